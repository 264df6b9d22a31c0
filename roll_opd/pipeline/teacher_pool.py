"""Who scores what: tag -> teachers, least-loaded replica, deadline, retry on another one, failure budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.distributed.runtime import user_error
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult
from roll_opd.errors import RollOPDError, TeacherError
from roll_opd.trajectory import TeacherScores, Trajectory, check_per_token

logger = logging.getLogger(__name__)


@dataclass
class Replica:
    """One worker of a teacher and how many tokens it has been asked for."""

    worker: Any
    tokens: int = 0
    dead: bool = False


@dataclass
class Teacher:
    """A teacher's replicas and policy."""

    name: str
    config: TeacherConfig
    replicas: list[Replica]
    failures: int = 0
    last_failure: str = ""
    rejected: list[str] = field(default_factory=list)

    def covers(self, tag: str) -> bool:
        """Whether samples with ``tag`` are this teacher's."""
        return not self.config.tag_included or tag in self.config.tag_included


class TeacherPool:
    """Scores trajectories by every teacher that covers them.

    Args:
        teachers: name -> (config, worker handles).
    """

    def __init__(self, teachers: Mapping[str, tuple[TeacherConfig, Sequence[Any]]]) -> None:
        self.teachers = {
            name: Teacher(name, config, [Replica(w) for w in workers]) for name, (config, workers) in teachers.items()
        }

    def route(self, tag: str) -> list[str]:
        """Return the names of the teachers that cover ``tag``."""
        return [name for name, teacher in self.teachers.items() if teacher.covers(tag)]

    @property
    def block_size(self) -> int:
        """Sequences that are worth sending together."""
        return min((t.config.infer_batch_size for t in self.teachers.values()), default=1)

    @property
    def failures(self) -> int:
        """Requests that failed so far, retried ones included."""
        return sum(t.failures for t in self.teachers.values())

    async def score(self, trajectories: Sequence[Trajectory]) -> list[dict[str, TeacherScores]]:
        """Return, for each trajectory, the scores of each teacher that covers its tag.

        Raises:
            TeacherError: a teacher's failure budget is spent, or none of its replicas is left.
        """
        out: list[dict[str, TeacherScores]] = [{} for _ in trajectories]

        async def one(teacher: Teacher) -> None:
            mine = [i for i, t in enumerate(trajectories) if teacher.covers(t.tag)]
            if mine:
                scores = await self._score_by(teacher, [trajectories[i] for i in mine])
                for i, score in zip(mine, scores, strict=True):
                    out[i][teacher.name] = score

        await asyncio.gather(*(one(teacher) for teacher in self.teachers.values()))
        return out

    async def _score_by(self, teacher: Teacher, trajectories: list[Trajectory]) -> list[TeacherScores]:
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in trajectories]
        tokens = sum(len(t) for t in trajectories)
        tried: set[int] = set()
        for _ in range(teacher.config.max_retries + 1):
            index = self._pick(teacher, tried)
            replica = teacher.replicas[index]
            tried.add(index)
            replica.tokens += tokens
            try:
                results = await asyncio.wait_for(
                    _resolve(replica.worker.score.remote(requests)), teacher.config.request_timeout
                )
                return [accept(t, r) for t, r in zip(trajectories, results, strict=True)]
            except RayError as error:  # before TimeoutError: Ray's copy of a worker's exception is of both classes
                if isinstance(error, RayTaskError) and isinstance(user_error(error), RollOPDError):
                    raise user_error(error) from error
                # An actor that is only unreachable for now may come back; one that died does not.
                replica.dead = isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
                reason = error.cause if isinstance(error, RayTaskError) else str(error).strip().splitlines()[0]
                self._failed(teacher, index, f"{type(error).__name__}: {reason}")
            except TimeoutError:
                # The request is still being worked on: its load stays counted, so that others go elsewhere first.
                replica.tokens += tokens
                self._failed(teacher, index, f"no answer within {teacher.config.request_timeout:.0f} s")
            except ValueError as error:
                self._failed(teacher, index, f"unusable scores: {error}")
            finally:
                replica.tokens -= tokens
        attempts = teacher.config.max_retries + 1
        raise TeacherError(
            f"teacher {teacher.name!r}: {attempts} attempts at one request failed; last: {teacher.last_failure}"
        )

    def _pick(self, teacher: Teacher, tried: set[int]) -> int:
        alive = [i for i, r in enumerate(teacher.replicas) if not r.dead]
        if not alive:
            raise TeacherError(f"teacher {teacher.name!r}: no replica is left; last failure: {teacher.last_failure}")
        fresh = [i for i in alive if i not in tried] or alive
        return min(fresh, key=lambda i: (teacher.replicas[i].tokens, i))

    def _failed(self, teacher: Teacher, replica: int, reason: str) -> None:
        teacher.failures += 1
        teacher.last_failure = f"replica {replica}: {reason}"
        logger.warning("teacher %s: request failed (%s), %s", teacher.name, teacher.failures, teacher.last_failure)
        if teacher.failures > teacher.config.failure_budget:
            raise TeacherError(
                f"teacher {teacher.name!r} failed {teacher.failures} times, more than its failure_budget of "
                f"{teacher.config.failure_budget}; last: {teacher.last_failure}"
            )


async def _resolve(ref: Any) -> list[ScoreResult]:
    return await ref


def accept(trajectory: Trajectory, result: ScoreResult) -> TeacherScores:
    """Check that ``result`` was made for ``trajectory`` and can be trained on.

    Raises:
        ValueError: another sequence, another length, or a value that is not finite.
    """
    wanted = ScoreRequest(trajectory.id, trajectory.tokens, trajectory.response_mask)
    if result.id != wanted.id or result.checksum != wanted.checksum:
        raise ValueError(f"asked for trajectory {trajectory.id}, got the scores of another sequence ({result.id})")
    check_per_token("teacher logprobs", result.logprobs, trajectory)
    return TeacherScores(np.where(trajectory.response_mask, result.logprobs, np.float32(0.0)))
