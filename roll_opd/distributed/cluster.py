"""The processes of one role as one object."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.layout import Layout, layout_of
from roll_opd.distributed.placement import Placement
from roll_opd.distributed.process_spec import ProcessSpec, thread_environment
from roll_opd.distributed.runtime import get

logger = logging.getLogger(__name__)

SHARDED_SCORERS = ("fsdp2_infer", "megatron_infer")
"""Scoring backends whose ranks hold one model together; the ranks of the others hold one each."""


@dataclass(frozen=True)
class Replica:
    """Workers that hold one copy of a model together and answer as one: they get every call in the same order."""

    workers: tuple[Any, ...]
    layout: Layout

    @classmethod
    def alone(cls, worker: Any) -> Replica:
        """One worker with a whole copy."""
        return cls((worker,), Layout.data_parallel(1))


class Cluster:
    """Starts one actor per worker of a role.

    Args:
        role: canonical role name.
        config: the role's settings.
        worker_cls: takes a :class:`ProcessSpec`.
        placement: says where the workers go.
        threads: threads per process.
        log_dir: folder of the processes' log files.
        seed: of torch's global generator in each process.
        system_envs: environment variables of every process of the run.
        timeout: seconds that a call may take.
    """

    def __init__(
        self,
        role: str,
        config: WorkerConfig,
        worker_cls: type,
        *,
        placement: Placement,
        threads: int,
        log_dir: str,
        seed: int,
        system_envs: dict[str, Any],
        timeout: float = 3600.0,
    ) -> None:
        self.role = role
        self.config = config
        self.timeout = timeout
        self.workers: list[Any] = []
        # A role without a model, a reward, has as many shares as processes.
        self.layout = layout_of(config) if config.strategy_args else Layout.data_parallel(config.world_size or 1)
        slots = placement.slots(config, threads)
        environment = {
            # Otherwise some versions of Ray hide the GPUs from actors that reserve none; we assign devices ourselves.
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            **thread_environment(threads),
            **{k: str(v) for k, v in {**system_envs, **config.system_envs}.items()},
        }
        for rank, slot in enumerate(slots):
            options: dict[str, Any] = {
                # CPU processes are many and mostly idle; threads, not Ray's CPU slots, are what we share out.
                "num_cpus": 0,
                "runtime_env": {"env_vars": environment},
                "max_restarts": 0,
                "scheduling_strategy": placement.strategy(slot),
            }
            spec = ProcessSpec(role, rank, len(slots), slot.gpu_ids, slot.threads, log_dir, seed)
            self.workers.append(ray.remote(worker_cls).options(**options).remote(spec))

    def __len__(self) -> int:
        return len(self.workers)

    def start_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``method`` with the same arguments on every worker; return the references at once."""
        return [getattr(worker, method).remote(*args, **kwargs) for worker in self.workers]

    def call_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``method`` with the same arguments on every worker and wait for all."""
        return self.wait(self.start_all(method, *args, **kwargs), method)

    def call_each(self, method: str, per_worker: list[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on every worker with its own arguments and wait for all."""
        refs = [getattr(w, method).remote(*args) for w, args in zip(self.workers, per_worker, strict=True)]
        return self.wait(refs, method)

    def call_shares(self, method: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on every worker with the arguments of its data-parallel rank; return one answer for each."""
        answers = self.call_each(method, [shares[dp] for dp in self.layout.dp_ranks])
        return [answers[rank] for rank in self.layout.answers]

    @property
    def is_sharded(self) -> bool:
        """Whether the workers of this scoring role hold one model together."""
        return self.config.strategy_args is not None and self.config.strategy_args.strategy_name in SHARDED_SCORERS

    @property
    def replicas(self) -> list[Replica]:
        """The copies of the model that a scoring role has."""
        if self.is_sharded:
            return [Replica(tuple(self.workers), self.layout)]
        return [Replica.alone(worker) for worker in self.workers]

    def wait(self, refs: Any, method: str) -> Any:
        """Wait for answers to ``method``, no longer than the run's ``rpc_timeout``."""
        return get(refs, self.timeout, f"{self.role}.{method}")

    def connect_ranks(self) -> None:
        """Form the process group of the role's ranks."""
        host, port = self.wait(self.workers[0].open_rendezvous.remote(), "open_rendezvous")
        self.call_all("join", host, port, self.config.backend_timeout)

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)
        self.workers = []
