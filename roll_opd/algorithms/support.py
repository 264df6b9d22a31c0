"""Sets of token ids: what a teacher says about them, and the mass outside.

Shapes: ``n`` tokens, ``c`` rows of a chunk, ``H`` hidden size, ``V`` vocabulary, ``K`` ids of a set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_opd.algorithms.projection import (
    WHOLE,
    Buffers,
    Head,
    HeldIds,
    VocabShard,
    check_ids,
    chunk_rows,
    fill_logprobs,
    logsumexp,
)


@dataclass(frozen=True)
class Support:
    """Ids of a few rows, and where those of this shard lie in a flat ``[c * V]`` buffer."""

    valid_cK: Tensor
    held: HeldIds
    flat: Tensor
    shard: VocabShard

    @classmethod
    def of(cls, ids_cK: Tensor, vocab: int, shard: VocabShard = WHOLE, rows: int | None = None) -> Support:
        """Take ids as they come; -1 is padding. ``ValueError``: an id beyond the vocabulary.

        ``vocab`` is the size of all shards together, ``rows`` how many of its ids ``shard`` holds (``None``: all).
        """
        check_ids(ids_cK, vocab, "a support", lowest=-1)
        rows = vocab if rows is None else rows
        held = HeldIds.of(ids_cK, shard.first, rows)
        flat = held.column_cK + torch.arange(len(ids_cK), device=ids_cK.device)[:, None] * rows
        return cls(ids_cK >= 0, held, flat[held.held_cK], shard)

    def gather(self, logprobs_cV: Tensor) -> Tensor:
        """Return the log-probabilities of the ids ``[c, K]``, wherever they are, -inf for padding."""
        return self.shard.sum(self.held.take(logprobs_cV)).masked_fill_(~self.valid_cK, -math.inf)

    def tail(self, logprobs_cV: Tensor, scratch_cV: Tensor) -> Tensor:
        """Log-sum-exp of everything outside the set, from the rows themselves: ``log(1 - sum)`` would cancel."""
        flat_view = logprobs_cV.view(-1)
        kept = flat_view[self.flat]
        flat_view[self.flat] = -math.inf
        tail = logsumexp(logprobs_cV, scratch_cV)
        flat_view[self.flat] = kept
        return self.shard.gather(tail[:, None]).logsumexp(dim=-1)


def tail_logprob(logits_nV: Tensor, ids_nK: Tensor) -> Tensor:
    """Return the log-probability ``[n]`` of everything outside the given ids, without cancellation.

    Args:
        logits_nV: logits or log-probabilities of whole rows.
        ids_nK: int64, -1 is padding.
    """
    scratch = torch.empty_like(logits_nV)
    logprobs = torch.log_softmax(logits_nV, dim=-1)
    return Support.of(ids_nK, logits_nV.shape[-1]).tail(logprobs, scratch)


@torch.no_grad()
def support_scores(
    hidden_nH: Tensor,
    head: Head,
    targets_n: Tensor,
    top_k: int = 0,
    given_ids_nK: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return what a teacher says about its own best tokens, about given ones, or about the union of both.

    Args:
        hidden_nH: the teacher's final hidden states, already shifted to the position that predicts the target.
        head: the teacher's, whole or one of its shards; every rank gets the same answer.
        targets_n: int64 token ids.
        top_k: how many of its own best tokens; 0: none.
        given_ids_nK: int64 ids to score as well, -1 is padding.
        chunk_tokens: tokens whose logits are held at a time, as many times more as there are shards; None: see
            :func:`~roll_opd.algorithms.projection.chunk_rows`.

    Returns:
        ``(logprobs_n, ids_nM, logprobs_nM, tail_n)``, the last three ``None`` when no set is asked for. A row holds its
        own ``top_k`` best, best first, then the given ids in their order, ``M = top_k + K``. A given id that occurred
        before in the row is padding: id -1, log-probability -inf. The tail is the log-probability of everything else.
        Which of equally good tokens come first, or at all, is not defined, as in :func:`torch.topk`.

    Raises:
        ValueError: ``top_k`` or an id beyond the vocabulary, or shapes that do not fit together.
    """
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(head)
    n, vocab, chunk_tokens = len(targets_n), head.total, chunk_tokens * head.shard.ranks
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}, must lie between 0 and the vocabulary's size of {vocab}")
    if hidden_nH.shape[0] != n or (given_ids_nK is not None and len(given_ids_nK) != n):
        raise ValueError(f"{n} targets, but hidden states or ids of another number of positions")
    check_ids(targets_n, vocab, "the targets")
    targets = HeldIds.of(targets_n[:, None], head.shard.first, head.rows)
    buffers = Buffers(min(chunk_tokens, n), head.rows, hidden_nH)
    logprobs = hidden_nH.new_empty(n, dtype=buffers.dtype)
    has_set = top_k > 0 or given_ids_nK is not None
    size = top_k + (0 if given_ids_nK is None else given_ids_nK.shape[-1])
    ids = targets_n.new_empty(n, size)
    set_logprobs = hidden_nH.new_empty(n, size, dtype=buffers.dtype)
    tail = hidden_nH.new_empty(n, dtype=buffers.dtype)
    for start in range(0, n, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, n))
        lp = fill_logprobs(hidden_nH[rows], head, buffers("logprobs", rows.stop - start), buffers)
        logprobs[rows] = targets[rows].take(lp).squeeze(-1)
        if not has_set:
            continue
        chosen = _best(lp, top_k, head.shard)
        if given_ids_nK is not None:
            chosen = _without_repetition(torch.cat([chosen, given_ids_nK[rows]], dim=-1))
        support = Support.of(chosen, vocab, head.shard, head.rows)
        ids[rows], set_logprobs[rows] = chosen, support.gather(lp)
        tail[rows] = support.tail(lp, buffers("scratch", rows.stop - start))
    logprobs = head.shard.sum(logprobs)
    return (logprobs, ids, set_logprobs, tail) if has_set else (logprobs, None, None, None)


def _best(logprobs_cV: Tensor, top_k: int, shard: VocabShard) -> Tensor:
    """Return the ids ``[c, top_k]`` of the best tokens of all shards, best first."""
    best = logprobs_cV.topk(min(top_k, logprobs_cV.shape[-1]), dim=-1)
    if shard.ranks == 1 or top_k == 0:
        return best.indices
    missing = (0, top_k - best.indices.shape[-1])
    values = shard.gather(torch.nn.functional.pad(best.values, missing, value=-math.inf))
    ids = shard.gather(torch.nn.functional.pad(best.indices + shard.first, missing, value=-1))
    # Stable, so that all ranks choose alike among equals.
    order = values.sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order[:, :top_k])


def _without_repetition(ids_cM: Tensor) -> Tensor:
    """Return the ids with -1 for each that occurred before in its row."""
    ordered, order = ids_cM.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids_cM, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ids_cM.masked_fill(torch.zeros_like(again).scatter_(-1, order, again), -1)
