"""Exact sampling by inverting the cumulative distribution, one uniform number per token.

Cheaper than ``torch.multinomial`` (which outweighs a small model on CPU), and reproducible whatever the batch: the
uniform numbers belong to the request, and a row's result is the same to the last bit whichever rows lie beside it.

The vocabulary is read in blocks. A uniform number picks a block by the blocks' masses, then a token inside it, so that
only ``V / BLOCK + BLOCK`` numbers are summed one after the other in fp64. The same masses give the log-sum-exp. The
ranking that top-k and top-p need looks for the k best in the k blocks with the largest maxima; no vocabulary is sorted
unless nearly all of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128
# A few rows at a time on CPU: what one operation writes is still in the cache when the next one reads it.
CPU_CHUNK = 2**19
# Top-p ranks this many tokens first; where they do not hold enough, GROWTH times the fewest that could.
FIRST_RANKS = 64
GROWTH = 8
# The bits of an fp64 mantissa (52) that fp32 (23) leaves empty.
ID_MASK = 2**29 - 1


@torch.no_grad()
def sample(
    logits_bV: Tensor, uniform_b: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row.

    A token of probability 0 (a logit of ``-inf``) is never drawn. Where probabilities are equal, the lower id ranks
    first. At temperature 1 the probability that a kept token was drawn with is ``exp(logprob) / kept``.

    Args:
        logits_bV: ``[b, V]``, any float dtype; exponentials are fp32, sums over blocks fp64.
        uniform_b: ``[b]`` in [0, 1).
        temperature: > 0.
        top_k: keep this many tokens; <= 0 = off.
        top_p: of those, keep the smallest set whose share of their mass reaches this; 1 = off.

    Returns:
        ``tokens [b]`` int64; ``logprobs [b]`` of those tokens under the *untruncated softmax at temperature 1*;
        ``kept [b]``, the mass at the given temperature that truncation kept.
    """
    parts = []
    for rows, logits_rV, weights_rW in _chunks(logits_bV):
        peak_r1 = logits_rV.amax(dim=-1, keepdim=True)
        cdf_rn = _exponentials(logits_rV, peak_r1, 1.0, weights_rW)
        log_mass_r1 = peak_r1 + cdf_rn[:, -1:].log()
        if temperature != 1.0:
            cdf_rn = _exponentials(logits_rV, peak_r1, temperature, weights_rW)
        uniform_r1 = uniform_b[rows, None].double()
        if top_k > 0 or top_p < 1.0:
            tokens_r1, kept_r1 = _draw_ranked(weights_rW, cdf_rn[:, -1:], uniform_r1, top_p, top_k)
        else:
            tokens_r1, kept_r1 = _draw(weights_rW, cdf_rn, uniform_r1), torch.ones_like(peak_r1)
        # Only logits that are not numbers lead past the end; their log-probability, NaN, tells.
        tokens_r1.clamp_(max=logits_rV.shape[-1] - 1)
        parts.append((tokens_r1, (logits_rV.gather(-1, tokens_r1) - log_mass_r1).float(), kept_r1.float()))
    tokens_b, logprobs_b, kept_b = (torch.cat(part).squeeze(-1) for part in zip(*parts, strict=True))
    return tokens_b, logprobs_b, kept_b


@torch.no_grad()
def token_logprob(logits_bV: Tensor, tokens_b: Tensor) -> Tensor:
    """Log-probability ``[b]`` of one token per row under the untruncated softmax at temperature 1, fp32."""
    parts = []
    for rows, logits_rV, weights_rW in _chunks(logits_bV):
        peak_r1 = logits_rV.amax(dim=-1, keepdim=True)
        log_mass_r1 = peak_r1 + _exponentials(logits_rV, peak_r1, 1.0, weights_rW)[:, -1:].log()
        parts.append((logits_rV.gather(-1, tokens_b[rows, None]) - log_mass_r1).float())
    return torch.cat(parts).squeeze(-1)


