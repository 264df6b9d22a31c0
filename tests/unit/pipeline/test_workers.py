"""What workers do by themselves: responses in lists, and details that a rank fetches. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError

from roll_opd.distributed.strategy.base import TrainItem
from roll_opd.pipeline.workers import TrainWorker, ready_together
from roll_opd.trajectory import DetailsRef, TeacherScores, TrajectoryId


async def bursts(*sizes: int) -> AsyncIterator[int]:
    """Numbers, as many at once as told."""
    for number, size in enumerate(sizes):
        for item in range(size):
            yield 10 * number + item
        await asyncio.sleep(0.01)


def test_what_is_ready_together_comes_together() -> None:
    async def run() -> list[list[int]]:
        return [batch async for batch in ready_together(bursts(3, 1, 2))]

    assert asyncio.run(run()) == [[0, 1, 2], [10], [20, 21]]


def test_a_slow_reader_gets_what_came_meanwhile() -> None:
    async def run() -> list[list[int]]:
        ended = asyncio.Event()

        async def stream() -> AsyncIterator[int]:
            async for item in bursts(1, 1, 1, 1):
                yield item
            ended.set()

        batches = []
        async for batch in ready_together(stream()):
            batches.append(batch)
            await ended.wait()
        return batches

    assert asyncio.run(run()) == [[0], [10, 20, 30]]


def test_nothing_is_lost_before_an_error() -> None:
    async def fails() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise RuntimeError("the engine died")

    async def run() -> None:
        batches = ready_together(fails())
        assert await anext(batches) == [1, 2]
        with pytest.raises(RuntimeError, match="engine died"):
            await anext(batches)

    asyncio.run(run())


def test_closing_ends_the_stream() -> None:
    ended = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def run() -> None:
        batches = ready_together(endless())
        assert await anext(batches) == [1]
        await batches.aclose()
        assert ended

    asyncio.run(run())


def test_a_rank_fetches_each_call_once_and_names_what_is_lost(monkeypatch: pytest.MonkeyPatch, fakes) -> None:
    store = {"call 1": ["a", "b", "c"], "call 2": ["d"]}
    got: list[str] = []

    def get(call: str) -> list[str]:
        got.append(call)
        if call not in store:
            raise ObjectLostError("0" * 56, None, "")
        return store[call]

    monkeypatch.setattr(ray, "get", get)
    worker = TrainWorker.__new__(TrainWorker)  # no process, no model
    keys = [(TrajectoryId(i, 0), "t") for i in range(5)]
    places = [("call 1", 2), ("lost", 0), ("call 2", 0), ("call 1", 0), ("lost", 1)]
    lost = worker.fetch_details({key: DetailsRef(*place) for key, place in zip(keys, places, strict=True)})
    assert lost == [keys[1], keys[4]] and sorted(got) == ["call 1", "call 2", "lost"]

    def details(draw: int) -> object:
        scores = {"t": TeacherScores(np.zeros(5, np.float32), DetailsRef("call 1", 0))}
        item = worker._with_details(TrainItem(fakes.trajectory(draw, teacher_scores=scores), 1.0))
        return item.trajectory.teacher_scores["t"].details

    assert [details(draw) for draw in range(4)] == ["c", None, "d", "a"]
    assert worker.fetch_details({}) == [] and details(0) is None
