"""Rough memory of each role and each device, from the models' `config.json`; opens no weights.

Activations come on top everywhere, and so do key-value caches, except the one for which an engine reserves memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.fsdp2 import FSDP2Settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.backends.remote import RemoteSettings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import WorkerConfig

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one parameter by the model's dtype."""
MASTER_BYTES = 4
"""Bytes of one number of the optimizer, of the weight that it changes and of that weight's gradient: always fp32."""
STATE_NUMBERS = {"adamw": 2, "sgd": 0}
"""Numbers that an optimizer keeps for each parameter: Adam's two moments."""


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


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a decoder.

    Attributes:
        total: all of them.
        experts: those in experts, which expert parallelism spreads.
        head: those of the output projection, tied or not.
        linear: by name of a linear layer, the sum of its input and output widths over all layers: what one rank of a
            LoRA adapter has parameters.
    """

    total: int
    experts: int
    head: int
    linear: Mapping[str, int]


def model_size(model: dict[str, Any]) -> ModelSize | None:
    """Count a decoder with (grouped) attention and a gated MLP or experts; None for other shapes."""
    model = model.get("text_config", model)
    try:
        hidden, layers, vocab = (int(model[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        heads, intermediate = int(model["num_attention_heads"]), int(model["intermediate_size"])
    except (KeyError, TypeError, ValueError):
        return None
    head_dim = int(model.get("head_dim") or hidden // heads)
    kv_heads = int(model.get("num_key_value_heads") or heads)
    wide, narrow = head_dim * heads, head_dim * kv_heads
    widths = {"q_proj": hidden + wide, "k_proj": hidden + narrow, "v_proj": hidden + narrow, "o_proj": hidden + wide}
    count = int(model.get("num_experts") or model.get("num_local_experts") or model.get("n_routed_experts") or 0)
    experts = router = mlp = 0
    if count:
        experts, router = count * 3 * hidden * int(model.get("moe_intermediate_size") or intermediate), count * hidden
    else:
        mlp = 3 * hidden * intermediate
        widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + intermediate)
    layer = 2 * hidden * (wide + narrow) + mlp + router + experts + 2 * hidden
    embeddings = vocab * hidden * (1 if model.get("tie_word_embeddings") else 2)
    linear = {name: layers * width for name, width in widths.items()}
    return ModelSize(embeddings + layers * layer + hidden, layers * experts, vocab * hidden, linear)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a role on each of its devices; of a role without devices, in each of its processes.

    Attributes:
        weights: what computes.
        training: gradients, the optimizer's state and, where the weights are of another dtype, its own copy of them.
        heads: teachers' output projections, which a trainer holds for divergences over the whole vocabulary.
        cache: key-value cache of an engine without devices.
        share: share of the device that an engine reserves, weights included.
        in_host_memory: of a role on devices: they hold but the layer that computes.
    """

    weights: float
    training: float = 0.0
    heads: float = 0.0
    cache: float = 0.0
    share: float | None = None
    in_host_memory: bool = False

    @property
    def total(self) -> float:
        """All of it; of an engine on a device, without what it reserves beside its weights."""
        return self.weights + self.training + self.heads + self.cache


def footprint(worker: WorkerConfig, head_bytes: float = 0.0) -> Footprint | None:
    """Estimate what a role holds.

    Args:
        worker: resolved.
        head_bytes: of the teachers' heads that it holds.

    Returns:
        None where the model's `config.json` is not on this disk, or its shape is not known, or nothing runs it.
    """
    assert worker.strategy_args is not None
    if worker.strategy_args.strategy_name not in SETTINGS:
        return None
    settings = backend_settings(worker.strategy_args)
    if isinstance(settings, RemoteSettings):
        return Footprint(0.0)
    model = find_model_config(worker.model_args.model_name_or_path)
    size = model_size(model) if model else None
    if size is None:
        return None
    per_weight, trains = WEIGHT_BYTES[worker.model_args.dtype], worker.strategy_args.strategy_name.endswith("_train")
    state = MASTER_BYTES * STATE_NUMBERS[worker.training_args.optimizer]
    if isinstance(settings, MegatronSettings):
        return _megatron(worker, settings, size, per_weight, state if trains else None, head_bytes)
    if isinstance(settings, FSDP2Settings):
        ranks = worker.world_size or 1
        if not trains:
            return Footprint(size.total * per_weight / ranks, in_host_memory=settings.offload_policy)
        # Masters, frozen ones too, are fp32 whatever is computed in.
        trained = _trained(size, worker.model_args)
        weights = MASTER_BYTES * (size.total + (trained if trained < size.total else 0))
        training = (MASTER_BYTES + state) * trained
        return Footprint(weights / ranks, training / ranks, head_bytes, in_host_memory=settings.offload_policy)
    weights = size.total * per_weight
    if isinstance(settings, VLLMSettings):
        if worker.device_mapping is None:
            return Footprint(weights, cache=settings.cpu_kvcache_space_gb * 2**30)
        return Footprint(weights / worker.num_gpus_per_worker, share=settings.gpu_memory_utilization)
    return Footprint(weights)


