"""The output projection: logits and log-probabilities of a few rows at a time, in buffers that are used again.

Shapes: ``n`` tokens, ``c`` rows of a chunk, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Most rows of logits held at a time. Memory grows with it; below 128, time grows as it shrinks (``benchmarks``)."""
CPU_CHUNK_NUMBERS = 2**24
"""Logits held at a time on a CPU, where fewer rows of a large vocabulary cost little."""
FEWEST_ROWS = 64
"""... and never fewer than these: each row more reads the head one time less."""


@dataclass(frozen=True)
class VocabShard:
    """What one of several ranks holds of a vocabulary whose rows lie on all of them, and how it talks to the others.

    All ranks call the same functions in the same order with the same tokens, also a rank without any row.

    Attributes:
        first: id of the first row held. The shards follow each other in rank order, without gaps.
        ranks: how many share the vocabulary.
        sum: sum over the ranks, of tensors of one shape; may overwrite its argument. Every rank must get the same bits.
        gather: concatenation along the last dimension, in rank order, of tensors of one shape.
    """

    first: int
    ranks: int
    sum: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]

    def all(self, yes: bool, device: torch.device) -> bool:
        """Return whether all ranks say yes."""
        return yes if self.ranks == 1 else bool(self.sum(torch.tensor([float(yes)], device=device)) == self.ranks)


def _itself(x: Tensor) -> Tensor:
    return x


WHOLE = VocabShard(0, 1, _itself, _itself)
"""The only shard of a vocabulary that is not split."""


