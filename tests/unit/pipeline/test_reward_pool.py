"""Rewards: routed by tag, counted when they fail, and never able to stop the run."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from roll_opd.configs.worker_config import RewardConfig
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.rewards.base import RewardItem, RewardResult


class Grader:
    def __init__(self, fakes, answer=None) -> None:
        self.calls: list[list[str]] = []
        self.answer = answer
        self.grade = fakes.Method(self._grade)

    def _grade(self, items):
        self.calls.append([i.id for i in items])
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is not None:
            return self.answer(items)
        return [RewardResult(i.id, float(len(i.response)), True) for i in items]


def items(*tags: str) -> list[RewardItem]:
    return [RewardItem(id=str(n), response="x" * n, ground_truth=None, tag=tag) for n, tag in enumerate(tags)]


def grade(pool: RewardPool, batch):
    return asyncio.run(pool.grade(batch))


def test_the_first_reward_that_covers_the_tag_grades(fakes) -> None:
    math, rest = Grader(fakes), Grader(fakes)
    pool = RewardPool({"math": (RewardConfig(tag_included=["math"]), [math]), "rest": (RewardConfig(), [rest])})
    results = grade(pool, items("math", "code", "math"))
    assert [r.id for r in results] == ["0", "1", "2"] and [r.reward for r in results] == [0, 1, 2]
    assert math.calls == [["0", "2"]] and rest.calls == [["1"]]


def test_an_uncovered_tag_is_not_graded_and_is_no_failure(fakes) -> None:
    pool = RewardPool({"math": (RewardConfig(tag_included=["math"]), [Grader(fakes)])})
    assert grade(pool, items("code")) == [None]
    assert grade(RewardPool({}), items("code")) == [None]
    assert pool.failures == 0


def test_workers_take_turns(fakes) -> None:
    workers = [Grader(fakes), Grader(fakes)]
    pool = RewardPool({"math": (RewardConfig(), workers)})
    for _ in range(4):
        grade(pool, items("math"))
    assert [len(w.calls) for w in workers] == [2, 2]


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        RayTaskError("grade", "Traceback\nValueError: boom", ValueError("boom")),
        RayTaskError("grade", "Traceback\nValueError: boom", ValueError("boom")).as_instanceof_cause(),
        ActorUnavailableError("gone for a while", b"0" * 16),
        ObjectLostError("00" * 28, None, ""),
    ],
)
def test_a_failing_reward_is_counted_and_the_others_go_on(fakes, error) -> None:
    pool = RewardPool({"bad": (RewardConfig(tag_included=["bad"]), [Grader(fakes, error)]),
                       "good": (RewardConfig(), [Grader(fakes)])})  # fmt: skip
    results = grade(pool, items("bad", "good", "bad"))
    assert results[0] is None and results[2] is None and results[1].reward == 1
    assert pool.failures == 2


def test_items_that_could_not_be_graded_are_counted(fakes) -> None:
    def answer(batch):
        return [RewardResult(i.id, 0.0, None, error="timeout" if i.id == "1" else None) for i in batch]

    pool = RewardPool({"math": (RewardConfig(), [Grader(fakes, answer)])})
    results = grade(pool, items("m", "m", "m"))
    assert [r.error for r in results] == [None, "timeout", None]
    assert pool.failures == 1


def test_a_reward_that_returns_too_few_results_is_counted(fakes) -> None:
    pool = RewardPool({"math": (RewardConfig(), [Grader(fakes, lambda batch: [])])})
    assert grade(pool, items("m", "m")) == [None, None]
    assert pool.failures == 2


def test_a_slow_reward_does_not_pile_up(fakes, monkeypatch, caplog) -> None:
    """What waits is bounded; beyond it samples stay ungraded, and the place is free again once answers come."""
    monkeypatch.setattr("roll_opd.pipeline.reward_pool.MAX_PENDING", 3)
    asked = []

    async def run() -> None:
        gate = asyncio.Event()

        async def answer(batch):
            asked.append(len(batch))
            await gate.wait()
            return [RewardResult(i.id, 1.0, True) for i in batch]

        pool = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(answer))])})
        first = asyncio.ensure_future(pool.grade(items("m", "m")))
        await asyncio.sleep(0.01)
        assert await pool.grade(items("m", "m")) == [None, None]
        assert await pool.grade(items("m", "m", "m")) == [None] * 3
        gate.set()
        assert [r.reward for r in await first] == [1, 1]
        for _ in range(2):
            assert [r.reward for r in await pool.grade(items("m", "m"))] == [1, 1]
        assert pool.failures == 5

    asyncio.run(run())
    assert asked == [2, 2, 2]
    # One line when it begins and one when it ends, however many blocks are dropped between.
    slow, caught_up = (record.getMessage() for record in caplog.records)
    assert "math is slow: 2 responses wait for it, so 2 more stay ungraded" in slow
    assert "math has caught up; it left 5 responses ungraded" in caught_up


def block(kind: str, number: int, size: int) -> list[RewardItem]:
    """A block, waited for where ``kind`` is training (the pool says so) or validation (the ids do)."""
    prefix = "val:" if kind == "validation" else ""
    return [RewardItem(id=f"{prefix}{number}/{i}/0", response="x", ground_truth=None, tag="m") for i in range(size)]


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_what_is_waited_for_is_graded_however_much_it_is(fakes, monkeypatch, caplog, kind) -> None:
    monkeypatch.setattr("roll_opd.pipeline.reward_pool.MAX_PENDING", 3)

    async def run() -> None:
        gate = asyncio.Event()

        async def answer(batch):
            await gate.wait()
            return [RewardResult(i.id, 1.0, True) for i in batch]

        workers = [SimpleNamespace(grade=fakes.Method(answer)) for _ in range(2)]
        pool = RewardPool({"math": (RewardConfig(), workers)}, waits=kind == "training")
        blocks = [asyncio.ensure_future(pool.grade(block(kind, n, 8))) for n in range(32)]
        await asyncio.sleep(0.01)
        gate.set()
        results = [result for graded in await asyncio.gather(*blocks) for result in graded]
        assert len(results) == 256 and None not in results
        assert pool.failures == 0 and not caplog.records

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["training", "validation", "monitoring"])
def test_time_in_the_queue_costs_no_verdict_that_is_waited_for(fakes, monkeypatch, kind) -> None:
    """One worker, 10 blocks of 4 at once, 0.03 s each one after the other: the last block ends after 1.2 s.

    Alone a block has 0.1 + 4 * 0.1 = 0.5 s, in which 4 blocks are graded. With the queue, block k has
    0.1 + 4 k * 0.1 s, and is done after 0.12 k s.
    """
    monkeypatch.setattr("roll_opd.pipeline.reward_pool.START_SECONDS", 0.1)

    async def run() -> None:
        turn = asyncio.Lock()

        async def answer(batch):
            async with turn:
                await asyncio.sleep(0.03 * len(batch))
            return [RewardResult(i.id, 1.0, True) for i in batch]

        worker = SimpleNamespace(grade=fakes.Method(answer))
        pool = RewardPool({"math": (RewardConfig(reward_timeout=0.1), [worker])}, waits=kind == "training")
        blocks = await asyncio.gather(*(pool.grade(block(kind, n, 4)) for n in range(10)))
        lost = sum(result is None for graded in blocks for result in graded)
        assert lost == pool.failures and (lost >= 20 if kind == "monitoring" else lost == 0)

    asyncio.run(run())


def test_a_reward_that_hangs_is_not_waited_for_for_ever(fakes, monkeypatch, caplog) -> None:
    monkeypatch.setattr("roll_opd.pipeline.reward_pool.START_SECONDS", 0.01)

    async def never(batch):
        await asyncio.sleep(3600)

    worker = SimpleNamespace(grade=fakes.Method(never))
    pool = RewardPool({"math": (RewardConfig(reward_timeout=0.01), [worker])}, waits=True)
    with caplog.at_level(logging.WARNING):
        assert grade(pool, items("m", "m")) == [None, None]
    assert pool.failures == 2 and "reward math failed on 2 responses" in caplog.text
    assert [w.pending for w in pool.rewards["math"][1]] == [0]


def test_a_reward_that_hangs_holds_up_no_other(fakes) -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def slow(batch):
            await gate.wait()
            return [RewardResult(i.id, 5.0, True) for i in batch]

        quick = Grader(fakes)
        pool = RewardPool({"slow": (RewardConfig(tag_included=["slow"]), [SimpleNamespace(grade=fakes.Method(slow))]),
                           "quick": (RewardConfig(), [quick])})  # fmt: skip
        grading = asyncio.ensure_future(pool.grade(items("slow", "m", "slow")))
        await asyncio.sleep(0.01)
        assert quick.calls == [["1"]]
        gate.set()
        assert [r.reward for r in await grading] == [5, 1, 5] and pool.failures == 0

    asyncio.run(run())


def test_the_worker_with_the_shortest_queue_is_asked(fakes) -> None:
    """Blocks of 8, 1, 1 and 1: the first worker is busy with 8 while the second one gets the three others."""

    async def run() -> None:
        gate = asyncio.Event()
        asked: list[list[int]] = [[], []]

        def grader(number):
            async def answer(batch):
                asked[number].append(len(batch))
                await gate.wait()
                return [RewardResult(i.id, 1.0, True) for i in batch]

            return SimpleNamespace(grade=fakes.Method(answer))

        pool = RewardPool({"math": (RewardConfig(), [grader(0), grader(1)])})
        blocks = [asyncio.ensure_future(pool.grade(items(*["m"] * size))) for size in (8, 1, 1, 1)]
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*blocks)
        assert sorted(asked) == [[1, 1, 1], [8]]

    asyncio.run(run())


def test_a_dead_reward_is_not_asked_again(fakes) -> None:
    calls = []

    def die(batch):
        calls.append(batch)
        raise RayActorError()

    pool = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(die))])})
    assert grade(pool, items("m")) == [None] and grade(pool, items("m", "m")) == [None, None]
    assert len(calls) == 1 and pool.failures == 3
