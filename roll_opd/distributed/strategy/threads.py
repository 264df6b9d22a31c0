"""How many threads a process computes with, when somebody else decides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

PATIENCE = 60.0
"""Seconds after which a number is taken to be in force although the work that it is for has not come to a pause."""


class LentThreads:
    """The number of threads that tensor work may use, changed between two pieces of it.

    torch keeps the number for each thread that computes, so it must be set by that one.

    Args:
        count: at the start.
    """

    def __init__(self, count: int) -> None:
        self._start = self._count = self._in_force = count
        self._working = False
        self._changed = threading.Condition()

    def use(self, count: int) -> None:
        """Change the number; return once it is in force, which is at once where nothing is being computed."""
        with self._changed:
            self._count = count
            self._changed.wait_for(lambda: not self._working or self._in_force == count, PATIENCE)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Compute within this block, in one thread, and call :meth:`pause` now and then."""
        self._set(working=True)
        try:
            yield
        finally:
            self._set(working=False)

    def rest(self) -> None:
        """Have the calling thread use as many as there were at the start, for what nobody has lent cores to."""
        torch.set_num_threads(self._start)

    def pause(self) -> None:
        """Take over a new number."""
        if self._in_force != self._count:
            self._set(working=True)

    def _set(self, working: bool) -> None:
        with self._changed:
            if working:
                torch.set_num_threads(self._count)
                self._in_force = self._count
            self._working = working
            self._changed.notify_all()
