"""The advantage step of on-policy distillation.

With ``d_t = log pi_student(y_t) - log pi_teacher(y_t)`` on the tokens that the student sampled, the expectation of
``d_t`` under the student is the reverse KL ``KL(pi_student || pi_teacher)`` at that prefix, and ``A_t = -c d_t`` is the
score whose policy gradient descends it (at discount 0): ``grad KL = E[d_t grad log pi_student(y_t)]``, because the
term from differentiating ``d_t`` itself has zero expectation. Source: Gu et al., MiniLLM,
https://arxiv.org/abs/2306.08543 (eq. 2) and Lu et al., "On-Policy Distillation", Thinking Machines Lab, 2025.

Sign: positive advantage = the teacher likes the sampled token more than the student does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roll_opd.algorithms.divergences import policy_gradient_score


def log_ratio(
    student_logprobs: Tensor, teacher_logprobs: Tensor, response_mask: Tensor, clip: float | None = None
) -> Tensor:
    """Return ``d_t = student - teacher`` on sampled tokens, 0 elsewhere.

    Args:
        student_logprobs: ``[N]``, untruncated softmax at temperature 1 (no gradient flows).
        teacher_logprobs: ``[N]``, likewise.
        response_mask: ``[N]`` bool.
        clip: bound on ``|d_t|`` (``opd_args.log_ratio_clip``), or None.

    Returns:
        ``[N]`` float32.
    """
    d = (student_logprobs.detach().float() - teacher_logprobs.detach().float()).masked_fill(~response_mask, 0.0)
    return d if clip is None else d.clamp(-clip, clip)


def opd_advantages(
    log_ratios: Sequence[Tensor], coefs: Sequence[float], divergence: str = "reverse_kl", jsd_beta: float = 0.5
) -> Tensor:
    """Return ``A_t = sum_i c_i A_{i,t}`` over the teachers that cover a sample; ``- sum_i c_i d_{i,t}`` for reverse KL.

    Args:
        log_ratios: for each teacher ``[N]``, from :func:`log_ratio`; where they are 0, so is the advantage.
        coefs: each teacher's ``opd_kl_coef``.
        divergence: whose gradient is followed, see :mod:`roll_opd.algorithms.divergences`.
        jsd_beta: its parameter.
    """
    if not log_ratios or len(log_ratios) != len(coefs):
        raise ValueError(f"{len(log_ratios)} log-ratios for {len(coefs)} coefficients")
    scores = [c * policy_gradient_score(divergence, d, jsd_beta) for c, d in zip(coefs, log_ratios, strict=True)]
    return torch.stack(scores).sum(dim=0)
