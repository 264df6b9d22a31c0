"""Models with random weights in the shapes of the comparison with TRL, and the product's objects around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.opd_step.models import PAIRS, make_model
from benchmarks.roofline import Shape
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.trajectory import TrajectoryId

VOCAB = PAIRS["language-8k"].vocab_size
SIZES = {torch.float32: 4, torch.bfloat16: 2}
NAMES: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PROMPT = 32


def save_model(folder: Path, role: str, vocab: int = VOCAB) -> Shape:
    """Write ``student`` or ``teacher`` with random weights; return its shape."""
    torch.manual_seed(0)
    model = make_model(getattr(PAIRS["language-8k"], role), vocab)
    model.save_pretrained(folder)
    return Shape.of(model.config.to_dict())


def worker_config(folder: Path, dtype: torch.dtype, **settings: Any) -> WorkerConfig:
    """A role that runs the model in ``folder``."""
    args = ModelArguments(str(folder), NAMES[dtype], disable_gradient_checkpointing=True)
    return WorkerConfig(model_args=args, **settings)


def vocabulary(size: int = VOCAB) -> Vocabulary:
    """A tokenizer's facts, without one."""
    return Vocabulary(size, (1,), lambda ids: " ".join(map(str, ids)))


def score_requests(lengths: list[int]) -> list[ScoreRequest]:
    """Random sequences: ``PROMPT`` tokens, and a response of each of ``lengths``."""
    rng = np.random.default_rng(0)
    out = []
    for number, length in enumerate(lengths):
        mask = np.arange(PROMPT + length) >= PROMPT
        tokens = rng.integers(2, VOCAB, PROMPT + length).astype(np.int32)
        out.append(ScoreRequest(TrajectoryId(number, 0), tokens, mask))
    return out


def ragged(count: int, mean: int, longest: int) -> list[int]:
    """Lengths with a long tail: exponentially distributed, up to ``longest``."""
    quantiles = (np.arange(count) + 0.5) / count
    return [int(np.clip(-mean * np.log(1 - q), 4, longest)) for q in quantiles]
