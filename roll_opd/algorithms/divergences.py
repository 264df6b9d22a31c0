"""Divergences between student and teacher, as policy-gradient scores on the sampled token.

With ``r = pi_T / pi`` a divergence is written ``D = E_pi[f(r)]``. Its gradient at a fixed prefix is

    grad D = -E_pi[(r f'(r) - f(r)) grad log pi],

because ``grad (pi f(pi_T / pi)) = (f(r) - r f'(r)) grad pi``. The score of a sampled token is therefore
``A = r f'(r) - f(r)``, up to a constant (``E_pi[grad log pi] = 0``), which is chosen here such that the score is 0
where student and teacher agree. Sources: Nowozin et al., f-GAN, https://arxiv.org/abs/1606.00709 (table 1, for the
``f``); generalised JSD as in Agarwal et al., GKD, https://arxiv.org/abs/2306.13649 (eq. 1).

``p``, the student, is what was sampled from; ``d = log pi - log pi_T``, so ``r = exp(-d)``.
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
