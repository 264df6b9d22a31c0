"""Roles that share devices take turns on them.

::

    role     devices        start     sync weights    rollout             scoring     training
    ------   -------        -----     ------------    -------             -------     --------
    trainer  0 1            leaves    weights only    -                   -           all
    student  0 1            leaves    weights only    all                 -           -
    maths    0 1            leaves    -               -                   all         -
    code     2 3            stays     stays           stays, and scores   stays       stays

A role that shares no device is never told to leave or to come. Roles that do are told by :meth:`Turns.take`, which is
called at the start of each phase with those that the phase needs at the same time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from roll_opd.distributed.cluster import Cluster

logger = logging.getLogger(__name__)


class Turns:
    """Knows which roles are on their devices, and brings them there.

    Args:
        clusters: the roles that hold models. Those without a ``device_mapping`` share nothing.
    """

    def __init__(self, clusters: Mapping[str, Cluster]) -> None:
        self.clusters = dict(clusters)
        devices = {name: set(cluster.config.device_mapping or ()) for name, cluster in clusters.items()}
        self._rivals = {
            name: {other for other, theirs in devices.items() if other != name and mine & theirs}
            for name, mine in devices.items()
        }
        # Of the roles that share: away, weights or all.
        self._state = {name: "all" for name, rivals in self._rivals.items() if rivals}
        self._lock = threading.Lock()

    @property
    def sharing(self) -> list[str]:
        """Roles that share a device with another."""
        return list(self._state)

    def share(self, one: str, other: str) -> bool:
        """Whether two roles have a device in common."""
        return other in self._rivals.get(one, ())

    def waves(self, first: Iterable[str], names: Iterable[str]) -> list[list[str]]:
        """Sort ``names`` into groups that can be on their devices together, each name as early as it can.

        Args:
            first: roles that are already to be there with the first group.
            names: the roles to sort; their order decides who comes first.

        Returns:
            Groups; the first one (which may be empty) goes with ``first``.
        """
        groups: list[list[str]] = [[]]
        busy = [list(first)]
        for name in names:
            place = next((i for i, there in enumerate(busy) if not any(self.share(name, o) for o in there)), None)
            if place is None:
                place = len(groups)
                groups.append([])
                busy.append([])
            groups[place].append(name)
            busy[place].append(name)
        return groups

    def left(self, name: str) -> None:
        """Note that ``name`` is told to leave right after it has loaded, to give room to the next one that loads."""
        if name in self._state:
            self._set(name, "away")

    def take(self, *names: str, weights_only: bool = False) -> None:
        """Bring ``names`` to their devices, once all that share a device with one of them have left.

        Args:
            names: roles that do not share a device, unless ``weights_only``.
            weights_only: bring no more than a weight update needs, for roles that may share.
        """
        with self._lock:
            wanted = [name for name in names if name in self._state]
            assert weights_only or not self._clash(wanted), f"{wanted} share devices and cannot be there together"
            for other in {rival for name in wanted for rival in self._rivals[name]} - set(wanted):
                self._set(other, "away")
            # What must shrink does so before anything grows.
            for name in sorted(wanted, key=lambda name: self._state[name] != "all"):
                self._set(name, "weights" if weights_only else "all")

    def _clash(self, names: Collection[str]) -> bool:
        return any(self.share(one, other) for one in names for other in names if one != other)

    def _set(self, name: str, state: str) -> None:
        before = self._state[name]
        if before == state:
            return
        method, *args = _STEPS[before, state]
        logger.debug("%s: %s (%s -> %s)", name, method, before, state)
        self.clusters[name].call_all(method, *args)
        self._state[name] = state


_STEPS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("all", "away"): ("offload", False),
    ("weights", "away"): ("offload", False),
    ("all", "weights"): ("offload", True),
    ("away", "weights"): ("onload", True),
    ("away", "all"): ("onload", False),
    ("weights", "all"): ("onload", False),
}
