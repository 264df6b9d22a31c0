"""Per-token weights and schedules that steady on-policy distillation; each is off until it is called.

A weight multiplies a token's score or loss. The counts that normalise the loss are taken before any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_WEIGHTS = ("none", "linear", "exponential", "prefix")
SCHEDULES = ("constant", "linear", "cosine")


def trust_region_gate(log_ratio: Tensor, bound: float) -> Tensor:
    """Return 1 where ``|d_t| <= bound`` and 0 elsewhere: tokens on which two policies disagree wildly are left out.

    Unlike a clip of ``d``, which keeps a bounded push, the gate takes the token out. Source: the trust region of TRPO,
    https://arxiv.org/abs/1502.05477, token by token as the two-sided mask of IcePop, https://arxiv.org/abs/2510.18855.

    Args:
        log_ratio: ``[n]``, nats.
        bound: nats, > 0.

    Returns:
        ``[n]``, no gradient.

    Raises:
        ValueError: a bound that is not above 0.
    """
    if not bound > 0:
        raise ValueError(f"bound must be above 0, not {bound}")
    return (log_ratio.detach().abs() <= bound).to(log_ratio.dtype)


def entropy_gate(entropies: Sequence[Tensor], keep_fraction: float) -> list[Tensor]:
    """Return 1 for the fraction of the batch's tokens with the highest entropy and 0 for the others.

    The threshold is one for the whole batch, so that neither the order of sequences nor a split matters as long as all
    of them are given. Tokens that tie with the last one kept are kept too. Source: Wang et al., "Beyond the 80/20
    Rule", https://arxiv.org/abs/2506.01939 (their fraction: 0.2).

    Args:
        entropies: of each sequence ``[n]``, of the student's distribution at its sampled tokens.
        keep_fraction: in (0, 1]; ``ceil(keep_fraction * tokens)`` are kept.

    Returns:
        For each sequence ``[n]``, no gradient.

    Raises:
        ValueError: a fraction out of range.
    """
    if not 0.0 < keep_fraction <= 1.0:
        raise ValueError(f"keep_fraction must be in (0, 1], not {keep_fraction}")
    detached = [e.detach() for e in entropies]
    total = sum(e.numel() for e in detached)
    if total == 0:
        return [torch.zeros_like(e) for e in detached]
    # 0.07 * 100 is a hair above 7: the slack keeps it from being 8.
    kept = max(1, math.ceil(keep_fraction * total - 1e-9))
    # The k-th largest is the (total - k + 1)-th smallest.
    threshold = torch.cat([e.flatten() for e in detached]).kthvalue(total - kept + 1).values
    return [(e >= threshold).to(e.dtype) for e in detached]


def position_weight(length: int, kind: str, scale: float) -> Tensor:
    """Return weights by the position ``t = 0, 1, ...`` of a token among the sampled tokens of its response.

    - ``none``: 1
    - ``linear``: ``max(0, 1 - t / scale)``
    - ``exponential``: ``exp(-t / scale)``
    - ``prefix``: 1 for ``t < scale``, else 0

    Late tokens follow prefixes that the teacher would hardly have written, where its verdict says less. Source of
    ``prefix``: Zhang et al., "Fast and Effective On-policy Distillation from Reasoning Prefixes",
    https://arxiv.org/abs/2602.15260; the two others are smooth versions of it.

    Args:
        length: sampled tokens; in an episode those of one turn, which is a response.
        kind: one of :data:`POSITION_WEIGHTS`.
        scale: tokens, > 0; unused by ``none``.

    Returns:
        ``[length]`` float32.

    Raises:
        ValueError: unknown kind, or a scale that is not above 0.
    """
    return _faded(torch.arange(length), kind, scale)


def turn_weight(turns: Tensor, kind: str, scale: float) -> Tensor:
    """Return weights by the number of a token's turn in its episode, by the formulas of :func:`position_weight`.

    With each turn the student is further from where the teacher would have led the episode.

    Args:
        turns: ``[n]`` int64, the turn that each token was sampled in, from 0 at the start of the episode.
        kind: one of :data:`POSITION_WEIGHTS`; ``prefix`` keeps the first ``scale`` turns.
        scale: turns, > 0; unused by ``none``.

    Returns:
        ``[n]`` float32.

    Raises:
        ValueError: unknown kind, or a scale that is not above 0.
    """
    return _faded(turns, kind, scale)


def _faded(position: Tensor, kind: str, scale: float) -> Tensor:
    position = position.double()
    if kind == "none":
        return torch.ones_like(position).float()
    if kind not in POSITION_WEIGHTS:
        raise ValueError(f"unknown position weight {kind!r}; one of {', '.join(POSITION_WEIGHTS)}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    if kind == "linear":
        weights = (1.0 - position / scale).clamp(min=0.0)
    elif kind == "exponential":
        weights = torch.exp(-position / scale)
    else:
        weights = (position < scale).double()
    return weights.float()


def scheduled_coef(kind: str, start: float, end: float, step: int, total_steps: int) -> float:
    """Return a coefficient that goes from ``start`` at step 0 to ``end`` at ``total_steps``, and stays there.

    With ``p = min(step / total_steps, 1)``:

    - ``constant``: ``start``
    - ``linear``: ``start + p (end - start)``
    - ``cosine``: ``end + (start - end) (1 + cos(pi p)) / 2`` (Loshchilov & Hutter, https://arxiv.org/abs/1608.03983)

    Raises:
        ValueError: unknown kind, a negative step, or no steps at all.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(SCHEDULES)}")
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}")
    progress = min(step / total_steps, 1.0)
    if kind == "constant":
        return start
    if progress == 1.0:
        return end
    if kind == "linear":
        return start + progress * (end - start)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def extrapolated_log_ratio(student: Tensor, teacher: Tensor, base: Tensor, lambd: float) -> Tensor:
    """Return ``d = (log pi - log base) - lambda (log teacher - log base)``.

    Its expectation under the student is ``KL(pi || base) - lambda E[log teacher / base]``: reinforcement learning with
    the reward ``log teacher / base`` and a KL to the base model. At a fixed prefix it is least for
    ``base^(1 - lambda) teacher^lambda``, normalised: lambda = 1 is the teacher, and ``d`` the ordinary log-ratio
    whatever the base; lambda > 1 goes past the teacher, away from the base. Source: Yang et al., "Learning
    beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation", https://arxiv.org/abs/2602.12125.

    Args:
        student: ``[n]`` log-probabilities of the sampled tokens; untruncated softmax at temperature 1, like the others.
        teacher: ``[n]``.
        base: ``[n]``.
        lambd: weight of the reward.

    Returns:
        ``[n]``, nats.
    """
    # Written such that at lambda = 1 the base drops out exactly, not up to rounding.
    return (student - teacher) + (1.0 - lambd) * (teacher - base)
