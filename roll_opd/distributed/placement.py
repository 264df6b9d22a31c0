"""Which process of which role runs where, and with how many threads.

GPUs are counted over the cluster in node order: with ``G`` GPUs a node, device ``d`` is GPU ``d % G`` of node
``d // G``. One placement-group bundle holds each node's GPUs; roles that share devices share the bundle (and, for now,
the memory). A role without a ``device_mapping`` runs as CPU processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.errors import ConfigError, LaunchError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where one worker process runs.

    Attributes:
        node: index of the node's bundle; None for a CPU process that Ray may put anywhere.
        gpu_ids: GPU numbers on that node.
        threads: threads for tensor work.
    """

    node: int | None
    gpu_ids: tuple[int, ...]
    threads: int


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_threads(roles: Mapping[str, WorkerConfig], phases: Mapping[str, str], cores: int) -> dict[str, int]:
    """Share the cores among the processes that are busy at the same time.

    Two busy processes whose OpenMP threads spin on the same cores are ten times slower than either alone, so the
    threads of each phase never sum to more than the cores (unless there are more processes than cores).

    Args:
        roles: role name -> config.
        phases: role name -> the phase it is busy in (``rollout`` or ``train``).
        cores: cores of the machine.

    Returns:
        Role name -> threads per process.
    """
    sharing: dict[str, int] = {}
    left = dict.fromkeys(phases.values(), cores)
    for name, config in roles.items():
        if config.device_mapping is not None:
            continue
        size = config.world_size or 1
        if config.cpu_threads:
            left[phases[name]] -= size * config.cpu_threads
        else:
            sharing[phases[name]] = sharing.get(phases[name], 0) + size
    return {
        name: config.cpu_threads or max(1, left[phases[name]] // max(1, sharing.get(phases[name], 1)))
        for name, config in roles.items()
    }


class Placement:
    """Reserves the GPUs that the roles ask for and says where each worker goes.

    Raises:
        ConfigError: a role asks for a device that the cluster does not have.
        LaunchError: the GPUs exist, but are taken.
    """

    def __init__(self, roles: Mapping[str, WorkerConfig], yaml_names: Mapping[str, str], timeout: float = 60.0) -> None:
        self.group: PlacementGroup | None = None
        self.gpus_per_node = 0
        wanted = {name: config.device_mapping for name, config in roles.items() if config.device_mapping}
        if not wanted:
            return
        nodes = sorted(int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"])
        nodes = [gpus for gpus in nodes if gpus]
        self.gpus_per_node = nodes[0] if nodes else 0
        total = len(nodes) * self.gpus_per_node
        for name, devices in wanted.items():
            if max(devices) >= total:
                raise ConfigError(
                    f"{yaml_names.get(name, name)}.device_mapping",
                    f"asks for device {max(devices)}, but the cluster has {total} GPU(s), numbered from 0. Map fewer "
                    f"devices, or leave device_mapping out to run on CPU processes",
                )
        last = max(max(devices) for devices in wanted.values()) // self.gpus_per_node
        self.group = placement_group([{"GPU": self.gpus_per_node, "CPU": 1}] * (last + 1), strategy="STRICT_SPREAD"
                                     if last else "PACK")  # fmt: skip
        if not self.group.wait(timeout):
            remove_placement_group(self.group)
            raise LaunchError(
                f"the {(last + 1) * self.gpus_per_node} GPUs that the roles map were not free within {timeout:.0f} s"
            )

    def slots(self, config: WorkerConfig, threads: int) -> list[Slot]:
        """Return one slot per worker of a role."""
        devices = config.device_mapping
        if not devices:
            return [Slot(None, (), threads) for _ in range(config.world_size or 1)]
        slots = []
        per_worker = max(1, config.num_gpus_per_worker)
        for start in range(0, len(devices), per_worker):
            mine = devices[start : start + per_worker]
            nodes = {d // self.gpus_per_node for d in mine}
            if len(nodes) > 1:
                raise ConfigError(
                    f"{config.name}.device_mapping",
                    f"devices {mine} of one worker lie on several nodes; keep them on one ({self.gpus_per_node} each)",
                )
            slots.append(Slot(nodes.pop(), tuple(d % self.gpus_per_node for d in mine), threads))
        return slots

    def release(self) -> None:
        """Give the GPUs back."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
