"""How trajectories come to be, as the stream sees it: draws go in, finished samples come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from roll_opd.distributed.strategy.base import Sampling
from roll_opd.rewards.base import RewardItem
from roll_opd.trajectory import Trajectory


@dataclass(frozen=True)
class Engines:
    """Workers that sample, and the role that they play."""

    role: str
    workers: Sequence[Any]


@dataclass(frozen=True)
class Draw:
    """One task that a group of samples is made for.

    Attributes:
        number: counts draws from the start of the run.
        task: a :class:`~roll_opd.datasets.prompts.Prompt`, or an :class:`~roll_opd.pipeline.agentic.episodes.EnvTask`.
    """

    number: int
    task: Any


@dataclass(frozen=True)
class RolloutJob:
    """What is to be sampled.

    Attributes:
        draws: sorted by number.
        num_samples: samples of each.
        sampling: how tokens are drawn.
        seed: from which each sample's own derives.
        stream: ``train``, ``val`` or ``probe``.
        engines: who samples.
    """

    draws: Sequence[Draw]
    num_samples: int
    sampling: Sampling
    seed: int
    stream: str
    engines: Engines


@dataclass(frozen=True)
class Sample:
    """What came of one sample of a draw.

    Attributes:
        draw: number of the draw.
        sample: which of the group.
        trajectories: one, or an episode's segments in order; empty: it failed, and its group is of no use.
        item: what a grader needs; None where the reward is known already, or nobody grades.
        failure: why there are none.
    """

    draw: int
    sample: int
    trajectories: tuple[Trajectory, ...]
    item: RewardItem | None = None
    failure: str = ""


class Rollout(Protocol):
    """Makes samples."""

    async def run(self, job: RolloutJob, finished: Callable[[Sample], None]) -> None:
        """Make every sample of ``job`` and hand each to ``finished`` as soon as it is there, once.

        Raises:
            GenerationError: an engine is at fault.
        """
        ...