@dataclass(frozen=True)
class Head:
    """An output projection: all of it, or the rows of one shard.

    Attributes:
        weight_VH: rows of consecutive ids, beginning at ``shard.first``. Rows beyond the vocabulary are padding: they
            take no part in anything, and their gradient is 0.
        bias_V: as long as ``weight_VH``.
        soft_cap: bounds the logits as ``cap * tanh(logits / cap)`` (Gemma 2).
        vocab_size: the tokenizer's, of all shards together; ``None``: no row is padding, and nothing is split.
        shard: which rows these are.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None
    vocab_size: int | None = None
    shard: VocabShard = WHOLE

    def __post_init__(self) -> None:
        if self.shard is not WHOLE:
            assert self.vocab_size is not None, "a shard does not know the size of the vocabulary"
        elif self.total > len(self.weight_VH):
            raise ValueError(f"a head of {len(self.weight_VH)} rows for a vocabulary of {self.total}")

    @property
    def total(self) -> int:
        """Size of the vocabulary over all shards."""
        return len(self.weight_VH) if self.vocab_size is None else self.vocab_size

    @property
    def rows(self) -> int:
        """How many ids of the vocabulary are held here; may be 0."""
        return max(0, min(len(self.weight_VH), self.total - self.shard.first))

    def trimmed(self) -> Head:
        """Return views without the padding. Their gradients, unlike this head's, would be copied into full size."""
        bias = None if self.bias_V is None else self.bias_V[: self.rows]
        return replace(self, weight_VH=self.weight_VH[: self.rows], bias_V=bias)

    def cut_like(self, other: Head) -> Head:
        """Return a copy of those rows of a whole head that ``other`` holds of its own.

        Raises:
            ValueError: the two are of different vocabularies.
        """
        assert self.shard is WHOLE, "only a whole head can be cut"
        if self.total != other.total:
            raise ValueError(f"a head for a vocabulary of {self.total} cannot be cut like one of {other.total}")
        held = slice(other.shard.first, other.shard.first + other.rows)
        bias = None if self.bias_V is None else self.bias_V[held].clone()
        return Head(self.weight_VH[held].clone(), bias, self.soft_cap, other.total, other.shard)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which softmax, divergences and sums over tokens are taken: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_rows(head: Head) -> int:
    """Return how many rows of logits to hold at a time; the same for every shard of a vocabulary."""
    if head.weight_VH.is_cuda:
        return CHUNK_TOKENS
    return min(CHUNK_TOKENS, max(FEWEST_ROWS, CPU_CHUNK_NUMBERS // head.total))


class Buffers:
    """``[c, V]`` buffers by name, used again for every chunk: fresh memory costs more than what is computed in it."""

    def __init__(self, chunk_tokens: int, vocab: int, like: Tensor) -> None:
        self.dtype = sum_dtype(like)
        self._shape = (chunk_tokens, vocab)
        self._device = like.device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        """Return the first rows of a buffer, with whatever was left in them."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, dtype=self.dtype, device=self._device)
        return self._buffers[name][:rows]


def row_dot(a_cV: Tensor, b_cV: Tensor, scratch_cV: Tensor) -> Tensor:
    """Return the scalar product of each pair of rows ``[c]``; ``scratch_cV`` is overwritten."""
    return torch.mul(a_cV, b_cV, out=scratch_cV).sum(dim=-1)


def fill_logits(hidden_cH: Tensor, head: Head, out: Tensor) -> Tensor:
    """Fill ``out`` with capped logits."""
    head = head.trimmed()
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


def log_softmax(logits_cV: Tensor, shard: VocabShard, buffers: Buffers, scratch: str = "scratch") -> Tensor:
    """Turn logits into log-probabilities over the vocabulary of all shards, in place.

    The buffer named ``scratch`` is overwritten, and not made where there is one shard.
    """
    if shard.ranks == 1:
        return torch.log_softmax(logits_cV, dim=-1, out=logits_cV)
    top = _row_max(logits_cV)
    mass = torch.exp(logits_cV.sub_(top[:, None]), out=buffers(scratch, len(logits_cV))).sum(dim=-1)
    tops, masses = shard.gather(torch.stack([top, mass])).view(2, shard.ranks, -1)
    best = tops.amax(dim=0)
    total = (masses * (tops - best).exp_()).sum(dim=0)
    # Two differences of small numbers: logits minus their log-sum-exp would be rounded in units of the logits.
    return logits_cV.sub_((best - top + total.log_())[:, None])


def fill_logprobs(hidden_cH: Tensor, head: Head, out: Tensor, buffers: Buffers) -> Tensor:
    """Fill ``out`` with the log-softmax of the logits, over the vocabulary of all shards."""
    return log_softmax(fill_logits(hidden_cH, head, out), head.shard, buffers)


def logsumexp(x_cV: Tensor, scratch_cV: Tensor) -> Tensor:
    """``torch.logsumexp`` in a given buffer; -inf for a row of nothing but -inf, or of nothing."""
    top = _row_max(x_cV)
    return torch.sub(x_cV, top[:, None], out=scratch_cV).exp_().sum(dim=-1).log_().add_(top)


def _row_max(x_cV: Tensor) -> Tensor:
    """The largest of each row ``[c]``, finite also where there is none."""
    lowest = torch.finfo(x_cV.dtype).min
    return x_cV.amax(dim=-1).clamp_(min=lowest) if x_cV.shape[-1] else x_cV.new_full(x_cV.shape[:1], lowest)


@dataclass(frozen=True)
class HeldIds:
    """Which of some ids ``[c, K]`` lie on this shard, and in which column of a ``[c, V]`` buffer (any, if not)."""

    column_cK: Tensor
    held_cK: Tensor

    @classmethod
    def of(cls, ids_cK: Tensor, first: int, rows: int) -> HeldIds:
        """Look ids up among ``rows`` ids from ``first`` on; -1 is nowhere."""
        column = ids_cK - first
        held = (column >= 0) & (column < rows)
        return cls(column.clamp_(min=0, max=max(rows - 1, 0)), held)

    def __getitem__(self, rows: slice | Tensor) -> HeldIds:
        return HeldIds(self.column_cK[rows], self.held_cK[rows])

    def take(self, x_cV: Tensor) -> Tensor:
        """Return the values at the ids ``[c, K]``, 0 for those of another shard."""
        if not x_cV.shape[-1]:
            return x_cV.new_zeros(self.held_cK.shape)
        return torch.where(self.held_cK, x_cV.gather(-1, self.column_cK), 0.0)

    def add(self, x_cV: Tensor, values_c1: Tensor) -> None:
        """Add to the values at the ids, where they are of this shard."""
        if x_cV.shape[-1]:
            x_cV.scatter_add_(-1, self.column_cK, torch.where(self.held_cK, values_c1, 0.0))


def check_ids(ids: Tensor, vocab: int, what: str, lowest: int = 0) -> None:
    """Refuse with ``ValueError`` ids that lie on no shard."""
    if ids.numel():
        least, most = torch.stack(ids.aminmax()).tolist()
        if least < lowest or most >= vocab:
            raise ValueError(f"token ids from {least} to {most} in {what}, but the vocabulary has {vocab}")
