"""Rewards: routed by tag, counted when they fail, and never able to stop the run."""

from __future__ import annotations

import asyncio
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


def test_a_slow_reward_does_not_pile_up(fakes, monkeypatch) -> None:
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
        gate.set()
        assert [r.reward for r in await first] == [1, 1]
        assert [r.reward for r in await pool.grade(items("m", "m"))] == [1, 1]
        assert pool.failures == 2

    asyncio.run(run())
    assert asked == [2, 2]


def test_a_dead_reward_is_not_asked_again(fakes) -> None:
    calls = []

    def die(batch):
        calls.append(batch)
        raise RayActorError()

    pool = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(die))])})
    assert grade(pool, items("m")) == [None] and grade(pool, items("m", "m")) == [None, None]
    assert len(calls) == 1 and pool.failures == 3
