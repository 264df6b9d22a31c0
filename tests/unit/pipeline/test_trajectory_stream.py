"""The stream over engines that finish in any order we like: blocks, order, faults, versions, and its end."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from roll_opd.configs.worker_config import RewardConfig, TeacherConfig
from roll_opd.datasets.prompts import Prompt
from roll_opd.datasets.rows import Row
from roll_opd.distributed.cluster import Replica
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling
from roll_opd.errors import EngineDiedError, GenerationError, TeacherError
from roll_opd.pipeline.generation import Generation
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.rlvr.prompt_rollout import PromptRollout
from roll_opd.pipeline.rollout import Engines
from roll_opd.pipeline.teacher_pool import TeacherPool
from roll_opd.pipeline.trajectory_stream import TrajectoryStream
from roll_opd.rewards.base import RewardResult
from roll_opd.trajectory import TeacherScores, Trajectory, TrajectoryId

pytestmark = pytest.mark.timeout(60)


def prompt(i: int, tag: str = "math") -> Prompt:
    row = Row(
        index=i, id=str(i), tag=tag, messages=None, prompt=f"p{i}", ground_truth=str(i), source=None, difficulty=None,
        test_cases=["t"], hint=None, file="f", line=i, extra={"level": i},
    )  # fmt: skip
    return Prompt(row, tuple(range(1, 2 + i % 3)), f"p{i}")


class Engine:
    """``worker.generate.options(...).remote(requests)`` as an async iterator of awaitables.

    Args:
        order: rearranges the results before they are handed out (may drop, repeat or raise).
        version: gives the weight version of a call.
    """

    def __init__(self, order: Callable[[list[GenerateResult]], Iterable] = list, version: Callable[[], int] = int):
        self.order = order
        self.version = version
        self.calls: list[list[GenerateRequest]] = []
        self.generate = SimpleNamespace(options=self._options)

    def _options(self, *, num_returns: str) -> SimpleNamespace:
        assert num_returns == "streaming"
        return SimpleNamespace(remote=self._remote)

    async def _remote(self, requests: Sequence[GenerateRequest]):
        self.calls.append(list(requests))
        for result in self.order([respond(r, self.version()) for r in requests]):
            await asyncio.sleep(0)
            yield self._ref(result)

    async def _ref(self, *results):
        await asyncio.sleep(0)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return list(results)


def respond(request: GenerateRequest, version: int = 0) -> GenerateResult:
    """Tokens and lengths that follow from the seed alone."""
    rng = np.random.default_rng(request.seed)
    n = int(rng.integers(1, 6))
    return GenerateResult(
        request.id, rng.integers(10, 99, n).astype(np.int32), -rng.random(n).astype(np.float32),
        np.full(n, version, dtype=np.int32), "stop", 1.0,
    )  # fmt: skip


class Teachers:
    """Records which trajectories are scored together."""

    def __init__(self, block_size: int = 1, error: BaseException | None = None, names: Sequence[str] = ()) -> None:
        self.block_size = block_size
        self.names = list(names or ["default"])
        self.error = error
        self.blocks: list[list[TrajectoryId]] = []

    async def score(self, trajectories: Sequence[Trajectory], names: Sequence[str]) -> list[dict[str, TeacherScores]]:
        self.blocks.append([t.id for t in trajectories])
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return [{name: TeacherScores(-t.tokens.astype(np.float32)) for name in names} for t in trajectories]


@pytest.fixture
def make_stream():
    streams: list[TrajectoryStream] = []

    def make(engines: Sequence[Engine], teachers: Teachers | None = None, **settings) -> TrajectoryStream:
        revive = settings.pop("revive", None)

        async def in_a_thread(worker) -> None:
            await asyncio.to_thread(revive, worker)

        generation = Generation(None if revive is None else in_a_thread, settings.pop("deadline", 20.0))
        contexts = settings.pop("contexts", None)
        graded = "rewards" in settings
        options = {
            "rollout": PromptRollout(generation, lambda ids: " ".join(map(str, ids)), lambda tag: graded, contexts),
            "rewards": RewardPool({}),
            "seed": 3,
            "group_size": 2,
            "sampling": Sampling(max_new_tokens=8),
        } | settings
        streams.append(
            TrajectoryStream(engines=Engines("actor_infer", engines), teachers=teachers or Teachers(), **options)
        )
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


SIZE = 5


def start(stream: TrajectoryStream, first: int, last: int, prompt_of: Callable[[int], Prompt] = prompt) -> None:
    """Batches ``first .. last - 1`` of five groups, none of which is filtered."""
    stream.start(prompt_of, SIZE, SIZE * first, first, last)


def one_batch(stream: TrajectoryStream):
    start(stream, 0, 1)
    stream.weights_ready(0)
    return stream.collect()


def shuffled(seed: int) -> Callable[[list[GenerateResult]], list[GenerateResult]]:
    return lambda results: random.Random(seed).sample(results, len(results))


def flat(batch) -> list:
    return [
        (t.id, t.tokens.tolist(), t.response_mask.tolist(), t.infer_logprobs.tolist(),
         {n: s.logprobs.tolist() for n, s in t.teacher_scores.items()})
        for t in batch.trajectories
    ]  # fmt: skip


def test_a_trajectory_is_prompt_and_response(make_stream) -> None:
    batch = one_batch(make_stream([Engine()]))
    assert [t.id for t in batch.trajectories] == [TrajectoryId(d, s) for d in range(5) for s in range(2)]
    for t in batch.trajectories:
        expected = respond(GenerateRequest(t.id, (), t.id.seed(3), Sampling()))
        ids = prompt(t.id.draw).token_ids
        assert t.tokens.tolist() == [*ids, *expected.response_ids]
        assert t.response_mask.tolist() == [False] * len(ids) + [True] * len(expected.response_ids)
        assert t.infer_logprobs.tolist() == [0.0] * len(ids) + expected.infer_logprobs.tolist()
        assert t.weight_version.tolist() == [-1] * len(ids) + [0] * len(expected.response_ids)
        assert t.tokens.dtype == t.weight_version.dtype == np.int32 and t.infer_logprobs.dtype == np.float32
        assert t.tag == "math" and t.reward is None
    assert batch.seconds["rollout"] >= batch.seconds["generate"] >= 0


def test_responses_that_come_together_are_taken_one_by_one(make_stream) -> None:
    class Bursts(Engine):
        async def _remote(self, requests):
            results = [respond(r) for r in requests]
            yield self._ref(*results[:7])
            yield self._ref(*results[7:])

    assert flat(one_batch(make_stream([Bursts()]))) == flat(one_batch(make_stream([Engine()])))


@pytest.mark.parametrize(
    ("block_size", "sizes"),
    [(1, [2] * 5), (2, [2] * 5), (3, [2] * 5), (4, [4, 4, 2]), (7, [6, 4]), (100, [10])],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_are_whole_groups_in_order_whatever_finishes_first(make_stream, block_size, sizes, seed) -> None:
    teachers, plain = Teachers(block_size), Teachers(block_size)
    batch = one_batch(make_stream([Engine(shuffled(seed)), Engine(shuffled(seed + 9))], teachers))
    straight = one_batch(make_stream([Engine()], plain))
    expected = [TrajectoryId(d, s) for d in range(5) for s in range(2)]
    bounds = np.cumsum([0, *sizes])
    blocks = [expected[a:b] for a, b in itertools.pairwise(bounds)]
    assert sorted(teachers.blocks) == sorted(plain.blocks) == blocks
    assert flat(batch) == flat(straight)


def test_a_block_is_scored_while_others_are_still_generated(make_stream) -> None:
    """A teacher scores each group as it finishes, not after the whole rollout."""
    teachers = Teachers()
    scored_before_the_end: list[int] = []

    class Slow(Engine):
        async def _remote(self, requests):
            for i, request in enumerate(requests):
                if i == len(requests) - 1:
                    for _ in range(50):
                        await asyncio.sleep(0)
                    scored_before_the_end.append(len(teachers.blocks))
                yield self._ref(respond(request))

    one_batch(make_stream([Slow()], teachers))
    assert scored_before_the_end == [4]


def test_groups_stay_together_on_an_engine(make_stream) -> None:
    """So that the prompt of a group is computed once."""
    engines = [Engine(), Engine(), Engine()]
    one_batch(make_stream(engines))
    groups = [[r.id.draw for r in engine.calls[0]] for engine in engines]
    assert groups == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2]]


def test_more_engines_than_groups(make_stream) -> None:
    engines = [Engine() for _ in range(8)]
    assert len(one_batch(make_stream(engines)).trajectories) == 10
    assert [len(e.calls) for e in engines] == [1] * 5 + [0] * 3


def test_rewards_beside_teachers(make_stream, fakes) -> None:
    seen = []

    def answer(items):
        seen.extend(items)
        return [
            RewardResult(i.id, float(i.ground_truth), i.ground_truth == "3", None if i.ground_truth != "4" else "late")
            for i in items
        ]

    rewards = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(answer))])})
    stream = make_stream([Engine()], Teachers(4), rewards=rewards)
    graded = stream.verdicts(one_batch(stream), patience=None)
    assert [t.reward for t in graded] == [0, 0, 1, 1, 2, 2, 3, 3, None, None]
    assert [t.correct for t in graded] == [False] * 6 + [True, True, None, None]
    assert all(t.teacher_scores for t in graded)
    item = next(i for i in seen if i.id == "1/0/0")
    assert (item.prompt, item.tag) == ("p1", "math")
    assert item.row == {
        "id": "1", "tag": "math", "prompt": "p1", "messages": None, "ground_truth": "1", "source": None,
        "difficulty": None, "test_cases": ["t"], "hint": None, "level": 1,
    }  # fmt: skip
    response = next(t for t in graded if str(t.id) == item.id)
    assert item.response == " ".join(map(str, response.tokens[response.response_mask]))


def test_responses_that_nobody_grades_are_not_decoded(make_stream) -> None:
    def decode(ids):
        raise AssertionError("decoded")

    rollout = PromptRollout(Generation(None, 20.0), decode, lambda tag: False)
    stream = make_stream([Engine()], rollout=rollout)
    batch = one_batch(stream)
    assert len(batch.trajectories) == 10 and not batch.grading


def test_a_reward_that_hangs_delays_nothing(make_stream, fakes) -> None:
    async def never(items):
        await asyncio.sleep(3600)

    rewards = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(never))])})
    stream = make_stream([Engine()], Teachers(4), rewards=rewards)
    began = time.monotonic()
    batch = one_batch(stream)
    graded = stream.verdicts(batch, patience=0.05)
    assert time.monotonic() - began < 5
    assert len(graded) == 10 and all(t.reward is None and t.teacher_scores for t in graded)


def test_a_reward_that_hangs_costs_no_verdict_of_another(make_stream, fakes) -> None:
    """Draws of two tags in turn, two to a block."""

    async def never(items):
        await asyncio.sleep(3600)

    def quick(items):
        return [RewardResult(i.id, 1.0, True) for i in items]

    rewards = RewardPool(
        {
            "code": (RewardConfig(tag_included=["code"]), [SimpleNamespace(grade=fakes.Method(never))]),
            "rest": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(quick))]),
        }
    )
    stream = make_stream([Engine()], Teachers(4), rewards=rewards)
    start(stream, 0, 1, lambda draw: prompt(draw, ("code", "math")[draw % 2]))
    stream.weights_ready(0)
    graded = stream.verdicts(stream.collect(), patience=0.5)
    assert [t.reward for t in graded] == [None, None, 1, 1, None, None, 1, 1, None, None]


# ---- groups that a filter drops ----------------------------------------------------------------------------------


def kept_draws(batch) -> list[int]:
    """The draws of a batch of whole groups of two."""
    assert [t.id.sample for t in batch.trajectories] == [0, 1] * (len(batch.trajectories) // 2)
    return [t.id.draw for t in batch.trajectories[::2]]


def even(group: list[Trajectory]) -> bool:
    assert len(group) == 2 and len({t.id.draw for t in group}) == 1
    return group[0].id.draw % 2 == 0


def collect_all(stream: TrajectoryStream, last: int, next_draw: int = 0, first: int = 0):
    stream.start(prompt, SIZE, next_draw, first, last)
    out = []
    for version in range(first, last):
        stream.weights_ready(version)
        out.append(stream.collect())
    return out


def test_without_a_filter_draws_go_on_where_they_ended(make_stream) -> None:
    batches = collect_all(make_stream([Engine(version=lambda: 9)]), 2)
    assert [kept_draws(b) for b in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [(b.next_draw, b.filtered_groups) for b in batches] == [(5, 0), (10, 0)]


def test_draws_go_on_until_the_batch_is_full(make_stream) -> None:
    engine = Engine(version=lambda: 9)
    batches = collect_all(make_stream([engine], keep_group=even), 2)
    assert [kept_draws(b) for b in batches] == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18]]
    # Rounds of the first batch: 0..4, then as many as are missing: 5 6, 7, 8. The second begins with 9.
    rounds = [sorted({r.id.draw for r in call}) for call in engine.calls]
    assert rounds[:4] == [[0, 1, 2, 3, 4], [5, 6], [7], [8]] and rounds[4] == [9, 10, 11, 12, 13]
    assert [(b.next_draw, b.filtered_groups) for b in batches] == [(9, 4), (19, 5)]
    assert all(t.teacher_scores for b in batches for t in b.trajectories)
    for batch in batches:
        assert batch.seconds["rollout"] >= batch.seconds["generate"] > 0


def test_extra_draws_are_made_once_something_was_dropped(make_stream) -> None:
    engine = Engine(version=lambda: 9)
    (batch,) = collect_all(make_stream([engine], keep_group=even, extra_draws=1), 1)
    rounds = [sorted({r.id.draw for r in call}) for call in engine.calls]
    assert rounds == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]
    assert kept_draws(batch) == [0, 2, 4, 6, 8] and (batch.next_draw, batch.filtered_groups) == (10, 5)


def test_extra_draws_are_no_more_than_are_missing(make_stream) -> None:
    """16 at once for one missing group would nearly all be thrown away."""
    engine = Engine(version=lambda: 9)
    stream = make_stream([engine], keep_group=lambda group: group[0].id.draw != 0, extra_draws=16)
    batches = collect_all(stream, 2)
    assert sorted({r.id.draw for r in engine.calls[1]}) == [5, 6]
    # 6 was more than was needed; it is not trained on, nor is it a group that the filter dropped.
    assert [kept_draws(b) for b in batches] == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert [(b.next_draw, b.filtered_groups) for b in batches] == [(7, 1), (12, 0)]


def test_a_filter_that_keeps_next_to_nothing_stops_the_run(make_stream) -> None:
    stream = make_stream([Engine()], keep_group=lambda group: group[0].id.draw in (1, 7))
    with pytest.raises(GenerationError, match=r"query_filter_config kept 2 of 10[0-9] prompts.*batch of 5.*widen"):
        one_batch(stream)


def test_filtered_batches_do_not_depend_on_what_finishes_first(make_stream) -> None:
    settings = {"keep_group": even, "extra_draws": 2}
    straight = collect_all(make_stream([Engine(version=lambda: 9)], Teachers(4), **settings), 3)
    engines = [Engine(shuffled(seed), version=lambda: 9) for seed in (1, 2)]
    again = collect_all(make_stream(engines, Teachers(4), **settings), 3)
    assert [flat(b) for b in straight] == [flat(b) for b in again]


def test_a_filtered_run_resumes_at_its_next_draw(make_stream) -> None:
    straight = collect_all(make_stream([Engine(version=lambda: 9)], keep_group=even), 4)
    stream = make_stream([Engine(version=lambda: 9)], keep_group=even)
    resumed = collect_all(stream, 4, next_draw=straight[1].next_draw, first=2)
    assert [flat(b) for b in resumed] == [flat(b) for b in straight[2:]]
    assert [b.next_draw for b in resumed] == [b.next_draw for b in straight[2:]]


def test_a_filter_waits_for_the_rewards_and_they_stay(make_stream, fakes) -> None:
    """Here a group is kept unless all of its rewards are equal."""

    async def slowly(items):
        await asyncio.sleep(0.05)
        return [RewardResult(i.id, float(i.id.endswith("1/0") and int(i.ground_truth) % 2), True, None) for i in items]

    rewards = RewardPool({"math": (RewardConfig(), [SimpleNamespace(grade=fakes.Method(slowly))])})
    stream = make_stream(
        [Engine(version=lambda: 9)], rewards=rewards, keep_group=lambda group: len({t.reward for t in group}) > 1
    )
    (batch,) = collect_all(stream, 1)
    assert kept_draws(batch) == [1, 3, 5, 7, 9] and batch.grading == []
    assert [t.reward for t in batch.trajectories] == [0.0, 1.0] * 5
    assert [t.reward for t in stream.verdicts(batch, None)] == [0.0, 1.0] * 5


def test_an_error_of_a_filter_is_raised_by_collect(make_stream) -> None:
    def broken(group):
        raise ValueError("no threshold")

    with pytest.raises(ValueError, match="no threshold"):
        one_batch(make_stream([Engine()], keep_group=broken))


# ---- what teachers see -------------------------------------------------------------------------------------------


def test_a_context_reaches_its_teacher_and_the_scores_come_back_to_the_students_tokens(make_stream, fakes) -> None:
    workers = {name: fakes.ScoringWorker() for name in ("plain", "privileged")}
    pool = TeacherPool({name: (TeacherConfig(infer_batch_size=100), [Replica.alone(w)]) for name, w in workers.items()})

    def contexts(p: Prompt) -> dict[str, tuple[int, ...]]:
        return {"privileged": (500, 501, 502, 503, *p.token_ids)}

    batch = one_batch(make_stream([Engine()], pool, contexts=contexts))
    seen = {name: {r.id: r for r in worker.calls[0]} for name, worker in workers.items()}
    for t in batch.trajectories:
        before = int(t.response_mask.argmax())
        response = t.tokens[before:].tolist()
        assert seen["plain"][t.id].tokens.tolist() == t.tokens.tolist()
        request = seen["privileged"][t.id]
        assert request.tokens.tolist() == [500, 501, 502, 503, *prompt(t.id.draw).token_ids, *response]
        assert request.response_mask.tolist() == [False] * (4 + before) + [True] * len(response)
        for name in workers:
            expected = np.where(t.response_mask, -t.tokens, 0)
            np.testing.assert_array_equal(t.teacher_scores[name].logprobs, expected)


def test_what_the_engine_ranked_first_travels_with_the_trajectory(make_stream) -> None:
    def ranked(results):
        return [dataclasses.replace(r, top_ids=np.stack([r.response_ids, r.response_ids + 1], -1)) for r in results]

    for t in one_batch(make_stream([Engine(ranked)])).trajectories:
        response = t.tokens[t.response_mask]
        assert t.top_ids.tolist() == [[x, x + 1] for x in response.tolist()]


def test_lost_scores_are_made_again(make_stream) -> None:
    """The same trajectories in the order given, each with what the teachers say now."""
    teachers = Teachers(4)
    stream = make_stream([Engine()], teachers)
    trajectories = one_batch(stream).trajectories
    asked = [trajectories[i] for i in (7, 0, 3)]
    bare = [dataclasses.replace(t, teacher_scores={}, reward=1.0) for t in asked]
    again = stream.score_again(bare)
    assert teachers.blocks[-1] == [t.id for t in asked] == [t.id for t in again]
    for t, before in zip(again, asked, strict=True):
        np.testing.assert_array_equal(t.teacher_scores["default"].logprobs, before.teacher_scores["default"].logprobs)
        assert t.reward == 1.0
    teachers.error = TeacherError("gone")
    with pytest.raises(TeacherError, match="gone"):
        stream.score_again(bare)


# ---- faults ------------------------------------------------------------------------------------------------------


def empty(result: GenerateResult) -> GenerateResult:
    none = np.zeros(0, dtype=np.int32)
    return GenerateResult(result.id, none, none.astype(np.float32), none, "stop", 1.0)


def nan(result: GenerateResult) -> GenerateResult:
    logprobs = np.full_like(result.infer_logprobs, np.nan)
    return GenerateResult(result.id, result.response_ids, logprobs, result.weight_version, "stop", 1.0)


def foreign(result: GenerateResult) -> GenerateResult:
    name = result.id._replace(draw=77)
    return GenerateResult(name, result.response_ids, result.infer_logprobs, result.weight_version, "stop", 1.0)


TASK_ERROR = RayTaskError("generate", "traceback", GenerationError("the engine is confused")).as_instanceof_cause()
FAULTS = {
    "repeated": (lambda rs: [rs[0], *rs], GenerationError, "0/0/0 twice"),
    "repeated late": (lambda rs: [*rs, rs[0]], GenerationError, "0/0/0 twice"),
    "missing": (lambda rs: rs[:-1], GenerationError, "1 of 10 responses never came, first 4/1/0"),
    "nothing": (lambda rs: [], GenerationError, "10 of 10"),
    "empty": (lambda rs: [*rs[:-1], empty(rs[-1])], GenerationError, "empty response.*4/1/0"),
    "user error": (lambda rs: [*rs[:2], TASK_ERROR], GenerationError, "confused"),
    "death": (lambda rs: [*rs[:2], RayActorError()], GenerationError, "died"),
    "nan": (lambda rs: [*rs[:-1], nan(rs[-1])], GenerationError, "not finite.*4/1/0"),
    "foreign": (lambda rs: [*rs, foreign(rs[0])], GenerationError, "77"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_of_an_engine_is_raised_by_collect(make_stream, fault) -> None:
    order, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        one_batch(make_stream([Engine(order)]))


@pytest.mark.parametrize("fault", ["foreign", "nan"])
def test_every_fault_of_an_engine_is_a_generation_error(make_stream, fault) -> None:
    with pytest.raises(GenerationError):
        one_batch(make_stream([Engine(FAULTS[fault][0])]))


def test_an_engine_that_hangs_is_given_up(make_stream) -> None:
    class Stuck(Engine):
        async def _remote(self, requests):
            yield self._ref(respond(requests[0]))
            await asyncio.sleep(3600)

    with pytest.raises(GenerationError, match="no response for 0 s"):
        one_batch(make_stream([Stuck()], deadline=0.1))


def test_an_error_of_a_teacher_is_raised_by_collect(make_stream) -> None:
    with pytest.raises(TeacherError, match="budget"):
        one_batch(make_stream([Engine()], Teachers(error=TeacherError("teacher 'default': budget"))))


def test_an_error_of_a_teacher_does_not_wait_for_the_engine(make_stream) -> None:
    class Stuck(Engine):
        async def _remote(self, requests):
            for request in requests[:2]:
                yield self._ref(respond(request))
            await asyncio.sleep(3600)

    with pytest.raises(TeacherError, match="budget"):
        one_batch(make_stream([Stuck()], Teachers(error=TeacherError("teacher 'default': budget")), deadline=0.5))


@pytest.mark.parametrize(
    "culprit",
    [
        "teacher",
        "engine",
    ],
)
def test_a_failure_stops_the_other_engines(make_stream, culprit) -> None:
    stopped = threading.Event()

    class Busy(Engine):
        async def _remote(self, requests):
            try:
                yield self._ref(respond(requests[0]))
                await asyncio.sleep(3600)
            finally:
                stopped.set()

    teachers = Teachers(error=TeacherError("budget") if culprit == "teacher" else None)
    engine = Engine(lambda results: [RayActorError()]) if culprit == "engine" else Engine()
    with pytest.raises(TeacherError if culprit == "teacher" else GenerationError):
        one_batch(make_stream([Busy(), engine], teachers))
    assert stopped.wait(1)


def test_an_error_while_drawing_is_raised_by_collect(make_stream) -> None:
    stream = make_stream([Engine()])

    def bad(_draw):
        raise RuntimeError("no data")

    start(stream, 0, 1, bad)
    stream.weights_ready(0)
    with pytest.raises(RuntimeError, match="no data"):
        stream.collect()


# ---- weights and batches -----------------------------------------------------------------------------------------


def settle(stream: TrajectoryStream) -> None:
    """Let the producer do whatever it can do now."""
    for _ in range(20):
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.002), stream._loop).result(10)


def test_a_batch_does_not_start_before_its_weights(make_stream) -> None:
    version = -1
    engine = Engine(version=lambda: version)
    stream = make_stream([engine])
    start(stream, 0, 5)
    settle(stream)
    assert engine.calls == []
    for batch in range(5):
        version = batch
        stream.weights_ready(batch)
        result = stream.collect()
        assert [t.id.draw for t in result.trajectories[::2]] == list(range(batch * 5, batch * 5 + 5))
        assert {int(t.weight_version.max()) for t in result.trajectories} == {batch}
        settle(stream)
        assert len(engine.calls) == batch + 1


@pytest.mark.parametrize("bound", [1, 2])
def test_generation_runs_ahead_by_the_bound_and_no_further(make_stream, bound) -> None:
    version = 0
    engine = Engine(version=lambda: version)
    stream = make_stream([engine], bound=bound)
    start(stream, 0, 9)
    for batch in range(3):
        version = batch
        stream.weights_ready(batch)
        settle(stream)
        assert len(engine.calls) == 1 + bound + batch
        assert stream.collect().trajectories[0].id.draw == 5 * batch
        settle(stream)
        assert len(engine.calls) == 1 + bound + batch


def test_nothing_is_generated_before_any_weights_were_given(make_stream) -> None:
    engine = Engine()
    stream = make_stream([engine], bound=1)
    start(stream, 0, 2)
    settle(stream)
    assert engine.calls == []


def test_tokens_older_than_the_bound_are_refused(make_stream) -> None:
    stream = make_stream([Engine(version=lambda: 0)])
    start(stream, 0, 2)
    stream.weights_ready(0)
    stream.collect()
    stream.weights_ready(1)
    with pytest.raises(AssertionError, match="batch 1 has tokens of weights 0"):
        stream.collect()


def test_a_resumed_stream_counts_on(make_stream) -> None:
    engine = Engine(version=lambda: 3)
    stream = make_stream([engine])
    start(stream, 3, 4)
    stream.weights_ready(3)
    assert stream.collect().trajectories[0].id == TrajectoryId(15, 0)


def test_validation_between_batches(make_stream) -> None:
    version = 0
    engine, other = Engine(version=lambda: version), Engine(version=lambda: 9)
    stream = make_stream([engine])
    start(stream, 0, 2)
    prompts = [prompt(i) for i in range(3)]
    greedy = Sampling(max_new_tokens=4, greedy=True)
    stream.weights_ready(0)
    first = stream.collect()
    validated = stream.validate(prompts, 2, greedy, seed=1)
    assert [t.id for t in validated.trajectories] == [TrajectoryId(d, s, 0, "val") for d in range(3) for s in range(2)]
    assert all(r.sampling == greedy for r in engine.calls[-1])
    assert [r.seed for r in engine.calls[-1]] == [
        TrajectoryId(d, s, 0, "val").seed(1) for d in range(3) for s in range(2)
    ]
    # the same prompts with the same seed: the same samples; from other engines when told so
    assert flat(stream.validate(prompts, 2, greedy, seed=1)) == flat(validated)
    stream.validate(prompts, 1, greedy, seed=1, engines=Engines("actor_infer", [other]))
    assert len(other.calls) == 1
    version = 1
    stream.weights_ready(1)
    second = stream.collect()
    assert first.trajectories[0].id.draw == 0 and second.trajectories[0].id.draw == 5


def test_an_error_in_validation_is_raised_there(make_stream) -> None:
    stream = make_stream([Engine(lambda results: [])])
    with pytest.raises(GenerationError, match="never came"):
        stream.validate([prompt(0)], 1, Sampling(), seed=1)


@pytest.mark.parametrize("state", ["idle", "waiting for weights", "generating", "done", "failed"])
def test_close_ends_the_thread(make_stream, state) -> None:
    started = threading.Event()

    class Stuck(Engine):
        async def _remote(self, requests):
            started.set()
            await asyncio.sleep(3600)
            yield

    engine = {"generating": Stuck(), "failed": Engine(lambda results: [])}.get(state, Engine())
    stream = make_stream([engine])
    if state != "idle":
        start(stream, 0, 2)
    if state in ("generating", "done", "failed"):
        stream.weights_ready(0)
    if state == "generating":
        assert started.wait(10)
    elif state in ("done", "failed"):
        settle(stream)  # the result waits in the queue; nobody collects it
    began = time.perf_counter()
    stream.close()
    assert time.perf_counter() - began < 5
    assert not stream._thread.is_alive()
    stream.close()  # and again


# ---- engines that die ------------------------------------------------------------------------------------------------


def died() -> RayTaskError:
    return RayTaskError("generate", "traceback", EngineDiedError("the engine is gone")).as_instanceof_cause()


def dies_after(count: int, times: int = 1) -> Callable[[list[GenerateResult]], Iterable]:
    """Hand out ``count`` results and die; ``times`` calls long."""
    calls = itertools.count(1)

    def order(results: list[GenerateResult]) -> Iterable:
        return [*results[:count], died()] if next(calls) <= times else results

    return order


@pytest.mark.parametrize("count", [0, 3, 5])
def test_what_a_dead_engine_had_not_finished_is_asked_for_again(make_stream, count) -> None:
    broken, whole = Engine(dies_after(count)), Engine()
    revived = []
    batch = one_batch(make_stream([broken, whole], revive=revived.append))
    assert revived == [broken]
    first, second = broken.calls
    assert second == first[count:]
    assert len(whole.calls) == 1
    # Each trajectory once, and the same ones as without an accident: seeds belong to requests.
    assert flat(batch) == flat(one_batch(make_stream([Engine(), Engine()])))


def test_an_engine_that_died_over_nothing_is_not_asked_again(make_stream) -> None:
    broken = Engine(lambda results: [*results, died()])
    revived = []
    batch = one_batch(make_stream([broken], revive=revived.append))
    assert revived == [broken] and len(broken.calls) == 1
    assert len(batch.trajectories) == 10


def test_engines_that_keep_dying_end_the_run(make_stream) -> None:
    left = [2]

    def revive(_worker) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise GenerationError("3 engines died")

    stream = make_stream([Engine(dies_after(1, times=100))], revive=revive)
    with pytest.raises(GenerationError, match="3 engines died"):
        one_batch(stream)


def test_without_a_way_back_a_death_is_the_end(make_stream) -> None:
    with pytest.raises(EngineDiedError, match="the engine is gone"):
        one_batch(make_stream([Engine(dies_after(1))]))


# ---- roles that share devices ----------------------------------------------------------------------------------------


class Devices:
    """Stands in for the turns: one list of what happened, shared with the teachers and the engine."""

    sharing = ("actor_infer", "teacher-near", "teacher-nearer")

    def __init__(self, log: list) -> None:
        self.log = log

    def waves(self, first: Sequence[str], names: Sequence[str]) -> list[list[str]]:
        far = [n for n in names if n not in self.sharing]
        near = [[n] for n in names if n in self.sharing]
        return [far, *near] if first else [[*far, *near[0]], *near[1:]]

    def take(self, *names: str) -> None:
        self.log.append(("take", *names))


def test_teachers_on_the_engine_s_devices_score_once_it_has_drained(make_stream) -> None:
    log: list = []

    class Logging(Teachers):
        async def score(self, trajectories, names):
            log.append(("score", *names))
            return await super().score(trajectories, names)

    def order(results: list[GenerateResult]) -> Iterable:
        for i, result in enumerate(results):
            if i == len(results) - 1:
                log.append("drained")
            yield result

    teachers = Logging(block_size=4, names=["far", "near", "nearer"])
    batch = one_batch(make_stream([Engine(order)], teachers, turns=Devices(log)))
    assert log[0] == ("take", "actor_infer", "teacher-far")
    assert log.index(("score", "far")) < log.index("drained") < log.index(("take", "teacher-near"))
    after = log[log.index(("take", "teacher-near")) :]
    assert after == [
        ("take", "teacher-near"), *[("score", "near")] * 3, ("take", "teacher-nearer"), *[("score", "nearer")] * 3,
    ]  # fmt: skip
    assert all(sorted(t.teacher_scores) == ["far", "near", "nearer"] for t in batch.trajectories)


def test_scoring_again_takes_turns_too(make_stream) -> None:
    log: list = []
    teachers = Teachers(names=["far", "near", "nearer"])
    stream = make_stream([Engine()], teachers, turns=Devices(log))
    batch = one_batch(stream)
    log.clear()
    again = stream.score_again(batch.trajectories)
    assert log == [("take", "teacher-far", "teacher-near"), ("take", "teacher-nearer")]
    assert all(sorted(t.teacher_scores) == ["far", "near", "nearer"] for t in again)
