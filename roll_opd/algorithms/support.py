"""Sets of token ids: what a teacher says about them, and the mass outside.

Shapes: ``n`` tokens, ``c`` rows of a chunk, ``H`` hidden size, ``V`` vocabulary, ``K`` ids of a set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_opd.algorithms.projection import CHUNK_TOKENS, Buffers, Head, fill_logprobs, logsumexp


@dataclass(frozen=True)
class Support:
    """Ids of a few rows, and where they lie in a flat ``[c * V]`` buffer."""

    ids_cK: Tensor
    valid_cK: Tensor
    flat: Tensor

    @classmethod
    def of(cls, ids_cK: Tensor, vocab: int) -> Support:
        """Take ids as they come; -1 is padding. ``ValueError``: an id beyond the vocabulary."""
        valid = ids_cK >= 0
        if ids_cK.numel() and int(ids_cK.max()) >= vocab:
            raise ValueError(f"token id {int(ids_cK.max())} in a support, but the vocabulary has {vocab}")
        ids = ids_cK.clamp(min=0)
        flat = ids + torch.arange(len(ids), device=ids.device)[:, None] * vocab
        return cls(ids, valid, flat[valid])

    def gather(self, logprobs_cV: Tensor) -> Tensor:
        """Return the log-probabilities of the ids ``[c, K]``, -inf for padding."""
        return logprobs_cV.gather(-1, self.ids_cK).masked_fill_(~self.valid_cK, -math.inf)

    def tail(self, logprobs_cV: Tensor, scratch_cV: Tensor) -> Tensor:
        """Log-sum-exp of everything outside the set, from the row itself: ``log(1 - sum)`` would cancel."""
        flat_view = logprobs_cV.view(-1)
        kept = flat_view[self.flat]
        flat_view[self.flat] = -math.inf
        tail = logsumexp(logprobs_cV, scratch_cV)
        flat_view[self.flat] = kept
        return tail


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
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return what a teacher says about its own best tokens, about given ones, or about the union of both.

    Args:
        hidden_nH: the teacher's final hidden states, already shifted to the position that predicts the target.
        head: the teacher's.
        targets_n: int64 token ids.
        top_k: how many of its own best tokens; 0: none.
        given_ids_nK: int64 ids to score as well, -1 is padding.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        ``(logprobs_n, ids_nM, logprobs_nM, tail_n)``, the last three ``None`` when no set is asked for. A row holds its
        own ``top_k`` best, best first, then the given ids in their order, ``M = top_k + K``. A given id that occurred
        before in the row is padding: id -1, log-probability -inf. The tail is the log-probability of everything else.

    Raises:
        ValueError: ``top_k`` beyond the vocabulary, or shapes that do not fit together.
    """
    n, vocab = len(targets_n), len(head.weight_VH)
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}, must lie between 0 and the vocabulary's size of {vocab}")
    if hidden_nH.shape[0] != n or (given_ids_nK is not None and len(given_ids_nK) != n):
        raise ValueError(f"{n} targets, but hidden states or ids of another number of positions")
    buffers = Buffers(min(chunk_tokens, n), vocab, hidden_nH)
    logprobs = hidden_nH.new_empty(n, dtype=buffers.dtype)
    has_set = top_k > 0 or given_ids_nK is not None
    size = top_k + (0 if given_ids_nK is None else given_ids_nK.shape[-1])
    ids = targets_n.new_empty(n, size)
    set_logprobs = hidden_nH.new_empty(n, size, dtype=buffers.dtype)
    tail = hidden_nH.new_empty(n, dtype=buffers.dtype)
    for start in range(0, n, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, n))
        lp = fill_logprobs(hidden_nH[rows], head, buffers("logprobs", rows.stop - start))
        logprobs[rows] = lp.gather(-1, targets_n[rows, None]).squeeze(-1)
        if not has_set:
            continue
        chosen = lp.topk(top_k, dim=-1).indices
        if given_ids_nK is not None:
            chosen = torch.cat([chosen, given_ids_nK[rows]], dim=-1)
            same = (chosen[:, :, None] == chosen[:, None, :]).tril_(diagonal=-1)
            chosen = chosen.masked_fill(same.any(dim=-1), -1)
        support = Support.of(chosen, vocab)
        ids[rows], set_logprobs[rows] = chosen, support.gather(lp)
        tail[rows] = support.tail(lp, buffers("scratch", rows.stop - start))
    return (logprobs, ids, set_logprobs, tail) if has_set else (logprobs, None, None, None)
