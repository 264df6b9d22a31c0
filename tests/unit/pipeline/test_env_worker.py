"""What environments return is checked, and what they raise becomes a failed episode. No Ray: the actor is a class."""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.environments.base import Opening, Outcome
from roll_opd.errors import ConfigError, EnvironmentFailedError, LaunchError
from roll_opd.pipeline.agentic import env_worker
from roll_opd.pipeline.agentic.env_metrics import aggregate
from roll_opd.pipeline.agentic.env_worker import EnvWorker, UnusableAnswerError

CONFIG = EnvironmentConfig(env_type="any")


class Colour(enum.IntEnum):
    RED = 3


class Scripted:
    """Answers a reset, and each step, with what it was given; raises what is an exception."""

    def __init__(self, opening: Any = ("go", {}), answer: Any = ("ok", 1, False, False, {})) -> None:
        self.opening, self.answer = opening, answer
        self.seeds: list[int] = []
        self.closed = 0
        self.threads: set[int] = set()

    def reset(self, *, seed=None, options=None) -> Any:
        self.seeds.append(seed)
        return self._give(self.opening)

    def step(self, action: str) -> Any:
        return self._give(self.answer)

    def close(self) -> None:
        self.closed += 1
        self.threads.add(threading.get_ident())

    def _give(self, answer: Any) -> Any:
        self.threads.add(threading.get_ident())
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def worker_of(monkeypatch, tmp_path):
    """A worker of two places whose environments are the given ones, one after the other."""

    def make(*environments: Any) -> EnvWorker:
        waiting = list(environments)

        def next_one(env_type: str, env_config: dict[str, Any], field: str) -> Any:
            environment = waiting.pop(0)
            if isinstance(environment, BaseException):
                raise environment
            return environment

        monkeypatch.setattr(env_worker, "make_environment", next_one)
        monkeypatch.setattr(env_worker, "configure_logging", lambda **_: None)
        return EnvWorker("env-test-0", str(tmp_path), 2)

    return make


def play(worker: EnvWorker, *actions: str, tag: str = "t", key: int = 1, seed: int = 5) -> list[Any]:
    """An episode from opening to close: everything it returned."""

    async def run() -> list[Any]:
        out: list[Any] = [await worker.open(key, tag, CONFIG, seed)]
        out += [await worker.step(key, action) for action in actions]
        await worker.close(key)
        return out

    return asyncio.run(run())


def test_what_is_returned_becomes_plain(worker_of) -> None:
    info = {
        "metrics": {"success": np.bool_(True), "distance": np.float32(0.5), "count": np.int64(3)},
        "colour": Colour.RED,
        "path": (np.int8(1), "a", None),
    }
    env = Scripted((np.str_("go"), info), ("ok", np.float32(0.25), np.bool_(True), False, None))
    opening, outcome = play(worker_of(env), "a")
    plain = {"metrics": {"success": True, "distance": 0.5, "count": 3}, "colour": 3, "path": [1, "a", None]}
    assert opening == Opening("go", plain)
    # Types of Python's own throughout: the driver need not have the environment's modules.
    assert type(opening.observation) is str and type(opening.info["colour"]) is int
    assert type(opening.info["metrics"]["success"]) is bool and type(opening.info["metrics"]["count"]) is int
    assert outcome == Outcome("ok", 0.25, True, False, {}, outcome.seconds) and type(outcome.reward) is float
    assert outcome.done and 0 <= outcome.seconds < 1 and env.seeds == [5]


@pytest.mark.parametrize("reward", [2, True, np.int64(2), np.array(2.0), Decimal("0.5")])
def test_any_finite_number_is_a_reward(worker_of, reward) -> None:
    _, outcome = play(worker_of(Scripted(answer=("ok", reward, False, False, {}))), "a")
    assert type(outcome.reward) is float and outcome.reward == float(reward)


def test_what_is_no_plain_value_is_left_out_and_named_once(worker_of, caplog) -> None:
    info = {"kept": 1, "board": np.zeros(3), "metrics": {"a": object(), "b": float("nan"), "c": 2.0}, 7: "seven"}
    env = Scripted(("go", {}), ("ok", 1, False, False, info))
    with caplog.at_level(logging.WARNING):
        _, outcome, again = play(worker_of(env), "a", "b")
    assert outcome.info == again.info == {"kept": 1, "metrics": {"c": 2.0}}
    told = [r.getMessage().split(": ", 2)[2] for r in caplog.records]
    assert told == [
        "7 is under a key that is no string; left out", "board is a ndarray; left out",
        "metrics.a is an object; left out", "metrics.b is nan; left out",
    ]  # fmt: skip


def test_metrics_that_the_pipeline_reads_are_what_it_expects(worker_of, caplog) -> None:
    infos = [
        {"metrics": {"success": 1, "action_is_valid": np.float32(0), "moves": np.int8(3)}, "metrics_agg_mode": None},
        {"metrics": None, "state": None, "metrics_agg_mode": {"moves": "median", "far": ["sum"], "success": "last"}},
        {"metrics": {"success": None, "far": 10**400}},
    ]
    envs = [Scripted(("go", infos[0]), ("ok", 1, False, False, info)) for info in infos[1:]]
    with caplog.at_level(logging.WARNING):
        opening, second = play(worker_of(envs[0]), "a")
        _, third = play(worker_of(envs[1]), "a")
    metrics = {"success": True, "action_is_valid": False, "moves": 3}
    assert opening.info == {"metrics": metrics} and opening.info["metrics"]["success"] is True
    assert opening.info["metrics"]["action_is_valid"] is False
    assert second.info == {"metrics_agg_mode": {"success": "last"}} and third.info == {"metrics": {"success": None}}
    told = [r.getMessage().split(": ", 2)[2] for r in caplog.records]
    known = "none of mean, sum, last, max, min; left out"
    assert told == [
        f"metrics_agg_mode.far is {known}", f"metrics_agg_mode.moves is {known}",
        "metrics.far is a number beyond all floats; left out",
    ]  # fmt: skip
    assert aggregate([opening.info, second.info, third.info]) == {"success": 1, "action_is_valid": 0, "moves": 3}


