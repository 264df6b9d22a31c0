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

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ray.exceptions import RayTaskError

from roll_opd.distributed.cluster import Cluster
from roll_opd.errors import EngineDiedError, WorkerDiedError, WorkerError

logger = logging.getLogger(__name__)

AWAY, WEIGHTS, ALL = range(3)
"""What a role has on its devices; the more, the larger."""


class Turns:
    """Knows which roles are on their devices, and brings them there.

    Whatever moves a role raises :class:`~roll_opd.errors.WorkerError` where a worker has died, or could not be moved,
    for example because the host's memory is full.

    Args:
        clusters: the roles that hold models. Those without a ``device_mapping`` share nothing.
        spare: roles that do without workers that have died, as long as one is left.
    """

    def __init__(self, clusters: Mapping[str, Cluster], spare: Collection[str] = ()) -> None:
        self.clusters = dict(clusters)
        self._spare = frozenset(spare)
        devices = {name: set(cluster.config.device_mapping or ()) for name, cluster in clusters.items()}
        self._rivals = {
            name: {other for other, theirs in devices.items() if other != name and mine & theirs}
            for name, mine in devices.items()
        }
        # Of the roles that share.
        self._state = {name: ALL for name, rivals in self._rivals.items() if rivals}
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
        """Make ``name`` leave right after it has loaded, to give room to the next one that loads."""
        if name in self._state:
            self._move({name: AWAY})

    def take(self, *names: str, weights_only: bool = False) -> None:
        """Bring ``names`` to their devices, once all that share a device with one of them have left.

        Args:
            names: roles that do not share a device, unless ``weights_only``.
            weights_only: bring no more than a weight update needs, for roles that may share.
        """
        with self._lock:
            wanted = [name for name in names if name in self._state]
            assert weights_only or not self._clash(wanted), f"{wanted} share devices and cannot be there together"
            rivals = {rival for name in wanted for rival in self._rivals[name]}
            moves = {name: AWAY for name in self._state if name in rivals}
            moves |= dict.fromkeys(wanted, WEIGHTS if weights_only else ALL)
            # What must shrink does so before anything grows.
            self._move({name: state for name, state in moves.items() if state < self._state[name]})
            self._move({name: state for name, state in moves.items() if state > self._state[name]})

    @contextlib.contextmanager
    def guest(self, name: str) -> Iterator[None]:
        """Have the weights of ``name`` on its devices for the moment, beside whoever is there."""
        with self._lock:
            is_away = self._state.get(name) == AWAY
            if is_away:
                self._move({name: WEIGHTS})
            yield
            if is_away:
                self._move({name: AWAY})

    def _clash(self, names: Collection[str]) -> bool:
        return any(self.share(one, other) for one in names for other in names if one != other)

    def _move(self, moves: Mapping[str, int]) -> None:
        """Move roles side by side; a role that is there already is not told."""
        started = []
        for name, state in moves.items():
            before = self._state[name]
            if before == state:
                continue
            method = "offload" if state < before else "onload"
            weights = state == WEIGHTS
            logger.debug("%s: %s(%s)", name, method, weights)
            started.append((name, state, method, self.clusters[name].start_all(method, weights)))
        for name, state, method, refs in started:
            self._wait(name, method, refs)
            self._state[name] = state

    def _wait(self, name: str, method: str, refs: list[Any]) -> None:
        deaths = []
        for ref in refs:
            try:
                self.clusters[name].wait(ref, method)
            except EngineDiedError as error:
                # It holds nothing any more. Whoever asks it next has it replaced, or stops the run.
                logger.warning("%s: %s", name, error)
            except WorkerDiedError as error:
                deaths.append(error)
                if name not in self._spare or len(deaths) == len(refs):
                    raise
            except RayTaskError as error:
                what = "leave its devices" if method == "offload" else "come back to its devices"
                raise WorkerError(f"{name} could not {what}: {error.cause!r}") from error
