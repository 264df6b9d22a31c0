"""The cores of the driver's node, lent to the processes that are busy.

::

    2 cores                     engine    teacher
    the student samples            2         -
    a block is to be scored        1         1
    the student has sampled        -         2

Threads of busy processes that together exceed the cores make each of them slower by much more than their share, so the
sum never does: whoever comes gets an equal part of what the others give back first, and where there is none left,
waits. Whoever goes leaves its part to the others. (A worker that is given up, past a deadline, may compute on for a
while with what it had.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

logger = logging.getLogger(__name__)


class Cores:
    """Tells workers how many threads to use.

    To be used in one event loop. Workers that borrow have a method ``use_threads``, which returns once the new number
    is in force. Others are not told anything, and are not counted.

    Args:
        total: cores to lend.
        workers: those that borrow, each with the threads that it was started with.
        patience: seconds that a worker may take to change its number.
    """

    def __init__(self, total: int = 0, workers: Mapping[Any, int] | None = None, patience: float = 90.0) -> None:
        self.total = total
        self.patience = patience
        self._threads = dict(workers or {})
        # In the order in which they came; a worker may be asked for several things at once.
        self._busy: Counter[Any] = Counter()
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def busy(self, workers: Collection[Any]) -> AsyncIterator[None]:
        """Lend cores to ``workers`` for the time of the block, which begins once there are some for each.

        Where ``workers`` alone are more than the cores, they do not wait for what cannot come: each has one thread.
        """
        mine = [worker for worker in workers if worker in self._threads]
        if not mine:
            yield
            return
        entered = False
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._busy or len({*self._busy, *mine}) <= self.total)
                entered = True
                self._busy.update(mine)
                await self._share()
            yield
        finally:
            if entered:
                async with self._changed:
                    self._busy -= Counter(mine)
                    self._changed.notify_all()
                    await self._share()

    async def _share(self) -> None:
        """Have each busy worker use its part; those that give something back do so first."""
        parts = shares(self.total, [worker for worker in self._busy if worker in self._threads])
        less = {worker: n for worker, n in parts.items() if n < self._threads[worker]}
        more = {worker: n for worker, n in parts.items() if n > self._threads[worker]}
        for changes in (less, more):
            await asyncio.gather(*(self._tell(worker, n) for worker, n in changes.items()))

    async def _tell(self, worker: Any, threads: int) -> None:
        self._threads[worker] = threads
        told = asyncio.ensure_future(_answer(worker.use_threads.remote(threads)))
        done, _ = await asyncio.wait([told], timeout=self.patience)
        if not done or not told.result():
            # Dead or stuck. Whoever asks it something deals with that, and has a deadline; here nobody waits again.
            logger.debug("a worker does not take over its number of threads")
            self._threads.pop(worker, None)


async def _answer(call: Any) -> bool:
    """Whether a call comes to its end."""
    try:
        await call
    except RayError:
        return False
    return True


def shares(total: int, workers: Sequence[Any]) -> dict[Any, int]:
    """Deal ``total`` cores out evenly, at least one to each; the first get what is left over."""
    each, over = divmod(total, len(workers)) if workers else (0, 0)
    return {worker: max(1, each + (index < over)) for index, worker in enumerate(workers)}
