"""The teacher's scoring and the student's training step, through the product's own backends, in this process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks.ceilings import tiny
from benchmarks.ceilings.measure import Row, row, seconds
from benchmarks.ceilings.rates import machine
from benchmarks.roofline import Shape, adamw, backward, causal_pairs, divergence_head, forward, scoring_head
from roll_opd.algorithms.chunked_head import CHUNK_TOKENS
from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant, TrainItem
from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.trajectory import TeacherScores, Trajectory

LENGTHS = {"16 of 128": [128] * 16, "16 ragged, up to 384": tiny.ragged(16, 128, 384)}
"""Response tokens of the sequences of a batch."""
TEACHER = "teacher"


def scoring() -> Iterable[Row]:
    """Milliseconds of scoring a batch with the 29M teacher: packed rows, beside a padded forward of transformers."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name:
        folder = Path(name)
        shape = tiny.save_model(folder, TEACHER)
        for dtype in (torch.float32, torch.bfloat16):
            strategy = _scorer(folder, dtype)
            lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            rates = machine(dtype)
            for what, lengths in LENGTHS.items():
                requests = tiny.score_requests(lengths)
                parts = [*_layers(shape, lengths, dtype), scoring_head(shape, sum(lengths), CHUNK_TOKENS, 4)]
                ceiling = 1e3 * sum(part.seconds(rates) for part in parts)
                case = f"{tiny.NAMES[dtype]}, {what}"
                ours = seconds(lambda s=strategy, r=requests: s.score(r))  # type: ignore[misc]
                yield row("scoring", f"packed, {case}", "ms", [1e3 * s for s in ours], ceiling)
                padded = seconds(lambda lm=lm, r=requests: _padded(lm, r))  # type: ignore[misc]
                yield row("scoring", f"padded transformers, {case}", "ms", [1e3 * s for s in padded], ceiling)


def training() -> Iterable[Row]:
    """Milliseconds of a training step of the 5M student on the exact reverse KL, teacher's logits included."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name, _one_rank():
        student, teacher = Path(name) / "student", Path(name) / "teacher"
        shapes = tiny.save_model(student, "student"), tiny.save_model(teacher, TEACHER)
        scorer = _scorer(teacher, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            training = TrainingArguments(learning_rate=1e-4)
            config = tiny.worker_config(student, dtype, training_args=training)
            trainer = FSDP2Strategy(
                "student", config, tiny.vocabulary(), torch.device("cpu"), max_grad_norm=1.0, total_updates=1000
            )
            trainer.set_teacher_head(TEACHER, scorer.head())
            rates = machine(dtype)
            for what, lengths in LENGTHS.items():
                items = _items(lengths, scorer)
                size = tiny.SIZES[dtype]
                count = sum(lengths) + tiny.PROMPT * len(lengths)
                parts = [
                    *_layers(shapes[0], lengths, dtype),
                    *backward(shapes[0], count, _pairs(lengths), size),
                    *divergence_head(*shapes, sum(lengths), CHUNK_TOKENS, size),
                    adamw(shapes[0].parameters),
                ]
                ceiling = 1e3 * sum(part.seconds(rates) for part in parts)
                flops = sum(part.times * part.flops for part in parts)
                step = lambda t=trainer, i=items: t.train_step([i], LOSS)  # type: ignore[misc]  # noqa: E731
                values = [1e3 * s for s in seconds(step)]
                used = flops / (1e-3 * float(np.median(values)) * rates.flops)
                note = f"{used:.0%} of the matmul rate"
                yield row("training step", f"{tiny.NAMES[dtype]}, {what}", "ms", values, ceiling, note=note)


LOSS = Loss(divergence=DivergenceLoss("reverse_kl", "full"))


def _scorer(folder: Path, dtype: torch.dtype) -> HFStrategy:
    config = tiny.worker_config(folder, dtype, infer_batch_size=32)
    return HFStrategy("teacher", config, tiny.vocabulary(), torch.device("cpu"), generates=False)


def _pairs(lengths: list[int]) -> int:
    return sum(causal_pairs(tiny.PROMPT + n) for n in lengths)


def _layers(shape: Shape, lengths: list[int], dtype: torch.dtype) -> list:
    count = sum(lengths) + tiny.PROMPT * len(lengths)
    return forward(shape, count, _pairs(lengths), tiny.SIZES[dtype])


@torch.inference_mode()
def _padded(lm: torch.nn.Module, requests: list[ScoreRequest]) -> torch.Tensor:
    """Log-probabilities of all tokens from one padded batch, logits whole."""
    width = max(len(r.tokens) for r in requests)
    tokens = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, request in enumerate(requests):
        tokens[i, : len(request.tokens)] = torch.from_numpy(request.tokens)
        mask[i, : len(request.tokens)] = 1
    logits = lm(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, tiny.PROMPT - 1 : -1]
    targets = tokens[:, tiny.PROMPT :, None]
    # The entropy comes with it, as it does in ours.
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(-1, targets).squeeze(-1) - (logprobs.exp() * logprobs).sum(-1)


def _items(lengths: list[int], scorer: HFStrategy) -> list[TrainItem]:
    """Trajectories as the pipeline would hand them to the trainer, the teacher's hidden states with them."""
    requests = tiny.score_requests(lengths)
    weight = 1.0 / sum(lengths)
    items = []
    for request, result in zip(requests, scorer.score(requests, ScoreWant(hidden=True)), strict=True):
        zeros = np.zeros(len(request.tokens), dtype=np.float32)
        trajectory = Trajectory(
            id=request.id,
            tag="",
            tokens=request.tokens,
            response_mask=request.response_mask,
            infer_logprobs=zeros - 9.0,
            weight_version=np.zeros(len(request.tokens), dtype=np.int32),
            old_logprobs=zeros - 9.0,
            advantages=zeros,
            teacher_scores={TEACHER: TeacherScores(result.logprobs, result.details)},
            divergence_weights={TEACHER: zeros + 1.0},
        )
        items.append(TrainItem(trajectory, weight))
    return items


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """A process group of this process alone, which FSDP2 asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
