"""Settings of `megatron_train` and `megatron_infer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


def size_problems(model: Mapping[str, Any], settings: MegatronSettings) -> Iterator[tuple[str, str]]:
    """Say which sizes do not divide a model.

    Args:
        model: contents of the `config.json` of a model of one of :data:`FAMILIES`.
        settings: how it is to be spread.

    Yields:
        Name of a setting, and what is wrong with it.
    """
    tensor, experts = settings.tensor_model_parallel_size, settings.expert_model_parallel_size
    pipeline, parts = settings.pipeline_model_parallel_size, settings.virtual_pipeline_model_parallel_size or 1
    # What a file leaves out has transformers' default; it is not judged here.
    heads, layers = model.get("num_attention_heads", tensor), model.get("num_hidden_layers", pipeline * parts)
    groups, count = (
        model.get("num_key_value_heads") or heads,
        model.get("num_experts") or model.get("num_local_experts") or 0,
    )
    rows = model.get("moe_intermediate_size" if count else "intermediate_size", tensor)
    if count and experts > 1:
        # Experts that have ranks of their own are not cut by the others.
        rows = tensor
    if heads % tensor:
        yield "tensor_model_parallel_size", f"{tensor} does not divide the model's {heads} attention heads"
    elif groups % tensor and tensor % groups:
        problem = f"{tensor} neither divides the model's {groups} key-value heads nor is a multiple of them"
        yield "tensor_model_parallel_size", problem
    elif rows % tensor:
        yield "tensor_model_parallel_size", f"{tensor} does not divide the {rows} rows of an MLP's matrix"
    if layers % pipeline:
        yield "pipeline_model_parallel_size", f"{pipeline} does not divide the model's {layers} layers"
    elif layers % (pipeline * parts):
        problem = f"{parts} does not divide the {layers // pipeline} layers of a pipeline rank"
        yield "virtual_pipeline_model_parallel_size", problem
    if not count and experts > 1:
        yield "expert_model_parallel_size", f"is {experts}, and the model has no experts; remove it"
    if not count:
        return
    if count % experts:
        yield "expert_model_parallel_size", f"{experts} does not divide the model's {count} experts"
    if tensor > 1 and not settings.sequence_parallel:
        problem = "must be true for a mixture of experts with tensor_model_parallel_size above 1"
        yield "sequence_parallel", f"{problem}: else each tensor-parallel rank would route every token"
    if settings.moe_token_dispatcher_type != "alltoall":
        problem = f"{settings.moe_token_dispatcher_type!r} needs rows of one length, or a CUDA library"
        yield "moe_token_dispatcher_type", f"{problem}; use alltoall"
