"""Trajectories made by hand, and worker handles that answer like Ray actors, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult
from roll_opd.trajectory import TeacherScores, Trajectory, TrajectoryId


def make_trajectory(
    draw: int = 0, prompt: int = 2, response: int = 3, sample: int = 0, tag: str = "math", **fields: Any
) -> Trajectory:
    """Tokens ``100 * draw + 10 * sample + position``; everything derived is a function of those."""
    n = prompt + response
    mask = np.arange(n) >= prompt
    values: dict[str, Any] = {
        "id": TrajectoryId(draw, sample),
        "tag": tag,
        "tokens": (100 * draw + 10 * sample + np.arange(n)).astype(np.int32),
        "response_mask": mask,
        "infer_logprobs": np.where(mask, -0.5, 0.0).astype(np.float32),
        "weight_version": np.where(mask, 0, -1).astype(np.int32),
    }
    return Trajectory(**(values | fields))


def good_scores(requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
    """Each token's score is minus its id, and rubbish off the mask."""
    return [
        ScoreResult(r.id, r.checksum, np.where(r.response_mask, -r.tokens, 77.0).astype(np.float32)) for r in requests
    ]


class Method:
    """``worker.method.remote(...)`` as an awaitable."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        async def call() -> Any:
            result = self.function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.ensure_future(call())


class ScoringWorker:
    """A teacher replica that answers by ``answers``, one a call; the last one is repeated."""

    def __init__(self, *answers: Callable[[Sequence[ScoreRequest]], Any] | BaseException) -> None:
        self.answers = list(answers) or [good_scores]
        self.calls: list[list[ScoreRequest]] = []
        self.score = Method(self._score)

    def _score(self, requests: Sequence[ScoreRequest]) -> Any:
        self.calls.append(list(requests))
        answer = self.answers[min(len(self.calls), len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer(requests)


class Fakes:
    """What the tests of this folder share."""

    trajectory = staticmethod(make_trajectory)
    good_scores = staticmethod(good_scores)
    Method = Method
    ScoringWorker = ScoringWorker
    TeacherScores = TeacherScores


@pytest.fixture(scope="session")
def fakes() -> type[Fakes]:
    return Fakes
