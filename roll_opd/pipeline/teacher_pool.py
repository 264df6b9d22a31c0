"""Who scores what: tag -> teachers, least-loaded replica, deadline, retry on another one, failure budget.

A reference policy and a base model are scorers like any teacher; what their scores are used for is not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.distributed.cluster import Replica
from roll_opd.distributed.cores import Cores
from roll_opd.distributed.runtime import user_error
from roll_opd.distributed.strategy.base import SAMPLED_ONLY, ScoreRequest, ScoreResult, ScoreWant
from roll_opd.errors import EngineDiedError, RollOPDError, TeacherError
from roll_opd.pipeline.batching import rank_shares, undeal
from roll_opd.trajectory import DetailsRef, TeacherScores, Trajectory, check_per_token

logger = logging.getLogger(__name__)


@dataclass
class Load:
    """One replica of a teacher and how many tokens it has been asked for.

    ``engine`` counts the engines that it had; a new one that is on its way is ``starting``.
    """

    replica: Replica
    tokens: int = 0
    dead: bool = False
    engine: int = 0
    starting: asyncio.Task[None] | None = None

    async def replace_engine(self, died: int) -> None:
        """Have the engine numbered ``died`` replaced, once, however many requests it took along."""
        if self.engine == died:
            self.engine += 1
            self.starting = asyncio.ensure_future(_restart(self.replica))
        await self.started()

    async def started(self) -> None:
        """Wait for an engine that is on its way."""
        if self.starting is not None:
            await asyncio.shield(self.starting)


@dataclass
class Teacher:
    """A teacher's replicas and policy."""

    name: str
    config: TeacherConfig
    replicas: list[Load]
    want: ScoreWant = SAMPLED_ONLY
    failures: int = 0
    last_failure: str = ""
    rejected: list[str] = field(default_factory=list)

    def covers(self, tag: str) -> bool:
        """Whether samples with ``tag`` are this teacher's."""
        return not self.config.tag_included or tag in self.config.tag_included