def _megatron(
    worker: WorkerConfig,
    settings: MegatronSettings,
    size: ModelSize,
    per_weight: int,
    state: int | None,
    head_bytes: float,
) -> Footprint:
    """``state``: bytes of the optimizer for each parameter; None for a role that only scores."""
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    experts = settings.expert_model_parallel_size
    # Experts that have ranks of their own are not cut by the others.
    own = (size.total - size.experts) / tensor / pipeline + size.experts / (
        experts if experts > 1 else tensor
    ) / pipeline
    weights = own * per_weight
    if state is None:
        return Footprint(weights)
    masters = MASTER_BYTES if per_weight < MASTER_BYTES else 0
    if settings.use_distributed_optimizer and state:
        # It spreads the optimizer's numbers over the data-parallel ranks, not weights and gradients.
        masters_and_state = (masters + state) / max(1, (worker.world_size or 1) // (tensor * pipeline))
    else:
        masters_and_state = masters + state
    return Footprint(weights, own * (MASTER_BYTES + masters_and_state), head_bytes / tensor)


def _trained(size: ModelSize, args: ModelArguments) -> int:
    """Parameters that get gradients: all of them, or those of the adapters."""
    if args.lora_target is None:
        return size.total
    names = [name.strip() for name in args.lora_target.split(",")]
    chosen = size.linear if "all-linear" in names else {n: w for n, w in size.linear.items() if n in names}
    return args.lora_rank * sum(chosen.values())


def head_bytes(config: PipelineConfig) -> float:
    """Bytes of the teachers' output projections that the student's trainer holds; 0 where it needs none."""
    args = config.opd_args
    if args.objective != "direct" or args.support != "full":
        return 0.0
    held = 0.0
    for teacher in config.teachers.values():
        model = find_model_config(teacher.model_args.model_name_or_path)
        size = model_size(model) if model else None
        held += size.head * WEIGHT_BYTES[teacher.model_args.dtype] if size else 0.0
    return held


@dataclass(frozen=True)
class DeviceGroup:
    """Devices that the same roles map.

    Attributes:
        devices: their numbers; empty for the processes without devices.
        roles: paths in the YAML. On devices they take turns, if there are several; else they are all there at once.
    """

    devices: tuple[int, ...]
    roles: tuple[str, ...]


def device_groups(roles: Mapping[str, WorkerConfig]) -> list[DeviceGroup]:
    """Sort devices by who maps them, in the order of the devices; processes without devices come last.

    Args:
        roles: by path. Those that run elsewhere are left out.
    """
    here = {path: worker for path, worker in roles.items() if not _is_remote(worker)}
    on_device: dict[int, list[str]] = {}
    for path, worker in here.items():
        for device in dict.fromkeys(worker.device_mapping or []):
            on_device.setdefault(device, []).append(path)
    devices_of: dict[tuple[str, ...], list[int]] = {}
    for device in sorted(on_device):
        devices_of.setdefault(tuple(on_device[device]), []).append(device)
    groups = [DeviceGroup(tuple(devices), paths) for paths, devices in devices_of.items()]
    without = tuple(path for path, worker in here.items() if worker.device_mapping is None)
    return groups + ([DeviceGroup((), without)] if without else [])


def turn_bytes(sharing: Mapping[str, Footprint], trainer: str, followers: Collection[str]) -> dict[str, float]:
    """Bytes of a device in each turn of the roles that share it: a role alone, or the two of a weight update.

    Args:
        sharing: path -> what the role holds there. An engine takes more than this, see ``Footprint.share``.
        trainer: path of the student's trainer.
        followers: paths of the roles that get its weights.
    """
    held = {path: 0.0 if size.in_host_memory else size.total for path, size in sharing.items()}
    if trainer in sharing:
        sent = 0.0 if sharing[trainer].in_host_memory else sharing[trainer].weights
        for path in followers:
            if path in sharing:
                held[f"weight update of {path}"] = sent + sharing[path].weights
    return held


def _is_remote(worker: WorkerConfig) -> bool:
    return worker.strategy_args is not None and worker.strategy_args.strategy_name == "remote"


def show_size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
