"""Which model a role runs, and how it is held in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import ranged


@dataclass(frozen=True)
class ModelArguments:
    """Model, precision, attention kernel and adapters of one role."""

    model_name_or_path: str | None = None
    """Folder of a Hugging Face checkpoint, or a hub name. Left out: the student's roles and the reference take
    `pretrain`; a teacher must name its own, because scoring with the student's weights would silently give a zero
    signal, unless `teacher_args.self_teacher` says that it is the student."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the weights in the forward pass. bf16 is what current checkpoints are trained in; fp32 on CPU."""
    attn_implementation: Literal["auto", "sdpa", "eager", "fa2", "fa3", "flex"] | None = None
    """Attention kernel; null and `auto` choose the fastest one that the machine supports."""
    disable_gradient_checkpointing: bool = False
    """Keep every activation instead of recomputing it in the backward pass: faster, more memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off, because a model path is data, not code."""
    model_config_kwargs: dict[str, Any] = field(default_factory=dict)
    """Entries that replace those of the checkpoint's `config.json`."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer, when it does not lie beside the model."""
    chat_template: str | None = None
    """Jinja text or path of a chat template that replaces the tokenizer's own."""
    ulysses_size: int = ranged(1, ge=1)
    """Ulysses sequence-parallel size of the FSDP2 strategies; it divides the number of devices."""
    moe_aux_loss_coef: float | None = ranged(None, ge=0)
    """Weight of the load-balancing loss of a mixture-of-experts student; null keeps the checkpoint's value."""
    freeze_module_prefix: str | None = None
    """Comma-separated prefixes of modules that are not trained."""
    adapter_name_or_path: str | None = None
    """Folder of a LoRA adapter to start from."""
    lora_target: str | None = None
    """Comma-separated names of the modules that get a LoRA adapter, or `all-linear`; null trains all weights."""
    lora_rank: int = ranged(8, ge=1)
    """Rank of the LoRA matrices."""
    lora_alpha: int | None = ranged(None, ge=1)
    """LoRA scale numerator; null means twice the rank."""
    lora_dropout: float = ranged(0.0, ge=0, lt=1)
    """Dropout in front of the LoRA matrices, 0 to below 1; 0 keeps trainer and sampler equal."""
    additional_target: str | None = None
    """Comma-separated modules that are trained in full beside the LoRA adapter."""
