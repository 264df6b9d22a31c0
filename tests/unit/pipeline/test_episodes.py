"""The player of episodes over scripted environments and engines: tokens, turns, retries, limits, overlap."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling
from roll_opd.environments.base import Opening, Outcome
from roll_opd.errors import ConfigError, DataError, EngineDiedError, GenerationError
from roll_opd.pipeline.agentic import turn_queue
from roll_opd.pipeline.agentic.env_pool import EpisodeLostError
from roll_opd.pipeline.agentic.episodes import EnvTask, EpisodeRollout, PrivilegedView
from roll_opd.pipeline.generation import Generation
from roll_opd.pipeline.rollout import Draw, Engines, RolloutJob, Sample
from roll_opd.trajectory import TrajectoryId

pytestmark = pytest.mark.timeout(60)

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models.student)


class Countdown:
    """Shows a number that goes down by one in each turn, with reward 1; at 0 the episode is won."""

    def __init__(self, start: int, seconds: float = 0.0) -> None:
        self.left = start
        self.seconds = seconds

    def opening(self, seed: int) -> Opening:
        return Opening(f"start {self.left}", {"env_instruction": "Count.", "hint": f"h{seed}"})

    async def step(self, action: str) -> Outcome:
        await asyncio.sleep(self.seconds)
        self.left -= 1
        metrics = {"success": self.left == 0, "action_is_valid": self.left != 1, "left": self.left}
        return Outcome(
            f"now {self.left}", 1.0, self.left == 0, False, {"metrics": metrics, "metrics_agg_mode": {"left": "min"}}
        )


class Broken(Countdown):
    """Fails in its second turn."""

    async def step(self, action: str) -> Outcome:
        if self.left == 2:
            raise EpisodeLostError("count", "it broke", "error")
        return await super().step(action)


class Pool:
    """Makes environments; notes seeds and who plays alone."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.asked: list[tuple[int, bool]] = []
        self.open = 0

    @contextlib.asynccontextmanager
    async def episode(self, tag: str, seed: int, alone: bool = False):
        environment = self.make(len(self.asked))
        self.asked.append((seed, alone))
        self.open += 1
        try:
            environment.tag = tag
            opening = environment.opening(seed)
            yield type("Session", (), {"opening": opening, "step": staticmethod(environment.step), "tag": tag})
        finally:
            self.open -= 1


