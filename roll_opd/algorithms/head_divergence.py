"""One divergence at the output projection: what it compares with, on which tokens, and its gradient in one chunk.

Shapes: ``n`` tokens, ``m`` of them covered by a teacher, ``c`` rows of a chunk, ``H`` the teacher's hidden size, ``V``
vocabulary, ``K`` ids of a support. The formulas are those of :mod:`roll_opd.algorithms.chunked_head`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roll_opd.algorithms.divergences import DIVERGENCES, bucket_divergence, bucket_score
from roll_opd.algorithms.projection import Buffers, Head, fill_logprobs
from roll_opd.algorithms.support import Support


@dataclass(frozen=True)
class FullTarget:
    """A divergence over the whole vocabulary.

    ``hidden_mH`` are the teacher's final hidden states for the covered tokens, in the dtype of its ``head``; ``rows_m``
    says which of the ``n`` tokens these are, without repetition (``None``: all, in order).

    ``weights_m`` announces what each covered token's divergence will weigh in the loss, up to one factor common to all
    targets. It is a hint: gradients are those of the loss in any case, but where all targets have it and it is true,
    they are made in the forward pass, in two matrix products less. Where it is untrue, two are wasted.
    """

    divergence: str
    hidden_mH: Tensor
    head: Head
    jsd_beta: float = 0.5
    rows_m: Tensor | None = None
    weights_m: Tensor | None = None


@dataclass(frozen=True)
class SupportTarget:
    """A divergence over a set of tokens at each position and, unless ``tail_m`` is ``None``, one bucket for the rest.

    ``ids_mK`` (int64) do not repeat within a row, -1 is padding. ``logprobs_mK`` and ``tail_m`` are the teacher's
    log-probabilities of these tokens and of everything else. ``rows_m`` and ``weights_m`` as in :class:`FullTarget`.
    """

    divergence: str
    ids_mK: Tensor
    logprobs_mK: Tensor
    tail_m: Tensor | None = None
    jsd_beta: float = 0.5
    rows_m: Tensor | None = None
    weights_m: Tensor | None = None


def check(target: FullTarget | SupportTarget, n: int, head: Head) -> None:
    """Refuse with ``ValueError`` what does not fit together, or ``n`` tokens and the student's ``head``."""
    if target.divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {target.divergence!r}; one of {', '.join(DIVERGENCES)}")
    if not 0.0 < target.jsd_beta < 1.0:
        raise ValueError(f"jsd_beta is {target.jsd_beta}, must lie between 0 and 1, both excluded")
    if isinstance(target, FullTarget):
        covered = len(target.hidden_mH)
        if target.head.total != head.total:
            raise ValueError(f"the teacher's head has {target.head.total} rows, the student's {head.total}")
        teacher, student = ((h.shard.ranks, h.shard.first, h.rows) for h in (target.head, head))
        if teacher != student:
            raise ValueError(f"the teacher's head is cut into (ranks, first, rows) {teacher}, the student's {student}")
    else:
        covered = len(target.ids_mK)
        ids, logprobs = tuple(target.ids_mK.shape), tuple(target.logprobs_mK.shape)
        if logprobs != ids:
            raise ValueError(f"log-probabilities of shape {logprobs} for ids of shape {ids}")
        if target.tail_m is not None and target.tail_m.shape != (covered,):
            raise ValueError(f"a tail of shape {tuple(target.tail_m.shape)} for {covered} positions")
    expected = n if target.rows_m is None else len(target.rows_m)
    if covered != expected:
        raise ValueError(f"the teacher has {covered} positions, {expected} are to be covered")
    if target.weights_m is not None and target.weights_m.shape != (covered,):
        raise ValueError(f"weights of shape {tuple(target.weights_m.shape)} for {covered} positions")


# --- rows of a chunk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The rows of one chunk that a teacher covers."""

    at: Any
    """Index into the ``n`` tokens: a slice or a tensor."""
    local: Tensor | None
    """Indices into the chunk; ``None``: all of it."""
    of_teacher: Any
    """Index into the teacher's ``m`` rows: a slice or a tensor."""
    count: int

    def rows(self, chunk_cV: Tensor, buffers: Buffers, name: str) -> Tensor:
        """Return these rows of a chunk: itself, or a copy in the buffer named."""
        if self.local is None:
            return chunk_cV
        return torch.index_select(chunk_cV, 0, self.local, out=buffers(name, self.count))


