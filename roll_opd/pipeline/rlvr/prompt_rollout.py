"""Single responses to prompts.

All requests of a job, sorted by id, are dealt out to the engines in whole groups; each engine gets one list and streams
results back. What an engine computes together therefore never depends on timing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import numpy as np

from roll_opd.datasets.prompts import Prompt
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult
from roll_opd.errors import GenerationError
from roll_opd.pipeline.generation import Generation, check_sampled
from roll_opd.pipeline.rollout import RolloutJob, Sample
from roll_opd.rewards.base import RewardItem
from roll_opd.trajectory import Trajectory, TrajectoryId


class PromptRollout:
    """Samples responses.

    Args:
        generation: asks the engines.
        decode: response token ids to the text that rewards see.
        graded: whether a reward sees the samples with this tag.
        contexts: prompt -> what scorers see in its place, by scorer (privileged context).
    """

    def __init__(
        self,
        generation: Generation,
        decode: Callable[[list[int]], str],
        graded: Callable[[str], bool],
        contexts: Callable[[Prompt], Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self.generation = generation
        self.decode = decode
        self.graded = graded
        self.contexts = contexts

    async def run(self, job: RolloutJob, finished: Callable[[Sample], None]) -> None:
        """See :class:`~roll_opd.pipeline.rollout.Rollout`."""
        prompts: dict[TrajectoryId, Prompt] = {}
        shares: list[list[GenerateRequest]] = []
        for draw in job.draws:
            names = [TrajectoryId(draw.number, sample, 0, job.stream) for sample in range(job.num_samples)]
            prompts |= dict.fromkeys(names, draw.task)
            ids = draw.task.token_ids
            shares.append([GenerateRequest(name, ids, name.seed(job.seed), job.sampling) for name in names])
        asked = len(prompts)

        def take(result: GenerateResult) -> None:
            prompt = prompts.pop(result.id, None)
            if prompt is None:
                raise GenerationError(f"an engine returned trajectory {result.id} twice, or without being asked")
            finished(self._sample(prompt, result))

        workers = job.engines.workers
        async with asyncio.TaskGroup() as group:
            for i, worker in enumerate(workers):
                group.create_task(self.generation.ask(worker, [r for s in shares[i :: len(workers)] for r in s], take))
        if prompts:
            raise GenerationError(f"{len(prompts)} of {asked} responses never came, first {next(iter(prompts))}")

    def _sample(self, prompt: Prompt, result: GenerateResult) -> Sample:
        trajectory, row = self._trajectory(prompt, result), prompt.row
        if not self.graded(row.tag):
            return Sample(trajectory.id.draw, trajectory.id.sample, (trajectory,))
        item = RewardItem(
            id=str(trajectory.id),
            response=self.decode(result.response_ids.tolist()),
            ground_truth=row.ground_truth,
            prompt=prompt.text,
            tag=row.tag,
            row=row.columns,
        )
        return Sample(trajectory.id.draw, trajectory.id.sample, (trajectory,), item)

    def _trajectory(self, prompt: Prompt, result: GenerateResult) -> Trajectory:
        before, after = len(prompt.token_ids), len(result.response_ids)
        if after == 0:
            raise GenerationError(f"an engine returned an empty response for trajectory {result.id}")

        def behind_prompt(values: np.ndarray, fill: float, dtype: type) -> np.ndarray:
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
        check_sampled(trajectory)
        return trajectory
