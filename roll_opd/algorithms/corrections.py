"""Train/infer mismatch: what was sampled with the engine's probabilities is trained with the trainer's.

Every quantity is a function of ``old_logprobs - infer_logprobs``, trainer before the update minus sampling engine, over
one of these spans:

- ``token``: each token by itself. Unbiased for a sum of per-token terms at fixed prefixes.
- ``sequence``: the product of the ratios over the sequence, which is unbiased for any function of the sequence.
- ``geometric``: the geometric mean of the ratios over the sequence; biased, of low variance.
- ``segment``: the geometric mean over one contiguous run of sampled tokens. The caller's ``segments`` name what the
  mean is taken over: pass runs in place of sequences for an episode of several turns. For a response of one
  run it is ``geometric``.

Sources: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025 (truncated token
weights); Espeholt et al., IMPALA, https://arxiv.org/abs/1802.01561 (truncation); Zheng et al., GSPO,
https://arxiv.org/abs/2507.18071 (geometric mean); IcePop in https://arxiv.org/abs/2510.18855 (band rejection).
"""

from __future__ import annotations

import torch
from torch import Tensor

CORRECTION_SPANS = ("token", "segment", "geometric", "sequence")


def correction_weights(
    kind: str,
    old_logprobs: Tensor,
    infer_logprobs: Tensor,
    segments: Tensor,
    num_segments: int,
    upper: float | None,
    lower: float | None = None,
) -> Tensor:
    """Return the truncated importance weight of each token; no gradient flows through it.

    Args:
        kind: one of :data:`CORRECTION_SPANS`.
        old_logprobs: ``[n]`` of the sampled tokens from the trainer before the update.
        infer_logprobs: ``[n]`` from the engine that sampled them.
        segments: ``[n]`` int64, the sequence (``segment``: the run) that each token belongs to.
        num_segments: sequences (runs) in this call, empty ones included.
        upper: weights above are cut to this; None: no bound but the one below.
        lower: weights below are raised to this; None: no bound.

    Returns:
        ``[n]``, in the type of ``old_logprobs``. ``e^20`` at most: beyond, something is broken.

    Raises:
        ValueError: unknown kind, or bounds that cross.
    """
    if upper is not None and lower is not None and lower > upper:
        raise ValueError(f"lower bound {lower} above upper bound {upper}")
    log_ratio = (old_logprobs - infer_logprobs).detach().double()
    weights = _over_span(kind, log_ratio, segments, num_segments).clamp(max=20.0).exp()
    if lower is not None:
        weights = weights.clamp(min=lower)
    if upper is not None:
        weights = weights.clamp(max=upper)
    return weights.to(old_logprobs.dtype)


def filter_mask(
    kind: str,
    old_logprobs: Tensor,
    infer_logprobs: Tensor,
    segments: Tensor,
    num_segments: int,
    ratio: tuple[float, float] | None = None,
    diff: tuple[float, float] | None = None,
) -> Tensor:
    """Return which tokens to keep, ``[n]`` bool; with a span longer than a token, its tokens stay or go together.

    Args:
        kind: one of :data:`CORRECTION_SPANS`.
        old_logprobs: ``[n]``, as in :func:`correction_weights`, like the next three.
        infer_logprobs: ``[n]``.
        segments: ``[n]``.
        num_segments: sequences (runs) in this call.
        ratio: lowest and highest ratio kept, bounds included; None: not tested.
        diff: lowest and highest difference of *probabilities* kept, bounds included; None: not tested. It is
            ``exp(old) - exp(infer)`` of a token, the sum of that over a ``sequence``, its mean over a ``geometric`` or
            ``segment`` span.

    Raises:
        ValueError: unknown kind.
    """
    old, infer = old_logprobs.detach().double(), infer_logprobs.detach().double()
    keep = torch.ones_like(old, dtype=torch.bool)
    for values, bounds in (
        (_over_span(kind, old - infer, segments, num_segments).exp(), ratio),
        (_over_span(kind, old.exp() - infer.exp(), segments, num_segments), diff),
    ):
        if bounds is not None:
            keep = keep & (values >= bounds[0]) & (values <= bounds[1])
    return keep


def _over_span(kind: str, values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Each token's value, or the sum or mean of its span, given back to each token; fp64."""
    if kind == "token":
        return values
    sums = values.new_zeros(num_segments).index_add(0, segments, values)
    if kind == "sequence":
        return sums[segments]
    if kind in ("geometric", "segment"):
        counts = values.new_zeros(num_segments).index_add(0, segments, torch.ones_like(values))
        return (sums / counts.clamp(min=1.0))[segments]
    raise ValueError(f"unknown span {kind!r}; one of {', '.join(CORRECTION_SPANS)}")
