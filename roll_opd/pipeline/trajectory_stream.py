"""One stream: prompts go in, scored groups come out.

::

    draws ──► generate ──► Trajectory ──► block of whole groups ──┬─► teachers ──► batch ──► queue ──► collect()
      ▲       (engines)    as it finishes     is complete         └─► rewards ──┬┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄► verdicts()
      └──────────────────── groups that a filter dropped are drawn anew ◄────────┘  (only with a group filter)

    producer (thread with its own event loop)
        consumes:      draws of batch b
        waits for:     weight version >= b - bound          (bound 0: synchronous training)
        produces:      batch b, into a queue (of 1 + bound batches at most)
        unblocked by:  weights_ready(version), from the main loop after weight sync
    devices
        teachers that share no device with the engines score beside them, block by block; the others come afterwards,
        one group after the other (see Turns.waves)
    engines that die
        are replaced and get their weights again (revive); what they had not finished is asked for once more
    rewards
        run beside the teachers; where they only monitor, nothing waits for them: verdicts() takes what has come;
        with a group filter the producer waits for them, and draws until the batch is full
    main loop
        waits for:     collect()
        unblocked by:  the queue, or the exception that ended the producer

Nothing in the event loop blocks. Blocks are cut from the sorted list of trajectories, not from the order in which they
happen to finish: which sequences are scored together, and so every bit of their scores, is the same in every run.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError

from roll_opd.datasets.prompts import Prompt
from roll_opd.distributed.runtime import user_error
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling
from roll_opd.distributed.turns import Turns
from roll_opd.errors import EngineDiedError, GenerationError
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.teacher_pool import TeacherPool
from roll_opd.rewards.base import RewardItem, RewardResult
from roll_opd.trajectory import Trajectory, TrajectoryId, check_per_token

logger = logging.getLogger(__name__)

MAX_DRAWS_PER_KEPT = 20
"""Prompts that may be drawn for each one that a batch needs before a filter is called hopeless."""
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
class Engines:
    """Workers that sample, and the role that they play."""

    role: str
    workers: Sequence[Any]


@dataclass(frozen=True)
class Draw:
    """One prompt to sample a group for; ``number`` counts draws from the start of the run."""

    number: int
    prompt: Prompt


@dataclass(frozen=True)
class Batch:
    """Trajectories of one step, sorted by id, and what they cost.

    Attributes:
        seconds: wall time from the first request to the last score; ``generate`` is the part until the last response.
        grading: verdicts that may still be on their way, one task a block.
        next_draw: the draw that the following batch begins with.
        filtered_groups: groups that a filter dropped while this batch was filled.
    """

    trajectories: list[Trajectory]
    seconds: dict[str, float]
    grading: list[asyncio.Task[dict[TrajectoryId, RewardResult]]]
    next_draw: int = 0
    filtered_groups: int = 0


@dataclass
class _Block:
    """Whole groups that are scored together once all their samples have finished."""

    size: int
    finished: list[tuple[Trajectory, Prompt]] = field(default_factory=list)


class TrajectoryStream:
    """Samples, grades and scores trajectories in the background.

    Args:
        engines: workers with ``generate``.
        teachers: scores; empty pool: none.
        rewards: grades; empty pool: none.
        decode: response token ids to the text that rewards see.
        seed: the run's seed, from which each trajectory's own derives.
        group_size: samples per prompt in training.
        sampling: how training samples are drawn.
        contexts: prompt -> what scorers see in its place, by scorer (privileged context).
        keep_group: whether a graded group is trained on; None keeps all, and waits for no reward.
        extra_draws: prompts beyond the missing ones that are drawn at once when groups are filtered.
        revive: brings a worker back whose engine has died, with current weights; may block. None: a death is the end.
        turns: moves roles that share devices; None: no role does.
        bound: how many batches generation may run ahead of training.
        deadline: seconds without any progress after which the run stops.
    """

    def __init__(
        self,
        *,
        engines: Engines,
        teachers: TeacherPool,
        rewards: RewardPool,
        decode: Callable[[list[int]], str],
        seed: int,
        group_size: int,
        sampling: Sampling,
        contexts: Callable[[Prompt], Mapping[str, tuple[int, ...]]] | None = None,
        keep_group: Callable[[list[Trajectory]], bool] | None = None,
        extra_draws: int = 0,
        revive: Callable[[Any], None] | None = None,
        turns: Turns | None = None,
        bound: int = 0,
        deadline: float = 3600.0,
    ) -> None:
        self.engines = engines
        self.teachers = teachers
        self.rewards = rewards
        self.decode = decode
        self.seed = seed
        self.group_size = group_size
        self.sampling = sampling
        self.contexts = contexts
        self.keep_group = keep_group
        self.extra_draws = extra_draws
        self.revive = revive
        self.turns = turns or Turns({})
        self.bound = bound
        self.deadline = deadline
        # Holds at most 1 + bound batches, because a batch is begun only when the weights are new enough for it.
        self._batches: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._version = -1
        self._loop = asyncio.new_event_loop()
        self._advanced = asyncio.Event()
        self._thread = threading.Thread(target=self._run_loop, name="trajectory-stream", daemon=True)
        self._thread.start()

    # ---- called by the main loop ---------------------------------------------------------------------------------

    def start(self, prompt_of: Callable[[int], Prompt], size: int, next_draw: int, first: int, last: int) -> None:
        """Begin to produce batches ``first .. last - 1`` of ``size`` groups; draws are taken from ``next_draw`` on."""
        asyncio.run_coroutine_threadsafe(self._produce(prompt_of, size, next_draw, first, last), self._loop)

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

    def validate(self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling, seed: int,
                 engines: Engines | None = None, stream: str = "val") -> Batch:  # fmt: skip
        """Sample, grade and score fixed prompts with fixed seeds; to be called between batches."""
        draws = [Draw(i, prompt) for i, prompt in enumerate(prompts)]
        future = asyncio.run_coroutine_threadsafe(
            self._rollout(draws, num_samples, sampling, seed, stream, engines or self.engines), self._loop
        )
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

    async def _produce(
        self, prompt_of: Callable[[int], Prompt], size: int, next_draw: int, first: int, last: int
    ) -> None:
        item: Batch | BaseException
        for number in range(first, last):
            try:
                # Never before the first sync: an engine must not sample with weights that nobody has verified.
                while self._version < max(first, number - self.bound):
                    self._advanced.clear()
                    await self._advanced.wait()
                item = await self._full_batch(prompt_of, size, next_draw)
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

    async def _full_batch(self, prompt_of: Callable[[int], Prompt], size: int, next_draw: int) -> Batch:
        """Sample ``size`` groups; with a filter, draw on until as many are kept.

        Raises:
            GenerationError: the filter keeps next to nothing.
        """
        kept: list[Trajectory] = []
        seconds: dict[str, float] = {}
        filtered = surplus = 0
        began = next_draw
        while True:
            missing = size - len(kept) // self.group_size
            # Extra prompts are a bet that some will be dropped: on the first round nothing says so yet.
            count = missing + (min(self.extra_draws, missing) if kept or filtered else 0)
            draws = [Draw(number, prompt_of(number)) for number in range(next_draw, next_draw + count)]
            next_draw += count
            batch = await self._rollout(draws, self.group_size, self.sampling, self.seed, "train", self.engines)
            if self.keep_group is None:
                return replace(batch, next_draw=next_draw)
            graded = await self._graded(batch, None)
            ungraded = sum(t.reward is None and self.rewards.route(t.tag) is not None for t in graded)
            if ungraded > MOST_UNGRADED * len(graded):
                raise GenerationError(
                    f"{ungraded} of {len(graded)} responses have no reward, so query_filter_config cannot tell what to "
                    f"keep; the log names the reward that failed"
                )
            for start in range(0, len(graded), self.group_size):
                group = graded[start : start + self.group_size]
                if not self.keep_group(group):
                    filtered += 1
                elif len(kept) < size * self.group_size:
                    kept += group
                else:
                    surplus += 1
            for name, value in batch.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
            if len(kept) == size * self.group_size:
                logger.debug("%d groups filtered, %d more than needed", filtered, surplus)
                return Batch(kept, seconds, [], next_draw, filtered)
            if next_draw - began >= MAX_DRAWS_PER_KEPT * size:
                raise GenerationError(
                    f"query_filter_config kept {len(kept) // self.group_size} of {next_draw - began} prompts, too few "
                    f"to fill a batch of {size}; widen the filter, or use prompts on which the student's samples differ"
                )

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

    async def _rollout(
        self, draws: list[Draw], num_samples: int, sampling: Sampling, seed: int, stream: str, engines: Engines
    ) -> Batch:
        """Sample ``num_samples`` per draw; return them scored and sorted."""
        began = time.perf_counter()
        prompts: dict[TrajectoryId, Prompt] = {}
        requests: list[GenerateRequest] = []
        for draw in sorted(draws, key=lambda d: d.number):
            for sample in range(num_samples):
                name = TrajectoryId(draw.number, sample, 0, stream)
                prompts[name] = draw.prompt
                requests.append(GenerateRequest(name, draw.prompt.token_ids, name.seed(seed), sampling))
        block_of = self._cut_blocks(requests, num_samples)
        scoring: list[asyncio.Task[list[Trajectory]]] = []
        grading: list[asyncio.Task[dict[TrajectoryId, RewardResult]]] = []
        generated = began
        beside, *afterwards = self._waves((engines.role,))
        await self._take([engines.role, *self._roles(beside)])
        # A task group: the first failure, of an engine or of a teacher, stops the others at once.
        group = asyncio.TaskGroup()

        def finished(result: GenerateResult) -> None:
            nonlocal generated
            generated = time.perf_counter()
            prompt = prompts.pop(result.id, None)
            if prompt is None:
                raise GenerationError(f"an engine returned trajectory {result.id} twice, or without being asked")
            block = block_of[result.id]
            block.finished.append((self._trajectory(prompt, result), prompt))
            if len(block.finished) == block.size:
                block.finished.sort(key=lambda pair: pair[0].id)
                members = self._decoded(block.finished)
                scores = self._score_block([t for t, _ in members], beside)
                try:
                    scoring.append(group.create_task(scores))
                except RuntimeError:  # the group has failed already and takes no more work
                    scores.close()
                    raise
                grading.append(asyncio.ensure_future(self._grade_block(members)))

        shares = [requests[i * num_samples : (i + 1) * num_samples] for i in range(len(draws))]
        async with group:
            workers = engines.workers
            sampling_tasks = [
                group.create_task(
                    self._generate(worker, [r for share in shares[i :: len(workers)] for r in share], finished)
                )
                for i, worker in enumerate(workers)
            ]
            await asyncio.wait(sampling_tasks)
            for task in sampling_tasks:
                task.result()
            if prompts:
                first = next(iter(prompts))
                raise GenerationError(f"{len(prompts)} of {len(requests)} responses never came, first {first}")
        blocks = [task.result() for task in scoring]
        for wave in afterwards:
            await self._take(self._roles(wave))
            blocks = await asyncio.gather(*(self._score_block(block, wave) for block in blocks))
        ended = time.perf_counter()
        trajectories = sorted((t for block in blocks for t in block), key=lambda t: t.id)
        return Batch(trajectories, {"rollout": ended - began, "generate": generated - began}, grading)

    def _cut_blocks(self, requests: list[GenerateRequest], num_samples: int) -> dict[TrajectoryId, _Block]:
        size = num_samples * max(1, self.teachers.block_size // num_samples)
        block_of: dict[TrajectoryId, _Block] = {}
        for start in range(0, len(requests), size):
            members = requests[start : start + size]
            block = _Block(len(members))
            block_of |= {request.id: block for request in members}
        return block_of

    async def _generate(
        self, worker: Any, requests: list[GenerateRequest], finished: Callable[[GenerateResult], None]
    ) -> None:
        left = {request.id: request for request in requests}
        while left:
            try:
                await self._generate_once(worker, list(left.values()), finished, left)
                return
            except EngineDiedError as error:
                if self.revive is None:
                    raise
                logger.warning("%s; %d responses will be asked for again", error, len(left))
                await asyncio.to_thread(self.revive, worker)

    async def _generate_once(
        self,
        worker: Any,
        requests: list[GenerateRequest],
        finished: Callable[[GenerateResult], None],
        left: dict[TrajectoryId, GenerateRequest],
    ) -> None:
        """Hand results on as they come, each taken off ``left``."""
        try:
            stream = worker.generate.options(num_returns="streaming").remote(requests)
            while True:
                try:
                    ref = await asyncio.wait_for(anext(stream), self.deadline)
                except StopAsyncIteration:
                    return
                result = await ref
                left.pop(result.id, None)
                finished(result)
        except RayTaskError as error:  # before TimeoutError: Ray's copy of a worker's exception is of both classes
            raise user_error(error) from error
        except TimeoutError:
            raise GenerationError(f"the generating engine gave no response for {self.deadline:.0f} s") from None
        except RayActorError as error:
            raise GenerationError(f"the generating process died: {str(error).splitlines()[0]}") from error

    def _trajectory(self, prompt: Prompt, result: GenerateResult) -> Trajectory:
        before, after = len(prompt.token_ids), len(result.response_ids)
        if after == 0:
            raise GenerationError(f"an engine returned an empty response for trajectory {result.id}")

        def behind_prompt(values: np.ndarray[Any, Any], fill: float, dtype: Any) -> np.ndarray[Any, Any]:
            return np.concatenate([np.full(before, fill, dtype=dtype), values.astype(dtype)])

        trajectory = Trajectory(
            id=TrajectoryId(*result.id),
            tag=prompt.row.tag,
            tokens=np.concatenate([np.array(prompt.token_ids, dtype=np.int32), result.response_ids]),
            response_mask=np.concatenate([np.zeros(before, dtype=bool), np.ones(after, dtype=bool)]),
            infer_logprobs=behind_prompt(result.infer_logprobs, 0.0, np.float32),
            weight_version=behind_prompt(result.weight_version, -1, np.int32),
            finish_reason=result.finish_reason,
            sampled_mass=result.sampled_mass,
            top_ids=result.top_ids,
            contexts={} if self.contexts is None else self.contexts(prompt),
            extras={"ground_truth": prompt.row.ground_truth, "prompt": prompt.text},
        )
        try:
            check_per_token("infer_logprobs", trajectory.infer_logprobs, trajectory)
            check_per_token("weight_version", trajectory.weight_version, trajectory)
        except ValueError as error:
            raise GenerationError(f"an engine returned something unusable: {error}") from error
        return trajectory

    def _decoded(self, members: list[tuple[Trajectory, Prompt]]) -> list[tuple[Trajectory, Prompt]]:
        """Add the responses' text, which rewards and sample pages want."""
        out = []
        for trajectory, prompt in members:
            response = self.decode(trajectory.tokens[trajectory.response_mask].tolist())
            out.append((replace(trajectory, extras={**trajectory.extras, "response": response}), prompt))
        return out

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

    async def _grade_block(self, members: list[tuple[Trajectory, Prompt]]) -> dict[TrajectoryId, RewardResult]:
        items = [
            RewardItem(
                id=str(t.id),
                response=t.extras["response"],
                ground_truth=prompt.row.ground_truth,
                prompt=prompt.text,
                tag=t.tag,
                row={"test_cases": prompt.row.test_cases, **prompt.row.extra},
            )
            for t, prompt in members
        ]
        results = await self.rewards.grade(items)
        return {t.id: r for (t, _), r in zip(members, results, strict=True) if r is not None}
