"""Turns of many episodes at one engine.

::

    episode ── ask() ──► waiting ──► call of all that wait ──► engine ──► result ──► the episode steps its environment
                            ▲                                                            │
                            └────────────────────────────────────────────────────────────┘

An engine that works on several calls at once gets each turn as it comes. One that takes call after call gets whatever
waits when it is free, sorted by id; while other episodes of its own are still in their environments it waits for them,
but at most half as long as its last call took: calls of a few turns would cost nearly as much as calls of many.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult
from roll_opd.errors import GenerationError
from roll_opd.pipeline.generation import Generation
from roll_opd.trajectory import TrajectoryId

SHORTEST_WAIT = 0.05
"""Seconds that a free engine waits for more turns at most, when its last call was very short."""
LONGEST_WAIT = 1.0
"""... and when it was very long."""


class TurnQueue:
    """The turns that one engine is asked for; to be run as a task beside the episodes.

    Args:
        generation: asks the engine.
        worker: of the engine.
        side_by_side: whether it works on several calls at once.

    Attributes:
        episodes: how many episodes get their turns here at the moment.
    """

    def __init__(self, generation: Generation, worker: Any, side_by_side: bool) -> None:
        self.generation = generation
        self.worker = worker
        self.side_by_side = side_by_side
        self.episodes = 0
        self._closed = False
        self._waiting: dict[TrajectoryId, GenerateRequest] = {}
        self._answers: dict[TrajectoryId, asyncio.Future[GenerateResult]] = {}
        self._came = asyncio.Event()

    async def ask(self, request: GenerateRequest) -> GenerateResult:
        """Wait for the answer to one turn; an id may be asked for again once it was answered.

        Raises:
            asyncio.CancelledError: nobody answers any more.
        """
        if self._closed:
            # Its rollout has ended, and whoever asks has lost the cancellation that told it so.
            raise asyncio.CancelledError
        assert request.id not in self._answers, f"turn {request.id} is asked for twice"
        answer = self._answers[request.id] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = request
        self._came.set()
        try:
            return await answer
        finally:
            del self._answers[request.id]
            self._waiting.pop(request.id, None)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """An episode gets its turns here as long as the block runs."""
        self.episodes += 1
        try:
            yield
        finally:
            self.episodes -= 1
            self._came.set()  # whoever waits for all episodes may have them all now

    def close(self) -> None:
        """End :meth:`run` once nothing waits.

        A cancellation alone might be lost: ``asyncio.wait_for`` of Python 3.11, which others' code may use, drops one
        that comes together with the answer which it waits for, as the end of a stream of results may.
        """
        self._closed = True
        self._came.set()

    async def run(self) -> None:
        """Hand turns to the engine until :meth:`close`; whoever still asks when this ends is cancelled.

        Raises:
            GenerationError: the engine is at fault.
        """
        try:
            async with asyncio.TaskGroup() as calls:
                await self._serve(calls)
        finally:
            self._closed = True
            for answer in self._answers.values():
                answer.cancel()

    async def _serve(self, calls: asyncio.TaskGroup) -> None:
        seconds = 0.0
        while True:
            await self._arrival()
            if self._closed:
                return
            if self.side_by_side:
                calls.create_task(self._call(self._take()))
                continue
            await self._gather(min(max(seconds / 2, SHORTEST_WAIT), LONGEST_WAIT))
            if requests := self._take():
                began = time.perf_counter()
                await self._call(requests)
                seconds = time.perf_counter() - began

    async def _arrival(self) -> None:
        while not self._waiting and not self._closed:
            self._came.clear()
            await self._came.wait()

    async def _gather(self, patience: float) -> None:
        """Wait until every episode's turn is here, or ``patience`` seconds are over."""
        deadline = time.perf_counter() + patience
        while len(self._waiting) < self.episodes and (left := deadline - time.perf_counter()) > 0:
            self._came.clear()
            try:
                async with asyncio.timeout(left):
                    await self._came.wait()
            except TimeoutError:
                return

    def _take(self) -> list[GenerateRequest]:
        requests, self._waiting = sorted(self._waiting.values(), key=lambda r: r.id), {}
        return requests

    async def _call(self, requests: list[GenerateRequest]) -> None:
        left = {request.id for request in requests}

        def finished(result: GenerateResult) -> None:
            if result.id not in left:
                raise GenerationError(f"an engine returned turn {result.id} twice, or without being asked")
            left.remove(result.id)
            answer = self._answers.get(result.id)
            # An episode that ends with its rollout does not wait for its turn any more.
            if answer is not None and not answer.done():
                answer.set_result(result)

        await self.generation.ask(self.worker, requests, finished)
        if left:
            raise GenerationError(f"{len(left)} of {len(requests)} turns never came, first {min(left)}")
