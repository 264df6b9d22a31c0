"""From the trainer's weights to the generator's, versioned and verified.

The trainer yields buckets of tensors, which every generator loads. What a bucket holds depends on the way
(:mod:`~roll_opd.distributed.strategy.weight_transfer`)::

    host     rank 0 ── bytes ──► object store ──► generators                  the driver passes references
    handles  each rank that shares its device ── handles ──► driver ──► generators, each opens its device's
    group    rank 0 ── names and shapes ──► driver ──► generators, while rank 0 broadcasts the tensors themselves

Afterwards each generator reports checksums of what it *holds*, which must equal those that the trainer took before
sending. A generator does not serve between ``begin`` and ``finish``.

An engine that dies is replaced by its worker and gets the weights again before it serves, whether it died while it was
being updated (:meth:`WeightSync.sync`) or while it was sampling (:meth:`WeightSync.revive`). Only a group cannot go on
without one of its members: there, a death during an update ends the run.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from roll_opd.configs.transports import Transport, transports
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.strategy.weight_transfer import Way, WeightBucket, merged
from roll_opd.errors import EngineDiedError, GenerationError

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Engines of a role that may be replaced between two steps; more deaths are no accident."""


WAYS: dict[Transport, Way] = {"ipc": "handles", "nccl": "group", "host": "host"}


def way_of(train: WorkerConfig, infer: WorkerConfig, transport: Literal["auto"] | Transport = "auto") -> Way:
    """Say how weights travel between two roles: as ``transport`` says, or the fastest way that is open to them."""
    if transport != "auto":
        return WAYS[transport]
    return next(WAYS[name] for name, problem in transports(train, infer).items() if not problem)


def senders(train: WorkerConfig, way: Way, devices: Collection[int]) -> list[int]:
    """The trainer's ranks that send: with ``handles`` those on one of the receivers' ``devices``, else the first.

    A handle that nobody opens would keep the memory behind it from being freed.
    """
    if way != "handles" or not train.device_mapping:
        return [0]
    firsts = train.device_mapping[:: train.num_gpus_per_worker]
    return [rank for rank, device in enumerate(firsts) if device in devices]


