"""From rewards to advantages of the external signal.

The order, each stage optional but never exchanged with another:

1. ``reward_clip`` bounds the external rewards.
2. Reward normalisation (``norm_mean_type``, ``norm_std_type``) or the estimator's own baseline over the group. Both see
   external rewards alone, each episode once.
3. Token rewards: the score on the last sampled token, minus a penalty per token: ``coef * KL-to-reference``, or the
   teachers' ``sum_i c_i d_i`` under ``apply_to: reward``.
4. ``whiten_rewards`` over all tokens of the batch.
5. Discounted sums, or GAE.
6. ``whiten_advantages`` over all tokens of the batch; ``reinforce++`` always.
7. The teachers' term under ``apply_to: advantage``, at full strength: nothing before this scales it.
8. ``advantage_clip``.

:func:`rl_advantages` is 1 to 6 for responses, :func:`roll_opd.algorithms.agent_advantages.agent_advantages` 1 to 6 for
episodes of several turns, :func:`final_advantages` 7 and 8. Sequences have no padding: each tensor ``[n]`` holds the
sampled tokens of one sequence, and a batch is a list of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from roll_opd.algorithms.reward_shaping import (
    EPS,
    NORM_TYPES,
    RunningMoments,
    clip_rewards,
    group_moments,
    normalise_rewards,
)

ADVANTAGE_ESTIMATORS = ("reinforce", "reinforce++", "grpo", "rloo", "gae")
WHITEN_EPS = 1e-8
"""Added to the variance that tokens are whitened by, as in ROLL."""


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages.

    Attributes:
        estimator: one of :data:`ADVANTAGE_ESTIMATORS`.
        gamma: discount per token, in 0..1.
        lambd: lambda of ``gae``, in 0..1.
        whiten_advantages: whiten at the end; ``reinforce++`` does so anyway.
        whiten_rewards: whiten token rewards before they are summed up.
        reward_clip: bound on the absolute external reward, or None.
        norm_mean_type: what rewards are centred over, see :func:`normalise_rewards`. ``grpo`` replaces both.
        norm_std_type: what they are scaled over.
    """

    ESTIMATORS: ClassVar[tuple[str, ...]] = ADVANTAGE_ESTIMATORS

    estimator: str = "gae"
    gamma: float = 1.0
    lambd: float = 0.95
    whiten_advantages: bool = False
    whiten_rewards: bool = False
    reward_clip: float | None = None
    norm_mean_type: str | None = None
    norm_std_type: str | None = None

    def __post_init__(self) -> None:
        _check_estimator(self.estimator, self.ESTIMATORS)
        for name, value in (("gamma", self.gamma), ("lambd", self.lambd)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in 0..1, not {value}")
        if self.reward_clip is not None and not self.reward_clip > 0:
            raise ValueError(f"reward_clip must be above 0, not {self.reward_clip}")
        for kind in (self.norm_mean_type, self.norm_std_type):
            if kind is not None and kind not in NORM_TYPES:
                raise ValueError(f"unknown norm type {kind!r}; one of {', '.join(NORM_TYPES)}, or None")


def group_baseline(estimator: str, rewards: Tensor, groups: Tensor, episodes: Tensor | None = None) -> Tensor:
    """Return the score of each sequence: its reward, compared with its group where the estimator does that.

    - ``grpo``: ``(r - mean) / (std + 1e-6)`` of the group, unbiased std (Shao et al., https://arxiv.org/abs/2402.03300).
    - ``rloo``: ``r -`` the mean of the *other* rewards of the group (Ahmadian et al., https://arxiv.org/abs/2402.14740).
    - ``reinforce``, ``reinforce++``, ``gae``: ``r``. Their baseline is none, the whitening over the batch
      (https://arxiv.org/abs/2501.03262) and the critic.

    A group of one, or one whose rewards are all equal, scores 0 with ``grpo`` and ``rloo``: there is nothing to compare
    with, hence no signal.

    Args:
        estimator: one of :data:`ADVANTAGE_ESTIMATORS`.
        rewards: ``[N]``.
        groups: ``[N]`` int64, the prompt that each entry belongs to.
        episodes: ``[N]`` int64; entries with the same number are segments of one episode, share one reward and group,
            and count once. None: every entry is an episode.

    Returns:
        ``[N]`` fp64.

    Raises:
        ValueError: unknown estimator; segments of an episode that disagree in reward or group.
    """
    _check_estimator(estimator)
    firsts, episode_of = _distinct_episodes(rewards, groups, episodes)
    return _compared(estimator, rewards.detach().double()[firsts], groups[firsts])[episode_of]


def token_rewards(score: float, length: int, penalty: Tensor | None = None) -> Tensor:
    """Return the reward of each token: ``score`` on the last one, minus ``penalty``.

    Args:
        score: of the sequence.
        length: sampled tokens; with none of them the result is empty.
        penalty: ``[length]``, already times its coefficient, or None.

    Returns:
        ``[length]`` fp64.
    """
    if penalty is not None and penalty.shape != (length,):
        raise ValueError(f"a penalty of shape {tuple(penalty.shape)} for {length} tokens")
    rewards = torch.zeros(length, dtype=torch.float64) if penalty is None else -penalty.detach().double()
    if length:
        rewards[-1] += score
    return rewards


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Return ``R_t = r_t + gamma R_{t+1}``, ``[n]`` in the type of ``rewards [n]``; summed in fp64."""
    return _discounted_sums(rewards.detach().double(), gamma).to(rewards.dtype)


def discounted_returns_by_turn(rewards: Tensor, turns: Sequence[int], gamma: float) -> Tensor:
    """Return the rewards from each token to the end, those of later turns discounted once for each turn between.

    Of token ``t`` in turn ``k``: ``sum_{s >= t in turn k} r_s + gamma R_{k+1}``, where ``R_k`` is that of the first
    token of turn ``k``. With rewards at the ends of turns alone it is ``R_k = r_k + gamma R_{k+1}`` on every token of
    the turn.

    Args:
        rewards: ``[n]``.
        turns: sampled tokens of each turn, each at least 1, in order; they add up to ``n``.
        gamma: discount per turn.

    Returns:
        ``[n]`` in the type of ``rewards``; summed in fp64.
    """
    parts, following = [], 0.0
    for part in reversed(rewards.detach().double().split(list(turns))):
        sums = part.flip(0).cumsum(0).flip(0) + gamma * following
        parts.append(sums)
        following = sums[0].item()
    return torch.cat(parts[::-1]).to(rewards.dtype)


def gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the critic's targets.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` with ``V = 0`` after the last token,
    ``A_t = delta_t + gamma lambda A_{t+1}``, ``returns = A + V``. Source: Schulman et al.,
    https://arxiv.org/abs/1506.02438 (eq. 16).

    Args:
        rewards: ``[n]``.
        values: ``[n]``, the value before each token is sampled; no gradient.
        gamma: discount per token.
        lambd: 0: one-step; 1: the discounted return minus the value.

    Returns:
        Two ``[n]``, in the type of ``rewards``; summed in fp64.
    """
    if rewards.shape != values.shape:
        raise ValueError(f"{tuple(values.shape)} values for {tuple(rewards.shape)} rewards")
    wide = values.detach().double()
    following = torch.cat([wide[1:], wide.new_zeros(min(1, len(wide)))])
    advantages = _discounted_sums(rewards.detach().double() + gamma * following - wide, gamma * lambd)
    return advantages.to(rewards.dtype), (advantages + wide).to(rewards.dtype)


def whitening(values: Sequence[Tensor]) -> tuple[float, float]:
    """Return ``mean`` and ``scale = 1 / sqrt(variance + 1e-8)`` over all tokens of a batch.

    Unbiased variance, in fp64. Equal values, a single one, or none have scale 0: nothing tells them apart.
    """
    tokens = torch.cat([v.detach().double().flatten() for v in values]) if values else torch.zeros(0)
    if tokens.numel() == 0:
        return 0.0, 0.0
    lowest = tokens.min().item()
    if lowest == tokens.max().item():
        return lowest, 0.0
    return tokens.mean().item(), 1.0 / math.sqrt(tokens.var().item() + WHITEN_EPS)


def whiten(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the batch with mean 0 and standard deviation 1 over all its tokens; equal values become 0.

    Args:
        values: of each sequence ``[n]``.

    Returns:
        For each sequence ``[n]``, in the type it came in.
    """
    return _whitened(values, *whitening(values))


def clip(values: Sequence[Tensor], bound: float) -> tuple[list[Tensor], float]:
    """Return the batch cut to ``-bound..bound``, and the fraction of tokens that this changed."""
    if not bound > 0:
        raise ValueError(f"bound must be above 0, not {bound}")
    total = sum(v.numel() for v in values)
    beyond = sum(int((v.abs() > bound).sum()) for v in values)
    return [v.clamp(-bound, bound) for v in values], beyond / total if total else 0.0


def rl_advantages(
    settings: AdvantageSettings,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
    groups: Sequence[int],
    episodes: Sequence[int] | None = None,
    penalties: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    masked: Sequence[bool] | None = None,
    running: RunningMoments | None = None,
) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    """Return the advantages of a batch, up to and including whitening: stages 1 to 6 of this module.

    An ungraded sequence is in no statistic. Its advantage is 0, and its return is its value, which leaves the critic
    where it is. So is a masked one, except that its reward counts for its group.

    Args:
        settings: how.
        rewards: external reward of each sequence, None where there is no verdict.
        lengths: sampled tokens of each.
        groups: the prompt of each; any numbers.
        episodes: the episode of each; segments of one episode share a reward and count once. None: one each.
        penalties: ``[n]`` of each, subtracted from its token rewards; already times its coefficient.
        values: ``[n]`` of each from the critic: needed for ``gae``, and for nothing else.
        masked: sequences that filters such as ``max_len_mask`` took out of the loss.
        running: moments of the run, where a norm type is ``running``; updated.

    Returns:
        Advantages ``[n]`` fp32 of each; returns ``[n]`` fp32 of each for ``gae``, else None; and metrics:
        ``reward_mean``, ``reward_std``, ``reward_clip_fraction`` (over graded episodes), ``ungraded_fraction``
        (of sequences), ``advantage_mean`` and ``advantage_std`` (over tokens, before stage 6), ``reward_scale`` and
        ``advantage_scale`` (what whitening multiplied by, 1 where it is off), ``penalty_scale`` (their product: what is
        left of each unit of ``penalties``). Means over nothing are left out.

    Raises:
        ValueError: lengths that do not match, a reward that is not finite, segments of an episode that disagree, values
            missing or not wanted, ``running`` missing.
    """
    batch = _checked_lengths(settings, rewards, lengths, groups, episodes, penalties, values, masked)
    graded = [i for i in range(batch) if rewards[i] is not None]
    metrics = {"ungraded_fraction": 1.0 - len(graded) / batch if batch else 0.0}
    scores = dict(zip(graded, _scores(settings, rewards, groups, episodes, graded, running, metrics), strict=True))
    trained = [i for i in graded if not (masked and masked[i])]

    rows = [token_rewards(scores[i], lengths[i], None if penalties is None else penalties[i]) for i in trained]
    rows, targets, extra = sequence_advantages(settings, rows, None if values is None else [values[i] for i in trained])
    metrics |= extra
    returns = None if values is None else [v.detach().float() for v in values]
    if returns is not None and targets is not None:
        for i, target in zip(trained, targets, strict=True):
            returns[i] = target.float()

    advantages = [torch.zeros(n) for n in lengths]
    for i, row in zip(trained, rows, strict=True):
        advantages[i] = row.float()
    return advantages, returns, metrics


def sequence_advantages(
    settings: AdvantageSettings,
    rewards: Sequence[Tensor],
    values: Sequence[Tensor] | None = None,
    turns: Sequence[Sequence[int]] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    """Return the advantages of sequences whose token rewards are known: stages 4 to 6 of this module.

    Args:
        settings: how.
        rewards: ``[n]`` of each sequence.
        values: ``[n]`` of each from the critic, for ``gae``.
        turns: sampled tokens of each turn of each sequence; ``gamma`` then discounts by turn, not by token. Not for
            ``gae``.

    Returns:
        Advantages ``[n]`` of each; the critic's targets ``[n]`` of each for ``gae``, else None; and the metrics
        ``advantage_mean`` to ``penalty_scale`` of :func:`rl_advantages`.
    """
    rows, targets = list(rewards), None
    reward_scale = advantage_scale = 1.0
    if settings.whiten_rewards:
        mean, reward_scale = whitening(rows)
        rows = _whitened(rows, mean, reward_scale)
    if values is not None:
        pairs = [gae(row, v, settings.gamma, settings.lambd) for row, v in zip(rows, values, strict=True)]
        rows, targets = [advantages for advantages, _ in pairs], [target for _, target in pairs]
    elif turns is not None:
        rows = [discounted_returns_by_turn(row, n, settings.gamma) for row, n in zip(rows, turns, strict=True)]
    else:
        rows = [discounted_returns(row, settings.gamma) for row in rows]
    metrics = {}
    tokens = torch.cat(rows) if rows else torch.zeros(0)
    if tokens.numel():
        metrics["advantage_mean"] = tokens.mean().item()
        metrics["advantage_std"] = tokens.std().item() if tokens.numel() > 1 else 0.0
    if settings.whiten_advantages or settings.estimator == "reinforce++":
        mean, advantage_scale = whitening(rows)
        rows = _whitened(rows, mean, advantage_scale)
    scales = {"reward_scale": reward_scale, "advantage_scale": advantage_scale}
    return rows, targets, metrics | scales | {"penalty_scale": reward_scale * advantage_scale}


def final_advantages(
    advantages: Sequence[Tensor], teacher_terms: Sequence[Tensor] | None, advantage_clip: float | None
) -> tuple[list[Tensor], dict[str, float]]:
    """Return ``clip(A_RL + A_teacher)``: stages 7 and 8 of this module.

    Args:
        advantages: ``[n]`` of each sequence, from :func:`rl_advantages`.
        teacher_terms: ``[n]`` of each, ``- sum_i c_i d_i`` under ``apply_to: advantage``; None where there is none.
        advantage_clip: bound on the sum, or None.

    Returns:
        ``[n]`` of each, and the metric ``advantage_clip_fraction`` where there is a bound.
    """
    if teacher_terms is None:
        total = list(advantages)
    else:
        for a, t in zip(advantages, teacher_terms, strict=True):
            if a.shape != t.shape:
                raise ValueError(f"a teacher's term of shape {tuple(t.shape)} for {tuple(a.shape)} advantages")
        total = [a + t for a, t in zip(advantages, teacher_terms, strict=True)]
    if advantage_clip is None:
        return total, {}
    clipped, fraction = clip(total, advantage_clip)
    return clipped, {"advantage_clip_fraction": fraction}


def _scores(
    settings: AdvantageSettings,
    rewards: Sequence[float | None],
    groups: Sequence[int],
    episodes: Sequence[int] | None,
    graded: Sequence[int],
    running: RunningMoments | None,
    metrics: dict[str, float],
) -> list[float]:
    """Stages 1 and 2: one score for each graded sequence, from each episode once. Adds to ``metrics``."""
    raw = torch.tensor([rewards[i] for i in graded], dtype=torch.float64)
    if not torch.isfinite(raw).all():
        raise ValueError("a reward is not finite")
    group = torch.tensor([groups[i] for i in graded], dtype=torch.int64)
    episode = None if episodes is None else torch.tensor([episodes[i] for i in graded], dtype=torch.int64)
    firsts, episode_of = _distinct_episodes(raw, group, episode)
    raw, group = raw[firsts], group[firsts]
    if raw.numel():
        metrics["reward_mean"] = raw.mean().item()
        metrics["reward_std"] = raw.std().item() if raw.numel() > 1 else 0.0
    scores = raw
    if settings.reward_clip is not None:
        scores = clip_rewards(raw, settings.reward_clip)
        if raw.numel():
            metrics["reward_clip_fraction"] = (scores != raw).double().mean().item()
    # grpo is a normalisation itself. The others' baseline, if any, shifts: it comes after.
    if settings.estimator != "grpo":
        scores = normalise_rewards(scores, group, settings.norm_mean_type, settings.norm_std_type, running)
    return _compared(settings.estimator, scores, group)[episode_of].tolist()


def _compared(estimator: str, rewards: Tensor, groups: Tensor) -> Tensor:
    """The estimator's baseline, one entry an episode."""
    if estimator not in ("grpo", "rloo") or rewards.numel() == 0:
        return rewards
    mean, std, size = group_moments(rewards, groups)
    if estimator == "grpo":
        return (rewards - mean) / (std + EPS)
    # r - (S - r)/(n - 1) = (r - mean) n/(n - 1); a group of one gives 0, because r is the mean.
    return (rewards - mean) * size / (size - 1).clamp(min=1.0)


def _distinct_episodes(rewards: Tensor, groups: Tensor, episodes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Index of the first segment of each episode, and for each segment the place of its episode in that list."""
    size = rewards.numel()
    if groups.shape != (size,) or (episodes is not None and episodes.shape != (size,)):
        raise ValueError(f"{size} rewards with groups or episodes of another length")
    entries = torch.arange(size)
    if episodes is None:
        return entries, entries
    names, episode_of = torch.unique(episodes, return_inverse=True)
    firsts = torch.full((names.numel(),), size).scatter_reduce(0, episode_of, entries, "amin")
    for what, array in (("reward", rewards), ("group", groups)):
        differs = (array != array[firsts][episode_of]).nonzero()
        if differs.numel():
            raise ValueError(f"segments of episode {int(episodes[differs[0, 0]])} differ in their {what}")
    return firsts, episode_of


def _discounted_sums(values: Tensor, decay: float) -> Tensor:
    """``S_t = v_t + decay S_{t+1}`` by doubling: after pass k every entry holds the sum of its next 2^k values."""
    sums, reach = values, 1
    while decay and reach < len(sums):
        shifted = torch.nn.functional.pad(sums[reach:], (0, reach))
        sums, reach = sums + decay**reach * shifted, 2 * reach
    return sums


def _whitened(values: Sequence[Tensor], mean: float, scale: float) -> list[Tensor]:
    return [((v.detach().double() - mean) * scale).to(v.dtype) for v in values]


def _check_estimator(estimator: str, known: Sequence[str] = ADVANTAGE_ESTIMATORS) -> None:
    if estimator not in known:
        raise ValueError(f"unknown estimator {estimator!r}; one of {', '.join(known)}")


def _checked_lengths(
    settings: AdvantageSettings,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
    groups: Sequence[int],
    episodes: Sequence[int] | None,
    penalties: Sequence[Tensor] | None,
    values: Sequence[Tensor] | None,
    masked: Sequence[bool] | None,
) -> int:
    """Number of sequences, once all arguments agree on it and on the tokens of each."""
    size = len(rewards)
    for name, given in (
        ("lengths", lengths),
        ("groups", groups),
        ("episodes", episodes),
        ("penalties", penalties),
        ("values", values),
        ("masked", masked),
    ):
        if given is not None and len(given) != size:
            raise ValueError(f"{len(given)} {name} for {size} rewards")
    for name, tensors in (("penalties", penalties), ("values", values)):
        for i, tensor in enumerate(tensors or ()):
            if tensor.shape != (lengths[i],):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} for the {lengths[i]} tokens of sequence {i}")
    if (settings.estimator == "gae") != (values is not None):
        raise ValueError("gae needs values, and no other estimator takes them")
    return size
