"""From the trainer's weights to the generator's, versioned and verified.

The trainer's rank 0 streams buckets of tensors into the object store; every generator loads each bucket from there;
the driver only passes references. Afterwards each generator reports checksums of what it *holds*, which must equal
those that the trainer took before sending. A generator does not serve between ``begin`` and ``finish``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from roll_opd.distributed.cluster import Cluster
from roll_opd.errors import GenerationError

logger = logging.getLogger(__name__)


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
        self._dtype: str | None = None

    def sync(self, version: int) -> None:
        """Give the generators the trainer's weights as ``version``.

        Raises:
            GenerationError: a generator holds something else than what was sent.
        """
        if self.version == version:
            return
        if self._dtype is None:
            # Rounding to the generator's precision is done once, before the checksum, on the sending side.
            self._dtype = self.targets.call_all("weight_dtype")[0]
        self.targets.call_all("begin_weight_update", version, self.mix)
        # All ranks take part in gathering; rank 0 yields the buckets.
        streams = [
            worker.export_weights.options(num_returns="streaming").remote(self._dtype, self.bucket_bytes)
            for worker in self.source.workers
        ]
        sent: dict[str, int] = {}
        for stream in streams:
            for ref in stream:
                sent |= self.targets.call_all("load_weights", ref)[0]
        held: list[Mapping[str, int]] = self.targets.call_all("finish_weight_update", version)
        for rank, sums in enumerate(held):
            # What is mixed has checksums of its own; that nothing was left out can still be told.
            expected = sent if self.mix == 1.0 else {name: sums.get(name, -1) for name in sent}
            _compare(expected, sums, f"{self.targets.role}-{rank}", version)
        self.version = version


def _compare(sent: Mapping[str, int], held: Mapping[str, int], worker: str, version: int) -> None:
    missing = sorted(set(held) - set(sent))
    if missing:
        raise GenerationError(f"weight update {version}: {worker} has parameters that were not sent: {missing[:3]}")
    wrong: list[Any] = [name for name, value in sent.items() if held.get(name) != value]
    if wrong:
        raise GenerationError(f"weight update {version}: {worker} holds other values than were sent in {wrong[:3]}")
