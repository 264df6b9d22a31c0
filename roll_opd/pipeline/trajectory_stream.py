"""One stream: draws go in, scored groups come out.

::

    draws ──► rollout ──► Sample ──► block of whole groups ──┬─► teachers ──► batch ──► queue ──► collect()
      ▲      (engines,   as it       is complete             └─► rewards ──┬┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄► verdicts()
      │     environments) finishes                                         │
      └────────── groups that a filter dropped, or that failed, are drawn anew ◄────┘  (only with a group filter)

    producer (thread with its own event loop)
        consumes:      draws of batch b
        waits for:     weight version >= b - bound          (bound 0: synchronous training)
        produces:      batch b, into a queue (of 1 + bound batches at most)
        unblocked by:  weights_ready(version), from the main loop after weight sync
    rollout
        says how trajectories come to be: single responses (PromptRollout), or episodes (EpisodeRollout)
    devices
        teachers that share no device with the engines score beside them, block by block; the others come afterwards,
        one group after the other (see Turns.waves)
    rewards
        run beside the teachers; where they only monitor, nothing waits for them: verdicts() takes what has come;
        with a group filter the producer waits for them, and draws until the batch is full
    main loop
        waits for:     collect()
        unblocked by:  the queue, or the exception that ended the producer

Nothing in the event loop blocks. Blocks are cut from the sorted list of draws, not from the order in which samples
happen to finish: which sequences are scored together is the same in every run, and with it every bit of their scores
where the number of threads is fixed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from roll_opd.distributed.cores import Cores
from roll_opd.distributed.strategy.base import Sampling
from roll_opd.distributed.turns import Turns
from roll_opd.errors import GenerationError
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.rollout import Draw, Engines, Rollout, RolloutJob, Sample
from roll_opd.pipeline.teacher_pool import TeacherPool
from roll_opd.rewards.base import RewardResult
from roll_opd.trajectory import Trajectory, TrajectoryId

logger = logging.getLogger(__name__)

MAX_DRAWS_PER_KEPT = 20
"""Draws that may be made for each one that a batch needs before a filter is called hopeless."""
MAX_FAILED_PER_KEPT = 2
"""Groups that may fail for each one that a batch needs before whatever they are played in is called broken."""
SPARE_FAILURES = 4
"""Failed groups that even a small batch puts up with."""
MOST_UNGRADED = 0.5
"""Share of responses without a reward beyond which a run that needs them stops: its grader is broken."""


TEACHER_ROLE = "teacher-"
"""What stands before a teacher's name in the name of its role."""


