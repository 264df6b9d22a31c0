"""Settings of `vllm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import ranged


@dataclass(frozen=True)
class VLLMSettings:
    """An asynchronous vLLM engine in each worker. Names and meanings are vLLM's own."""

    tensor_parallel_size: int = ranged(1, ge=1)
    """Devices that share each matrix of one engine."""
    pipeline_parallel_size: int = ranged(1, ge=1)
    """Devices that share the layers of one engine."""
    gpu_memory_utilization: float = ranged(0.9, gt=0, le=1)
    """Share of a GPU's memory that weights and key-value cache may take; without GPUs it has no effect."""
    cpu_kvcache_space_gb: int = ranged(1, ge=1)
    """Host memory for the key-value cache of an engine without GPUs, in GiB."""
    max_model_len: int | None = ranged(None, ge=1)
    """Longest sequence; null: the pipeline's `sequence_length`."""
    max_num_seqs: int | None = ranged(None, ge=1)
    """Sequences that are decoded at once; null: vLLM's default."""
    max_num_batched_tokens: int | None = ranged(None, ge=1)
    """Tokens of one engine step; null: vLLM's default, and 2048 for a model that only scores."""
    block_size: int | None = ranged(None, ge=1)
    """Tokens of a cache block; null: vLLM's default for the device."""
    enforce_eager: bool = False
    """Run without compilation and CUDA graphs: starts faster, decodes slower."""
    enable_prefix_caching: bool = True
    """Share the cache of equal prompts, as those of a group are."""
    enable_chunked_prefill: bool | None = None
    """Cut long prompts into parts that share steps with decoding; null: vLLM's default, off where a model generates
    without CUDA (vLLM cannot do both there)."""
    load_format: Literal["auto", "dummy"] = "auto"
    """Where the first weights come from; the first weight update replaces them in either case."""
    sleep_level: Literal[1, 2] = 1
    """What a sleeping engine keeps of its weights: 1 a copy in host memory, 2 nothing (the next update brings them)."""
    start_timeout: float = ranged(600.0, gt=0)
    """Seconds that an engine may take to start."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, handed on as they are and checked by the installed vLLM."""
