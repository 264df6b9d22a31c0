"""Divergences between student and teacher: as scores and losses of the sampled token, and over explicit buckets.

With ``r = pi_T / pi`` a divergence is written ``D = E_pi[f(r)]``. Its gradient at a fixed prefix is

    grad D = -E_pi[(r f'(r) - f(r)) grad log pi],

because ``grad (pi f(pi_T / pi)) = (f(r) - r f'(r)) grad pi``. The score of a sampled token is therefore
``A = r f'(r) - f(r)``, up to a constant (``E_pi[grad log pi] = 0``), which is chosen here such that the score is 0
where student and teacher agree. Sources: Nowozin et al., f-GAN, https://arxiv.org/abs/1606.00709 (table 1, for the
``f``); generalised JSD as in Agarwal et al., GKD, https://arxiv.org/abs/2306.13649 (eq. 1).

``p``, the student, is what was sampled from; ``d = log pi - log pi_T``, so ``r = exp(-d)``.

A bucket is a token or a group of tokens (the tail of a top-k support); ``P`` and ``Q`` are the masses that student and
teacher put there. Merging tokens into one bucket never raises a divergence (data processing inequality), so a support
with its tail gives a lower bound of the full divergence, 0 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def policy_gradient_score(divergence: str, log_ratio: Tensor, jsd_beta: float = 0.5) -> Tensor:
    """Return ``A`` of each sampled token, 0 where student and teacher agree.

    - ``reverse_kl``, ``KL(pi || pi_T)``: ``f = -log r``, ``A = log r = -d``
    - ``forward_kl``, ``KL(pi_T || pi)``: ``f = r log r``, ``A = r - 1``. Unbounded above: ``log_ratio_clip`` bounds it.
    - ``jsd``, ``beta KL(pi_T || m) + (1 - beta) KL(pi || m)`` with ``m = beta pi_T + (1 - beta) pi``:
      ``A = (1 - beta) log(beta r + 1 - beta)``

    Args:
        divergence: one of :data:`DIVERGENCES`.
        log_ratio: ``d``, any shape.
        jsd_beta: weight of the teacher in the mixture, in (0, 1).

    Raises:
        ValueError: unknown divergence.
    """
    if divergence == "reverse_kl":
        return -log_ratio
    if divergence == "forward_kl":
        return torch.expm1(-log_ratio)
    if divergence == "jsd":
        # log(beta r + 1 - beta) as a log-sum-exp: r itself may overflow where the teacher is far surer.
        teacher = math.log(jsd_beta) - log_ratio
        student = torch.full_like(log_ratio, math.log1p(-jsd_beta))
        return (1.0 - jsd_beta) * torch.logaddexp(teacher, student)
    raise ValueError(f"unknown divergence {divergence!r}; one of {', '.join(DIVERGENCES)}")


def direct_sampled_loss(
    divergence: str, logprobs_n: Tensor, teacher_logprobs_n: Tensor, log_ratio_clip: float | None = None
) -> Tensor:
    """Return a loss ``[n]`` of sampled tokens whose expected gradient is the divergence's.

    - ``reverse_kl``: k2, ``d^2 / 2``, with slope ``d``
    - ``forward_kl``: k3, ``r - 1 - log r``, with slope ``1 - r``; its *value* estimates the reverse KL

    ``E_pi[slope * grad log pi]`` is the gradient of the divergence named. k1, ``d`` itself, has slope 1 and hence the
    expected gradient 0; it is no loss. Source: J. Schulman, Approximating KL Divergence,
    http://joschu.net/blog/kl-approx.html (k1, k2, k3).

    Args:
        divergence: ``reverse_kl`` or ``forward_kl``.
        logprobs_n: the student's, of the sampled tokens; the gradient flows here.
        teacher_logprobs_n: the teacher's; never gets a gradient.
        log_ratio_clip: bound on ``|d|``. Beyond it the loss goes on as a straight line: the slope is bounded, not 0,
            so that the tokens that are furthest off are still corrected.

    Raises:
        ValueError: a divergence that has no such loss.
    """
    if divergence not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"{divergence!r} has no direct loss on sampled tokens; reverse_kl and forward_kl have one")
    d = logprobs_n - teacher_logprobs_n.detach()
    at = d.detach() if log_ratio_clip is None else d.detach().clamp(-log_ratio_clip, log_ratio_clip)
    if divergence == "reverse_kl":
        value, slope = at.square() / 2.0, at
    else:
        value, slope = torch.expm1(-at) + at, -torch.expm1(-at)
    return value + slope * (d - at)


def bucket_divergence(
    divergence: str, student_logprobs_nB: Tensor, teacher_logprobs_nB: Tensor, jsd_beta: float = 0.5
) -> Tensor:
    """Return the divergence ``[n]`` of ``Q`` and ``P`` over explicit buckets, which need not sum to 1.

    Differentiable by autograd. An impossible bucket is -inf: on both sides (padding) it adds 0 to the value and to
    every gradient, on one side what the limit says (infinite only for ``P > 0 = Q`` in the reverse and ``Q > 0 = P`` in
    the forward KL).

    Args:
        divergence: one of :data:`DIVERGENCES`.
        student_logprobs_nB: ``log P``.
        teacher_logprobs_nB: ``log Q``.
        jsd_beta: weight of the teacher in the mixture, in (0, 1).

    Raises:
        ValueError: unknown divergence.
    """
    p, q = student_logprobs_nB, teacher_logprobs_nB
    in_p, in_q = p > -math.inf, q > -math.inf
    if divergence == "reverse_kl":
        return (p.exp() * _where(in_p, p - q)).sum(dim=-1)
    if divergence == "forward_kl":
        return (q.exp() * _where(in_q, q - p)).sum(dim=-1)
    mixture = _log_mixture(divergence, p, q, jsd_beta)
    teacher_side = q.exp() * _where(in_q, q - mixture)
    student_side = p.exp() * _where(in_p, p - mixture)
    return (jsd_beta * teacher_side + (1.0 - jsd_beta) * student_side).sum(dim=-1)


def bucket_score(
    divergence: str, student_logprobs_nB: Tensor, teacher_logprobs_nB: Tensor, jsd_beta: float = 0.5
) -> Tensor:
    """Return ``dD/dlog P = P dD/dP`` of :func:`bucket_divergence`, ``[n, B]``, with no constraint on the sum of ``P``.

    - ``reverse_kl``: ``P (log P - log Q + 1)``
    - ``forward_kl``: ``-Q``
    - ``jsd``: ``(1 - beta) P (log P - log M)``

    Taken by ``log P``, because ``dD/dP`` itself overflows where the student's mass vanishes. Arguments and errors are
    those of :func:`bucket_divergence`.
    """
    p, q = student_logprobs_nB, teacher_logprobs_nB
    if divergence == "reverse_kl":
        return p.exp() * _where(p > -math.inf, p - q + 1.0)
    if divergence == "forward_kl":
        return -q.exp()
    mixture = _log_mixture(divergence, p, q, jsd_beta)
    return (1.0 - jsd_beta) * p.exp() * _where(p > -math.inf, p - mixture)


def _where(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, value, 0.0)


def _log_mixture(divergence: str, p: Tensor, q: Tensor, jsd_beta: float) -> Tensor:
    if divergence != "jsd":
        raise ValueError(f"unknown divergence {divergence!r}; one of {', '.join(DIVERGENCES)}")
    # Where neither side has mass the mixture is not used, but its gradient would be NaN: any finite value will do.
    nowhere = (p == -math.inf) & (q == -math.inf)
    return torch.logaddexp(torch.where(nowhere, 0.0, q) + math.log(jsd_beta), p + math.log1p(-jsd_beta))