NOT_FINITE = "returned a reward that is no finite number"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (("ok", float("nan"), False, False, {}), "step returned a reward of nan"),
        (("ok", np.float32("-inf"), False, False, {}), "step returned a reward of -inf"),
        (("ok", 10**400, False, False, {}), f"step {NOT_FINITE}: int too large to convert to float"),
        (("ok", "1.0", False, False, {}), "step returned a reward that is a str, not a number"),
        (("ok", None, False, False, {}), "step returned a reward that is None, not a number"),
        ((3, 1.0, False, False, {}), "step returned an observation that is an int, not a string"),
        (("\ud800", 1.0, False, False, {}), "step returned an observation with half of a surrogate pair, which is no "
         "text"),
        (("ok", 1.0, 1, False, {}), "step returned a `terminated` that is an int, not a boolean"),
        (("ok", 1.0, False, None, {}), "step returned a `truncated` that is None, not a boolean"),
        (("ok", 1.0, False, False, [1]), "step returned an `info` that is a list of 1, not a mapping"),
        (("ok", 1.0, False, False, {"metrics": [1]}), "step returned an `info` whose `metrics` is a list of 1, not a "
         "mapping"),
        (("ok", 1.0, False, False, {"metrics_agg_mode": "mean"}), "step returned an `info` whose `metrics_agg_mode` is "
         "a str, not a mapping"),
        (("ok", 1.0, False, False, {"metrics": {"success": "no"}}), "step returned an `info` whose `metrics.success` "
         "is a str, not a boolean"),
        (("ok", 1.0, False, False, {"metrics": {"action_is_valid": 0.5}}), "step returned an `info` whose "
         "`metrics.action_is_valid` is 0.5, not a boolean"),
        (("ok", 1.0, False, {}), "step returned a tuple of 4, not observation, reward, terminated, truncated and "
         "`info`"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_fails_the_episode(worker_of, answer, reason) -> None:
    broken, fresh = Scripted(answer=answer), Scripted()
    worker = worker_of(broken, fresh)
    with pytest.raises(UnusableAnswerError) as caught:
        play(worker, "a")
    assert (caught.value.tag, caught.value.reason) == ("t", reason)
    # The next episode gets another environment.
    play(worker, key=2, seed=6)
    assert fresh.seeds == [6] and broken.seeds == [5]


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        ("go", "reset returned a str, not an observation and `info`"),
        ((b"go", {}), "reset returned an observation that is a bytes, not a string"),
    ],
)
def test_an_opening_that_cannot_be_used(worker_of, opening, reason) -> None:
    with pytest.raises(UnusableAnswerError) as caught:
        play(worker_of(Scripted(opening)))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (ValueError("no\n  such"), "ValueError: no such"),
        (SystemExit(), "SystemExit"),
        (ValueError("x" * 900), f"ValueError: {'x' * 500}"),
    ],
)
def test_an_exception_fails_the_episode_and_says_where_it_came_from(worker_of, error, described) -> None:
    env = Scripted(answer=error)

    async def run() -> None:
        worker = worker_of(env)
        await worker.open(1, "t", CONFIG, 0)
        with pytest.raises(EnvironmentFailedError) as caught:
            await worker.step(1, "a")
        assert not isinstance(caught.value, UnusableAnswerError)
        start, _, where = caught.value.reason.partition(" (")
        assert start == f"step raised {described}"
        assert where.startswith("test_env_worker.py, line ") and where.endswith(", in _give)")
        await worker.close(1)  # has failed: nothing to do
        await worker.shut_down()

    asyncio.run(run())
    assert env.closed == 1


def test_a_config_error_goes_through(worker_of) -> None:
    refusal = ConfigError("custom_envs.t.env_type", "is unknown")
    with pytest.raises(ConfigError) as caught:
        play(worker_of(refusal))
    assert caught.value is refusal


def test_what_cannot_be_started_stops_the_run_at_a_reset_and_costs_an_episode_in_a_step(worker_of) -> None:
    busy = LaunchError("namespaces: not ready after 10 s")
    with pytest.raises(LaunchError):
        play(worker_of(Scripted(opening=busy)))
    with pytest.raises(EnvironmentFailedError) as caught:
        play(worker_of(Scripted(answer=busy)), "a")
    assert caught.value.reason == "step: namespaces: not ready after 10 s"


def test_an_environment_is_reset_for_the_next_episode_of_its_tag_alone(worker_of) -> None:
    first, second, third = Scripted(), Scripted(), Scripted()
    worker = worker_of(first, second, third)
    play(worker, key=1, tag="a", seed=1)
    play(worker, key=2, tag="a", seed=2)
    play(worker, key=3, tag="b", seed=3)
    assert (first.seeds, second.seeds, first.closed) == ([1, 2], [3], 0)
    # There are places for two: the one that has been idle for longest makes room.
    play(worker, key=4, tag="c", seed=4)
    asyncio.run(worker.shut_down())
    assert third.seeds == [4] and (first.closed, second.closed, third.closed) == (1, 1, 1)
    # Each has seen one thread, from its first reset to its close.
    assert len(first.threads) == 1 and threading.get_ident() not in first.threads