def _chunks(logits_bV: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the batch, their logits ``[r, V]`` in fp32, and room ``[r, W]`` for their exponentials.

    ``W`` is ``V`` rounded up to whole blocks. The room is used again by the next rows; beyond ``V`` it holds zeros.
    """
    count, vocab = logits_bV.shape
    assert count, "a batch of no rows"
    step = count if logits_bV.is_cuda else max(1, CPU_CHUNK // vocab)
    width = -(-vocab // BLOCK) * BLOCK
    weights_rW = logits_bV.new_empty(min(step, count), width, dtype=torch.float32)
    if width > vocab:
        weights_rW[:, vocab:] = 0
    for start in range(0, count, step):
        logits_rV = logits_bV[start : start + step].float()
        yield slice(start, start + step), logits_rV, weights_rW[: len(logits_rV)]


def _exponentials(logits_rV: Tensor, peak_r1: Tensor, temperature: float, weights_rW: Tensor) -> Tensor:
    """Write ``exp((logits - peak) / temperature)`` to ``weights``; sum it block by block, ``[r, W / BLOCK]`` fp64."""
    weights_rV = weights_rW[:, : logits_rV.shape[-1]]
    torch.sub(logits_rV, peak_r1, out=weights_rV)
    if temperature != 1.0:
        weights_rV /= temperature
    weights_rV.exp_()
    return _blocks(weights_rW).sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _blocks(weights_rW: Tensor) -> Tensor:
    return weights_rW.view(len(weights_rW), -1, BLOCK)


def _draw(weights_rW: Tensor, cdf_rn: Tensor, uniform_r1: Tensor) -> Tensor:
    """Tokens ``[r, 1]`` in proportion to their weights, inverting the distribution in the order of the ids."""
    threshold_r1 = uniform_r1 * cdf_rn[:, -1:]
    # The first sum above the threshold is that of a block of positive mass. (NaN finds none.)
    block_r1 = torch.searchsorted(cdf_rn, threshold_r1, right=True).clamp_(max=cdf_rn.shape[-1] - 1)
    rows_r = torch.arange(len(block_r1), device=block_r1.device)
    inner_cdf_rB = _blocks(weights_rW)[rows_r, block_r1[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    # The threshold, measured from the block's end. Block and total were rounded apart by 1e-7: stay within the block,
    # and at or before the token that completes it, because those behind have no weight.
    total_r1 = inner_cdf_rB[:, -1:].contiguous()
    rest_r1 = (total_r1 - (cdf_rn.gather(-1, block_r1) - threshold_r1)).clamp_(min=0.0)
    token_r1 = torch.searchsorted(inner_cdf_rB, rest_r1, right=True)
    return block_r1 * BLOCK + torch.minimum(token_r1, torch.searchsorted(inner_cdf_rB, total_r1))


def _draw_ranked(
    weights_rW: Tensor, mass_r1: Tensor, uniform_r1: Tensor, top_p: float, top_k: int, ranks: int = FIRST_RANKS
) -> tuple[Tensor, Tensor]:
    """Tokens ``[r, 1]`` of the ``top_k`` best, of those the fewest that reach ``top_p``; the share of ``mass`` kept.

    This is the order in which transformers and vLLM apply the two. The distribution is inverted in the order of ranks.
    Without ``top_k``, ``ranks`` is a first guess of how many are needed, and no result depends on it.
    """
    width = weights_rW.shape[-1]
    if top_k > 0:
        ranks = min(top_k, width)
    elif not weights_rW.is_cpu or 4 * ranks > width:
        # Whether a guess suffices is known without waiting on CPU alone.
        ranks = width
    ranked_rk, order_rk = _ranked(weights_rW, ranks)
    cdf_rk = ranked_rk.cumsum(dim=-1, dtype=torch.float64)
    enough_r1 = top_p * (cdf_rk[:, -1:] if top_k > 0 else mass_r1)
    # The first rank at which the sum reaches what is asked for is the last one kept.
    last_r1 = torch.searchsorted(cdf_rk, enough_r1).clamp_(max=ranks - 1)
    held_r1 = cdf_rk.gather(-1, last_r1)
    rank_r1 = torch.minimum(torch.searchsorted(cdf_rk, uniform_r1 * held_r1, right=True), last_r1)
    tokens_r1, kept_r1 = order_rk.gather(-1, rank_r1), (held_r1 / mass_r1).clamp_(max=1.0)
    if top_k <= 0 and ranks < width:
        missing_r = (enough_r1 - cdf_rk[:, -1:])[:, 0]
        short_r = missing_r > 0
        if short_r.any():
            # None of the others weighs more than the last one ranked, so at least this many are needed.
            at_least = ranks + int((missing_r / ranked_rk[:, -1])[short_r].max().clamp(max=width))
            tokens_r1[short_r], kept_r1[short_r] = _draw_ranked(
                weights_rW[short_r], mass_r1[short_r], uniform_r1[short_r], top_p, top_k, GROWTH * at_least
            )
    return tokens_r1, kept_r1


def _ranked(weights_rW: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """The ``ranks`` largest weights ``[r, ranks]`` and their ids, largest first, of equal ones the lower id first."""
    width = weights_rW.shape[-1]
    device = weights_rW.device
    if ranks == width:
        return weights_rW.sort(dim=-1, descending=True, stable=True)
    if 2 * ranks * BLOCK > width:
        return _best(weights_rW, torch.arange(width, device=device), ranks)
    # The k best lie in the k blocks whose maxima rank first: k maxima come before whatever another block holds.
    blocks_rnB = _blocks(weights_rW)
    maxima_rn = blocks_rnB.amax(dim=-1)
    _, chosen_rk = _best(maxima_rn, torch.arange(maxima_rn.shape[-1], device=device), ranks)
    inside_rkB = blocks_rnB[torch.arange(len(chosen_rk), device=device)[:, None], chosen_rk]
    ids_rkB = chosen_rk[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    return _best(inside_rkB.flatten(1), ids_rkB.flatten(1), ranks)


def _best(weights_rn: Tensor, ids: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """As :func:`_ranked`, among candidates whose ids are given (``[n]`` or ``[r, n]``)."""
    # ``topk`` promises no order among equals, so there are none: the bits of a number >= 0 rank as it does, and in
    # the last bits of an fp64 number that was fp32 there is room for the id, falling.
    keys_rn = weights_rn.double().view(torch.int64)
    keys_rn += ID_MASK - ids
    best_rk = keys_rn.topk(ranks, dim=-1).values
    falling_rk = best_rk & ID_MASK
    return (best_rk - falling_rk).view(torch.float64), ID_MASK - falling_rk
