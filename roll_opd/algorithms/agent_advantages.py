"""From the rewards of an episode's turns to advantages: stages 1 to 6 of :mod:`roll_opd.algorithms.advantages`.

An episode is one stream of sampled tokens, cut into turns. How its trajectories were cut, at a context limit or by a
chat template that rewrites earlier turns, changes nothing: whoever calls joins them first, and splits the result.

What an estimator puts on the last token of a turn, with ``z`` the episode's score, compared as the estimator or
``reward_normalization`` says, ``r_k`` the reward of turn ``k``, and ``G_k = r_k + step_gamma G_{k+1}``:

=====================  =======================================================  ==========================
estimator              reward at the end of turn ``k``                          summed over (stage 5)
=====================  =======================================================  ==========================
``reinforce``          ``z`` on the last turn, 0 before                         the episode, ``gamma`` by token
``reinforce++``        the same, whitened at the end                            the same
``grpo``, ``rloo``     the same, ``z`` compared within the draw                 the same
``gae``                ``r_k``, normalised with the episode                     the same, with the critic
``agentic_reinforce``  the same                                                 the episode, ``gamma`` by turn
``step_reinforce``     ``G_k``, normalised over all turns                       the turn, ``gamma`` by token
``gigpo``              ``episode_weight z + step_weight a_k``, ``a_k`` being    the turn, ``gamma`` by token
                       ``G_k`` normalised over the turns of the draw that
                       began in the same state
=====================  =======================================================  ==========================

"Normalised with the episode": where the score becomes ``(s - mean) scale``, each ``r_k`` is multiplied by ``scale``,
and ``mean * scale`` comes off the last one. They then add up to the normalised score.

The penalties of stage 3 (KL to a reference, or teachers under ``apply_to: reward``) are summed over the same span as
the rewards: with ``step_reinforce`` and ``gigpo`` over the turn alone, because there a turn's score is its whole
future.

Sources: GiGPO is Feng et al., "Group-in-Group Policy Optimization for LLM Agent Training",
https://arxiv.org/abs/2505.10978 (eq. 3 and 5 to 8); a turn that is alone in its state gets ``a_k = 0``. The other
turn-level estimators are REINFORCE (Williams, https://doi.org/10.1007/BF00992696) with a turn as the action.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from roll_opd.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    AdvantageSettings,
    discounted_returns,
    group_baseline,
    sequence_advantages,
)
from roll_opd.algorithms.reward_shaping import clip_rewards, group_moments, normalise_rewards, reward_normaliser

GROUPINGS = ("batch", "traj_group_id", "tags")
TURNS_REWARDED = ("gae", "agentic_reinforce", "step_reinforce", "gigpo")
"""Estimators that see the rewards of turns; to the others an episode has its score alone."""
TURN_BY_TURN = ("step_reinforce", "gigpo")
"""Estimators that give each turn a score of its own, which nothing is added to from later turns."""


@dataclass(frozen=True)
class AgentAdvantageSettings(AdvantageSettings):
    """How the rewards of episodes become advantages.

    Attributes:
        grouping: what norm type ``group`` means: the whole ``batch``, the episodes of one draw (``traj_group_id``), or
            of one environment (``tags``). ``gigpo`` compares turns within a draw and state whatever it says.
        step_gamma: discount per turn of the returns of ``step_reinforce`` and ``gigpo``, in 0..1.
        episode_weight: weight of the episode's score in ``gigpo``.
        step_weight: weight of the turn's score in ``gigpo``.
    """

    ESTIMATORS: ClassVar[tuple[str, ...]] = (*ADVANTAGE_ESTIMATORS, "agentic_reinforce", "step_reinforce", "gigpo")

    grouping: str = "batch"
    step_gamma: float = 0.95
    episode_weight: float = 1.0
    step_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grouping not in GROUPINGS:
            raise ValueError(f"unknown grouping {self.grouping!r}; one of {', '.join(GROUPINGS)}")
        if not 0.0 <= self.step_gamma <= 1.0:
            raise ValueError(f"step_gamma must be in 0..1, not {self.step_gamma}")
        if "running" in (self.norm_mean_type, self.norm_std_type):
            raise ValueError("episodes are compared within a batch, norm type running is not for them")
        if self.estimator in ("grpo", "rloo") and (self.norm_mean_type or self.norm_std_type):
            raise ValueError(f"{self.estimator} compares by itself, norm types are not for it")


@dataclass(frozen=True)
class Episode:
    """What the advantages of an episode depend on.

    Attributes:
        draw: number of its group; episodes of one draw began alike.
        tag: of its environment.
        score: external reward of the whole; None: ungraded.
        rewards: of each turn, in order.
        lengths: sampled tokens of each turn, at least 1.
        states: of each turn; equal for decisions of a draw that were taken in the same state of the environment.
    """

    draw: int
    tag: str
    score: float | None
    rewards: Sequence[float]
    lengths: Sequence[int]
    states: Sequence[str]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"an episode of turns of {list(self.lengths)} tokens")
        if not len(self.rewards) == len(self.lengths) == len(self.states):
            raise ValueError(f"{len(self.lengths)} turns, {len(self.rewards)} rewards, {len(self.states)} states")


def agent_advantages(
    settings: AgentAdvantageSettings,
    episodes: Sequence[Episode],
    penalties: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    """Return the advantages of a batch of episodes, up to and including whitening.

    An ungraded episode is in no statistic. Its advantage is 0, and its return is its value, which leaves the critic
    where it is.

    Args:
        settings: how.
        episodes: each with all of its turns.
        penalties: ``[n]`` of each, over all its sampled tokens, subtracted from token rewards; already times their
            coefficient.
        values: ``[n]`` of each from the critic: needed for ``gae``, and for nothing else. The value behind an episode's
            last token is 0; between its segments the next segment's first value follows.

    Returns:
        Advantages ``[n]`` fp32 of each; returns ``[n]`` fp32 of each for ``gae``, else None; and the metrics of
        :func:`~roll_opd.algorithms.advantages.rl_advantages`. ``reward_clip_fraction`` is over turns where the
        estimator sees them. ``step_reinforce`` and ``gigpo`` add ``step_return_mean`` and ``step_return_std`` over
        turns, ``gigpo`` also ``state_group_size_mean`` (turns of a draw in one state, mean over such groups) and
        ``state_compared_fraction`` (of turns: those that are not alone in their group).

    Raises:
        ValueError: lengths that do not match, a reward that is not finite, values missing or not wanted.
    """
    sizes = [sum(e.lengths) for e in episodes]
    _check_tensors(settings, sizes, penalties, values)
    graded = [i for i, e in enumerate(episodes) if e.score is not None]
    metrics = {"ungraded_fraction": 1.0 - len(graded) / len(episodes) if episodes else 0.0}
    scored = [episodes[i] for i in graded]
    rows = []
    for i, placed in zip(graded, _placed(settings, scored, metrics), strict=True):
        row = torch.zeros(sizes[i], dtype=torch.float64) if penalties is None else -penalties[i].detach().double()
        row[torch.tensor(episodes[i].lengths).cumsum(0) - 1] += placed
        rows.append(row)

    by_turn = settings.estimator in TURN_BY_TURN
    if by_turn:
        rows = [turn for row, e in zip(rows, scored, strict=True) for turn in row.split(list(e.lengths))]
    rows, targets, extra = sequence_advantages(
        settings,
        rows,
        values=None if values is None else [values[i] for i in graded],
        turns=[e.lengths for e in scored] if settings.estimator == "agentic_reinforce" else None,
    )
    if by_turn:
        turns = iter(rows)
        rows = [torch.cat([next(turns) for _ in e.lengths]) for e in scored]

    advantages = [torch.zeros(size) for size in sizes]
    returns = None if values is None else [v.detach().float() for v in values]
    for place, i in enumerate(graded):
        advantages[i] = rows[place].float()
        if returns is not None and targets is not None:
            returns[i] = targets[place].float()
    return advantages, returns, metrics | extra


def _placed(
    settings: AgentAdvantageSettings, episodes: Sequence[Episode], metrics: dict[str, float]
) -> Sequence[Tensor]:
    """Stages 1 and 2: what stands on the last token of each turn, ``[turns]`` of each episode. Adds to ``metrics``."""
    if not episodes:
        return []
    counts = [len(e.lengths) for e in episodes]
    scores = _finite([e.score for e in episodes if e.score is not None])
    rewards = _finite([r for e in episodes for r in e.rewards])
    metrics["reward_mean"] = scores.mean().item()
    metrics["reward_std"] = scores.std().item() if scores.numel() > 1 else 0.0
    if settings.reward_clip is not None:
        whole = rewards if settings.estimator in TURNS_REWARDED else scores
        clipped = clip_rewards(whole, settings.reward_clip)
        metrics["reward_clip_fraction"] = (clipped != whole).double().mean().item()
        if whole is rewards:
            rewards, scores = clipped, torch.stack([part.sum() for part in clipped.split(counts)])
        else:
            scores = clipped

    draws = torch.tensor([e.draw for e in episodes])
    groups = {"batch": torch.zeros_like(draws), "traj_group_id": draws, "tags": _numbered(e.tag for e in episodes)}
    group, kinds = groups[settings.grouping], (settings.norm_mean_type, settings.norm_std_type)
    if settings.estimator in TURN_BY_TURN:
        returns = torch.cat([discounted_returns(part, settings.step_gamma) for part in rewards.split(counts)])
        metrics["step_return_mean"] = returns.mean().item()
        metrics["step_return_std"] = returns.std().item() if returns.numel() > 1 else 0.0
    if settings.estimator == "step_reinforce":
        return normalise_rewards(returns, group.repeat_interleave(torch.tensor(counts)), *kinds).split(counts)

    if settings.estimator in ("grpo", "rloo"):
        compared = group_baseline(settings.estimator, scores, draws)
    else:
        mean, scale = reward_normaliser(scores, group, *kinds)
        compared = (scores - mean) * scale
    if settings.estimator == "gigpo":
        states = _numbered((e.draw, state) for e in episodes for state in e.states)
        _count_states(returns, states, metrics)
        steps = normalise_rewards(returns, states, *kinds)
        wholes = compared.repeat_interleave(torch.tensor(counts))
        return (settings.episode_weight * wholes + settings.step_weight * steps).split(counts)

    placed = [torch.zeros(count, dtype=torch.float64) for count in counts]
    for i, turns in enumerate(rewards.split(counts)):
        if settings.estimator in TURNS_REWARDED:
            placed[i] = turns * scale[i]
            placed[i][-1] -= mean[i] * scale[i]
        else:
            placed[i][-1] = compared[i]
    return placed


def _count_states(returns: Tensor, states: Tensor, metrics: dict[str, float]) -> None:
    size = group_moments(returns, states)[2]
    metrics["state_group_size_mean"] = size.numel() / (1.0 / size).sum().item()
    metrics["state_compared_fraction"] = (size > 1).double().mean().item()


def _finite(values: Sequence[float]) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    if not torch.isfinite(tensor).all():
        raise ValueError("a reward is not finite")
    return tensor


def _numbered(names: Iterable[Hashable]) -> Tensor:
    """Number distinct names in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64)


def _check_tensors(
    settings: AgentAdvantageSettings,
    sizes: Sequence[int],
    penalties: Sequence[Tensor] | None,
    values: Sequence[Tensor] | None,
) -> None:
    for name, tensors in (("penalties", penalties), ("values", values)):
        if tensors is not None and [t.shape for t in tensors] != [(size,) for size in sizes]:
            raise ValueError(f"{name} of shapes {[tuple(t.shape) for t in tensors]} for episodes of {sizes} tokens")
    if (settings.estimator == "gae") != (values is not None):
        raise ValueError("gae needs values, and no other estimator takes them")
