"""Which process of which role runs where, and with how many threads.

::

    node         10.0.0.7 (no GPU, driver)   10.0.0.8 (2 GPUs)   10.0.0.9 (4 GPUs)
    devices      -                           0 1                 2 3 4 5
    processes    roles without a             those that map      those that map
                 device_mapping, rewards     0 or 1              2, 3, 4 or 5

Devices are counted over the GPUs of the cluster, node after node in the order of the nodes' IP addresses (as numbers;
Ray's node ids decide between nodes of one address), whatever Ray calls them and whichever node the driver is on. One
placement-group bundle holds all GPUs of each node that is mapped, so that nobody else gets them; roles that share
devices share the bundle, and take turns (:mod:`roll_opd.distributed.turns`). A role without a ``device_mapping`` runs
as CPU processes on the driver's node, whose cores they share.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.errors import ConfigError, LaunchError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where one worker process runs.

    Attributes:
        node: index of the node's bundle; None for a CPU process.
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
    threads of each phase never sum to more than the cores (unless there are more processes than cores). Processes on
    GPUs mostly wait for them: they are not counted, and share the cores among those of their role alone.

    Args:
        roles: role name -> config.
        phases: role name -> the phase it is busy in (``rollout``, ``critic`` or ``train``).
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

    def share(name: str, config: WorkerConfig) -> int:
        on_gpus = config.device_mapping is not None
        free, processes = (cores, config.world_size or 1) if on_gpus else (left[phases[name]], sharing[phases[name]])
        return max(1, free // processes)

    return {name: config.cpu_threads or share(name, config) for name, config in roles.items()}


BORROWERS = ("hf_infer",)
"""Backends that change their number of threads while they run."""


def lent_cores(
    roles: Mapping[str, WorkerConfig], phases: Mapping[str, str], threads: Mapping[str, int], cores: int
) -> tuple[int, list[str]]:
    """Say which roles of the rollout need no fixed share of the cores, and how many cores they have together.

    Args:
        roles: role name -> config.
        phases: as in :func:`cpu_threads`, which gave ``threads``.
        threads: role name -> threads per process.
        cores: cores of the machine.
    """
    busy = {n: c for n, c in roles.items() if phases[n] == "rollout" and c.device_mapping is None}
    borrow = [
        name
        for name, config in busy.items()
        if config.strategy_args is not None
        and config.strategy_args.strategy_name in BORROWERS
        and config.cpu_threads is None
    ]
    fixed = sum((config.world_size or 1) * threads[name] for name, config in busy.items() if name not in borrow)
    return max(1, cores - fixed), borrow


@dataclass(frozen=True)
class _Node:
    """A node with GPUs; its devices are ``first .. first + gpus - 1``."""

    id: str
    address: str
    first: int
    gpus: int


class Placement:
    """Reserves the GPUs that the roles ask for and says where each worker goes.

    Args:
        roles: role name -> config.
        yaml_names: role name -> what its user calls it, for messages.
        timeout: seconds to wait for GPUs that something else is using.

    Raises:
        ConfigError: a role asks for a device that the cluster does not have, or for a worker on two nodes.
        LaunchError: the GPUs exist, but are taken.
    """

    def __init__(self, roles: Mapping[str, WorkerConfig], yaml_names: Mapping[str, str], timeout: float = 60.0) -> None:
        self.group: PlacementGroup | None = None
        self._nodes: list[_Node] = []
        wanted = {yaml_names.get(n, n): config for n, config in roles.items() if config.device_mapping}
        if not wanted:
            return
        present = _gpu_nodes(ray.nodes())
        used = {
            node for name, config in wanted.items() for node in _nodes_of(config, f"{name}.device_mapping", present)
        }
        self._nodes = [node for node in present if node in used]
        self.group = placement_group(
            [{"GPU": node.gpus} for node in self._nodes],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{"ray.io/node-id": node.id} for node in self._nodes],
        )
        if not self.group.wait(timeout):
            self.release()
            where = ", ".join(f"{node.gpus} on {node.address}" for node in self._nodes)
            raise LaunchError(
                f"the GPUs of the nodes that the roles map ({where}) were not all free within {timeout:.0f} s; "
                f"something else on this Ray cluster holds some of them (`ray status` says how many)"
            )

    def slots(self, config: WorkerConfig, threads: int) -> list[Slot]:
        """Return one slot per worker of a role."""
        if not config.device_mapping:
            return [Slot(None, (), threads) for _ in range(config.world_size or 1)]
        slots = []
        for devices in _per_worker(config):
            index = next(i for i, n in enumerate(self._nodes) if n.first <= devices[0] < n.first + n.gpus)
            slots.append(Slot(index, tuple(d - self._nodes[index].first for d in devices), threads))
        return slots

    def strategy(self, slot: Slot) -> PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy:
        """How Ray is told to put a process into ``slot``."""
        if slot.node is None:
            return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        assert self.group is not None
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=slot.node)

    def release(self) -> None:
        """Give the GPUs back."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None


def _gpu_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[_Node]:
    """The living nodes with GPUs among Ray's ``nodes``, in order."""
    found: list[_Node] = []
    for node in sorted(nodes, key=lambda n: (int(ipaddress.ip_address(n["NodeManagerAddress"])), n["NodeID"])):
        gpus = int(node["Resources"].get("GPU", 0))
        if node["Alive"] and gpus:
            found.append(_Node(node["NodeID"], node["NodeManagerAddress"], sum(n.gpus for n in found), gpus))
    return found


def _per_worker(config: WorkerConfig) -> list[list[int]]:
    devices, size = config.device_mapping or [], config.num_gpus_per_worker
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _nodes_of(config: WorkerConfig, path: str, present: Sequence[_Node]) -> set[_Node]:
    """The nodes that the devices of a role lie on."""
    devices = config.device_mapping or []
    node_of = {node.first + gpu: node for node in present for gpu in range(node.gpus)}
    has = "; ".join(f"{format_devices(list(range(n.first, n.first + n.gpus)))} on {n.address}" for n in present)
    if max(devices) not in node_of:
        total = f"{len(node_of)} GPU(s), numbered from 0" + (f": {has}" if len(present) > 1 else "")
        fix = "map fewer devices, or leave device_mapping out to run on CPU processes"
        raise ConfigError(path, f"asks for device {max(devices)}, but the cluster has {total}; {fix}")
    for mine in _per_worker(config):
        if len({node_of[device] for device in mine}) > 1:
            problem = f"devices {format_devices(mine)} of one worker lie on several nodes; keep them on one"
            raise ConfigError(path, f"{problem} ({has})")
    return {node_of[device] for device in devices}
