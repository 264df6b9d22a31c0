"""Exact sampling by inverting the cumulative distribution, one uniform number per token.

Cheaper than ``torch.multinomial`` (which outweighs a small model on CPU), and reproducible whatever the batch: the
uniform numbers belong to the request, not to the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits_bV: Tensor, uniform_b: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_bV: ``[b, V]``, any float dtype; the softmax is fp32 and the cumulative sum fp64.
        uniform_b: ``[b]`` in [0, 1).
        temperature: > 0.
        top_k: keep this many tokens; <= 0 = off.
        top_p: of those, keep the smallest set whose share of their mass reaches this; 1 = off.

    Returns:
        ``tokens [b]`` int64; ``logprobs [b]`` of those tokens under the *untruncated softmax at temperature 1*;
        ``kept [b]``, the mass at the given temperature that truncation kept.
    """
    logits_bV = logits_bV.float()
    probs_bV = torch.softmax(logits_bV / temperature, dim=-1)
    kept_b = torch.ones_like(uniform_b, dtype=torch.float32)
    if top_k > 0 or top_p < 1.0:
        # One order serves both: the k best, then the shortest prefix that reaches top_p of what they hold (the order
        # in which transformers and vLLM apply the two).
        ranked_bV, order_bV = probs_bV.sort(dim=-1, descending=True, stable=True)
        keep_bV = torch.ones_like(ranked_bV, dtype=torch.bool)
        if top_k > 0:
            keep_bV[:, top_k:] = False
        if top_p < 1.0:
            held_bV = ranked_bV * keep_bV
            before_bV = held_bV.cumsum(dim=-1) - held_bV
            keep_bV &= before_bV < top_p * held_bV.sum(dim=-1, keepdim=True)
        keep_bV[:, 0] = True
        kept_b = (ranked_bV * keep_bV).sum(dim=-1)
        probs_bV = torch.zeros_like(probs_bV).scatter(-1, order_bV, ranked_bV * keep_bV)
    cdf_bV = probs_bV.cumsum(dim=-1, dtype=torch.float64)
    threshold_b1 = uniform_b.double()[:, None] * cdf_bV[:, -1:]
    # The first index whose cdf exceeds the threshold has positive probability, by construction.
    tokens_b = torch.searchsorted(cdf_bV, threshold_b1, right=True).squeeze(-1).clamp_(max=logits_bV.shape[-1] - 1)
    return tokens_b, token_logprob(logits_bV, tokens_b), kept_b


def token_logprob(logits_bV: Tensor, tokens_b: Tensor) -> Tensor:
    """Log-probability ``[b]`` of one token per row under the untruncated softmax at temperature 1, fp32."""
    logits_bV = logits_bV.float()
    return logits_bV.gather(-1, tokens_b[:, None]).squeeze(-1) - torch.logsumexp(logits_bV, dim=-1)
