"""Routing, load, deadlines, retries, rejection and the failure budget of the teachers."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from roll_opd.configs.worker_config import TeacherArguments, TeacherConfig
from roll_opd.distributed.cluster import Replica
from roll_opd.distributed.layout import Layout
from roll_opd.distributed.strategy.base import ScoreWant
from roll_opd.errors import EngineDiedError, ModelError, TeacherError
from roll_opd.pipeline.teacher_pool import TeacherPool, accept, request_for
from roll_opd.trajectory import DetailsRef


def alone(*workers) -> list[Replica]:
    return [Replica.alone(worker) for worker in workers]


def pool_of(*workers, **settings) -> TeacherPool:
    return TeacherPool({"default": (TeacherConfig(**settings), alone(*workers))})


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
            "math": (TeacherConfig(tag_included=["math"]), alone(workers["math"])),
            "code": (TeacherConfig(tag_included=["code", "sql"]), alone(workers["code"])),
            "all": (TeacherConfig(), alone(workers["all"])),
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


# ---- requests and what comes back --------------------------------------------------------------------------------


def test_a_context_replaces_all_before_the_first_sampled_token(fakes) -> None:
    """Also in an episode of several turns, whose later prompts stay where they are."""
    mask = np.array([False, False, True, False, True])
    t = fakes.trajectory(1, response_mask=mask, contexts={"seeing": (7, 8, 9)})
    request = request_for(t, "seeing")
    assert request.id == t.id
    assert request.tokens.tolist() == [7, 8, 9, *t.tokens[2:]] and request.tokens.dtype == np.int32
    assert request.response_mask.tolist() == [False, False, False, True, False, True]
    plain = request_for(t, "blind")
    assert plain.tokens.tolist() == t.tokens.tolist() and plain.response_mask.tolist() == mask.tolist()
    (result,) = fakes.good_scores([request])
    np.testing.assert_array_equal(accept(t, request, result).logprobs, np.where(mask, -t.tokens, 0))


def test_a_context_may_be_shorter_than_the_prompt(fakes) -> None:
    t = fakes.trajectory(1, contexts={"a": (5,)})
    request = request_for(t, "a")
    assert request.tokens.tolist() == [5, *t.tokens[2:]]
    assert request.response_mask.tolist() == [False, True, True, True]


def test_a_score_of_the_students_own_sequence_is_not_one_behind_the_context(fakes) -> None:
    t = fakes.trajectory(1, contexts={"a": (7, 8)})
    (foreign,) = fakes.good_scores([request_for(t, "b")])
    with pytest.raises(ValueError, match="another sequence"):
        accept(t, request_for(t, "a"), foreign)


def test_ids_to_report_on_are_the_engines_and_only_when_wanted(fakes) -> None:
    t = fakes.trajectory(1, top_ids=np.arange(6, dtype=np.int32).reshape(3, 2), contexts={"a": (7,)})
    for name in ("a", "b"):
        assert request_for(t, name).given_ids is None
        assert request_for(t, name, ScoreWant(top_k=3)).given_ids is None
        assert request_for(t, name, ScoreWant(given=True)).given_ids is t.top_ids


class DetailsWorker:
    """Answers ``score_with_details`` as Ray does: a reference of the results and one of all details."""

    def __init__(self, name: str, *answers) -> None:
        self.name, self.answers, self.wants = name, list(answers), []
        self.score_with_details = SimpleNamespace(options=self._options)

    def _options(self, *, num_returns: int) -> SimpleNamespace:
        def remote(requests, want):
            assert num_returns == 2
            self.wants.append(want)
            answer = self.answers.pop(0)

            async def results():
                if isinstance(answer, BaseException):
                    raise answer
                return answer(requests)

            return [results(), f"{self.name}'s details of {[str(r.id) for r in requests]}"]

        return SimpleNamespace(remote=remote)


def test_details_stay_references_beside_their_sequence(fakes) -> None:
    """The driver passes them on; of a request that failed none is left."""
    bad = DetailsWorker("bad", task_error(RuntimeError("x")))
    good = DetailsWorker("good", fakes.good_scores)
    want = ScoreWant(hidden=True)
    pool = TeacherPool(
        {"a": (TeacherConfig(), alone(bad, good)), "b": (TeacherConfig(), alone(fakes.ScoringWorker()))}, {"a": want}
    )
    batch = [fakes.trajectory(i) for i in (3, 1, 2)]
    out = score(pool, batch)
    check_scores(out, batch, "a")
    check_scores(out, batch, "b")
    call = f"good's details of {[str(t.id) for t in batch]}"
    assert [scores["a"].details for scores in out] == [DetailsRef(call, i) for i in range(3)]
    assert all(scores["b"].details is None for scores in out)
    assert bad.wants == good.wants == [want] and pool.failures == 1


def test_details_of_ranks_that_hold_a_model_together(fakes) -> None:
    """Each data-parallel rank's call has an object of its own; those of ranks that do not answer are dropped."""
    layout = Layout.megatron(4, tensor=2, pipeline=1)
    workers = tuple(
        DetailsWorker(f"rank {rank}", fakes.good_scores if rank in (0, 2) else lambda requests: []) for rank in range(4)
    )
    pool = TeacherPool({"a": (TeacherConfig(), [Replica(workers, layout)])}, {"a": ScoreWant(hidden=True)})
    batch = [fakes.trajectory(i) for i in range(3)]
    out = score(pool, batch)
    check_scores(out, batch, "a")
    even, odd = "rank 0's details of ['0/0/0', '2/0/0']", "rank 2's details of ['1/0/0']"
    assert [s["a"].details for s in out] == [DetailsRef(even, 0), DetailsRef(odd, 0), DetailsRef(even, 1)]


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
    pool = TeacherPool({"maths": (TeacherConfig(failure_budget=2), alone(worker))})
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


