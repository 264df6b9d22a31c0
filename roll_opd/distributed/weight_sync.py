"""From the trainer's weights to the generator's, versioned and verified.

The trainer's rank 0 streams buckets of tensors into the object store; every generator loads each bucket from there;
the driver only passes references. Afterwards each generator reports checksums of what it *holds*, which must equal
those that the trainer took before sending. A generator does not serve between ``begin`` and ``finish``.

An engine that dies is replaced by its worker and gets the weights again before it serves, whether it died while it was
being updated (:meth:`WeightSync.sync`) or while it was sampling (:meth:`WeightSync.revive`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from roll_opd.distributed.cluster import Cluster
from roll_opd.errors import EngineDiedError, GenerationError

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Engines of a role that may be replaced between two steps; more deaths are no accident."""


class WeightSync:
    """Moves weights from ``source`` to ``targets``.

    Args:
        source: the training cluster.
        targets: the generating cluster.
        bucket_bytes: bytes per transfer.
        mix: share of the new weights in what the targets hold afterwards; below 1 they hold a moving average, whose
            checksums are nobody's but their own.
    """

    def __init__(self, source: Cluster, targets: Cluster, bucket_bytes: int, mix: float = 1.0) -> None:
        self.source = source
        self.targets = targets
        self.bucket_bytes = bucket_bytes
        self.mix = mix
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
        self.targets.wait([worker.restart.remote() for worker in workers], "restart")

    def _update(self, version: int, workers: Sequence[Any]) -> list[Any]:
        """Send the weights to ``workers``; return those whose engines died over it."""
        alive = _Alive(self.targets, workers)
        if self._dtype is None:
            # Rounding to the generator's precision is done once, before the checksum, on the sending side.
            self._dtype = self.targets.wait(workers[0].weight_dtype.remote(), "weight_dtype")
        alive.call("begin_weight_update", version, self.mix)
        # All ranks take part in gathering; rank 0 yields the buckets.
        streams = [
            worker.export_weights.options(num_returns="streaming").remote(self._dtype, self.bucket_bytes)
            for worker in self.source.workers
        ]
        sent: dict[str, int] = {}
        for stream in streams:
            for ref in stream:
                # Also when nobody is left to receive: the trainer's ranks must come to their end.
                sent |= next(iter(alive.call("load_weights", ref).values()), {})
        held: dict[int, Mapping[str, int]] = alive.call("finish_weight_update", version)
        for rank, sums in held.items():
            # What is mixed has checksums of its own; that nothing was left out can still be told.
            expected = sent if self.mix == 1.0 else {name: sums.get(name, -1) for name in sent}
            _compare(expected, sums, f"{self.targets.role}-{self.targets.workers.index(workers[rank])}", version)
        return alive.dead


class _Alive:
    """Some workers of a cluster, less those whose engines have died."""

    def __init__(self, cluster: Cluster, workers: Sequence[Any]) -> None:
        self._cluster = cluster
        self._workers = dict(enumerate(workers))
        self.dead: list[Any] = []

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
