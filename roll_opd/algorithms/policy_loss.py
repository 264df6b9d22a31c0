"""The clipped importance-sampled policy loss, per token.

Source: Schulman et al., PPO, https://arxiv.org/abs/1707.06347 (eq. 7); asymmetric bounds as in DAPO,
https://arxiv.org/abs/2503.14476 (eq. 10); the dual clip is Ye et al., https://arxiv.org/abs/1912.09729 (eq. 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """Numbers that define the per-token loss; travels from the driver to the trainers.

    Attributes:
        clip_low: the ratio is bounded below by ``1 - clip_low``; None switches the clip off.
        clip_high: the ratio is bounded above by ``1 + clip_high``.
        dual_clip: for negative advantages the loss is bounded by ``-dual_clip * A``; None switches it off.
        entropy_coef: weight of the entropy bonus (0: none).
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError("clip_low and clip_high: set both, or neither")

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each token and the per-token quantities worth reporting.

        Args:
            logprobs: ``[n]`` of the sampled tokens under the weights being trained; carries the gradient.
            old_logprobs: ``[n]`` before the update; no gradient.
            advantages: ``[n]``; no gradient.
            entropy: ``[n]`` of the student's distribution at each token, needed when ``entropy_coef`` is not 0.

        Returns:
            ``loss [n]`` and a dict of detached ``[n]`` tensors: ``ratio``, ``clipped`` (0/1), ``old_minus_new``.
        """
        old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
        # exp of a bounded difference: a ratio beyond e^20 says that something is broken, not how much.
        ratio = torch.exp((logprobs - old_logprobs).clamp(-20.0, 20.0))
        loss = -ratio * advantages
        clipped = torch.zeros_like(loss, dtype=torch.bool)
        if self.clip_low is not None and self.clip_high is not None:
            bounded = -ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * advantages
            clipped = bounded > loss
            loss = torch.maximum(loss, bounded)
        if self.dual_clip is not None:
            ceiling = -self.dual_clip * advantages
            too_high = (advantages < 0) & (loss > ceiling)
            clipped = clipped | too_high
            loss = torch.where(too_high, ceiling, loss)
        if self.entropy_coef:
            if entropy is None:
                raise ValueError("entropy_coef is set, but no entropy was computed")
            loss = loss - self.entropy_coef * entropy
        stats = {
            "ratio": ratio.detach(),
            "clipped": clipped.float(),
            "old_minus_new": (old_logprobs - logprobs).detach(),
        }
        return loss, stats
