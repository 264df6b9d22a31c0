"""The loss of a token: a sum of components, each with a weight per token.

::

    L_t = policy_weight_t * L_policy(A_t)                      policy gradient, clipped
        + sum_i divergence_weight_{i,t} * D_{i,t}              teacher i's divergence, back-propagated
        + kl_coef * KL_t(student, reference)                   distance to a frozen policy
        - entropy_coef * H_t

How tokens become one number is :mod:`roll_opd.algorithms.aggregation`'s business, and every stabiliser is a weight: no
component knows of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roll_opd.algorithms.divergences import direct_sampled_loss
from roll_opd.algorithms.kl import kl_estimate
from roll_opd.algorithms.policy_loss import PolicyLoss


@dataclass(frozen=True)
class DivergenceLoss:
    """Which divergence from the teachers is back-propagated.

    Attributes:
        divergence: ``reverse_kl``, ``forward_kl`` or ``jsd``.
        support: ``sampled``, ``full``, or a ``*_topk`` set of tokens.
        jsd_beta: weight of the teacher in the mixture of ``jsd``.
        add_tail: the mass outside a set is one more bucket.
        log_ratio_clip: bound on the sampled token's log-ratio.
    """

    divergence: str = "reverse_kl"
    support: str = "full"
    jsd_beta: float = 0.5
    add_tail: bool = True
    log_ratio_clip: float | None = None


@dataclass(frozen=True)
class LossInputs:
    """Tensors of the sampled tokens of a packed row, all ``[n]``; only ``logprobs``, ``entropy`` and ``divergences``
    carry a gradient.

    Attributes:
        logprobs: under the weights being trained.
        entropy: of the student's distribution at each token.
        old_logprobs: before the update.
        advantages: of each token.
        policy_weights: weight of each token's policy loss.
        segments: int64, which sequence of the row a token belongs to; with a policy ratio by turn, which turn.
        num_segments: sequences, or turns, in the row.
        ref_logprobs: under the reference, when there is one.
        teacher_logprobs: teacher name -> the sampled token's log-probability.
        divergences: teacher name -> divergence at each token, formed at the head (supports other than ``sampled``).
        divergence_weights: teacher name -> weight of each token.
    """

    logprobs: Tensor
    entropy: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    policy_weights: Tensor
    segments: Tensor
    num_segments: int
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Mapping[str, Tensor] = field(default_factory=dict)
    divergences: Mapping[str, Tensor] = field(default_factory=dict)
    divergence_weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """Numbers that define the loss; travels from the driver to the trainers.

    Attributes:
        policy: the policy-gradient component. Its ratio is reported in any case.
        divergence: the back-propagated divergence; None: the teachers' signal is in the advantages.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference.
        kl_kind: its estimator on the sampled token, see :func:`roll_opd.algorithms.kl.kl_estimate`.
    """

    policy: PolicyLoss = field(default_factory=PolicyLoss)
    divergence: DivergenceLoss | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss ``[n]`` and detached per-token quantities ``[n]`` worth reporting.

        Raises:
            ValueError: a component is switched on whose inputs are missing.
        """
        policy, stats = self.policy(x.logprobs, x.old_logprobs, x.advantages, x.segments, x.num_segments)
        loss = x.policy_weights * policy
        stats["policy_loss"] = loss.detach()
        if self.divergence is not None:
            total = torch.zeros_like(loss)
            for name, weight in x.divergence_weights.items():
                total = total + weight * self._divergence(self.divergence, name, x)
            stats["divergence_loss"] = total.detach()
            loss = loss + total
        if self.kl_coef:
            if x.ref_logprobs is None:
                raise ValueError("kl_coef is set, but there is no reference")
            kl = kl_estimate(self.kl_kind, x.logprobs, x.ref_logprobs)
            stats["kl_loss"] = kl.detach()
            loss = loss + self.kl_coef * kl
        if self.entropy_coef:
            loss = loss - self.entropy_coef * x.entropy
        return loss, stats

    @staticmethod
    def _divergence(spec: DivergenceLoss, teacher: str, x: LossInputs) -> Tensor:
        if spec.support == "sampled":
            return direct_sampled_loss(
                spec.divergence, x.logprobs, x.teacher_logprobs[teacher], log_ratio_clip=spec.log_ratio_clip
            )
        return x.divergences[teacher]
