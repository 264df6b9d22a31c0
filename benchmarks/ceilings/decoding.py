"""Sampling responses: the product's decoding loop, and what libraries do with the same model in the same process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.ceilings import tiny
from benchmarks.ceilings.measure import Row, row
from benchmarks.ceilings.rates import machine
from benchmarks.roofline import Machine, Shape, decode, forward
from roll_opd.distributed.strategy.base import GenerateRequest, Sampling
from roll_opd.distributed.strategy.decoding import DecodingLoop
from roll_opd.distributed.strategy.packed_model import PackedModel, load_model
from roll_opd.trajectory import TrajectoryId

NEW = 64
"""Tokens of a response; all have as many."""
REPEATS = 5
BATCHES = (1, 32, 256)


def measure() -> Iterable[Row]:
    """Milliseconds of one decoding step (prefill shared out), beside the roofline of decode and prefill."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name:
        folder = Path(name)
        shape = tiny.save_model(folder, "student")
        for dtype in (torch.float32, torch.bfloat16):
            args = tiny.worker_config(folder, dtype).model_args
            model = load_model(
                args, role="student", vocab_size=tiny.VOCAB, device=torch.device("cpu"), decodes=True
            ).requires_grad_(False)
            rates = machine(dtype)
            for batch in BATCHES:
                ceiling = 1e3 * seconds_at(rates, shape, batch, NEW, dtype) / NEW
                for what, run in _ways(model, shape, dtype, batch):
                    yield _row(f"{what}, {tiny.NAMES[dtype]}, batch {batch}", run, batch, ceiling)


def seconds_at(rates: Machine, shape: Shape, batch: int, new: int, dtype: torch.dtype) -> float:
    """Seconds in which a machine of these rates would read ``batch`` prompts and write ``new`` tokens to each."""
    parts = decode(shape, batch, tiny.PROMPT, new, tiny.SIZES[dtype])
    parts += forward(shape, batch * tiny.PROMPT, batch * tiny.PROMPT**2 / 2, tiny.SIZES[dtype])
    return sum(part.seconds(rates) for part in parts)


def _row(case: str, run: Callable[[], int], batch: int, ceiling: float) -> Row:
    steps = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        tokens = run()
        steps.append(1e3 * (time.perf_counter() - began) / NEW)
        assert tokens == batch * NEW, f"{case}: {tokens} tokens of {batch * NEW}"
    median = sorted(steps[1:])[REPEATS // 2]
    return row("decode step", case, "ms", steps[1:], ceiling, note=f"{1e3 * batch / median:,.0f} tokens/s")


def _ways(model: PackedModel, shape: Shape, dtype: torch.dtype, batch: int) -> Iterable[tuple[str, Callable[[], int]]]:
    """Each way to sample ``batch`` responses, as a call that returns how many tokens it made."""
    prompts = [tuple(r.tokens[: tiny.PROMPT].tolist()) for r in tiny.score_requests([1] * batch)]
    loop = DecodingLoop(model, (), lambda ids: "")
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    requests = [GenerateRequest(TrajectoryId(i, 0), prompt, i, sampling) for i, prompt in enumerate(prompts)]
    yield "DecodingLoop", lambda: sum(len(result.response_ids) for result in loop.run(requests, 0))
    if batch == 1 or (batch == 256 and dtype is torch.float32):
        return  # what is of interest takes long enough
    ids = torch.tensor(prompts)
    lm: Any = model.lm
    before = lm.config._attn_implementation
    for cache in (None, "static"):
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=1,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip

        def generate(config: GenerationConfig = config) -> int:
            with torch.inference_mode():
                mask = torch.ones_like(ids)
                return int(lm.generate(ids, attention_mask=mask, generation_config=config)[:, tiny.PROMPT :].numel())

        lm.set_attn_implementation("sdpa")
        try:
            yield f"transformers generate, {cache or 'dynamic'} cache", generate
        finally:
            lm.set_attn_implementation(before)
