"""Whether what the roles hold fits where they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.launch_checks import model_holders, weight_followers
from roll_opd.configs.memory import DeviceGroup, Footprint, device_groups, footprint, head_bytes, show_size, turn_bytes
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding

_FIX = "use more devices, a smaller model, or a smaller dtype"


def memory(facts: Facts) -> Iterator[Finding]:
    """What the roles hold at the least fits: on a GPU each in its turn, in the machine's memory all together."""
    config, address = facts.config, facts.config.ray_args.address
    roles = model_holders(config, facts.loaded.yaml_names)
    heads = head_bytes(config)
    found: dict[str, Footprint] = {}
    for path, worker in roles.items():
        held = footprint(worker, heads if worker is config.actor_train else 0.0)
        yield Finding("ok", path, f"memory: {_told(held, worker)}")
        if held is not None:
            found[path] = held
    waiting: dict[str, float] = {}
    for group in device_groups(roles):
        known = {path: found[path] for path in group.roles if path in found}
        if not group.devices:
            yield from _together(known, roles, _memory_of("cpu", address))
            continue
        sizes = [_memory_of(str(device), address) for device in group.devices]
        if sizes[0] is not None:
            yield from _in_turns(facts, group, known, min(size for size in sizes if size is not None))
        if len(known) > 1:
            for path, held in known.items():
                waiting[path] = waiting.get(path, 0.0) + held.total * len(group.devices)
    room = _memory_of("cpu", address)
    if waiting and room is not None and sum(waiting.values()) - min(waiting.values()) > room:
        largest = max(waiting, key=lambda path: waiting[path])
        problem = f"while others are on the devices, {show_size(sum(waiting.values()) - min(waiting.values()))} wait in"
        problem += f" this machine's memory, which has {show_size(room)}"
        yield Finding(
            "warning", f"{facts.block_of(largest)}.device_mapping", f"{problem}; map some roles to devices of their own"
        )


def _together(
    known: Mapping[str, Footprint], roles: Mapping[str, WorkerConfig], room: float | None
) -> Iterator[Finding]:
    """Processes without devices: all of them are there all the time."""
    held = {path: size.total * (roles[path].world_size or 1) for path, size in known.items()}
    if room is None or not held:
        return
    largest = max(held, key=lambda path: held[path])
    where = f"this machine's memory, which has {show_size(room)}"
    if held[largest] > room:
        yield Finding("error", largest, f"holds at least {show_size(held[largest])} in {where}; {_FIX}")
    elif sum(held.values()) > room:
        problem = f"{', '.join(held)} hold at least {show_size(sum(held.values()))} together in {where}"
        yield Finding("warning", largest, f"{problem}; map some of them to GPUs, or use smaller models")


def _in_turns(facts: Facts, group: DeviceGroup, known: Mapping[str, Footprint], room: float) -> Iterator[Finding]:
    """Roles on the same devices: one after the other, and two for a weight update."""
    device = f"device {format_devices(list(group.devices))}"
    for turn, held in turn_bytes(known, facts.student, weight_followers(facts.loaded)).items():
        if held <= room:
            continue
        if turn in known:
            problem = f"holds at least {show_size(held)} in {device}, which has {show_size(room)}"
            yield Finding("error", turn, f"{problem}; {_FIX}")
        else:
            problem = f"{turn}: the weights of both take {show_size(held)} of {device}, which has {show_size(room)}"
            yield Finding("warning", f"{facts.student}.device_mapping", f"{problem}; {_FIX}")
    for path, size in known.items():
        if size.share is not None and size.weights > size.share * room:
            problem = f"{size.share:.0%} of {device} are {show_size(size.share * room)}, less than the weights"
            field = f"{facts.block_of(path)}.strategy_args.strategy_config.gpu_memory_utilization"
            yield Finding("error", field, f"{problem} ({show_size(size.weights)}); raise it, or use more devices")


def _told(held: Footprint | None, worker: WorkerConfig) -> str:
    if held is None:
        return "unknown, because config.json is not on this disk or has an unknown shape"
    if not held.total:
        return "none here"
    parts = {"weights": held.weights, "gradients and optimizer": held.training, "teachers' heads": held.heads}
    parts["cache"] = held.cache
    told = ", ".join(f"{what} {show_size(size)}" for what, size in parts.items() if size)
    told += f", with its cache {held.share:.0%} of the device" if held.share else ""
    told += " in host memory" if held.in_host_memory else ""
    return f"{told}, per {'process' if worker.device_mapping is None else 'device'}; activations come on top"


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


MEMORY_CHECKS: tuple[Check[Facts], ...] = (Check("settings", memory),)