class TeacherPool:
    """Scores trajectories by every teacher that covers them.

    Args:
        teachers: name -> (config, replicas).
        wants: name -> what to ask for besides the sampled token's log-probability.
        cores: lends them to replicas that score; None: nobody borrows any.
    """

    def __init__(
        self,
        teachers: Mapping[str, tuple[TeacherConfig, Sequence[Replica]]],
        wants: Mapping[str, ScoreWant] | None = None,
        cores: Cores | None = None,
    ) -> None:
        wants = wants or {}
        self._cores = cores or Cores()
        self.teachers = {
            name: Teacher(name, config, [Load(r) for r in replicas], wants.get(name, SAMPLED_ONLY))
            for name, (config, replicas) in teachers.items()
        }
        # Requests past their deadline that are still being worked on.
        self._late: set[asyncio.Future[list[ScoreResult]]] = set()

    def route(self, tag: str) -> list[str]:
        """Return the names of the teachers that cover ``tag``."""
        return [name for name, teacher in self.teachers.items() if teacher.covers(tag)]

    @property
    def names(self) -> list[str]:
        """Names of the teachers."""
        return list(self.teachers)

    @property
    def block_size(self) -> int:
        """Sequences that are worth sending together."""
        return min((t.config.infer_batch_size for t in self.teachers.values()), default=1)

    @property
    def failures(self) -> int:
        """Requests that failed so far, retried ones included."""
        return sum(t.failures for t in self.teachers.values())

    async def score(
        self, trajectories: Sequence[Trajectory], names: Collection[str] | None = None
    ) -> list[dict[str, TeacherScores]]:
        """Return, for each trajectory, the scores of each teacher that covers its tag.

        Details, where they are wanted, are references.

        Args:
            trajectories: what to score.
            names: ask these teachers alone.

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

        await asyncio.gather(*(one(t) for name, t in self.teachers.items() if names is None or name in names))
        return out

    async def _score_by(self, teacher: Teacher, trajectories: list[Trajectory]) -> list[TeacherScores]:
        # Held-out samples are measured, not trained on: nobody reads more of them than the sampled token's score.
        want = teacher.want if all(t.id.stream == "train" for t in trajectories) else SAMPLED_ONLY
        requests = [request_for(t, teacher.name, want) for t in trajectories]
        tokens = sum(len(r.tokens) for r in requests)
        tried: set[int] = set()
        for _ in range(teacher.config.max_retries + 1):
            index = self._pick(teacher, tried)
            load = teacher.replicas[index]
            tried.add(index)
            load.tokens += tokens
            try:
                await load.started()
                engine = load.engine
                async with self._cores.busy(load.replica.workers):
                    answers, details = _ask(load.replica, requests, want)
                    results = await self._in_time(load, answers, tokens, teacher.config.request_timeout)
                triples = zip(trajectories, requests, results, strict=True)
                scores = [accept(t, q, r) for t, q, r in triples]
                return [replace(s, details=d) for s, d in zip(scores, details, strict=True)]
            except RayError as error:  # before TimeoutError: Ray's copy of a worker's exception is of both classes
                cause = user_error(error) if isinstance(error, RayTaskError) else None
                if isinstance(cause, EngineDiedError):
                    self._failed(teacher, index, str(cause))
                    await self._replace_engine(teacher, load, engine)
                    continue
                if isinstance(cause, RollOPDError):
                    raise cause from error
                # An actor that is only unreachable for now may come back; one that died does not.
                load.dead = isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
                reason = error.cause if isinstance(error, RayTaskError) else str(error).strip().splitlines()[0]
                self._failed(teacher, index, f"{type(error).__name__}: {reason}")
            except TimeoutError:
                self._failed(teacher, index, f"no answer within {teacher.config.request_timeout:.0f} s")
            except ValueError as error:
                self._failed(teacher, index, f"unusable scores: {error}")
            finally:
                load.tokens -= tokens
        attempts = teacher.config.max_retries + 1
        raise TeacherError(
            f"teacher {teacher.name!r}: {attempts} attempts at one request failed; last: {teacher.last_failure}"
        )

    async def _in_time(self, load: Load, answers: list[Any], tokens: int, seconds: float) -> list[ScoreResult]:
        """Wait for the answers to a request of ``tokens`` tokens.

        Raises:
            TimeoutError: it takes longer than ``seconds``. It is still being worked on, and counts as load until that
                is over, so that others go elsewhere first.
        """
        call = asyncio.ensure_future(_results(load.replica, answers))
        try:
            in_time, _ = await asyncio.wait([call], timeout=seconds)
        except asyncio.CancelledError:
            call.cancel()
            raise
        if in_time:
            return call.result()

        def over(call: asyncio.Future[list[ScoreResult]]) -> None:
            load.tokens -= tokens
            self._late.discard(call)
            if not call.cancelled():
                call.exception()  # seen: nobody asks for it any more

        load.tokens += tokens
        self._late.add(call)
        call.add_done_callback(over)
        raise TimeoutError

    async def replace_engine(self, worker: Any) -> None:
        """Have the engine of a teacher's ``worker`` replaced that died while it sampled; that counts as a failure.

        Raises:
            TeacherError: the teacher's failure budget is spent, or a new engine would not have its weights.
        """
        for teacher in self.teachers.values():
            for index, load in enumerate(teacher.replicas):
                if worker in load.replica.workers:
                    self._failed(teacher, index, "its engine died while it sampled")
                    if load.starting is not None and not load.starting.done():
                        # What it was scoring at the time has been quicker to notice.
                        await load.started()
                    else:
                        await self._replace_engine(teacher, load, load.engine)

    async def _replace_engine(self, teacher: Teacher, load: Load, died: int) -> None:
        if teacher.config.teacher_args.self_teacher == "live":
            raise TeacherError(
                f"teacher {teacher.name!r}: its engine died, and a new one would not have the student's weights, which "
                f"it follows (teacher_args.self_teacher: live); resume from the last checkpoint, or use hf_infer; last "
                f"failure: {teacher.last_failure}"
            )
        await load.replace_engine(died)

    def _pick(self, teacher: Teacher, tried: set[int]) -> int:
        alive = [i for i, r in enumerate(teacher.replicas) if not r.dead]
        if not alive:
            raise TeacherError(
                f"teacher {teacher.name!r}: no replica is left, its last process died; last failure: "
                f"{teacher.last_failure}"
            )
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


def _ask(
    replica: Replica, requests: list[ScoreRequest], want: ScoreWant
) -> tuple[list[Any], list[DetailsRef] | list[None]]:
    """Send each rank its share; return each rank's reference and each sequence's details (None: none wanted)."""
    layout = replica.layout
    shares = rank_shares(requests, layout.dp_size)
    answers: list[Any] = []
    details: list[list[Any]] = []
    for worker, dp in zip(replica.workers, layout.dp_ranks, strict=True):
        share = shares[dp]
        if want.details and share:
            answer, call = worker.score_with_details.options(num_returns=2).remote(share, want)
            details.append([DetailsRef(call, index) for index in range(len(share))])
        else:
            # A rank without a share takes part all the same: the ranks of a replica compute together.
            answer = worker.score.remote(share)
            details.append([None] * len(share))
        answers.append(answer)
    return answers, undeal([details[rank] for rank in layout.answers])


async def _restart(replica: Replica) -> None:
    try:
        await asyncio.gather(*(worker.restart.remote() for worker in replica.workers))
    except RayTaskError as error:
        raise user_error(error) from error


async def _results(replica: Replica, answers: list[Any]) -> list[ScoreResult]:
    """Wait for all ranks, so that the failure of any is noticed; those that answer speak for the others."""
    values = await asyncio.gather(*answers)
    return undeal([values[rank] for rank in replica.layout.answers])


def request_for(trajectory: Trajectory, teacher: str, want: ScoreWant = SAMPLED_ONLY) -> ScoreRequest:
    """Ask ``teacher`` about ``trajectory``: behind the student's prompt, or behind a context of the teacher's own.

    The response is the student's tokens in either case; whatever came before its first sampled token is replaced.
    """
    context = trajectory.contexts.get(teacher)
    given = trajectory.top_ids if want.given else None
    if context is None:
        return ScoreRequest(trajectory.id, trajectory.tokens, trajectory.response_mask, given)
    first = int(np.argmax(trajectory.response_mask))
    tokens = np.concatenate([np.array(context, dtype=np.int32), trajectory.tokens[first:]])
    mask = np.concatenate([np.zeros(len(context), dtype=bool), trajectory.response_mask[first:]])
    return ScoreRequest(trajectory.id, tokens, mask, given)


def accept(trajectory: Trajectory, request: ScoreRequest, result: ScoreResult) -> TeacherScores:
    """Check that ``result`` answers ``request`` and can be trained on; put it back on the trajectory's positions.

    Raises:
        ValueError: another sequence, another length, or a value that is not finite.
    """
    if result.id != request.id or result.checksum != request.checksum:
        raise ValueError(f"asked for trajectory {trajectory.id}, got the scores of another sequence ({result.id})")
    if result.logprobs is None:
        return TeacherScores(None)
    if result.logprobs.shape != request.tokens.shape:
        raise ValueError(f"{len(result.logprobs)} scores for {len(request.tokens)} tokens of {trajectory.id}")
    logprobs = trajectory.spread(result.logprobs[request.response_mask])
    check_per_token("teacher logprobs", logprobs, trajectory)
    return TeacherScores(logprobs)
