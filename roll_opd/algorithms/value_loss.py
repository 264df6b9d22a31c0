"""The critic's loss, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2)``, or ``0.5 (v - R)^2`` without a clip.

    The clip keeps one update from carrying a value further than ``c`` from where it was: beyond that, and on the
    way towards the return, there is no gradient. Source: Schulman et al., https://arxiv.org/abs/1506.02438, and the
    reference implementation of PPO (the clip is not in its paper).

    Args:
        values: ``[n]`` from the weights being trained; carries the gradient.
        old_values: ``[n]`` before the update; no gradient.
        returns: ``[n]`` targets; no gradient.
        clip: ``c`` (``value_clip``), or None.

    Returns:
        ``loss [n]`` and detached ``[n]`` tensors: ``clipped`` (0/1), ``squared_error`` (``(v - R)^2``).
    """
    old_values, returns = old_values.detach(), returns.detach()
    squared_error = (values - returns).square()
    loss, clipped = squared_error, torch.zeros_like(values, dtype=torch.bool)
    if clip is not None:
        near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        bounded = (near - returns).square()
        clipped = bounded > squared_error
        loss = torch.maximum(squared_error, bounded)
    return 0.5 * loss, {"clipped": clipped.float(), "squared_error": squared_error.detach()}
