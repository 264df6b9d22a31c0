"""Routing, load, deadlines, retries, rejection and the failure budget of the teachers."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.errors import ModelError, TeacherError
from roll_opd.pipeline.teacher_pool import TeacherPool, accept, request_for


def pool_of(*workers, **settings) -> TeacherPool:
    return TeacherPool({"default": (TeacherConfig(**settings), workers)})


def score(pool: TeacherPool, trajectories):
    async def run():
        return await asyncio.wait_for(pool.score(trajectories), 20)

    return asyncio.run(run())


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("score", "traceback", cause).as_instanceof_cause()


async def hang(_requests):
    await asyncio.sleep(3600)


def check_scores(out, trajectories, name="default") -> None:
    for scores, t in zip(out, trajectories, strict=True):
        np.testing.assert_array_equal(scores[name].logprobs, np.where(t.response_mask, -t.tokens, 0))


def test_scores_come_back_in_order_and_masked(fakes) -> None:
    trajectories = [fakes.trajectory(i, response=2 + i) for i in (4, 0, 2)]
    worker = fakes.ScoringWorker()
    pool = pool_of(worker)
    check_scores(score(pool, trajectories), trajectories)
    assert len(worker.calls) == 1 and pool.failures == 0


def test_routing_by_tag(fakes) -> None:
    workers = {name: fakes.ScoringWorker() for name in ("math", "code", "all")}
    pool = TeacherPool(
        {
            "math": (TeacherConfig(tag_included=["math"]), [workers["math"]]),
            "code": (TeacherConfig(tag_included=["code", "sql"]), [workers["code"]]),
            "all": (TeacherConfig(), [workers["all"]]),
        }
    )
    assert pool.route("math") == ["math", "all"]
    assert pool.route("sql") == ["code", "all"]
    assert pool.route("poetry") == ["all"]
    batch = [fakes.trajectory(i, tag=tag) for i, tag in enumerate(["sql", "math", "poetry", "code"])]
    out = score(pool, batch)
    assert [sorted(scores) for scores in out] == [["all", "code"], ["all", "math"], ["all"], ["all", "code"]]
    assert [r.id.draw for r in workers["code"].calls[0]] == [0, 3]
    check_scores([out[0], out[3]], [batch[0], batch[3]], "code")


def test_a_teacher_without_samples_is_not_asked_and_no_teacher_is_no_score(fakes) -> None:
    worker = fakes.ScoringWorker()
    pool = pool_of(worker, tag_included=["code"])
    assert score(pool, [fakes.trajectory(tag="math")]) == [{}]
    assert worker.calls == []
    assert score(TeacherPool({}), [fakes.trajectory()]) == [{}]


def test_block_size_is_the_smallest_batch() -> None:
    small, large = TeacherConfig(infer_batch_size=4), TeacherConfig(infer_batch_size=32)
    assert TeacherPool({"a": (large, []), "b": (small, [])}).block_size == 4
    assert TeacherPool({}).block_size == 1


def test_the_least_loaded_replica_is_asked(fakes) -> None:
    async def run() -> None:
        gates = [asyncio.Event() for _ in range(2)]

        def gated(gate):
            async def answer(requests):
                await gate.wait()
                return fakes.good_scores(requests)

            return fakes.ScoringWorker(answer)

        first, second = gated(gates[0]), gated(gates[1])
        pool = pool_of(first, second)
        asked = []

        async def ask(draw, response):
            asked.append(asyncio.ensure_future(pool.score([fakes.trajectory(draw, response=response)])))
            await asyncio.sleep(0.01)

        await ask(0, 100)  # -> first: 102 tokens
        await ask(1, 10)  # -> second: 12
        await ask(2, 10)  # -> second: 24
        assert ([len(w.calls) for w in (first, second)]) == [1, 2]
        gates[0].set()
        await asked[0]  # the first is free again
        await ask(3, 10)
        assert ([len(w.calls) for w in (first, second)]) == [2, 2]
        gates[1].set()
        await asyncio.gather(*asked)
        assert [r.tokens for r in pool.teachers["default"].replicas] == [0, 0]

    asyncio.run(run())


def test_a_replica_that_does_not_answer_in_time_is_replaced_by_another(fakes) -> None:
    slow, good = fakes.ScoringWorker(hang), fakes.ScoringWorker()
    pool = pool_of(slow, good, request_timeout=0.05)
    batch = [fakes.trajectory(1)]
    check_scores(score(pool, batch), batch)
    assert (len(slow.calls), len(good.calls), pool.failures) == (1, 1, 1)


def bad_answers(good_scores):
    def altered(**change):
        def answer(requests):
            results = good_scores(requests)
            values = {k: v(requests[-1], results[-1]) for k, v in change.items()}
            return [*results[:-1], dataclasses.replace(results[-1], **values)]

        return answer

    def at(position, value):
        def change(request, result):
            logprobs = result.logprobs.copy()
            logprobs[np.flatnonzero(request.response_mask)[position]] = value
            return logprobs

        return change

    return {
        "another trajectory": altered(id=lambda q, r: q.id._replace(draw=99)),
        "another sequence": altered(checksum=lambda q, r: r.checksum ^ 1),
        "short": altered(logprobs=lambda q, r: r.logprobs[:-1]),
        "long": altered(logprobs=lambda q, r: np.append(r.logprobs, np.float32(0))),
        "another rank": altered(logprobs=lambda q, r: r.logprobs[None]),
        "nan": altered(logprobs=at(0, np.nan)),
        "-inf": altered(logprobs=at(-1, -np.inf)),
        "one result too few": lambda requests: good_scores(requests)[:-1],
        "one result too many": lambda requests: good_scores([*requests, requests[0]]),
        "swapped": lambda requests: good_scores(requests)[::-1],
        "nothing": lambda requests: [],
        "an error": task_error(RuntimeError("out of memory")),
        "a death": RayActorError(),
    }


BAD = ["another trajectory", "another sequence", "short", "long", "another rank", "nan", "-inf", "one result too few",
       "one result too many", "swapped", "nothing", "an error", "a death"]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_unusable_scores_are_rejected_and_asked_of_another_replica(fakes, kind) -> None:
    answers = bad_answers(fakes.good_scores)
    assert sorted(answers) == sorted(BAD)
    bad, good = fakes.ScoringWorker(answers[kind]), fakes.ScoringWorker()
    pool = pool_of(bad, good)
    batch = [fakes.trajectory(1), fakes.trajectory(2)]
    check_scores(score(pool, batch), batch)
    assert (len(bad.calls), len(good.calls), pool.failures) == (1, 1, 1)


def test_values_off_the_mask_are_free_and_dropped(fakes) -> None:
    t = fakes.trajectory(1)
    (result,) = fakes.good_scores([request_for(t, "default")])
    logprobs = np.where(t.response_mask, result.logprobs, np.nan).astype(np.float32)
    accepted = accept(t, request_for(t, "default"), dataclasses.replace(result, logprobs=logprobs))
    assert accepted.logprobs[~t.response_mask].tolist() == [0.0, 0.0]
    assert accepted.logprobs.dtype == np.float32


def test_a_single_replica_is_tried_again(fakes) -> None:
    worker = fakes.ScoringWorker(task_error(RuntimeError("hiccup")), fakes.good_scores)
    pool = pool_of(worker)
    batch = [fakes.trajectory(1)]
    check_scores(score(pool, batch), batch)
    assert len(worker.calls) == 2


def test_retries_are_bounded_and_the_teacher_is_named(fakes) -> None:
    worker = fakes.ScoringWorker(task_error(RuntimeError("hiccup")))
    pool = pool_of(worker, max_retries=2)
    with pytest.raises(TeacherError, match=r"'default'.*hiccup"):
        score(pool, [fakes.trajectory(1)])
    assert len(worker.calls) == 3


def test_the_failure_budget_stops_the_run_and_names_the_teacher(fakes) -> None:
    flaky = [bad_answers(fakes.good_scores)["nan"], fakes.good_scores] * 5
    worker = fakes.ScoringWorker(*flaky)
    pool = TeacherPool({"maths": (TeacherConfig(failure_budget=2), [worker])})
    batch = [fakes.trajectory(1)]
    for _ in range(2):  # two failures are within the budget
        check_scores(score(pool, batch), batch, "maths")
    with pytest.raises(TeacherError, match=r"'maths' failed 3 times.*failure_budget of 2.*not finite"):
        score(pool, batch)
    assert pool.failures == 3


def test_a_dead_replica_is_not_asked_again(fakes) -> None:
    dead, good = fakes.ScoringWorker(RayActorError()), fakes.ScoringWorker()
    pool = pool_of(dead, good)
    for i in range(4):
        batch = [fakes.trajectory(i)]
        check_scores(score(pool, batch), batch)
    assert (len(dead.calls), len(good.calls), pool.failures) == (1, 4, 1)


def test_no_replica_left(fakes) -> None:
    pool = pool_of(fakes.ScoringWorker(RayActorError()))
    with pytest.raises(TeacherError, match=r"'default': no replica is left"):
        score(pool, [fakes.trajectory(1)])


def test_an_error_meant_for_the_user_is_not_retried(fakes) -> None:
    worker = fakes.ScoringWorker(task_error(ModelError("the teacher's head is too small")))
    pool = pool_of(worker)
    with pytest.raises(ModelError, match="head is too small"):
        score(pool, [fakes.trajectory(1)])
    assert len(worker.calls) == 1


def test_load_is_given_back_after_failures_unless_the_work_goes_on(fakes) -> None:
    workers = [fakes.ScoringWorker(task_error(RuntimeError("x"))), fakes.ScoringWorker(hang)]
    pool = pool_of(*workers, request_timeout=0.05, max_retries=1)
    with pytest.raises(TeacherError):
        score(pool, [fakes.trajectory(1)])
    assert [r.tokens for r in pool.teachers["default"].replicas] == [0, 5]


def test_a_lost_answer_is_asked_for_again(fakes) -> None:
    worker = fakes.ScoringWorker(ObjectLostError("00" * 28, None, ""), fakes.good_scores)
    batch = [fakes.trajectory(1)]
    check_scores(score(pool_of(worker), batch), batch)
