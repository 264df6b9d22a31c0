"""Strategy names to classes. A new backend is one branch here and one file beside it.

Backends are imported where they are chosen: an engine must not be loaded by a role that does not use it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import GenerateStrategy, ScoreStrategy, TrainStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.errors import ConfigError


class InferStrategy(GenerateStrategy, ScoreStrategy, Protocol):
    """What ``actor_infer`` and the teachers are served by."""


def build_infer_strategy(
    role: str, config: WorkerConfig, vocabulary: Vocabulary, device: torch.device, *, generates: bool
) -> InferStrategy:
    """Build the backend of a generating or scoring role."""
    if _name(config) == "hf_infer":
        from roll_opd.distributed.strategy.hf import HFStrategy

        return HFStrategy(role, config, vocabulary, device, generates=generates)
    raise _unknown(role, config, "hf_infer")


def build_train_strategy(
    role: str,
    config: WorkerConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    max_grad_norm: float,
    total_updates: int,
) -> TrainStrategy:
    """Build the backend of a trained role; the process group must exist."""
    if _name(config) == "fsdp2_train":
        from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy

        return FSDP2Strategy(role, config, vocabulary, device, max_grad_norm=max_grad_norm, total_updates=total_updates)
    raise _unknown(role, config, "fsdp2_train")


def _name(config: WorkerConfig) -> str:
    return config.strategy_args.strategy_name if config.strategy_args else ""


def _unknown(role: str, config: WorkerConfig, known: str) -> ConfigError:
    return ConfigError(f"{role}.strategy_args.strategy_name", f"{_name(config)!r} cannot run here; use {known}")
