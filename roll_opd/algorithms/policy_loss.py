"""The clipped importance-sampled policy loss, per token.

Source: Schulman et al., PPO, https://arxiv.org/abs/1707.06347 (eq. 7); asymmetric bounds as in DAPO,
https://arxiv.org/abs/2503.14476 (eq. 10); the dual clip is Ye et al., https://arxiv.org/abs/1912.09729 (eq. 5); one
ratio per sequence is Zheng et al., GSPO, https://arxiv.org/abs/2507.18071 (eq. 5-7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """Numbers that define the per-token loss; travels from the driver to the trainers.

    Attributes:
        clip_low: the ratio is bounded below by ``1 - clip_low``; None on both sides is the plain policy gradient.
        clip_high: the ratio is bounded above by ``1 + clip_high``.
        dual_clip: for negative advantages the loss is bounded by ``-dual_clip * A``; None switches it off.
        ratio: what the ratio is taken over. ``token``: ``exp(logprob - old_logprob)``. ``seq``: the exponential of the
            mean of the same difference over the sequence, the same for each of its tokens. ``turn``: likewise over one
            turn of an episode.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "seq", "turn"] = "token"

    def __post_init__(self) -> None:
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError("clip_low and clip_high: set both, or neither")
        if self.ratio not in ("token", "seq", "turn"):
            raise ValueError(f"unknown ratio {self.ratio!r}; one of token, seq, turn")

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        segments: Tensor | None = None,
        num_segments: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each token and the per-token quantities worth reporting.

        With ``ratio: seq`` or ``turn`` the gradient of each token's loss reaches every token of its sequence or turn,
        which must be whole in one call.

        Args:
            logprobs: ``[n]`` of the sampled tokens under the weights being trained; carries the gradient.
            old_logprobs: ``[n]`` before the update; no gradient.
            advantages: ``[n]``; no gradient.
            segments: ``[n]`` int64, the sequence (``turn``: the turn) that each token belongs to; not for ``token``.
            num_segments: sequences (turns) in this call, empty ones included; not for ``token``.

        Returns:
            ``loss [n]`` and a dict of detached ``[n]`` tensors: ``ratio``, ``clipped`` (0/1), ``old_minus_new``.

        Raises:
            ValueError: ``ratio: seq`` or ``turn`` without segments.
        """
        old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
        log_ratio = logprobs - old_logprobs
        if self.ratio != "token":
            if segments is None or num_segments is None:
                raise ValueError(f"ratio: {self.ratio} needs segments and num_segments")
            log_ratio = _mean_over_segment(log_ratio, segments, num_segments)
        # exp of a bounded difference: a ratio beyond e^20 says that something is broken, not how much.
        ratio = torch.exp(log_ratio.clamp(-20.0, 20.0))
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
        stats = {
            "ratio": ratio.detach(),
            "clipped": clipped.float(),
            "old_minus_new": (old_logprobs - logprobs).detach(),
        }
        return loss, stats


def _mean_over_segment(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Mean of ``values [n]`` over each segment, given back to each of its tokens; differentiable."""
    # fp64: the order in which a GPU adds a segment's tokens up must not show in fp32.
    wide = values.double()
    sums = wide.new_zeros(num_segments).index_add(0, segments, wide)
    counts = wide.new_zeros(num_segments).index_add(0, segments, torch.ones_like(wide))
    return (sums / counts.clamp(min=1.0))[segments].to(values.dtype)
