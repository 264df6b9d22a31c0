"""What is computed at the output projection, without ever holding ``[tokens, vocabulary]``.

Log-probabilities, entropies and exact divergences from a teacher, each with its closed-form gradient, chunk by chunk.
There are two times at which the gradient can be made (measured in ``benchmarks/full_vocabulary_kl.py``):

- *ahead*, in the forward pass, where every target says by ``weights_m`` what its divergences will weigh in the loss:
  four matrix products. The gradient of the hidden states and of the head are kept, and the backward pass multiplies
  them by the one number that it finds between these weights and the true ones.
- *again*, in the backward pass, which makes the logits a second time: six products, nothing kept but the inputs and a
  few numbers a token. Used where the weights are not known beforehand or turn out to be others (a policy gradient's
  depend on the log-probabilities, which need an output of their own anyway).

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

The vocabulary may be split over ranks (:class:`~roll_opd.algorithms.projection.VocabShard`). A chunk is then ``ranks``
times as many tokens, each rank holds ``[c, V / ranks]`` of it, and what is summed over ``v`` above is summed over the
ranks as well. In one chunk they talk to each other

- for the normaliser of the student, and of each teacher of a whole vocabulary: the largest logit of each shard and the
  mass relative to it
- for ``sum_u s_u``, where a gradient is made (the forward KL's is known)
- for the log-probabilities of a set, and once for the mass of its tail

and once a call for log-probabilities, entropies and divergences. What is made of these numbers is made on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from roll_opd.algorithms.head_divergence import (
    Chunk,
    Cover,
    FullTarget,
    SupportTarget,
    check,
    fill_teacher,
    full_divergence,
    set_divergence,
)
from roll_opd.algorithms.projection import (
    CHUNK_TOKENS,
    Buffers,
    Head,
    HeldIds,
    VocabShard,
    check_ids,
    chunk_rows,
    fill_logits,
    log_softmax,
    row_dot,
    sum_dtype,
)
from roll_opd.algorithms.support import support_scores, tail_logprob

__all__ = [
    "CHUNK_TOKENS",
    "FullTarget",
    "Head",
    "HeadOutputs",
    "SupportTarget",
    "VocabShard",
    "head_outputs",
    "support_scores",
    "tail_logprob",
]

WEIGHT_ROWS = 16384
"""Rows of the head for which a low-precision product is held before it is added to the gradient in fp32."""

SAME_FACTOR = 1e-6
"""How far, relatively, a token's weight in the loss may lie from a common multiple of the weights announced: a few
roundings in fp32. This bounds the relative error of what is kept."""


@dataclass(frozen=True)
class HeadOutputs:
    """One number a token, float32 (float64 for float64 inputs): ``[n]`` each, ``divergences`` 0 where not covered.

    ``teacher_logprobs`` has an entry for each divergence: what a teacher of a whole vocabulary says of the target, 0
    where it does not cover it; all 0 for a set. It has no gradient. All are the same on all ranks that share a
    vocabulary.
    """

    logprobs_n: Tensor
    entropy_n: Tensor
    divergences: tuple[Tensor, ...] = ()
    teacher_logprobs: tuple[Tensor, ...] = ()


def head_outputs(
    hidden_nH: Tensor,
    head: Head,
    targets_n: Tensor,
    divergences: Sequence[FullTarget | SupportTarget] = (),
    *,
    chunk_tokens: int | None = None,
) -> HeadOutputs:
    """Return log-probability of each target, entropy of each distribution, and each divergence at each position.

    Differentiable once, with respect to ``hidden_nH``, ``head.weight_VH`` and ``head.bias_V``. Products are formed in
    the dtype of the inputs, softmax and divergence in float32, the head's gradient is summed in float32.

    Where the head is one of several shards, all ranks give the same hidden states, targets and divergences, make the
    same loss of what they get, and go backward. The gradient by ``hidden_nH`` is then what this shard's ids contribute:
    the caller sums it over the ranks. That by the head is complete.

    Args:
        hidden_nH: final hidden states, already shifted to the position that predicts the target.
        head: the student's, whole or one of its shards.
        targets_n: int64 token ids.
        divergences: what to compare with, any number of teachers. Their heads are cut like the student's.
        chunk_tokens: tokens whose logits are held at a time, as many times more as there are shards; None: see
            :func:`~roll_opd.algorithms.projection.chunk_rows`.

    Raises:
        ValueError: shapes or vocabularies that do not fit together, ids beyond the vocabulary, an unknown divergence, a
            ``jsd_beta`` outside (0, 1).
    """
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(head)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")
    if hidden_nH.shape[0] != targets_n.shape[0]:
        raise ValueError(f"{hidden_nH.shape[0]} hidden states for {targets_n.shape[0]} targets")
    for target in divergences:
        check(target, len(targets_n), head)
    check_ids(targets_n, head.total, "the targets")
    chunk_tokens *= head.shard.ranks
    covers = tuple(Cover(t.rows_m, len(targets_n), chunk_tokens) for t in divergences)
    job = _Job(
        head.soft_cap,
        head.vocab_size,
        head.shard,
        targets_n,
        tuple(divergences),
        covers,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    logprobs, entropy, *values = _HeadFunction.apply(hidden_nH, head.weight_VH, head.bias_V, job)
    count = len(divergences)
    return HeadOutputs(logprobs, entropy, tuple(values[:count]), tuple(values[count:]))


# --- the walk over the chunks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    soft_cap: float | None
    vocab_size: int | None
    shard: VocabShard
    targets_n: Tensor
    divergences: tuple[FullTarget | SupportTarget, ...]
    covers: tuple[Cover, ...]
    chunk_tokens: int
    grad_enabled: bool

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the student's head; its tensors are kept by autograd, not here."""
        return Head(weight, bias, self.soft_cap, self.vocab_size, self.shard)

    def chunks(self) -> list[slice]:
        n = len(self.targets_n)
        return [slice(start, min(start + self.chunk_tokens, n)) for start in range(0, n, self.chunk_tokens)]

    def announced(self, dtype: torch.dtype) -> _Upstream | None:
        """What the targets say that their divergences will weigh; ``None`` unless all of them do."""
        weights: list[Tensor] = []
        for target in self.divergences:
            if target.weights_m is None:
                return None
            weights_n = target.weights_m.to(dtype, copy=True)
            if target.rows_m is not None:
                weights_n = weights_n.new_zeros(len(self.targets_n)).index_copy_(0, target.rows_m, weights_n)
            weights.append(weights_n)
        return _Upstream(None, None, tuple(weights)) if weights else None


