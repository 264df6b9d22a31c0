"""Whole engines beside each other: the product's two that sample, and the continuous batching of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.ceilings import tiny
from benchmarks.ceilings.decoding import seconds_at
from benchmarks.ceilings.measure import Row, row
from benchmarks.ceilings.rates import machine
from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateStrategy, Sampling
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.trajectory import TrajectoryId

SEQUENCES, NEW = 32, 128
LONGEST = tiny.PROMPT + NEW
REPEATS = 5
CPU = torch.device("cpu")


def measure() -> Iterable[Row]:
    """Tokens per second of a batch of 32 responses of 128 tokens; an engine's start is not counted."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name:
        folder = Path(name)
        shape = tiny.save_model(folder, "student")
        for dtype in (torch.float32, torch.bfloat16):
            ceiling = SEQUENCES * NEW / seconds_at(machine(dtype), shape, SEQUENCES, NEW, dtype)
            for what, engine in (("hf_infer", _hf), ("vllm, eager", _vllm), ("generate_batch", _continuous)):
                if engine is _continuous and dtype is torch.bfloat16:
                    continue  # what is of interest takes minutes
                with engine(folder, dtype) as run:
                    if run is not None:
                        yield _row(f"{what}, {tiny.NAMES[dtype]}", run, ceiling)


def _row(case: str, run: Callable[[], int], ceiling: float) -> Row:
    rates = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - began))
        assert tokens == SEQUENCES * NEW, f"{case}: {tokens} tokens"
    return row("engine", f"{case}, {SEQUENCES} x {NEW}", "tokens/s", rates[1:], ceiling, rate=True)


def _prompts() -> list[list[int]]:
    return [r.tokens[: tiny.PROMPT].tolist() for r in tiny.score_requests([1] * SEQUENCES)]


def _through(strategy: GenerateStrategy) -> Callable[[], int]:
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    requests = [GenerateRequest(TrajectoryId(i, 0), tuple(p), i, sampling) for i, p in enumerate(_prompts())]

    async def run() -> int:
        return sum([len(result.response_ids) async for result in strategy.generate(requests)])

    return lambda: asyncio.run(run())


@contextlib.contextmanager
def _hf(folder: Path, dtype: torch.dtype) -> Iterator[Callable[[], int]]:
    config = tiny.worker_config(folder, dtype, infer_batch_size=SEQUENCES)
    yield _through(HFStrategy("student_infer", config, tiny.vocabulary(), CPU, generates=True))


@contextlib.contextmanager
def _vllm(folder: Path, dtype: torch.dtype) -> Iterator[Callable[[], int] | None]:
    if find_spec("vllm") is None:
        yield None
        return
    from roll_opd.distributed.strategy.vllm.strategy import VLLMStrategy

    config = tiny.worker_config(
        folder, dtype, infer_batch_size=SEQUENCES, strategy_args=StrategyArguments("vllm", {"enforce_eager": True})
    )
    strategy = VLLMStrategy("student_infer", config, tiny.vocabulary(), CPU, generates=True, max_length=LONGEST)
    try:
        yield _through(strategy)
    finally:
        strategy.close()


@contextlib.contextmanager
def _continuous(folder: Path, dtype: torch.dtype) -> Iterator[Callable[[], int]]:
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    # Its end-of-sequence id is one that no model has.
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)

    def run() -> int:
        answers = lm.generate_batch(_prompts(), generation_config=config)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    yield run