class Cover:
    """Cuts a teacher's rows into the chunks in which they lie."""

    def __init__(self, rows_m: Tensor | None, n: int, chunk_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._rows = None
        if rows_m is not None:
            self._rows, self._order = torch.sort(rows_m)
            if len(rows_m) and not (int(self._rows[0]) >= 0 and int(self._rows[-1]) < n):
                raise ValueError(f"rows between {int(self._rows[0])} and {int(self._rows[-1])}, but {n} tokens")
            starts = torch.arange(0, n + chunk_tokens, chunk_tokens, device=rows_m.device)
            self._bounds = torch.searchsorted(self._rows, starts).tolist()

    def part(self, chunk: slice) -> Part:
        """Return what lies in one of the chunks that start at multiples of ``chunk_tokens``."""
        size = chunk.stop - chunk.start
        if self._rows is None:
            return Part(chunk, None, chunk, size)
        first, last = self._bounds[chunk.start // self._chunk : chunk.start // self._chunk + 2]
        order = self._order[first:last]
        if last - first == size:
            return Part(chunk, None, order, size)
        rows = self._rows[first:last]
        return Part(rows, rows - chunk.start, order, last - first)


# --- one divergence, one chunk ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Student's log-probabilities and probabilities of some tokens, for the ids that its head holds."""

    lp_cV: Tensor
    p_cV: Tensor
    head: Head
    buffers: Buffers

    def lp(self, part: Part) -> Tensor:
        """Return the covered rows of the log-probabilities."""
        return part.rows(self.lp_cV, self.buffers, "rows_lp")

    def p(self, part: Part) -> Tensor:
        """Return the covered rows of the probabilities."""
        return part.rows(self.p_cV, self.buffers, "rows_p")


def fill_teacher(target: FullTarget, part: Part, t: Tensor, buffers: Buffers) -> None:
    """Fill ``t [c, V]`` with the teacher's log-probabilities."""
    fill_logprobs(target.hidden_mH[part.of_teacher], target.head, t, buffers)


def full_divergence(
    target: FullTarget, part: Part, chunk: Chunk, t: Tensor, upstream: Tensor | None, wants_value: bool
) -> Tensor | None:
    """Return this shard's part of the divergence ``[c]`` if wanted, a sum over its ids.

    ``t`` are the teacher's log-probabilities. They are overwritten: where there is an upstream, by ``upstream *
    dD/dz``.
    """
    p = chunk.p(part)
    value, total, factor = _full_score(target, chunk.lp(part), p, t, chunk.buffers, wants_value)
    if upstream is not None:
        t.sub_(p) if total is None else t.addcmul_(p, -target.head.shard.sum(total)[:, None])
        t.mul_((upstream * factor)[:, None])
    return value


def _full_score(
    target: FullTarget, lp: Tensor, p: Tensor, t: Tensor, buffers: Buffers, wants_value: bool
) -> tuple[Tensor | None, Tensor | None, float]:
    """Overwrite the teacher's log-probabilities ``t`` with the score ``s``, up to a factor and a multiple of ``p``.

    Neither changes the gradient ``s - p sum s`` by more than the factor. Return value, ``sum t`` and factor; the sums
    are over the ids held. Where ``sum t`` over all ids is 1 by definition it is ``None``.
    """
    if target.divergence == "reverse_kl":
        total = torch.sub(lp, t, out=t).mul_(p).sum(dim=-1)
        return total.clone() if wants_value else None, total, 1.0
    value = None
    if target.divergence == "forward_kl":
        if wants_value:
            ratio = torch.sub(t, lp, out=buffers("scratch", len(t)))
            value = ratio.mul_(t.exp_()).sum(dim=-1)
        else:
            t.exp_()
        return value, None, -1.0
    # With r = log q - log p: log p - log m = -u and log q - log m = r - u, where u = log(beta e^r + 1 - beta).
    beta = target.jsd_beta
    if wants_value:
        q = torch.exp(t, out=buffers("scratch", len(t)))
        u = _log_mixture_ratio(t.sub_(lp), beta, out=buffers("mixture", len(t)))
        value = beta * t.sub_(u).mul_(q).sum(dim=-1)
    else:
        u = _log_mixture_ratio(t.sub_(lp), beta, out=t)
    total = torch.mul(u, p, out=t).sum(dim=-1)
    return None if value is None else value + (beta - 1.0) * total, total, beta - 1.0


def _log_mixture_ratio(r: Tensor, beta: float, out: Tensor) -> Tensor:
    student = torch.full((), math.log1p(-beta), dtype=r.dtype, device=r.device)
    return torch.logaddexp(torch.add(r, math.log(beta), out=out), student, out=out)


def set_divergence(
    target: SupportTarget,
    part: Part,
    chunk: Chunk,
    t: Tensor,
    upstream: Tensor | None,
    tail_n: Tensor | None,
    wants_value: bool,
) -> Tensor | None:
    """As :func:`full_divergence`, but the value is that of all shards.

    ``tail_n`` is the student's mass outside, written with the value and else read.
    """
    lp = chunk.lp(part)
    support = Support.of(target.ids_mK[part.of_teacher], chunk.head.total, chunk.head.shard, chunk.head.rows)
    if tail_n is not None and wants_value:
        tail_n[part.at] = support.tail(lp, t)
    student = support.gather(lp)
    teacher = target.logprobs_mK[part.of_teacher].to(lp.dtype).masked_fill(~support.valid_cK, -math.inf)
    tail = None
    if tail_n is not None and target.tail_m is not None:
        tail = tail_n[part.at]
        student = torch.cat([student, tail[:, None]], -1)
        teacher = torch.cat([teacher, target.tail_m[part.of_teacher].to(lp.dtype)[:, None]], -1)
    if upstream is not None:
        score = bucket_score(target.divergence, student, teacher, target.jsd_beta)
        _set_gradient(support, score, student, tail, chunk.p(part), upstream, out=t)
    if not wants_value:
        return None
    value = bucket_divergence(target.divergence, student, teacher, target.jsd_beta)
    return value if tail is None else value.clamp_(min=0.0)


def _set_gradient(
    support: Support, score: Tensor, student: Tensor, tail: Tensor | None, p: Tensor, upstream: Tensor, out: Tensor
) -> None:
    """Fill ``out`` with ``upstream * dD/dz``."""
    total = score.sum(dim=-1)
    outside = -total
    if tail is not None:
        # Bounded, so that a tail that underflows in p is 0 * finite. It cannot be felt: p itself is below e^-80 there.
        outside = outside + score[:, -1] * torch.exp((-tail).clamp(max=80.0))
    size = support.valid_cK.shape[-1]
    inside = upstream[:, None] * (score[:, :size] - student[:, :size].exp() * total[:, None])
    torch.mul(p, (upstream * outside)[:, None], out=out)
    # The set is written over, not corrected: s_tail / T may be huge, and what it puts there would not cancel exactly.
    out.view(-1)[support.flat] = inside[support.held.held_cK]