@dataclass(frozen=True)
class _Upstream:
    """Derivatives of the loss with respect to the outputs, ``[n]`` each; ``None``: nothing depends on it."""

    logprobs: Tensor | None
    entropy: Tensor | None
    divergences: tuple[Tensor | None, ...]

    def multiple_of(self, other: _Upstream) -> float | None:
        """The number that ``other``, made of divergences alone, must be multiplied by; ``None``: there is none."""
        if any(x is not None and bool(x.any()) for x in (self.logprobs, self.entropy)):
            return None
        announced = [w for w in other.divergences if w is not None]
        weights = torch.cat(announced)
        mine = torch.cat(
            [torch.zeros_like(w) if x is None else x for x, w in zip(self.divergences, announced, strict=True)]
        )
        if not weights.any():
            return None if mine.any() else 0.0
        heaviest = weights.abs().argmax()
        factor = mine[heaviest] / weights[heaviest]
        expected = factor * weights
        same = (mine - expected).abs() <= SAME_FACTOR * expected.abs()
        return float(factor) if bool(same.all()) else None


class _Gradients:
    """Sums over the chunks, those of the head in full precision: hidden states', weight's and bias' gradient."""

    def __init__(self, upstream: _Upstream, hidden: Tensor, head: Head, wanted: Sequence[bool]) -> None:
        inputs = hidden, head.weight_VH, head.bias_V
        self.upstream = upstream
        self._rows = slice(head.rows)
        self._dtypes = [None if x is None else x.dtype for x in inputs]
        of_hidden, of_weight, of_bias = (x if wants else None for x, wants in zip(inputs, wanted, strict=True))
        self._hidden = None if of_hidden is None else torch.empty_like(of_hidden)
        self._weight = None if of_weight is None else torch.zeros_like(of_weight, dtype=sum_dtype(of_weight))
        self._bias = None if of_bias is None else torch.zeros_like(of_bias, dtype=sum_dtype(of_bias))

    def add(self, chunk: slice, grad_cV: Tensor, hidden_cH: Tensor, weight_VH: Tensor) -> None:
        """Add what the derivative by a chunk's logits gives."""
        if self._bias is not None:
            self._bias[self._rows].add_(grad_cV.sum(dim=0))
        grad_cV = grad_cV.to(hidden_cH.dtype)
        if self._hidden is not None:
            self._hidden[chunk] = grad_cV @ weight_VH[self._rows]
        if self._weight is not None:
            _add_product(self._weight[self._rows], grad_cV, hidden_cH)

    def times(self, factor: float) -> tuple[Tensor | None, ...]:
        """Return the sums, multiplied by ``factor``, in the dtypes of the inputs. They are given away: call it once."""
        sums = self._hidden, self._weight, self._bias
        self._hidden = self._weight = self._bias = None
        if factor != 1.0:
            for x in sums:
                if x is not None:
                    x.mul_(factor)
        return tuple(None if x is None else x.to(dtype) for x, dtype in zip(sums, self._dtypes, strict=True))


