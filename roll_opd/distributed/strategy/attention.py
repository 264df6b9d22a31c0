"""One attention function for packed rows and for decoding, registered with transformers under :data:`NAME`.

Packed rows (``cu_seq_lens_q`` given): causal attention inside each segment, one call a segment, no ``[N, N]`` mask.
Otherwise: scaled-dot-product attention with the 4-D mask given by the caller; keys beyond the mask's width (the unused
part of a static cache) are not looked at.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "roll_opd_varlen"


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend; ``query [B, heads, N, D]``, ``key`` and ``value [B, kv_heads, M, D]``; returns ``[B, N, heads, D]``."""
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if cu_seq_lens_q is None:
        width = attention_mask.shape[-1] if attention_mask is not None else key.shape[2]
        out = scaled_dot_product_attention(
            query, key[:, :, :width], value[:, :, :width], attn_mask=attention_mask, dropout_p=dropout, **options
        )
    else:
        bounds = cu_seq_lens_q.tolist()
        out = torch.cat(
            [
                scaled_dot_product_attention(
                    query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, dropout_p=dropout, **options
                )
                for a, b in itertools.pairwise(bounds)
            ],
            dim=2,
        )
    return out.transpose(1, 2).contiguous(), None


def _mask_of_caller(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None


def register() -> None:
    """Make :data:`NAME` known to transformers; may be called repeatedly."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _mask_of_caller)
