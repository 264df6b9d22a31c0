"""How a per-token loss becomes one number, independent of micro-batches, packing and ranks.

Every mode is a weight per token that depends on *global* counts only, so that the loss of an optimizer step is
``sum over tokens of weight * loss``: a plain sum, which may be split anywhere. Counts come from the response mask,
before any correction, gate or clip.
"""

from __future__ import annotations

from collections.abc import Sequence

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def sequence_weights(mode: str, lengths: Sequence[int], max_length: int) -> list[float]:
    """Weight of each token of each sequence of one optimizer step.

    With ``n_i`` sampled tokens in sequence ``i`` of ``S`` non-empty sequences:

    - ``token-mean``: ``1 / sum_j n_j``
    - ``seq-mean-token-sum``: ``1 / S``
    - ``seq-mean-token-mean``: ``1 / (S n_i)``
    - ``seq-mean-token-sum-norm``: ``1 / (S max_length)`` (Dr. GRPO's constant, https://arxiv.org/abs/2503.20783)

    Args:
        mode: one of :data:`LOSS_AGG_MODES`.
        lengths: sampled tokens of each sequence, over all ranks and micro-batches of the step.
        max_length: the response limit, in tokens; used by ``seq-mean-token-sum-norm`` alone.

    Returns:
        One weight per sequence; 0.0 for an empty one.

    Raises:
        ValueError: unknown mode.
    """
    num_sequences = sum(1 for n in lengths if n > 0)
    total = sum(lengths)
    if mode == "token-mean":
        return [1.0 / total if n else 0.0 for n in lengths]
    if mode == "seq-mean-token-sum":
        return [1.0 / num_sequences if n else 0.0 for n in lengths]
    if mode == "seq-mean-token-mean":
        return [1.0 / (num_sequences * n) if n else 0.0 for n in lengths]
    if mode == "seq-mean-token-sum-norm":
        return [1.0 / (num_sequences * max_length) if n else 0.0 for n in lengths]
    raise ValueError(f"unknown loss_agg_mode {mode!r}; one of {', '.join(LOSS_AGG_MODES)}")