@dataclass(frozen=True)
class _Saved:
    """What the forward pass finds and the gradient reads, ``[n]`` each.

    ``tails`` are the student's log-masses outside of a set, ``None`` where that is no bucket.
    """

    entropy: Tensor
    tails: tuple[Tensor | None, ...]


def _walk(
    job: _Job, hidden: Tensor, head: Head, saved: _Saved, outputs: HeadOutputs | None, gradients: _Gradients | None
) -> None:
    """Go through the chunks once. With ``outputs``, fill in these and ``saved``; with ``gradients``, add to them."""
    buffers = Buffers(min(job.chunk_tokens, len(job.targets_n)), head.rows, hidden)
    targets = HeldIds.of(job.targets_n[:, None], head.shard.first, head.rows)
    fill = outputs is not None
    upstream = _Upstream(None, None, (None,) * len(job.divergences)) if gradients is None else gradients.upstream
    for chunk in job.chunks():
        size = chunk.stop - chunk.start
        lp = fill_logits(hidden[chunk], head, buffers("student", size))
        slope = None
        if gradients is not None and head.soft_cap is not None:
            slope = torch.div(lp, head.soft_cap, out=buffers("slope", size)).square_().neg_().add_(1.0)
        log_softmax(lp, head.shard, buffers, "p")
        p = torch.exp(lp, out=buffers("p", size))
        grad = buffers("grad", size)
        if outputs is not None:
            outputs.logprobs_n[chunk] = targets[chunk].take(lp).squeeze(-1)
            outputs.entropy_n[chunk] = -row_dot(p, lp, grad)
        state = Chunk(lp, p, head, buffers)
        empty = True
        for i, target in enumerate(job.divergences):
            part, d_value_n = job.covers[i].part(chunk), upstream.divergences[i]
            if part.count == 0 or not (fill or d_value_n is not None):
                continue
            d_value = None if d_value_n is None else d_value_n[part.at]
            # Nothing is in `grad` yet: what speaks about the whole chunk, or is no gradient, is made right there.
            in_place = empty and (part.local is None or d_value is None)
            t = grad[: part.count] if in_place else buffers("teacher", part.count)
            if isinstance(target, FullTarget):
                fill_teacher(target, part, t, buffers)
                if outputs is not None:
                    at = targets[part.at]
                    outputs.teacher_logprobs[i][part.at] = at.take(t).squeeze(-1)
                value = full_divergence(target, part, state, t, d_value, fill)
            else:
                value = set_divergence(target, part, state, t, d_value, saved.tails[i], fill)
            if outputs is not None and value is not None:
                outputs.divergences[i][part.at] = value
            if d_value is None:
                continue
            if not in_place:
                if empty:
                    grad.zero_()
                grad.add_(t) if part.local is None else grad.index_add_(0, part.local, t)
            empty = False
        if gradients is None:
            continue
        if empty:
            grad.zero_()
        if upstream.logprobs is not None:
            grad.addcmul_(p, -upstream.logprobs[chunk, None])
            targets[chunk].add(grad, upstream.logprobs[chunk, None])
        if upstream.entropy is not None:
            grad.sub_(lp.add_(saved.entropy[chunk, None]).mul_(p).mul_(upstream.entropy[chunk, None]))
        if slope is not None:
            grad.mul_(slope)
        gradients.add(chunk, grad, hidden[chunk], head.weight_VH)
    if outputs is not None:
        _add_up(outputs, job.divergences, head.shard)