@pytest.mark.parametrize("late", ["scores", "error", "death"])
def test_load_is_given_back_after_failures_unless_the_work_goes_on(fakes, late) -> None:
    """Then it is once the work is over, however it ends."""
    unexpected: list[dict] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unexpected.append(context))
        over = asyncio.Event()

        async def slowly(requests):
            await over.wait()
            if late != "scores":
                raise task_error(RuntimeError("x")) if late == "error" else RayActorError()
            return fakes.good_scores(requests)

        workers = [fakes.ScoringWorker(task_error(RuntimeError("x"))), fakes.ScoringWorker(slowly)]
        pool = pool_of(*workers, request_timeout=0.05, max_retries=1)
        loads = pool.teachers["default"].replicas
        with pytest.raises(TeacherError):
            await pool.score([fakes.trajectory(1)])
        assert [r.tokens for r in loads] == [0, 5]
        over.set()
        await asyncio.sleep(0.01)
        assert [r.tokens for r in loads] == [0, 0]

    asyncio.run(run())
    assert not unexpected


def test_a_request_that_is_given_up_costs_no_load_and_is_not_waited_for(fakes) -> None:
    """The rollout has failed elsewhere."""

    async def run() -> None:
        pool = pool_of(fakes.ScoringWorker(hang))
        scoring = asyncio.ensure_future(pool.score([fakes.trajectory(1)]))
        await asyncio.sleep(0.01)
        assert [r.tokens for r in pool.teachers["default"].replicas] == [5]
        scoring.cancel()
        await asyncio.sleep(0.01)
        assert scoring.cancelled() and [r.tokens for r in pool.teachers["default"].replicas] == [0]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_lost_answer_is_asked_for_again(fakes) -> None:
    worker = fakes.ScoringWorker(ObjectLostError("00" * 28, None, ""), fakes.good_scores)
    batch = [fakes.trajectory(1)]
    check_scores(score(pool_of(worker), batch), batch)


def test_ranks_that_hold_a_model_together_get_shares_and_answer_as_one(fakes) -> None:
    # Tensor-parallel 2, data-parallel 2: ranks 0 and 1 see the even requests, 2 and 3 the odd ones; 0 and 2 answer.
    layout = Layout.megatron(4, tensor=2, pipeline=1)
    workers = tuple(fakes.ScoringWorker(*([] if rank in (0, 2) else [lambda requests: []])) for rank in range(4))
    pool = TeacherPool({"default": (TeacherConfig(), [Replica(workers, layout)])})
    batch = [fakes.trajectory(i, response=2 + i) for i in range(3)]
    check_scores(score(pool, batch), batch)
    assert [[r.id.draw for r in w.calls[0]] for w in workers] == [[0, 2], [0, 2], [1], [1]]
    # One sequence: the second data-parallel rank is called all the same, the ranks compute together.
    check_scores(score(pool, batch[:1]), batch[:1])
    assert workers[2].calls[-1] == []


def test_a_dead_engine_is_replaced_once_whatever_it_took_along(fakes) -> None:
    class Engine(fakes.ScoringWorker):
        restarts = 0

        def __init__(self) -> None:
            super().__init__()
            self.alive = False
            self.score, self.restart = fakes.Method(self._answer), fakes.Method(self._restart)

        async def _answer(self, requests):
            await asyncio.sleep(0.01)
            if not self.alive:
                raise task_error(EngineDiedError("the engine is gone"))
            return fakes.good_scores(requests)

        async def _restart(self):
            await asyncio.sleep(0.05)
            self.restarts, self.alive = self.restarts + 1, True

    worker = Engine()
    pool = pool_of(worker)
    blocks = [[fakes.trajectory(i)] for i in range(3)]

    async def run():
        return await asyncio.gather(*(pool.score(block) for block in blocks))

    for out, block in zip(asyncio.run(run()), blocks, strict=True):
        check_scores(out, block)
    assert worker.restarts == 1 and pool.failures == 3
    worker.alive = False
    check_scores(score(pool, blocks[0]), blocks[0])
    assert worker.restarts == 2


