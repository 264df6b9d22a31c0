"""Strategy names to classes. A new backend is one branch here and one file beside it.

Backends are imported where they are chosen: an engine must not be loaded by a role that does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    Resident,
    ScoreRequest,
    ScoreStrategy,
    TrainItem,
    TrainStrategy,
)
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.errors import ConfigError
from roll_opd.trajectory import FloatArray


class ValueStrategy(Resident, Protocol):
    """Trains a critic across ranks. All ranks call every method together."""

    def values(self, requests: Sequence[ScoreRequest]) -> list[FloatArray]:
        """Return, for each of this rank's ``requests``, ``[T]`` float32: at a sampled token the value before it is
        sampled, elsewhere 0.
        """
        ...

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], value_clip: float | None) -> dict[str, float]:
        """One optimizer step over this rank's ``micro_batches``, whose trajectories carry values and returns."""
        ...

    def save(self, folder: str) -> None:
        """Write weights and optimizer state."""
        ...

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote."""
        ...

    def export_hf(self, folder: str) -> None:
        """Write the backbone in Hugging Face format and the head beside it."""
        ...


def build_infer_strategy(
    role: str,
    config: WorkerConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    generates: bool,
    max_length: int,
) -> ScoreStrategy:
    """Build the backend of a generating or scoring role; for a sharded one the process group must exist.

    What can generate is a :class:`~roll_opd.distributed.strategy.base.GenerateStrategy` as well.

    Args:
        role: named in messages.
        config: the role's settings.
        vocabulary: of the student's tokenizer.
        device: of this process.
        generates: whether the role must be able to sample.
        max_length: tokens of the longest sequence.
    """
    match _name(config):
        case "hf_infer":
            from roll_opd.distributed.strategy.hf import HFStrategy

            return HFStrategy(role, config, vocabulary, device, generates=generates)
        case "vllm":
            from roll_opd.distributed.strategy.vllm.strategy import VLLMStrategy

            return VLLMStrategy(role, config, vocabulary, device, generates=generates, max_length=max_length)
        case "remote":
            from roll_opd.distributed.strategy.remote import RemoteStrategy

            return RemoteStrategy(role, config, vocabulary, max_length=max_length)
        case "fsdp2_infer":
            from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy

            return FSDP2InferStrategy(role, config, vocabulary, device)
        case "megatron_infer":
            from roll_opd.distributed.strategy.megatron.strategy import MegatronInferStrategy

            return MegatronInferStrategy(role, config, vocabulary, device)
    raise _unknown(role, config, "hf_infer, fsdp2_infer, megatron_infer, vllm or remote")


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
    build: Callable[..., TrainStrategy]
    match _name(config):
        case "fsdp2_train":
            from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy

            build = FSDP2Strategy
        case "megatron_train":
            from roll_opd.distributed.strategy.megatron.strategy import MegatronTrainStrategy

            build = MegatronTrainStrategy
        case _:
            raise _unknown(role, config, "fsdp2_train or megatron_train")
    return build(role, config, vocabulary, device, max_grad_norm=max_grad_norm, total_updates=total_updates)


def build_value_strategy(
    role: str,
    config: WorkerConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    max_grad_norm: float,
    total_updates: int,
) -> ValueStrategy:
    """Build the backend of the critic; the process group must exist."""
    if _name(config) == "fsdp2_train":
        from roll_opd.distributed.strategy.fsdp2_value import FSDP2ValueStrategy

        return FSDP2ValueStrategy(
            role, config, vocabulary, device, max_grad_norm=max_grad_norm, total_updates=total_updates
        )
    raise _unknown(role, config, "fsdp2_train")


def _name(config: WorkerConfig) -> str:
    return config.strategy_args.strategy_name if config.strategy_args else ""


def _unknown(role: str, config: WorkerConfig, known: str) -> ConfigError:
    return ConfigError(f"{role}.strategy_args.strategy_name", f"{_name(config)!r} cannot run here; use {known}")
