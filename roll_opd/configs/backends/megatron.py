"""Settings of `megatron_train` and `megatron_infer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_opd.configs.field_spec import ranged

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""``model_type`` of the models that are computed with Megatron-core as transformers computes them."""


@dataclass(frozen=True)
class MegatronSettings:
    """How Megatron-core spreads a model and its optimizer. Data-parallel size is what the other sizes leave."""

    tensor_model_parallel_size: int = ranged(1, ge=1)
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = ranged(1, ge=1)
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = ranged(None, ge=1)
    """Parts of each pipeline rank's layers that are interleaved; null: one."""
    context_parallel_size: int = ranged(1, ge=1)
    """Ranks that share a sequence's positions."""
    expert_model_parallel_size: int = ranged(1, ge=1)
    """Ranks that share the experts of a mixture-of-experts model."""
    sequence_parallel: bool = False
    """Split activations between the matrices over the tensor-parallel ranks too. False where there is only one."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer's state over the data-parallel ranks."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: of whole layers, of attention alone, or (null) none."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`, which layers: all of them in units (`uniform`), or the first of each pipeline rank (`block`). Null:
    `uniform`."""
    recompute_num_layers: int | None = ranged(None, ge=1)
    """With `full`: layers of a unit, or of a pipeline rank's first block. Null: 1."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """How tokens reach their experts."""
    moe_grouped_gemm: bool = False
    """One grouped matrix product for all experts of a rank; needs CUDA."""

    def __post_init__(self) -> None:
        """Fill in what follows from other settings, so that whoever reads one need not know the others."""
        if self.tensor_model_parallel_size == 1:
            object.__setattr__(self, "sequence_parallel", False)
        if self.virtual_pipeline_model_parallel_size == 1:
            object.__setattr__(self, "virtual_pipeline_model_parallel_size", None)
        if self.recompute_granularity == "full":
            object.__setattr__(self, "recompute_method", self.recompute_method or "uniform")
            object.__setattr__(self, "recompute_num_layers", self.recompute_num_layers or 1)
