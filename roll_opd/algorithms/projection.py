"""The output projection: logits and log-probabilities of a few rows at a time, in buffers that are used again.

Shapes: ``n`` tokens, ``c`` rows of a chunk, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Rows of logits held at a time. Memory grows with it; below 128, time grows as it shrinks (see ``benchmarks``)."""


@dataclass(frozen=True)
class Head:
    """An output projection, trimmed to the tokenizer's vocabulary.

    ``soft_cap`` bounds the logits as ``cap * tanh(logits / cap)`` (Gemma 2).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which softmax, divergences and sums over tokens are taken: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def fill_logprobs(hidden_cH: Tensor, head: Head, out: Tensor) -> Tensor:
    """Fill ``out`` with the log-softmax of the logits."""
    return torch.log_softmax(fill_logits(hidden_cH, head, out), dim=-1, out=out)


def logsumexp(x_cV: Tensor, scratch_cV: Tensor) -> Tensor:
    """``torch.logsumexp`` in a given buffer; -inf for a row of nothing but -inf."""
    top = x_cV.amax(dim=-1).clamp_(min=torch.finfo(x_cV.dtype).min)
    return torch.sub(x_cV, top[:, None], out=scratch_cV).exp_().sum(dim=-1).log_().add_(top)
