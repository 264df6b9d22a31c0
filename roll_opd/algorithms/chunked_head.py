"""What is computed at the output projection, without ever holding ``[tokens, vocabulary]``.

Log-probabilities, entropies and exact divergences from a teacher, each with its closed-form gradient. The forward pass
keeps its inputs and a few numbers a token; the backward pass makes the logits again, chunk by chunk (measured against
the alternatives in ``benchmarks/full_vocabulary_kl.py``).

Shapes: ``n`` tokens, ``m`` of them covered by a teacher, ``H`` hidden size (a teacher has its own), ``V`` vocabulary,
``K`` ids of a support, ``c`` rows of a chunk. Logits ``z``, student ``p = softmax(z)``, teacher ``q``, all at
temperature 1 and untruncated.

Gradients with respect to ``z``; ``s_b = dD/dlog P_b`` is :func:`~roll_opd.algorithms.divergences.bucket_score`:

- log-probability of token ``y``: ``onehot_y - p``
- entropy ``H``: ``-p (log p + H)``
- divergence over the vocabulary: ``s_v - p_v sum_u s_u``, which is ``p (log p - log q - D)`` for the reverse KL,
  ``p - q`` for the forward KL, ``(1 - beta) p (log(p / m) - KL(p || m))`` for the JSD
- divergence over a set ``S`` and its tail, ``T`` the student's mass outside: ``s_v - p_v sum_b s_b`` on ``S`` and
  ``p_v (s_tail / T - sum_b s_b)`` elsewhere; without a tail the sum is over ``S`` and ``s_tail = 0``
- soft cap ``z = cap tanh(raw / cap)``: times ``1 - (z / cap)^2``

Teachers' tensors never get gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from roll_opd.algorithms.divergences import DIVERGENCES, bucket_divergence, bucket_score

CHUNK_TOKENS = 256
"""Rows of logits held at a time. Memory grows with it; below 128, time grows as it shrinks (see ``benchmarks``)."""

WEIGHT_ROWS = 16384
"""Rows of the head for which a low-precision product is held before it is added to the gradient in fp32."""


@dataclass(frozen=True)
class Head:
    """An output projection, trimmed to the tokenizer's vocabulary.

    ``soft_cap`` bounds the logits as ``cap * tanh(logits / cap)`` (Gemma 2).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class FullTarget:
    """A divergence over the whole vocabulary.

    ``hidden_mH`` are the teacher's final hidden states for the covered tokens, in the dtype of its ``head``; ``rows_m``
    says which of the ``n`` tokens these are, without repetition (``None``: all, in order).
    """

    divergence: str
    hidden_mH: Tensor
    head: Head
    jsd_beta: float = 0.5
    rows_m: Tensor | None = None


@dataclass(frozen=True)
class SupportTarget:
    """A divergence over a set of tokens at each position and, unless ``tail_m`` is ``None``, one bucket for the rest.

    ``ids_mK`` (int64) do not repeat within a row, -1 is padding. ``logprobs_mK`` and ``tail_m`` are the teacher's
    log-probabilities of these tokens and of everything else. ``rows_m`` as in :class:`FullTarget`.
    """

    divergence: str
    ids_mK: Tensor
    logprobs_mK: Tensor
    tail_m: Tensor | None = None
    jsd_beta: float = 0.5
    rows_m: Tensor | None = None


@dataclass(frozen=True)
class HeadOutputs:
    """One number a token, float32 (float64 for float64 inputs): ``[n]`` each, ``divergences`` 0 where not covered."""

    logprobs_n: Tensor
    entropy_n: Tensor
    divergences: tuple[Tensor, ...] = ()