class Engine:
    """Answers with tokens that follow from the request's seed; notes its calls."""

    def __init__(self, tokenizer: Any, seconds: float = 0.0) -> None:
        self.tokenizer = tokenizer
        self.seconds = seconds
        self.calls: list[list[GenerateRequest]] = []

    async def ask(self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable) -> None:
        self.calls.append(list(requests))
        await asyncio.sleep(self.seconds)
        for request in requests:
            finished(self.answer(request))

    def answer(self, request: GenerateRequest) -> GenerateResult:
        ids = self.tokenizer.encode(f" {request.seed % 9}", add_special_tokens=False)
        ids = np.array([*ids, self.tokenizer.eos_token_id][: request.sampling.max_new_tokens], dtype=np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
        return GenerateResult(request.id, ids, logprobs, np.full(len(ids), 7, dtype=np.int32), "stop", 0.5)

    @property
    def requests(self) -> list[GenerateRequest]:
        return [request for call in self.calls for request in call]


def rollout(
    tokenizer, pool: Pool, engine: Engine, config: EnvironmentConfig | None = None, **settings
) -> EpisodeRollout:
    options: dict[str, Any] = {
        "environments": {"count": config or EnvironmentConfig(env_type="x", agent_template="See {observation}")},
        "pools": {"train": pool},
        "penalties": {"train": -0.25},
        "generation": engine,
        "side_by_side": False,
        "tokenizer": tokenizer,
        "stop_ids": [tokenizer.eos_token_id],
        "max_length": 400,
        "views": {},
    } | settings
    return EpisodeRollout(**options)


def play(player: EpisodeRollout, draws: int = 1, num_samples: int = 1, stream: str = "train") -> list[Sample]:
    job = RolloutJob(
        [Draw(i, EnvTask("count", 100 + i)) for i in range(draws)], num_samples, SAMPLING, 5, stream,
        Engines("actor_infer", ["engine"]),
    )  # fmt: skip
    samples: list[Sample] = []
    try:
        asyncio.run(asyncio.wait_for(player.run(job, samples.append), 30))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return sorted(samples, key=lambda s: (s.draw, s.sample))


def test_an_episode_token_by_token(tokenizer) -> None:
    """Two turns by hand: what was sampled is kept, what stands around it is the template's, and rewards follow."""
    engine, pool = Engine(tokenizer), Pool(lambda i: Countdown(2))
    (sample,) = play(rollout(tokenizer, pool, engine))
    (t,) = sample.trajectories
    first, second = engine.requests
    name = TrajectoryId(0, 0)
    assert [r.seed for r in engine.requests] == [name.seed(5), name.seed(5, 1)] and first.seed != second.seed
    said = [f" {r.seed % 9}" for r in engine.requests]
    text = (
        f"<|im_start|>user\nCount.\nSee start 2<|im_end|>\n<|im_start|>assistant\n{said[0]}<|im_end|>\n"
        f"<|im_start|>user\nSee now 1<|im_end|>\n<|im_start|>assistant\n{said[1]}<|im_end|>"
    )
    assert tokenizer.decode(t.tokens.tolist()) == text
    assert tuple(t.tokens[: t.turns[1].start].tolist()) == second.prompt_ids
    answers = [engine.answer(r) for r in engine.requests]
    sampled = np.concatenate([a.response_ids for a in answers])
    assert t.sampled(t.tokens).tolist() == sampled.tolist()
    assert t.sampled(t.infer_logprobs).tolist() == [-1.0, -2.0, -1.0, -2.0]
    assert t.sampled(t.weight_version).tolist() == [7] * 4 and (t.weight_version[~t.response_mask] == -1).all()
    # The first action is invalid (one is left): reward 1 - 0.25.
    assert [(u.index, u.end - u.start, u.observation, u.reward, u.state, u.is_valid) for u in t.turns] == [
        (0, 2, "start 2", 0.75, "start 2", False),
        (1, 2, "now 1", 1.0, "now 1", True),
    ]
    assert (t.reward, t.correct, t.finish_reason, t.sampled_mass, t.id) == (1.75, True, "stop", 0.5, name)
    # success and action_is_valid as means, left as its least.
    assert t.extras["env_metrics"] == {"success": 0.5, "action_is_valid": 0.5, "left": 0.0}
    assert pool.asked == [(100, False)] and pool.open == 0


def test_steps_are_trajectories_of_their_own(tokenizer) -> None:
    config = EnvironmentConfig(
        env_type="x", episode_mode="step", history_length=1,
        agent_template="{env_instruction} {step_count} [{history}] {current_observation}",
    )  # fmt: skip
    engine = Engine(tokenizer)
    (sample,) = play(rollout(tokenizer, Pool(lambda i: Countdown(3)), engine, config))
    said = [f" {r.seed % 9}" for r in engine.requests]
    prompts = [
        "Count. 0 [] start 3",
        f"Count. 1 [(step: 1, observation: start 3, action: {said[0]}, reward: 1)] now 2",
        f"Count. 2 [(step: 2, observation: now 2, action: {said[1]}, reward: 0.75)] now 1",
    ]
    for i, (t, prompt) in enumerate(zip(sample.trajectories, prompts, strict=True)):
        assert t.id == TrajectoryId(0, 0, i)
        shown = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{said[i]}<|im_end|>"
        assert tokenizer.decode(t.tokens.tolist()) == shown
        assert [u.index for u in t.turns] == [i] and t.reward == 2.75 and t.correct is True
    assert ["env_metrics" in t.extras for t in sample.trajectories] == [True, False, False]


def test_a_failed_environment_costs_one_attempt(tokenizer) -> None:
    """The second attempt plays alone, with the same seed, and asks for the same tokens."""
    engine = Engine(tokenizer)
    pool = Pool(lambda i: Broken(3) if i == 0 else Countdown(3))
    player = rollout(tokenizer, pool, engine)
    (sample,) = play(player)
    assert pool.asked == [(100, False), (100, True)]
    assert [(r.prompt_ids, r.seed) for r in engine.requests[:2]] == [
        (r.prompt_ids, r.seed) for r in engine.requests[2:4]
    ]
    assert len(sample.trajectories) == 1 and len(sample.trajectories[0].turns) == 3
    assert player.failures == {"count": 1} and pool.open == 0


def test_failing_twice_gives_the_group_up(tokenizer) -> None:
    pool = Pool(lambda i: Broken(3))
    player = rollout(tokenizer, pool, Engine(tokenizer))
    (sample,) = play(player)
    assert sample.trajectories == () and "it broke" in sample.failure
    assert [alone for _, alone in pool.asked] == [False, True] and player.failures == {"count": 2}


def test_an_observation_longer_than_the_context_is_not_tried_twice(tokenizer) -> None:
    pool = Pool(lambda i: Countdown(2))
    (sample,) = play(rollout(tokenizer, pool, Engine(tokenizer), max_length=10))
    assert "sequence_length is 10" in sample.failure and len(pool.asked) == 1


def test_a_full_context_ends_the_episode(tokenizer) -> None:
    """28 tokens of prompt, turns of two and bridges: what does not fit is never begun."""
    engine = Engine(tokenizer)
    full = play(rollout(tokenizer, Pool(lambda i: Countdown(9)), engine))[0].trajectories[0]
    limit = full.turns[3].start  # exactly no room for the fourth turn
    (t,) = play(rollout(tokenizer, Pool(lambda i: Countdown(9)), Engine(tokenizer), max_length=limit))[0].trajectories
    assert len(t.turns) == 3 and t.finish_reason == "length" and len(t) <= limit and t.correct is False
    (t,) = play(rollout(tokenizer, Pool(lambda i: Countdown(9)), Engine(tokenizer), max_length=limit + 1))[
        0
    ].trajectories
    assert len(t.turns) == 4 and t.turns[3].end - t.turns[3].start == 1  # room for one token


def test_a_full_context_can_be_shortened(tokenizer) -> None:
    config = EnvironmentConfig(
        env_type="x", agent_template="See {observation}",
        on_context_full="roll_opd.pipeline.agentic.context_limits.drop_oldest_turns",
    )  # fmt: skip
    (sample,) = play(rollout(tokenizer, Pool(lambda i: Countdown(9)), Engine(tokenizer), config, max_length=160))
    assert len(sample.trajectories) > 1
    indices = [u.index for t in sample.trajectories for u in t.turns]
    assert indices == list(range(9)) and all(len(t) <= 160 for t in sample.trajectories)
    later = tokenizer.decode(sample.trajectories[1].tokens.tolist())
    assert later.startswith("<|im_start|>user\nCount.\nSee start 9<|im_end|>")
    assert all(t.reward == 8.75 and t.correct for t in sample.trajectories)


def test_what_a_shortening_function_returns_is_checked(tokenizer, monkeypatch) -> None:
    from roll_opd.pipeline.agentic import context_limits

    monkeypatch.setattr(context_limits, "drop_oldest_turns", lambda messages: messages[:-1])
    config = EnvironmentConfig(
        env_type="x", on_context_full="roll_opd.pipeline.agentic.context_limits.drop_oldest_turns"
    )
    with pytest.raises(GenerationError, match=r"custom_envs\.count\.on_context_full"):
        play(rollout(tokenizer, Pool(lambda i: Countdown(9)), Engine(tokenizer), config, max_length=100))


def test_turns_end_at_max_steps(tokenizer) -> None:
    config = EnvironmentConfig(env_type="x", max_steps=2, max_tokens_per_step=1)
    engine = Engine(tokenizer)
    (t,) = play(rollout(tokenizer, Pool(lambda i: Countdown(9)), engine, config))[0].trajectories
    assert len(t.turns) == 2 and t.correct is False and t.response_length == 2
    assert all(r.sampling.max_new_tokens == 1 for r in engine.requests)


def test_members_of_a_group_begin_alike_and_sample_differently(tokenizer) -> None:
    pool, engine = Pool(lambda i: Countdown(1)), Engine(tokenizer)
    samples = play(rollout(tokenizer, pool, engine), draws=2, num_samples=3)
    assert sorted(seed for seed, _ in pool.asked) == [100] * 3 + [101] * 3
    assert [(s.draw, s.sample) for s in samples] == [(d, s) for d in range(2) for s in range(3)]
    assert len({r.seed for r in engine.requests}) == 6


def test_a_free_engine_waits_for_the_other_episodes(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight episodes of three turns whose environments take 10 to 80 ms: three calls of eight, sorted."""
    monkeypatch.setattr(turn_queue, "SHORTEST_WAIT", 10.0)
    monkeypatch.setattr(turn_queue, "LONGEST_WAIT", 10.0)
    engine = Engine(tokenizer)
    play(rollout(tokenizer, Pool(lambda i: Countdown(3, seconds=0.01 * (i + 1))), engine), draws=4, num_samples=2)
    assert [len(call) for call in engine.calls] == [8, 8, 8]
    assert all([r.id for r in call] == sorted(r.id for r in call) for call in engine.calls)


def test_environments_and_engine_overlap(tokenizer) -> None:
    """Eight episodes whose three turns take 0.2 s each: as long as one of them takes, not as all."""
    player = rollout(tokenizer, Pool(lambda i: Countdown(3, seconds=0.2)), Engine(tokenizer), side_by_side=True)
    began = time.perf_counter()
    play(player, draws=8)
    assert time.perf_counter() - began < 0.8 * 8 * 3 * 0.2


def test_a_broken_engine_ends_the_rollout(tokenizer) -> None:
    class Silent(Engine):
        async def ask(self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable) -> None:
            if len(self.calls) == 1:
                raise GenerationError("the generating process died")
            await super().ask(worker, requests, finished)

    pool = Pool(lambda i: Countdown(3))
    with pytest.raises(GenerationError, match="process died"):
        play(rollout(tokenizer, pool, Silent(tokenizer)), draws=2)
    assert pool.open == 0


def test_nobody_waits_for_an_episode_that_is_over(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven long episodes and a short one: after its end seven turns are all, and go at once."""
    monkeypatch.setattr(turn_queue, "SHORTEST_WAIT", 30.0)
    monkeypatch.setattr(turn_queue, "LONGEST_WAIT", 30.0)
    engine = Engine(tokenizer)
    began = time.perf_counter()
    # The short one ends last of its round, when the others wait already.
    pool = Pool(lambda i: Countdown(1, seconds=0.2) if i == 3 else Countdown(3))
    play(rollout(tokenizer, pool, engine), draws=8)
    assert [len(call) for call in engine.calls] == [8, 7, 7]
    assert time.perf_counter() - began < 15


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_a_rollout_ends_where_a_cancellation_is_lost(tokenizer, side_by_side: bool, breaks: bool) -> None:
    """The last answer is there before its call ends, and the call swallows a cancellation, as `wait_for` may."""

    class Lossy(Engine):
        async def ask(self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable) -> None:
            await super().ask(worker, requests, finished)
            if breaks and len(self.calls) == 2:
                finished(self.answer(requests[0]))  # twice: an error of the engine's
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)

    player = rollout(tokenizer, Pool(lambda i: Countdown(2)), Lossy(tokenizer), side_by_side=side_by_side)
    with pytest.raises(GenerationError, match="twice") if breaks else contextlib.nullcontext():
        play(player, draws=3)


def test_an_episode_that_loses_its_cancellation_ends_with_its_rollout(tokenizer) -> None:
    """The engine fails while the environment of another episode, which goes on to ask for a turn, swallows its end."""

    class Breaks(Engine):
        async def ask(self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable) -> None:
            if len(self.calls) == 2:
                raise GenerationError("the generating process died")
            await super().ask(worker, requests, finished)

    class Deaf(Countdown):
        async def step(self, action: str) -> Outcome:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            return await super().step(action)

    pool = Pool(lambda i: Deaf(3) if i else Countdown(3))
    with pytest.raises(GenerationError, match="process died"):
        play(rollout(tokenizer, pool, Breaks(tokenizer), side_by_side=True), draws=2)
    assert pool.open == 0


def test_a_turn_that_nobody_waits_for_any_more_hides_no_error(tokenizer) -> None:
    """An environment is misconfigured; the other episode's turn arrives when that one has ended."""

    class Misconfigured(Countdown):
        async def step(self, action: str) -> Outcome:
            await at_the_engine.wait()
            raise ConfigError("custom_envs.count.env_config", "has no map")

    class Late(Engine):
        async def ask(self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable) -> None:
            try:
                if self.calls:
                    at_the_engine.set()
                    await asyncio.sleep(3600)
            finally:
                await super().ask(worker, requests, finished)

    at_the_engine = asyncio.Event()
    pool = Pool(lambda i: Countdown(3) if i else Misconfigured(3))
    with pytest.raises(ConfigError, match="has no map"):
        play(rollout(tokenizer, pool, Late(tokenizer), side_by_side=True), draws=2)
    assert pool.open == 0


def test_one_death_of_an_engine_is_one_revival(tokenizer) -> None:
    """Turns are calls of their own at an engine that takes many at once: all of them lose it, one brings it back.

    Three of eight episodes lose their second turn. The others ask for theirs while there is no engine, and wait.
    """

    class Mortal:
        """``worker.generate.options(...).remote(requests)``: the first engine dies once it has three second turns."""

        def __init__(self) -> None:
            self.engine: int | None = 1
            self.asked = self.held = 0
            self.dead, self.gone = asyncio.Event(), asyncio.Event()
            self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.remote))

        async def remote(self, requests):
            self.asked += len(requests)
            if self.engine is None:
                raise AttributeError("'NoneType' object has no attribute 'model_config'")
            if self.engine == 1 and self.asked > 8:
                self.held += 1
                if self.held == 3:
                    self.dead.set()
                await self.dead.wait()
                raise EngineDiedError("student_infer: the engine died")
            for request in requests:
                yield asyncio.sleep(0, [Engine(tokenizer).answer(request)])

    class Paced(Countdown):
        """The first steps of three episodes end one after the other, those of the rest while there is no engine."""

        async def step(self, action: str) -> Outcome:
            number = environments.index(self)
            while number < 3 and worker.held < number:
                await asyncio.sleep(0.001)
            if number >= 3:
                await worker.gone.wait()
            return await super().step(action)

    def make(_: int) -> Paced:
        environments.append(Paced(2))
        return environments[-1]

    def steps() -> int:
        return sum(2 - environment.left for environment in environments)

    async def revive(dead) -> None:
        assert dead is worker
        revived.append(steps())
        worker.engine = None
        worker.gone.set()
        while steps() < 8:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        worker.engine = 2

    worker = Mortal()
    environments: list[Paced] = []
    revived: list[int] = []
    player = rollout(tokenizer, Pool(make), Generation(revive, 20.0), side_by_side=True)  # type: ignore[arg-type]
    samples: list[Sample] = []
    draws = [Draw(i, EnvTask("count", i)) for i in range(8)]
    job = RolloutJob(draws, 1, SAMPLING, 5, "train", Engines("actor_infer", [worker]))
    asyncio.run(player.run(job, samples.append))
    assert revived == [3] and len(samples) == 8 and all(len(s.trajectories[0].turns) == 2 for s in samples)
    # Sixteen turns, three of them asked for twice.
    assert worker.asked == 16 + 3


