"""Whether the settings fit together and fit this machine: rewards, batches, devices, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from roll_opd.configs.checks import data_parallel_size, roles_of
from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.memory import FSDP2_BYTES, WEIGHT_BYTES, count_parameters, find_model_config, memory_per_device
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.errors import ConfigError
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding, failed
from roll_opd.rewards import resolve_reward


def reward_classes(facts: Facts) -> Iterator[Finding]:
    """Every reward's class can be imported."""
    for name, reward in facts.config.rewards.items():
        field = f"rewards.{name}.worker_cls"
        try:
            yield Finding("ok", field, f"class {resolve_reward(reward.worker_cls or '', field).__name__}")
        except ConfigError as error:
            yield failed(error)


def top_k_fits(facts: Facts) -> Iterator[Finding]:
    """A set of tokens is no larger than the vocabulary."""
    args = facts.config.opd_args
    if not facts.config.teachers or args.objective != "direct" or not args.support.endswith("topk"):
        return
    size = len(facts.tokenizer)
    if args.top_k > size:
        problem = f"{args.top_k} is more than the vocabulary of {size} tokens; lower it"
        yield failed(ConfigError("opd_args.top_k", problem))
    else:
        yield Finding("ok", "opd_args.top_k", f"{args.top_k} of {size} tokens")


def batch_arithmetic(facts: Facts) -> Iterator[Finding]:
    """What a step holds and what divides it; the config warns where something is left over."""
    config, path = facts.config, facts.student
    training = config.actor_train.training_args
    group, size = config.num_return_sequences_in_group, training.per_device_train_batch_size
    samples = config.rollout_batch_size * group
    ranks = data_parallel_size(config.actor_train, path)
    update = size * training.gradient_accumulation_steps * ranks
    told = f"{config.rollout_batch_size} prompts x {group} samples = {samples} trajectories a step"
    yield Finding("ok", "rollout_batch_size", told)
    whole, rest = divmod(samples, update)
    parts = f"{size} x {training.gradient_accumulation_steps} x {ranks} rank(s) = {update} trajectories"
    left = f" and one of {rest}" if rest else ""
    told = f"an optimizer step takes {parts}: {whole} of them a step{left}, {config.ppo_epochs} time(s) over"
    yield Finding("ok", f"{path}.training_args", told)
    if ranks > samples:
        problem = f"{ranks} ranks share {samples} trajectories, so {ranks - samples} compute nothing"
        yield Finding("warning", f"{path}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")
    infer, role = config.actor_infer, facts.loaded.yaml_names["actor_infer"]
    engines = infer.world_size or 1
    each = -(-config.rollout_batch_size // engines) * group
    batches = -(-each // infer.infer_batch_size)
    told = f"{engines} engine(s), {each} trajectories each at most: {batches} batch(es) of {infer.infer_batch_size}"
    yield Finding("ok", f"{role}.infer_batch_size", told)
    if engines > config.rollout_batch_size:
        idle = engines - config.rollout_batch_size
        problem = f"{engines} engines for {config.rollout_batch_size} prompts, whose groups stay together: {idle} idle"
        yield Finding("warning", f"{role}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")


def devices(facts: Facts) -> Iterator[Finding]:
    """The devices that the roles map exist; of a running cluster only the cluster knows."""
    mapped = {path: worker.device_mapping for path, worker in _roles(facts).items() if worker.device_mapping}
    if not mapped:
        yield Finding("ok", "device_mapping", "no role maps a device; all run as CPU processes")
        return
    if facts.config.ray_args.address is not None:
        yield Finding("skipped", "device_mapping", "devices: the cluster at ray_args.address is asked at launch")
        return
    present = torch.cuda.device_count()
    for path, numbers in mapped.items():
        if max(numbers) >= present:
            problem = f"asks for device {max(numbers)}, but this machine has {present} GPU(s), numbered from 0"
            fix = "map fewer devices, or leave device_mapping out to run on CPU processes"
            yield Finding("error", f"{path}.device_mapping", f"{problem}; {fix}")
        else:
            yield Finding("ok", f"{path}.device_mapping", f"{format_devices(numbers)} of {present} GPU(s)")


def memory(facts: Facts) -> Iterator[Finding]:
    """What the roles hold at the least fits where they are."""
    least: dict[str, dict[str, float]] = {}
    for path, worker in _roles(facts).items():
        yield Finding("ok", path, f"memory: {memory_per_device(worker, path)}")
        held = _least_bytes(worker)
        if held is None:
            continue
        count = 1 if worker.device_mapping else worker.world_size or 1
        for place in [str(number) for number in worker.device_mapping or []] or ["cpu"]:
            least.setdefault(place, {})[path] = held * count
    for place, by_role in sorted(least.items()):
        total = _memory_of(place, facts.config.ray_args.address)
        if total is None:
            continue
        where = "this machine's memory" if place == "cpu" else f"device {place}"
        largest = max(by_role, key=lambda path: by_role[path])
        if by_role[largest] > total:
            problem = f"holds at least {_gib(by_role[largest])} in {where}, which has {_gib(total)}"
            yield Finding("error", largest, f"{problem}; use more devices, a smaller model, or a smaller dtype")
        elif sum(by_role.values()) > total:
            together = f"{', '.join(by_role)} hold at least {_gib(sum(by_role.values()))} together"
            problem = f"{together} in {where}, which has {_gib(total)}"
            yield Finding("warning", largest, f"{problem}; map them to different devices, or use smaller models")


def _roles(facts: Facts) -> dict[str, WorkerConfig]:
    roles = roles_of(facts.config, facts.loaded.yaml_names)
    if not facts.config.needs_reference:
        roles.pop("reference", None)
    return roles


def _least_bytes(worker: WorkerConfig) -> float | None:
    """Bytes of one process that nothing can do without; None where the strategy's sharding is not ours to know."""
    model = find_model_config(worker.model_args.model_name_or_path)
    parameters = count_parameters(model) if model else None
    strategy = worker.strategy_args.strategy_name if worker.strategy_args else ""
    if parameters is None:
        return None
    if strategy == "fsdp2_train":
        return parameters * FSDP2_BYTES / (worker.world_size or 1)
    if strategy in ("hf_infer", "vllm"):
        return parameters * WEIGHT_BYTES[worker.model_args.dtype] / max(1, worker.num_gpus_per_worker)
    return None


def _memory_of(place: str, address: str | None) -> float | None:
    """Bytes of the machine's memory, or of its smallest GPU; None where they are not this machine's or not known."""
    if address is not None:
        return None
    if place == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # Not torch: reading a device's properties there starts CUDA in this process.
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a machine that cannot say is not held up by that
        return None
    sizes = [float(line) for line in answer.split() if line.strip().isdigit()]
    return min(sizes) * 2**20 if sizes else None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


SETTING_CHECKS: tuple[Check[Facts], ...] = (
    Check("settings", reward_classes, always=True),
    Check("settings", top_k_fits, always=True),
    Check("settings", batch_arithmetic),
    Check("settings", devices),
    Check("settings", memory),
)