def first_of(error: BaseException) -> BaseException:
    """Return the first failure of a task group; the others were cancelled because of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(frozen=True)
class Batch:
    """Trajectories of one step, sorted by id, and what they cost.

    Attributes:
        seconds: wall time from the first request to the last score; ``generate`` is the part until the last response.
        grading: verdicts that may still be on their way, one task for each block and reward.
        next_draw: the draw that the following batch begins with.
        filtered_groups: groups that a filter dropped while this batch was filled.
        failed_groups: groups that were replaced because one of their samples failed.
        failure: why one of them did.
    """

    trajectories: list[Trajectory]
    seconds: dict[str, float]
    grading: list[asyncio.Task[dict[TrajectoryId, RewardResult]]]
    next_draw: int = 0
    filtered_groups: int = 0
    failed_groups: int = 0
    failure: str = ""


@dataclass
class _Block:
    """Whole groups that are scored together once all their samples have finished."""

    size: int
    finished: list[Sample] = field(default_factory=list)

    def usable(self) -> list[Sample]:
        """The samples of groups that did not fail, sorted."""
        failed = {sample.draw for sample in self.finished if not sample.trajectories}
        return sorted((s for s in self.finished if s.draw not in failed), key=lambda s: (s.draw, s.sample))


class TrajectoryStream:
    """Samples, grades and scores trajectories in the background.

    Args:
        engines: workers with ``generate``.
        rollout: makes samples with them.
        teachers: scores; empty pool: none.
        rewards: grades; empty pool: none.
        seed: the run's seed, from which each trajectory's own derives.
        group_size: samples per draw in training.
        sampling: how training samples are drawn.
        keep_group: whether a graded group is trained on; None keeps all, and waits for no reward.
        extra_draws: draws beyond the missing ones that are made at once when groups are filtered.
        turns: moves roles that share devices; None: no role does.
        cores: lends this node's cores to engines that sample; None: nobody borrows any.
        bound: how many batches generation may run ahead of training.
    """

    def __init__(
        self,
        *,
        engines: Engines,
        rollout: Rollout,
        teachers: TeacherPool,
        rewards: RewardPool,
        seed: int,
        group_size: int,
        sampling: Sampling,
        keep_group: Callable[[list[Trajectory]], bool] | None = None,
        extra_draws: int = 0,
        turns: Turns | None = None,
        cores: Cores | None = None,
        bound: int = 0,
    ) -> None:
        self.engines = engines
        self.rollout = rollout
        self.teachers = teachers
        self.rewards = rewards
        self.seed = seed
        self.group_size = group_size
        self.sampling = sampling
        self.keep_group = keep_group
        self.extra_draws = extra_draws
        self.turns = turns or Turns({})
        self.cores = cores or Cores()
        self.bound = bound
        # Holds at most 1 + bound batches, because a batch is begun only when the weights are new enough for it.
        self._batches: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._version = -1
        self._loop = asyncio.new_event_loop()
        self._advanced = asyncio.Event()
        self._thread = threading.Thread(target=self._run_loop, name="trajectory-stream", daemon=True)
        self._thread.start()

    # ---- called by the main loop ---------------------------------------------------------------------------------

    def start(self, task_of: Callable[[int], Any], size: int, next_draw: int, first: int, last: int) -> None:
        """Begin to produce batches ``first .. last - 1`` of ``size`` groups; draws are taken from ``next_draw`` on."""
        asyncio.run_coroutine_threadsafe(self._produce(task_of, size, next_draw, first, last), self._loop)

    def weights_ready(self, version: int) -> None:
        """Tell the producer that the engines hold weights ``version``."""

        def advance() -> None:
            self._version = version
            self._advanced.set()

        self._loop.call_soon_threadsafe(advance)

    def collect(self) -> Batch:
        """Wait for the next batch; raise what ended the producer, if something did."""
        item = self._batches.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def validate(self, tasks: Sequence[Any], num_samples: int, sampling: Sampling, seed: int,
                 engines: Engines | None = None, stream: str = "val") -> Batch:  # fmt: skip
        """Sample, grade and score fixed tasks with fixed seeds; to be called between batches."""
        draws = [Draw(i, task) for i, task in enumerate(tasks)]
        job = RolloutJob(draws, num_samples, sampling, seed, stream, engines or self.engines)
        future = asyncio.run_coroutine_threadsafe(self._rollout(job), self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as error:
            raise first_of(error) from error

    def verdicts(self, batch: Batch, patience: float | None) -> list[Trajectory]:
        """Return the batch's trajectories with the rewards that are known.

        Args:
            batch: from :meth:`collect` or :meth:`validate`.
            patience: seconds to wait for verdicts still on their way (None: until all have come). Those that come later
                are dropped.
        """

        return asyncio.run_coroutine_threadsafe(self._graded(batch, patience), self._loop).result()

    def score_again(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Have the teachers score ``trajectories`` once more, when something of their scores was lost.

        Those that share devices with the trainer take their place there, and keep it.
        """

        async def score() -> list[Trajectory]:
            scored = list(trajectories)
            for wave in self._waves(()):
                await self._take(self._roles(wave))
                scored = await self._score_block(scored, wave)
            return scored

        return asyncio.run_coroutine_threadsafe(score(), self._loop).result()

    def close(self) -> None:
        """Stop producing and end the thread."""

        async def wind_up() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(wind_up(), self._loop)
            self._thread.join(timeout=10)

    # ---- the event loop ------------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _produce(self, task_of: Callable[[int], Any], size: int, next_draw: int, first: int, last: int) -> None:
        item: Batch | BaseException
        for number in range(first, last):
            try:
                # Never before the first sync: an engine must not sample with weights that nobody has verified.
                while self._version < max(first, number - self.bound):
                    self._advanced.clear()
                    await self._advanced.wait()
                item = await self._full_batch(task_of, size, next_draw)
                next_draw = item.next_draw
                oldest = min(int(t.weight_version[t.response_mask].min()) for t in item.trajectories)
                assert oldest >= number - self.bound, f"batch {number} has tokens of weights {oldest}"
            except (asyncio.CancelledError, concurrent.futures.CancelledError):
                # close() was called, or something ended the task behind our back: nobody must wait for it for ever.
                item = GenerationError("the trajectory stream was stopped")
            except BaseException as error:  # noqa: BLE001 - raised again by collect(), in the main loop
                item = first_of(error)
            self._batches.put(item)
            failed = isinstance(item, BaseException)
            del item  # or the teachers' details would live until the next batch is complete
            if failed:
                return

    async def _full_batch(self, task_of: Callable[[int], Any], size: int, next_draw: int) -> Batch:
        """Sample ``size`` groups; where groups fail, or a filter drops them, draw on until as many are kept.

        Raises:
            GenerationError: the filter keeps next to nothing, or group after group fails.
        """
        kept: list[list[Trajectory]] = []
        seconds: dict[str, float] = {}
        grading: list[asyncio.Task[dict[TrajectoryId, RewardResult]]] = []
        filtered = failed = surplus = 0
        began = next_draw
        while len(kept) < size:
            missing = size - len(kept)
            # Extra draws are a bet that some will be dropped: on the first round nothing says so yet.
            count = missing + (min(self.extra_draws, missing) if kept or filtered else 0)
            draws = [Draw(number, task_of(number)) for number in range(next_draw, next_draw + count)]
            next_draw += count
            batch = await self._rollout(
                RolloutJob(draws, self.group_size, self.sampling, self.seed, "train", self.engines)
            )
            for name, value in batch.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
            failed += batch.failed_groups
            if failed > MAX_FAILED_PER_KEPT * size + SPARE_FAILURES:
                raise GenerationError(
                    f"{failed} groups failed while a batch of {size} was filled, one of them with: {batch.failure}"
                )
            if self.keep_group is None:
                kept += _by_draw(batch.trajectories)
                grading += batch.grading
                continue
            for group in self._groups_of(await self._graded(batch, None)):
                if not self.keep_group(group):
                    filtered += 1
                elif len(kept) < size:
                    kept.append(group)
                else:
                    surplus += 1
            if len(kept) < size and next_draw - began >= MAX_DRAWS_PER_KEPT * size:
                raise GenerationError(
                    f"query_filter_config kept {len(kept)} of {next_draw - began} prompts, too few to fill a batch of "
                    f"{size}; widen the filter, or use prompts on which the student's samples differ"
                )
        logger.debug("%d groups filtered, %d failed, %d more than needed", filtered, failed, surplus)
        return Batch([t for group in kept for t in group], seconds, grading, next_draw, filtered, failed)

    def _groups_of(self, graded: list[Trajectory]) -> list[list[Trajectory]]:
        """The groups of a batch that a filter is about to judge.

        Raises:
            GenerationError: most of them have no reward.
        """
        ungraded = sum(t.reward is None and self.rewards.route(t.tag) is not None for t in graded)
        if ungraded > MOST_UNGRADED * len(graded):
            raise GenerationError(
                f"{ungraded} of {len(graded)} responses have no reward, so query_filter_config cannot tell what to "
                f"keep; the log names the reward that failed"
            )
        return _by_draw(graded)

    async def _graded(self, batch: Batch, patience: float | None) -> list[Trajectory]:
        if batch.grading:
            await asyncio.wait(batch.grading, timeout=patience)
        found: dict[TrajectoryId, RewardResult] = {}
        for task in batch.grading:
            if task.done():
                found |= task.result()
        out = []
        for trajectory in batch.trajectories:
            verdict = found.get(trajectory.id)
            if verdict is not None and verdict.error is None:
                trajectory = replace(trajectory, reward=verdict.reward, correct=verdict.correct)
            out.append(trajectory)
        return out

    async def _rollout(self, job: RolloutJob) -> Batch:
        """Make the samples of a job; return their trajectories scored and sorted."""
        began = generated = time.perf_counter()
        block_of = self._cut_blocks(job)
        blocks = list({id(block): block for block in block_of.values()}.values())
        scoring: list[asyncio.Task[list[Trajectory]]] = []
        grading: list[asyncio.Task[dict[TrajectoryId, RewardResult]]] = []
        beside, *afterwards = self._waves((job.engines.role,))
        await self._take([job.engines.role, *self._roles(beside)])
        # A task group: the first failure, of an engine or of a teacher, stops the others at once.
        group = asyncio.TaskGroup()

        def finished(sample: Sample) -> None:
            nonlocal generated
            generated = time.perf_counter()
            block = block_of[sample.draw]
            block.finished.append(sample)
            if len(block.finished) == block.size and (usable := block.usable()):
                scores = self._score_block([t for s in usable for t in s.trajectories], beside)
                try:
                    scoring.append(group.create_task(scores))
                except RuntimeError:  # the group has failed already and takes no more work
                    scores.close()
                    raise
                grading.extend(asyncio.ensure_future(self._grade(part)) for part in self._by_reward(usable))

        async def sample() -> None:
            async with self.cores.busy(job.engines.workers):
                await self.rollout.run(job, finished)

        async with group:
            await group.create_task(sample())
        assert all(len(block.finished) == block.size for block in blocks), "a rollout ended without all of its samples"
        scored = [task.result() for task in scoring]
        for wave in afterwards:
            await self._take(self._roles(wave))
            scored = await asyncio.gather(*(self._score_block(block, wave) for block in scored))
        ended = time.perf_counter()
        trajectories = sorted((t for block in scored for t in block), key=lambda t: t.id)
        failed = len(job.draws) - len({t.id.draw for t in trajectories})
        failure = max((s.failure for block in blocks for s in block.finished), default="")
        seconds = {"rollout": ended - began, "generate": generated - began}
        return Batch(trajectories, seconds, grading, failed_groups=failed, failure=failure)

    def _cut_blocks(self, job: RolloutJob) -> dict[int, _Block]:
        """The block of each draw."""
        size = max(1, self.teachers.block_size // job.num_samples)
        block_of: dict[int, _Block] = {}
        for start in range(0, len(job.draws), size):
            draws = job.draws[start : start + size]
            block_of |= dict.fromkeys((draw.number for draw in draws), _Block(len(draws) * job.num_samples))
        return block_of

    async def _score_block(self, trajectories: list[Trajectory], names: Collection[str]) -> list[Trajectory]:
        """Add the scores of the teachers ``names``."""
        scores = await self.teachers.score(trajectories, names)
        return [replace(t, teacher_scores={**t.teacher_scores, **s}) for t, s in zip(trajectories, scores, strict=True)]

    # ---- devices -------------------------------------------------------------------------------------------------

    def _waves(self, first: Collection[str]) -> list[list[str]]:
        """Sort the teachers into groups that score at the same time, the first one beside the roles ``first``."""
        waves = self.turns.waves(first, self._roles(self.teachers.names))
        return [[role.removeprefix(TEACHER_ROLE) for role in wave] for wave in waves]

    @staticmethod
    def _roles(teachers: Iterable[str]) -> list[str]:
        return [TEACHER_ROLE + name for name in teachers]

    async def _take(self, roles: Sequence[str]) -> None:
        if self.turns.sharing:
            await asyncio.to_thread(self.turns.take, *roles)

    def _by_reward(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples that a reward grades, one list for each: a slow one's verdicts hold up no others."""
        parts: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.item is not None and (name := self.rewards.route(sample.item.tag)) is not None:
                parts.setdefault(name, []).append(sample)
        return list(parts.values())

    async def _grade(self, samples: Sequence[Sample]) -> dict[TrajectoryId, RewardResult]:
        """Verdicts by trajectory; an episode's goes to each of its segments."""
        graded = [(s.trajectories, s.item) for s in samples if s.item is not None]
        results = await self.rewards.grade([item for _, item in graded])
        pairs = zip(graded, results, strict=True)
        return {t.id: result for (segments, _), result in pairs if result is not None for t in segments}


def _by_draw(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The groups of sorted trajectories."""
    return [list(group) for _, group in itertools.groupby(trajectories, key=lambda t: t.id.draw)]