def _add_up(outputs: HeadOutputs, divergences: Sequence[FullTarget | SupportTarget], shard: VocabShard) -> None:
    """Replace what are sums over this shard's ids by those over all, at one go for all tokens."""
    whole = [i for i, target in enumerate(divergences) if isinstance(target, FullTarget)]
    full, said = ([values[i] for i in whole] for values in (outputs.divergences, outputs.teacher_logprobs))
    parts = [outputs.logprobs_n, outputs.entropy_n, *full, *said]
    for part, total in zip(parts, shard.sum(torch.stack(parts)), strict=True):
        part.copy_(total)
    for value in full:
        value.clamp_(min=0.0)  # its rounding error is negative where the two agree


class _HeadFunction(torch.autograd.Function):
    """Keeps its inputs and a few numbers a token, and the gradients where their weights were announced."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        dtype, wanted = sum_dtype(hidden), ctx.needs_input_grad[:3]

        def numbers() -> Tensor:
            return hidden.new_zeros(len(hidden), dtype=dtype)

        values, said = (tuple(numbers() for _ in job.divergences) for _ in range(2))
        outputs = HeadOutputs(numbers(), numbers(), values, said)
        has_tail = [isinstance(t, SupportTarget) and t.tail_m is not None for t in job.divergences]
        saved = _Saved(outputs.entropy_n, tuple(numbers() if has else None for has in has_tail))
        announced = job.announced(dtype) if job.grad_enabled and any(wanted) else None
        head = job.head(weight, bias)
        ahead = None if announced is None else _Gradients(announced, hidden, head, wanted)
        _walk(job, hidden, head, saved, outputs, ahead)
        ctx.job, ctx.ahead = job, ahead
        ctx.save_for_backward(hidden, weight, bias, saved.entropy, *saved.tails)
        ctx.mark_non_differentiable(*said)
        return outputs.logprobs_n, outputs.entropy_n, *values, *said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        true = _Upstream(upstream[0], upstream[1], upstream[2 : 2 + len(ctx.job.divergences)])
        # Whether it can be used or not, it is not kept any longer; who goes backward twice makes the gradient again.
        ahead: _Gradients | None = ctx.ahead
        ctx.ahead = None
        if ahead is not None:
            factor = true.multiple_of(ahead.upstream)
            # One answer for all shards: those that make the gradient again wait for each other.
            if ctx.job.shard.all(factor is not None, ctx.job.targets_n.device) and factor is not None:
                return *ahead.times(factor), None
            del ahead
        hidden, weight, bias, entropy, *tails = ctx.saved_tensors
        head = ctx.job.head(weight, bias)
        again = _Gradients(true, hidden, head, ctx.needs_input_grad[:3])
        _walk(ctx.job, hidden, head, _Saved(entropy, tuple(tails)), None, again)
        return *again.times(1.0), None


def _add_product(sum_VH: Tensor, grad_cV: Tensor, hidden_cH: Tensor) -> None:
    """Add ``grad.T @ hidden`` to a sum that may be of higher precision."""
    if sum_VH.dtype == hidden_cH.dtype:
        sum_VH.addmm_(grad_cV.t(), hidden_cH)
        return
    for start in range(0, len(sum_VH), WEIGHT_ROWS):
        rows = slice(start, start + WEIGHT_ROWS)
        sum_VH[rows].add_(grad_cV[:, rows].t() @ hidden_cH)
