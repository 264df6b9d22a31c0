"""What happens to the scalar reward of a response before it becomes an advantage, and which responses train.

Standard deviations are the unbiased ones (divided by ``n - 1``), as in ROLL. Where nothing can be compared, in a set of
one or a set of equal rewards, a standardised reward is 0: such a set carries no signal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NORM_TYPES = ("batch", "group", "running")
EPS = 1e-6
"""Added to a standard deviation that rewards are divided by."""

QUERY_FILTERS: dict[str, dict[str, float]] = {
    "no_filter": {},
    "mean_filter": {"threshold_up": math.inf, "threshold_down": -1.0},
    "std_filter": {"std_threshold": -1.0},
}
"""Filters of whole groups: their arguments and defaults."""


class RunningMoments:
    """Mean and standard deviation of all rewards seen so far.

    Batches are merged by the parallel update of Chan et al., "Algorithms for computing the sample variance", 1983, in
    fp64; any split of the rewards into batches gives the same moments up to rounding.
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._mean = 0.0
        self._sum_of_squares = 0.0

    @property
    def count(self) -> int:
        """Rewards seen."""
        return int(self._count)

    @property
    def mean(self) -> float:
        """Mean; 0 before the first reward."""
        return self._mean

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 below two rewards."""
        return math.sqrt(self._sum_of_squares / (self._count - 1)) if self._count > 1 else 0.0

    def update(self, rewards: Tensor) -> None:
        """Take in ``rewards [N]``."""
        if rewards.numel() == 0:
            return
        rewards = rewards.detach().double()
        added, mean = float(rewards.numel()), rewards.mean().item()
        total = self._count + added
        shift = mean - self._mean
        squares = (rewards - mean).square().sum().item()
        self._sum_of_squares += squares + shift * shift * self._count * added / total
        self._mean += shift * added / total
        self._count = total

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"count": self._count, "mean": self._mean, "sum_of_squares": self._sum_of_squares}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's :meth:`state`."""
        self._count, self._mean = float(state["count"]), float(state["mean"])
        self._sum_of_squares = float(state["sum_of_squares"])


def clip_rewards(rewards: Tensor, bound: float) -> Tensor:
    """Return ``rewards`` cut to ``-bound..bound`` (``reward_clip``)."""
    if not bound > 0:
        raise ValueError(f"bound must be above 0, not {bound}")
    return rewards.clamp(-bound, bound)


def normalise_rewards(
    rewards: Tensor,
    groups: Tensor,
    mean_type: str | None,
    std_type: str | None,
    running: RunningMoments | None = None,
) -> Tensor:
    """Return ``(r - mean) / (std + 1e-6)``, each taken over the batch, the prompt's group or the run so far.

    ``None`` leaves a part out: no shift, no scale. ``running`` takes this batch in before it is used.

    Args:
        rewards: ``[N]``, one of each episode.
        groups: ``[N]`` int64, the prompt that each belongs to; any numbers, in any order, groups of any size.
        mean_type: one of :data:`NORM_TYPES`, or None.
        std_type: one of :data:`NORM_TYPES`, or None.
        running: needed, and updated, where a type is ``running``.

    Returns:
        ``[N]`` fp64. 0 where a standard deviation is asked for and there is none.

    Raises:
        ValueError: unknown type, shapes that differ, or ``running`` missing.
    """
    mean, scale = reward_normaliser(rewards, groups, mean_type, std_type, running)
    return (rewards.detach().double() - mean) * scale