def head_outputs(
    hidden_nH: Tensor,
    head: Head,
    targets_n: Tensor,
    divergences: Sequence[FullTarget | SupportTarget] = (),
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> HeadOutputs:
    """Return log-probability of each target, entropy of each distribution, and each divergence at each position.

    Differentiable once, with respect to ``hidden_nH``, ``head.weight_VH`` and ``head.bias_V``. Products are formed in
    the dtype of the inputs, softmax and divergence in float32, the head's gradient is summed in float32.

    Args:
        hidden_nH: final hidden states, already shifted to the position that predicts the target.
        head: the student's.
        targets_n: int64 token ids.
        divergences: what to compare with, any number of teachers.
        chunk_tokens: tokens whose logits are held at a time.

    Raises:
        ValueError: shapes or vocabularies that do not fit together, an unknown divergence, a ``jsd_beta`` outside
            (0, 1).
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")
    if hidden_nH.shape[0] != targets_n.shape[0]:
        raise ValueError(f"{hidden_nH.shape[0]} hidden states for {targets_n.shape[0]} targets")
    for target in divergences:
        _check(target, len(targets_n), len(head.weight_VH))
    job = _Job(head.soft_cap, targets_n, tuple(divergences), chunk_tokens)
    logprobs, entropy, *values = _HeadFunction.apply(hidden_nH, head.weight_VH, head.bias_V, job)
    return HeadOutputs(logprobs, entropy, tuple(values))


def _check(target: FullTarget | SupportTarget, n: int, vocab: int) -> None:
    if target.divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {target.divergence!r}; one of {', '.join(DIVERGENCES)}")
    if not 0.0 < target.jsd_beta < 1.0:
        raise ValueError(f"jsd_beta is {target.jsd_beta}, must lie between 0 and 1, both excluded")
    if isinstance(target, FullTarget):
        covered = len(target.hidden_mH)
        if len(target.head.weight_VH) != vocab:
            raise ValueError(f"the teacher's head has {len(target.head.weight_VH)} rows, the student's {vocab}")
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


# --- buffers and rows -------------------------------------------------------------------------------------------------


class _Buffers:
    """``[c, V]`` buffers by name, used again for every chunk: fresh memory costs more than what is computed in it."""

    def __init__(self, chunk_tokens: int, vocab: int, like: Tensor) -> None:
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._shape = (chunk_tokens, vocab)
        self._device = like.device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, dtype=self.dtype, device=self._device)
        return self._buffers[name][:rows]


@dataclass(frozen=True)
class _Part:
    """The rows of one chunk that a teacher covers."""

    local: Tensor | None
    """Indices into the chunk; ``None``: all of it."""
    of_teacher: Any
    """Index into the teacher's ``m`` rows: a slice or a tensor."""
    count: int

    def rows(self, chunk_cV: Tensor, buffers: _Buffers, name: str) -> Tensor:
        if self.local is None:
            return chunk_cV
        return torch.index_select(chunk_cV, 0, self.local, out=buffers(name, self.count))


class _Cover:
    """Cuts a teacher's rows into the chunks in which they lie."""

    def __init__(self, rows_m: Tensor | None, n: int, chunk_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._n = n
        self._rows = None
        if rows_m is not None:
            self._rows, self._order = torch.sort(rows_m)
            if len(rows_m) and not (int(self._rows[0]) >= 0 and int(self._rows[-1]) < n):
                raise ValueError(f"rows between {int(self._rows[0])} and {int(self._rows[-1])}, but {n} tokens")
            starts = torch.arange(0, n + chunk_tokens, chunk_tokens, device=rows_m.device)
            self._bounds = torch.searchsorted(self._rows, starts).tolist()

    def part(self, start: int) -> _Part:
        if self._rows is None:
            stop = min(start + self._chunk, self._n)
            return _Part(None, slice(start, stop), stop - start)
        first, last = self._bounds[start // self._chunk : start // self._chunk + 2]
        return _Part(self._rows[first:last] - start, self._order[first:last], last - first)


def _row_dot(a_cV: Tensor, b_cV: Tensor, scratch_cV: Tensor) -> Tensor:
    return torch.mul(a_cV, b_cV, out=scratch_cV).sum(dim=-1)


def _logits(hidden_cH: Tensor, head: Head, out: Tensor) -> Tensor:
    """Fill ``out`` with capped logits."""
    if hidden_cH.dtype == out.dtype:
        torch.mm(hidden_cH, head.weight_VH.t(), out=out)
        if head.bias_V is not None:
            out.add_(head.bias_V)
    else:
        out.copy_(torch.nn.functional.linear(hidden_cH, head.weight_VH, head.bias_V))
    if head.bias_V is not None:
        # A bias may hold -inf for ids that do not exist: finite, and out of reach, it makes no inf - inf below.
        out.clamp_(min=torch.finfo(out.dtype).min / 4)
    if head.soft_cap is not None:
        out.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return out


def _logprobs(hidden_cH: Tensor, head: Head, out: Tensor) -> Tensor:
    """Fill ``out`` with the log-softmax of the logits."""
    return torch.log_softmax(_logits(hidden_cH, head, out), dim=-1, out=out)


def _logsumexp(x_cV: Tensor, scratch_cV: Tensor) -> Tensor:
    """``torch.logsumexp`` in a given buffer; -inf for a row of nothing but -inf."""
    top = x_cV.amax(dim=-1).clamp_(min=torch.finfo(x_cV.dtype).min)
    return torch.sub(x_cV, top[:, None], out=scratch_cV).exp_().sum(dim=-1).log_().add_(top)


# --- supports ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Support:
    """Ids of a few rows, and where they lie in a flat ``[c * V]`` buffer."""

    ids_cK: Tensor
    valid_cK: Tensor
    flat: Tensor

    @classmethod
    def of(cls, ids_cK: Tensor, vocab: int) -> _Support:
        valid = ids_cK >= 0
        if ids_cK.numel() and int(ids_cK.max()) >= vocab:
            raise ValueError(f"token id {int(ids_cK.max())} in a support, but the vocabulary has {vocab}")
        ids = ids_cK.clamp(min=0)
        flat = ids + torch.arange(len(ids), device=ids.device)[:, None] * vocab
        return cls(ids, valid, flat[valid])

    def gather(self, logprobs_cV: Tensor) -> Tensor:
        return logprobs_cV.gather(-1, self.ids_cK).masked_fill_(~self.valid_cK, -math.inf)

    def tail(self, logprobs_cV: Tensor, scratch_cV: Tensor) -> Tensor:
        """Log-sum-exp of everything outside the set, from the row itself: ``log(1 - sum)`` would cancel."""
        flat_view = logprobs_cV.view(-1)
        kept = flat_view[self.flat]
        flat_view[self.flat] = -math.inf
        tail = _logsumexp(logprobs_cV, scratch_cV)
        flat_view[self.flat] = kept
        return tail


def _support_buckets(target: SupportTarget, part: _Part, support: _Support, lp: Tensor, tail: Tensor | None):
    """Student's and teacher's log-probabilities ``[c, K]``, or ``[c, K + 1]`` with the tail last."""
    student = support.gather(lp)
    teacher = target.logprobs_mK[part.of_teacher].to(lp.dtype).masked_fill(~support.valid_cK, -math.inf)
    if target.tail_m is None or tail is None:
        return student, teacher
    teacher_tail = target.tail_m[part.of_teacher].to(lp.dtype)
    return torch.cat([student, tail[:, None]], -1), torch.cat([teacher, teacher_tail[:, None]], -1)


# --- one divergence, one chunk ----------------------------------------------------------------------------------------


def _full_value(target: FullTarget, lp: Tensor, p: Tensor, t: Tensor, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """Return the divergence ``[c]`` and the mean ``sum p g`` that its gradient subtracts; ``t`` is overwritten."""
    if target.divergence == "reverse_kl":
        value = torch.sub(lp, t, out=t).mul_(p).sum(dim=-1)
        return value, value
    q = torch.exp(t, out=buffers("scratch", len(t)))
    t.sub_(lp)
    if target.divergence == "forward_kl":
        value = t.mul_(q).sum(dim=-1)
        return value, torch.zeros_like(value)
    # With r = log q - log p: log p - log m = -u and log q - log m = r - u, where u = log(beta e^r + 1 - beta).
    beta = target.jsd_beta
    u = _log_mixture_ratio(t, beta, out=buffers("mixture", len(t)))
    teacher_side = t.sub_(u).mul_(q).sum(dim=-1)
    student_side = -u.mul_(p).sum(dim=-1)
    return beta * teacher_side + (1.0 - beta) * student_side, student_side


def _log_mixture_ratio(r: Tensor, beta: float, out: Tensor) -> Tensor:
    student = torch.full((), math.log1p(-beta), dtype=r.dtype, device=r.device)
    return torch.logaddexp(torch.add(r, math.log(beta), out=out), student, out=out)


def _full_gradient(target: FullTarget, lp: Tensor, p: Tensor, t: Tensor, center: Tensor, upstream: Tensor) -> Tensor:
    """Overwrite the teacher's log-probabilities ``t`` with ``upstream * dD/dz``."""
    if target.divergence == "reverse_kl":
        return torch.sub(lp, t, out=t).sub_(center[:, None]).mul_(p).mul_(upstream[:, None])
    if target.divergence == "forward_kl":
        return torch.sub(p, t.exp_(), out=t).mul_(upstream[:, None])
    u = _log_mixture_ratio(t.sub_(lp), target.jsd_beta, out=t)
    return u.add_(center[:, None]).mul_(p).mul_((upstream * (target.jsd_beta - 1.0))[:, None])


def _add_support_gradient(
    grad: Tensor, target: SupportTarget, part: _Part, lp: Tensor, p: Tensor, tail: Tensor, upstream: Tensor
) -> None:
    """Add ``upstream * dD/dz`` to ``grad``."""
    support = _Support.of(target.ids_mK[part.of_teacher], lp.shape[-1])
    student, teacher = _support_buckets(target, part, support, lp, tail)
    score = bucket_score(target.divergence, student, teacher, target.jsd_beta)
    total = score.sum(dim=-1)
    outside = -total
    if target.tail_m is not None:
        # Bounded, so that a tail that underflows in p is 0 * finite. It cannot be felt: p itself is below e^-80 there.
        outside = outside + score[:, -1] * torch.exp((-tail).clamp(max=80.0))
    size = support.ids_cK.shape[-1]
    inside = upstream[:, None] * (score[:, :size] - student[:, :size].exp() * total[:, None])
    # The set is written over, not corrected: s_tail / T may be huge, and what it puts there would not cancel exactly.
    flat_view = grad.view(-1)
    exact = flat_view[support.flat] + inside[support.valid_cK]
    grad.addcmul_(p, (upstream * outside)[:, None])
    flat_view[support.flat] = exact


# --- the function -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    soft_cap: float | None
    targets_n: Tensor
    divergences: tuple[FullTarget | SupportTarget, ...]
    chunk_tokens: int

    def covers(self) -> list[_Cover]:
        return [_Cover(t.rows_m, len(self.targets_n), self.chunk_tokens) for t in self.divergences]

    def chunks(self) -> list[slice]:
        n = len(self.targets_n)
        return [slice(start, min(start + self.chunk_tokens, n)) for start in range(0, n, self.chunk_tokens)]

    def buffers(self, hidden: Tensor, weight: Tensor) -> _Buffers:
        return _Buffers(min(self.chunk_tokens, len(self.targets_n)), len(weight), hidden)


class _HeadFunction(torch.autograd.Function):
    """Saves its inputs, the outputs, and one more number a token and divergence."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        head = Head(weight, bias, job.soft_cap)
        buffers, covers = job.buffers(hidden, weight), job.covers()
        logprobs, entropy = (hidden.new_empty(len(hidden), dtype=buffers.dtype) for _ in range(2))
        values = [hidden.new_zeros(len(hidden), dtype=buffers.dtype) for _ in covers]
        # For a full divergence the mean that its gradient subtracts, for a support the student's tail.
        extras = [hidden.new_zeros(len(hidden), dtype=buffers.dtype) for _ in covers]
        for chunk in job.chunks():
            size = chunk.stop - chunk.start
            lp = _logprobs(hidden[chunk], head, buffers("student", size))
            p = torch.exp(lp, out=buffers("p", size))
            logprobs[chunk] = lp.gather(-1, job.targets_n[chunk, None]).squeeze(-1)
            entropy[chunk] = -_row_dot(p, lp, buffers("teacher", size))
            for target, cover, value_n, extra_n in zip(job.divergences, covers, values, extras, strict=True):
                part = cover.part(chunk.start)
                if part.count == 0:
                    continue
                at: Any = chunk if part.local is None else part.local + chunk.start
                rows_lp = part.rows(lp, buffers, "rows_lp")
                t = buffers("teacher", part.count)
                if isinstance(target, FullTarget):
                    _logprobs(target.hidden_mH[part.of_teacher], target.head, t)
                    rows_p = part.rows(p, buffers, "rows_p")
                    value, extra_n[at] = _full_value(target, rows_lp, rows_p, t, buffers)
                else:
                    support = _Support.of(target.ids_mK[part.of_teacher], len(weight))
                    tail = None if target.tail_m is None else support.tail(rows_lp, t)
                    student, teacher = _support_buckets(target, part, support, rows_lp, tail)
                    value = bucket_divergence(target.divergence, student, teacher, target.jsd_beta)
                    if tail is not None:
                        extra_n[at] = tail
                if isinstance(target, FullTarget) or target.tail_m is not None:
                    # Between two distributions it is never negative; its rounding error is, where they agree.
                    value = value.clamp(min=0.0)
                value_n[at] = value
        ctx.job = job
        ctx.save_for_backward(hidden, weight, bias, entropy, *extras)
        return logprobs, entropy, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        hidden, weight, bias, entropy, *extras = ctx.saved_tensors
        head = Head(weight, bias, job.soft_cap)
        d_logprobs, d_entropy, *d_values = upstream
        buffers, covers = job.buffers(hidden, weight), job.covers()
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=buffers.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=buffers.dtype) if needs_bias and bias is not None else None
        for chunk in job.chunks():
            size = chunk.stop - chunk.start
            lp = _logits(hidden[chunk], head, buffers("student", size))
            slope = None
            if job.soft_cap is not None:
                slope = torch.div(lp, job.soft_cap, out=buffers("slope", size)).square_().neg_().add_(1.0)
            torch.log_softmax(lp, dim=-1, out=lp)
            p = torch.exp(lp, out=buffers("p", size))
            grad = buffers("grad", size)
            fresh = True
            for target, cover, d_value_n, extra_n in zip(job.divergences, covers, d_values, extras, strict=True):
                part = cover.part(chunk.start)
                if d_value_n is None or part.count == 0:
                    continue
                at: Any = chunk if part.local is None else part.local + chunk.start
                d_value, extra = d_value_n[at], extra_n[at]
                rows_lp, rows_p = part.rows(lp, buffers, "rows_lp"), part.rows(p, buffers, "rows_p")
                # The first contribution that speaks about the whole chunk is made in place.
                t = grad if part.local is None and fresh else buffers("teacher", part.count)
                if isinstance(target, FullTarget):
                    _logprobs(target.hidden_mH[part.of_teacher], target.head, t)
                    _full_gradient(target, rows_lp, rows_p, t, extra, d_value)
                else:
                    _add_support_gradient(t.zero_(), target, part, rows_lp, rows_p, extra, d_value)
                if t is not grad:
                    if fresh:
                        grad.zero_()
                    grad.add_(t) if part.local is None else grad.index_add_(0, part.local, t)
                fresh = False
            if fresh:
                grad.zero_()
            if d_logprobs is not None:
                grad.addcmul_(p, -d_logprobs[chunk, None])
                grad.scatter_add_(1, job.targets_n[chunk, None], d_logprobs[chunk, None])
            if d_entropy is not None:
                grad.sub_(lp.add_(entropy[chunk, None]).mul_(p).mul_(d_entropy[chunk, None]))
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(grad.sum(dim=0))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden[chunk])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _add_product(sum_VH: Tensor, grad_cV: Tensor, hidden_cH: Tensor) -> None:
    """Add ``grad.T @ hidden`` to a sum that may be of higher precision."""
    if sum_VH.dtype == hidden_cH.dtype:
        sum_VH.addmm_(grad_cV.t(), hidden_cH)
        return
    for start in range(0, len(sum_VH), WEIGHT_ROWS):
        rows = slice(start, start + WEIGHT_ROWS)
        sum_VH[rows].add_(grad_cV[:, rows].t() @ hidden_cH)


# --- the teacher's side -----------------------------------------------------------------------------------------------


def tail_logprob(logits_nV: Tensor, ids_nK: Tensor) -> Tensor:
    """Return the log-probability ``[n]`` of everything outside the given ids, without cancellation.

    Args:
        logits_nV: logits or log-probabilities of whole rows.
        ids_nK: int64, -1 is padding.
    """
    scratch = torch.empty_like(logits_nV)
    logprobs = torch.log_softmax(logits_nV, dim=-1)
    return _Support.of(ids_nK, logits_nV.shape[-1]).tail(logprobs, scratch)


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
    buffers = _Buffers(min(chunk_tokens, n), vocab, hidden_nH)
    logprobs = hidden_nH.new_empty(n, dtype=buffers.dtype)
    has_set = top_k > 0 or given_ids_nK is not None
    size = top_k + (0 if given_ids_nK is None else given_ids_nK.shape[-1])
    ids = targets_n.new_empty(n, size)
    set_logprobs = hidden_nH.new_empty(n, size, dtype=buffers.dtype)
    tail = hidden_nH.new_empty(n, dtype=buffers.dtype)
    for start in range(0, n, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, n))
        lp = _logprobs(hidden_nH[rows], head, buffers("logprobs", rows.stop - start))
        logprobs[rows] = lp.gather(-1, targets_n[rows, None]).squeeze(-1)
        if not has_set:
            continue
        chosen = lp.topk(top_k, dim=-1).indices
        if given_ids_nK is not None:
            chosen = torch.cat([chosen, given_ids_nK[rows]], dim=-1)
            same = (chosen[:, :, None] == chosen[:, None, :]).tril_(diagonal=-1)
            chosen = chosen.masked_fill(same.any(dim=-1), -1)
        support = _Support.of(chosen, vocab)
        ids[rows], set_logprobs[rows] = chosen, support.gather(lp)
        tail[rows] = support.tail(lp, buffers("scratch", rows.stop - start))
    return (logprobs, ids, set_logprobs, tail) if has_set else (logprobs, None, None, None)