class Mortal:
    """A replica whose engine is dead. While another one is started, which lasts until ``go``, there is none."""

    def __init__(self, fakes) -> None:
        self.fakes = fakes
        self.engine: str | None = "dead"
        self.asked = self.restarts = 0
        self.starts, self.go = asyncio.Event(), asyncio.Event()
        self.score, self.restart = fakes.Method(self._score), fakes.Method(self._restart)

    async def _score(self, requests):
        self.asked += 1
        if self.engine is None:
            raise task_error(AttributeError("'NoneType' object has no attribute 'model_config'"))
        if self.engine == "dead":
            raise task_error(EngineDiedError("the engine is gone"))
        return self.fakes.good_scores(requests)

    async def _restart(self):
        self.engine, self.restarts = None, self.restarts + 1
        self.starts.set()
        await self.go.wait()
        self.engine = "alive"


def test_a_block_that_comes_while_an_engine_is_replaced_waits_for_it(fakes) -> None:
    blocks = [[fakes.trajectory(i)] for i in range(4)]

    async def run() -> None:
        worker = Mortal(fakes)
        pool = pool_of(worker)
        scoring = [asyncio.ensure_future(pool.score(blocks[0]))]
        while not pool.failures:
            await asyncio.sleep(0)
        # Before the worker is told, and after.
        scoring.append(asyncio.ensure_future(pool.score(blocks[1])))
        await worker.starts.wait()
        scoring += [asyncio.ensure_future(pool.score(block)) for block in blocks[2:]]
        await asyncio.sleep(0.01)
        scoring[2].cancel()
        await asyncio.sleep(0.01)
        assert worker.asked == 1 and [r.tokens for r in pool.teachers["default"].replicas] == [15]
        worker.go.set()
        outs = await asyncio.gather(*scoring, return_exceptions=True)
        assert isinstance(outs.pop(2), asyncio.CancelledError)
        for out, block in zip(outs, [*blocks[:2], blocks[3]], strict=True):
            check_scores(out, block)
        assert (worker.restarts, worker.asked, pool.failures) == (1, 4, 1)
        assert [r.tokens for r in pool.teachers["default"].replicas] == [0]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_engine_that_died_while_it_sampled_is_replaced(fakes) -> None:
    """Once, also where it was scoring at the time, and no more often than the budget allows."""

    async def run() -> None:
        worker, other = Mortal(fakes), fakes.ScoringWorker()
        pool = TeacherPool(
            {
                "a": (TeacherConfig(), alone(other)),
                "b": (TeacherConfig(tag_included=["math"], failure_budget=3), alone(fakes.ScoringWorker(), worker)),
            }
        )
        replacing = asyncio.ensure_future(pool.replace_engine(worker))
        await worker.starts.wait()
        again = asyncio.ensure_future(pool.replace_engine(worker))
        await asyncio.sleep(0.01)
        assert not replacing.done() and not again.done()
        worker.go.set()
        await asyncio.gather(replacing, again)
        assert worker.restarts == 1 and pool.teachers["b"].failures == 2
        await pool.replace_engine(worker)
        assert worker.restarts == 2
        with pytest.raises(TeacherError, match=r"'b' failed 4 times.*failure_budget of 3.*replica 1: its engine died"):
            await pool.replace_engine(worker)
        assert worker.restarts == 2 and pool.teachers["a"].failures == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_engine_that_follows_the_student_cannot_be_replaced(fakes) -> None:
    """A new one would hold the checkpoint's weights; the error names the teacher."""

    async def run() -> None:
        worker = Mortal(fakes)
        pool = pool_of(worker, teacher_args=TeacherArguments(self_teacher="live"))
        for call in (pool.score([fakes.trajectory(1)]), pool.replace_engine(worker)):
            with pytest.raises(TeacherError, match=r"'default': its engine died.*self_teacher: live.*resume"):
                await call
        assert worker.restarts == 0

    asyncio.run(run())


def test_a_replica_is_dead_when_any_of_its_ranks_is(fakes) -> None:
    dead = fakes.ScoringWorker(RayActorError())
    pool = TeacherPool(
        {"default": (TeacherConfig(), [Replica((fakes.ScoringWorker(), dead), Layout.data_parallel(2))])}
    )
    with pytest.raises(TeacherError, match="no replica is left"):
        score(pool, [fakes.trajectory(0), fakes.trajectory(1)])