def reward_normaliser(
    rewards: Tensor,
    groups: Tensor,
    mean_type: str | None,
    std_type: str | None,
    running: RunningMoments | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`normalise_rewards` takes off each reward, and what it multiplies the rest by; ``[N]`` fp64.

    Arguments and errors are those of :func:`normalise_rewards`.
    """
    for kind in (mean_type, std_type):
        if kind is not None and kind not in NORM_TYPES:
            raise ValueError(f"unknown norm type {kind!r}; one of {', '.join(NORM_TYPES)}, or None")
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"{tuple(rewards.shape)} rewards for {tuple(groups.shape)} groups")
    rewards = rewards.detach().double()
    if "running" in (mean_type, std_type) and rewards.numel():
        if running is None:
            raise ValueError("norm type running needs the running moments")
        running.update(rewards)

    def moments(kind: str) -> tuple[Tensor, Tensor]:
        if kind == "running":
            assert running is not None
            return torch.full_like(rewards, running.mean), torch.full_like(rewards, running.std)
        return group_moments(rewards, groups if kind == "group" else torch.zeros_like(groups))[:2]

    mean, scale = torch.zeros_like(rewards), torch.ones_like(rewards)
    if rewards.numel() and mean_type is not None:
        mean = moments(mean_type)[0]
    if rewards.numel() and std_type is not None:
        std = moments(std_type)[1]
        scale = torch.where(std > 0, 1.0 / (std + EPS), torch.zeros_like(std))
    return mean, scale


def group_moments(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, unbiased standard deviation and size of each entry's group.

    Args:
        rewards: ``[N]``.
        groups: ``[N]`` int64.

    Returns:
        Three ``[N]`` fp64 tensors. In a group of equal rewards the mean is that reward and the standard deviation 0,
        exactly; in a group of one likewise.
    """
    rewards = rewards.detach().double()
    _, member_of = torch.unique(groups, return_inverse=True)
    num_groups = int(member_of.max()) + 1 if member_of.numel() else 0
    zeros = rewards.new_zeros(num_groups)
    size = zeros.index_add(0, member_of, torch.ones_like(rewards))
    mean = zeros.index_add(0, member_of, rewards) / size
    lowest = zeros.scatter_reduce(0, member_of, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, member_of, rewards, "amax", include_self=False)
    # The mean of three times 0.1 is not 0.1: without this, rounding divided by rounding would look like a signal.
    mean = torch.where(lowest == highest, lowest, mean)
    squares = zeros.index_add(0, member_of, (rewards - mean[member_of]).square())
    std = (squares / (size - 1).clamp(min=1.0)).sqrt()
    return mean[member_of], std[member_of], size[member_of]


def difficulty_mask(scores: Sequence[float | None], groups: Sequence[int], low: float, high: float) -> list[bool]:
    """Return which responses to keep: those whose prompt's mean score lies strictly between ``low`` and ``high``.

    A group with fewer than two scores is kept: one response does not tell how hard its prompt is. An ungraded response
    shares its group's fate.

    Args:
        scores: as the graders gave them, neither clipped nor normalised; None: ungraded.
        groups: the prompt of each.
        low: ``difficulty_low_threshold``.
        high: ``difficulty_high_threshold``.
    """
    members: dict[int, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        if score is not None:
            members.setdefault(group, []).append(score)
    dropped = {g for g, m in members.items() if len(m) > 1 and not low < statistics.mean(m) < high}
    return [group not in dropped for group in groups]


def max_len_mask(truncated: Sequence[bool]) -> list[bool]:
    """Return which responses to keep: those that were not cut at the length limit."""
    return [not cut for cut in truncated]


def error_max_len_mask(scores: Sequence[float | None], lengths: Sequence[int], threshold: int) -> list[bool]:
    """Return which responses to keep: all but wrong ones (score 0 or less) of ``threshold`` tokens or more.

    Args:
        scores: as the graders gave them; None: ungraded, kept.
        lengths: sampled tokens of each.
        threshold: ``error_max_len_threshold``.
    """
    return [score is None or score > 0 or length < threshold for score, length in zip(scores, lengths, strict=True)]


def query_filter(kind: str, args: Mapping[str, float], group_rewards: Sequence[float]) -> bool:
    """Return whether to keep a prompt, by the rewards of its group.

    - ``no_filter``: yes.
    - ``mean_filter``: if ``threshold_down < mean < threshold_up`` (default: -1, infinity).
    - ``std_filter``: if the unbiased standard deviation is above ``std_threshold`` (default: -1).

    A group with fewer than two rewards is kept.

    Args:
        kind: one of :data:`QUERY_FILTERS`.
        args: ``filter_args``.
        group_rewards: of the graded responses of the group.

    Raises:
        ValueError: unknown kind or argument.
    """
    if kind not in QUERY_FILTERS:
        raise ValueError(f"unknown filter {kind!r}; one of {', '.join(QUERY_FILTERS)}")
    unknown = sorted(set(args) - set(QUERY_FILTERS[kind]))
    if unknown:
        raise ValueError(f"{kind} takes {', '.join(QUERY_FILTERS[kind]) or 'no arguments'}, not {', '.join(unknown)}")
    settings = {**QUERY_FILTERS[kind], **args}
    if kind == "no_filter" or len(group_rewards) < 2:
        return True
    # Exact arithmetic on purpose: a threshold of 0 must catch three rewards of 0.1.
    if kind == "mean_filter":
        return settings["threshold_down"] < statistics.mean(group_rewards) < settings["threshold_up"]
    return statistics.stdev(group_rewards) > settings["std_threshold"]