def test_success_that_nobody_tells_is_unknown(tokenizer) -> None:
    """Neither at its end nor where it is cut; a last turn that tells nothing after others did is no success."""

    class Mute(Countdown):
        tells: tuple[int, ...] = ()

        async def step(self, action: str) -> Outcome:
            outcome = await super().step(action)
            return outcome if self.left in self.tells else dataclasses.replace(outcome, info={})

    class Tells(Mute):
        tells = (1,)

    def success(make: type[Countdown], start: int) -> bool | None:
        config = EnvironmentConfig(env_type="x", max_steps=3)
        return (
            play(rollout(tokenizer, Pool(lambda i: make(start)), Engine(tokenizer), config))[0].trajectories[0].correct
        )

    assert success(Mute, 2) is None and success(Mute, 9) is None
    assert success(Tells, 2) is False and success(Countdown, 2) is True and success(Countdown, 9) is False


def view(template: str, limit: int = 400) -> Mapping[str, PrivilegedView]:
    return {"wise": PrivilegedView(template, limit, lambda tag: tag == "count")}


def test_a_teacher_with_a_view_of_its_own(tokenizer) -> None:
    views = view("{{ prompt }} ({{ hint }}, {{ tag }})")
    (t,) = play(rollout(tokenizer, Pool(lambda i: Countdown(2)), Engine(tokenizer), views=views))[0].trajectories
    shown = "<|im_start|>user\nCount.\nSee start 2 (h100, count)<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(list(t.contexts["wise"])) == shown
    with pytest.raises(DataError, match="more than 5"):
        play(rollout(tokenizer, Pool(lambda i: Countdown(2)), Engine(tokenizer), views=view("{{ prompt }}", 5)))


def test_validation_has_its_own_pool_and_penalty(tokenizer) -> None:
    train, val = Pool(lambda i: Countdown(2)), Pool(lambda i: Countdown(2))
    player = rollout(
        tokenizer, train, Engine(tokenizer), pools={"train": train, "val": val}, penalties={"train": -1.0, "val": 0.0}
    )
    (sample,) = play(player, stream="val")
    assert not train.asked and sample.trajectories[0].reward == 2.0 and sample.trajectories[0].id.stream == "val"
    (sample,) = play(player, stream="probe")
    assert len(train.asked) == 1 and sample.trajectories[0].reward == 1.0


def test_rewards_of_turns_add_up(tokenizer) -> None:
    (t,) = play(rollout(tokenizer, Pool(lambda i: Countdown(4)), Engine(tokenizer)))[0].trajectories
    assert t.reward == sum(u.reward for u in t.turns)
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.reward = 0.0  # type: ignore[misc]