class WeightSync:
    """Moves weights from ``source`` to ``targets``.

    Args:
        source: the training cluster.
        targets: the generating cluster.
        bucket_bytes: bytes per transfer.
        mix: share of the new weights in what the targets hold afterwards; below 1 they hold a moving average, whose
            checksums are nobody's but their own.
        way: how the tensors travel.
    """

    def __init__(
        self, source: Cluster, targets: Cluster, bucket_bytes: int, mix: float = 1.0, way: Way = "host"
    ) -> None:
        self.source = source
        self.targets = targets
        self.bucket_bytes = bucket_bytes
        self.mix = mix
        self.way: Way = way
        # Who is in the process group.
        self._group: list[Any] = []
        self.version: int | None = None
        self.restarts = 0
        self._dtype: str | None = None
        # Engines that die at the same time are brought back one after the other: the trainer sends to one at a time.
        self._lock = threading.Lock()

    def sync(self, version: int) -> None:
        """Give the generators the trainer's weights as ``version``.

        Raises:
            GenerationError: a generator holds something else than what was sent, or engines keep dying.
        """
        if self.version == version:
            return
        with self._lock:
            self.restarts = 0
            self._update_all(version, self.targets.workers)
            self.version = version

    def revive(self, worker: Any) -> None:
        """Replace the dead engine of ``worker`` and give it the weights that the others serve.

        Raises:
            GenerationError: engines keep dying.
        """
        assert self.version is not None, "an engine served before it had any weights"
        with self._lock:
            self._restart([worker])
            self._update_all(self.version, [worker])

    def _update_all(self, version: int, workers: Sequence[Any]) -> None:
        while workers := self._update(version, workers):
            self._restart(workers)

    def _restart(self, workers: Sequence[Any]) -> None:
        self.restarts += len(workers)
        if self.restarts > MAX_RESTARTS:
            raise GenerationError(
                f"{self.targets.role}: {self.restarts} engines died between two steps; their logs are in logging_dir"
            )
        logger.warning("%s: %d engine(s) died; starting again", self.targets.role, len(workers))
        self._group = []
        self.targets.wait([worker.restart.remote() for worker in workers], "restart")

    def _update(self, version: int, workers: Sequence[Any]) -> list[Any]:
        """Send the weights to ``workers``; return those whose engines died over it."""
        alive = _Alive(self.targets, workers)
        if self._dtype is None:
            # Rounding to the generator's precision is done once, before the checksum, on the sending side.
            self._dtype = self.targets.wait(workers[0].weight_dtype.remote(), "weight_dtype")
        if self.way == "group" and list(workers) != self._group:
            self._connect(workers)
        alive.call("begin_weight_update", version, self.mix)
        self._check_group(alive)
        sent = self._send(alive)
        held: dict[int, Mapping[str, int]] = alive.call("finish_weight_update", version)
        self._check_group(alive)
        if self.way == "handles":
            self.source.call_all("end_transfer")
        for rank, sums in held.items():
            # What is mixed has checksums of its own; that nothing was left out can still be told.
            expected = sent if self.mix == 1.0 else {name: sums.get(name, -1) for name in sent}
            _compare(expected, sums, f"{self.targets.role}-{self.targets.workers.index(workers[rank])}", version)
        return alive.dead

    def _connect(self, workers: Sequence[Any]) -> None:
        """Form a group of the trainer's rank 0 and all processes that receive."""
        self._group = []
        counts = self.targets.wait([worker.receivers.remote() for worker in workers], "receivers")
        size, seconds = 1 + sum(counts), 60.0 * self.targets.config.backend_timeout
        sender = self.source.workers[0]
        host, port = self.source.wait(sender.open_transfer.remote(size), "open_transfer")
        joined = [sender.join_transfer.remote(host, port, size, seconds)]
        for worker, first in zip(workers, itertools.accumulate(counts, initial=1), strict=False):
            joined.append(worker.join_transfer.remote(host, port, first, size, seconds))
        self.targets.wait(joined, "join_transfer")
        self._group = list(workers)

    def _send(self, alive: _Alive) -> dict[str, int]:
        """Have the trainer yield buckets and the generators load them; return the checksums of what was sent."""
        options: dict[str, Any] = {"num_returns": "streaming"}
        if self.way == "handles":
            # One bucket ahead and no more: what handles stand for must live until it has been copied.
            options["_generator_backpressure_num_objects"] = 1
        sending = senders(self.source.config, self.way, self._devices(alive.workers))
        # All ranks take part in gathering.
        streams = [
            worker.export_weights.options(**options).remote(
                self._dtype, self.bucket_bytes, self.way if rank in sending else None
            )
            for rank, worker in enumerate(self.source.workers)
        ]
        sent: dict[str, int] = {}
        for refs in zip(*(streams[rank] for rank in sending), strict=True):
            # Also when nobody is left to receive: the trainer's ranks must come to their end.
            sent |= next(iter(alive.call("load_weights", self._bucket(refs)).values()), {})
            self._check_group(alive)
        for rank, stream in enumerate(streams):
            if rank not in sending:
                for ref in stream:  # an error: it sends nothing
                    self.source.wait(ref, "export_weights")
        return sent

    def _devices(self, workers: Iterable[Any]) -> set[int]:
        mapping, each = self.targets.config.device_mapping or [], self.targets.config.num_gpus_per_worker
        places = [self.targets.workers.index(worker) for worker in workers]
        return {device for place in places for device in mapping[place * each : (place + 1) * each]}

    def _bucket(self, refs: Sequence[Any]) -> Any:
        """What to pass on: bytes are never fetched by the driver."""
        if self.way == "host":
            return refs[0]
        buckets: list[WeightBucket] = self.source.wait(list(refs), "export_weights")
        return merged(buckets)

    def _check_group(self, alive: _Alive) -> None:
        if self.way == "group" and alive.dead:
            raise GenerationError(
                f"{self.targets.role}: an engine died during a weight update over NCCL, which cannot go on without it; "
                f"its log is in logging_dir. Resume from the last checkpoint; with model_update_transport: host, "
                f"engines that die are replaced"
            )


class _Alive:
    """Some workers of a cluster, less those whose engines have died."""

    def __init__(self, cluster: Cluster, workers: Sequence[Any]) -> None:
        self._cluster = cluster
        self._workers = dict(enumerate(workers))
        self.dead: list[Any] = []

    @property
    def workers(self) -> list[Any]:
        """Those that are left."""
        return list(self._workers.values())

    def call(self, method: str, *args: Any) -> dict[int, Any]:
        """Call ``method`` on those that are left; return the answers of those that still are afterwards."""
        refs = {rank: getattr(worker, method).remote(*args) for rank, worker in self._workers.items()}
        answers = {}
        for rank, ref in refs.items():
            try:
                answers[rank] = self._cluster.wait(ref, method)
            except EngineDiedError as error:
                logger.warning("%s", error)
                self.dead.append(self._workers.pop(rank))
        return answers


def _compare(sent: Mapping[str, int], held: Mapping[str, int], worker: str, version: int) -> None:
    missing = sorted(set(held) - set(sent))
    if missing:
        raise GenerationError(f"weight update {version}: {worker} has parameters that were not sent: {missing[:3]}")
    wrong: list[Any] = [name for name, value in sent.items() if held.get(name) != value]
    if wrong:
        raise GenerationError(f"weight update {version}: {worker} holds other values than were sent in {wrong[:3]}")
