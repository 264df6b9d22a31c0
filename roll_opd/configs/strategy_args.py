"""Which backend runs a role, and how sequences are packed into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import ranged

StrategyName = Literal[
    "hf_infer", "fsdp2_train", "fsdp2_infer", "megatron_train", "megatron_infer", "vllm", "sglang", "remote"
]


@dataclass(frozen=True)
class StrategyArguments:
    """A backend and its own settings."""

    strategy_name: StrategyName = "fsdp2_train"
    """`*_train` train; `vllm`, `sglang`, `hf_infer` generate; `hf_infer`, `*_infer`, `vllm`, `remote` score."""
    strategy_config: dict[str, Any] = field(default_factory=dict)
    """The backend's own settings, such as `tensor_parallel_size` for vLLM."""


@dataclass(frozen=True)
class SequencePackingArguments:
    """Limits of packed rows."""

    algorithm: Literal["none", "load_balance"] = "none"
    """`load_balance` spreads sequences over micro-batches so that their token counts are even."""
    max_packed_sequence_length_forward: int | None = ranged(None, ge=1)
    """Tokens in a packed row of a forward pass at most; null: the pipeline's `sequence_length`."""
    max_packed_sequence_length_train: int | None = ranged(None, ge=1)
    """Tokens in a packed row of a training pass at most; null: the pipeline's `sequence_length`."""
    min_num_micro_batches_forward: int = ranged(1, ge=1)
    """At least this many micro-batches per forward pass."""
    min_num_micro_batches_train: int = ranged(1, ge=1)
    """At least this many micro-batches per optimizer step."""
