"""Rough memory per device for the plan, from a model's `config.json`; opens no weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.worker_config import WorkerConfig

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one parameter by the model's dtype: all that a scorer or a generator holds of it."""
OPTIMIZER_BYTES = 12
"""Bytes per parameter in training: fp32 master weight and two Adam moments, beside weight and gradient in the dtype."""
FSDP2_BYTES = 16
"""Bytes per parameter in training: FSDP2 holds weight, gradient and both moments in fp32 whatever it computes in."""


def find_model_config(name_or_path: str | None) -> dict[str, Any] | None:
    """Contents of the model's `config.json`, from its folder or from the Hugging Face cache; None when not on disk."""
    if not name_or_path:
        return None
    candidates = [Path(name_or_path).expanduser() / "config.json"]
    if name_or_path.count("/") == 1:
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        hub = Path(os.environ.get("HF_HUB_CACHE", str(home / "hub"))).expanduser()
        candidates += sorted((hub / f"models--{name_or_path.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    for candidate in candidates:
        try:
            loaded = json.loads(candidate.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # A plan never fails over a model: what cannot be read is unknown, and an error at launch.
            continue
        if isinstance(loaded, dict):
            return loaded
    return None


def count_parameters(model: dict[str, Any]) -> int | None:
    """Parameters of a decoder with (grouped) attention and a gated MLP or experts; None for other shapes."""
    model = model.get("text_config", model)
    try:
        hidden, layers, vocab = (int(model[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        heads, intermediate = int(model["num_attention_heads"]), int(model["intermediate_size"])
    except (KeyError, TypeError, ValueError):
        return None
    head_dim = int(model.get("head_dim") or hidden // heads)
    kv_heads = int(model.get("num_key_value_heads") or heads)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    experts = int(model.get("num_experts") or model.get("num_local_experts") or model.get("n_routed_experts") or 0)
    if experts:
        mlp = experts * 3 * hidden * int(model.get("moe_intermediate_size") or intermediate) + experts * hidden
    else:
        mlp = 3 * hidden * intermediate
    embeddings = vocab * hidden * (1 if model.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + mlp + 2 * hidden) + hidden


def memory_per_device(worker: WorkerConfig, path: str) -> str:
    """One phrase: the estimate in GiB with what it covers, or ``unknown``."""
    model = find_model_config(worker.model_args.model_name_or_path)
    parameters = count_parameters(model) if model else None
    strategy = worker.strategy_args
    if parameters is None or strategy is None:
        return "unknown"
    per_weight = WEIGHT_BYTES[worker.model_args.dtype]
    name, processes = strategy.strategy_name, worker.world_size or 1
    if name == "remote":
        return "none here"
    if name == "fsdp2_train":
        total, shards = parameters * FSDP2_BYTES, processes
    elif name == "megatron_train":
        shards = _model_shards(worker, path)
        replicas = max(1, processes // shards)
        # The distributed optimizer spreads its state, not weights and gradients, over the data-parallel ranks.
        state = OPTIMIZER_BYTES / (replicas if backend_settings(strategy).use_distributed_optimizer else 1)
        total = int(parameters * (2 * per_weight + state))
    else:
        total, shards = parameters * per_weight, processes if name == "fsdp2_infer" else _model_shards(worker, path)
    covered = "weights, gradients, optimizer" if name.endswith("_train") else "weights"
    unit = "device" if worker.device_mapping is not None else "process"
    return f"{_size(total / shards)} per {unit} ({covered}; activations and caches come on top)"


def _model_shards(worker: WorkerConfig, path: str) -> int:
    strategy = worker.strategy_args
    assert strategy is not None
    if not strategy.strategy_name.startswith("megatron"):
        return worker.num_gpus_per_worker
    settings = backend_settings(strategy)
    return int(settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
