"""Which attention function a model gets; and one of our own, registered with transformers under :data:`NAME`.

Ours serves packed rows and decoding.

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
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from roll_opd.errors import ModelError

NAME = "roll_opd_varlen"
_FLASH = {"fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_DENSE = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}


def choose(
    wanted: str | None, config: Any, dtype: torch.dtype, device: torch.device, *, field: str, decodes: bool = False
) -> tuple[str, bool]:
    """Return the name of the attention function for a model, and whether it reads ``cu_seq_lens_q``.

    Functions that do not read it make a mask for the whole row from the positions, which restart in each sequence.

    Args:
        wanted: ``attn_implementation`` of the config; None and ``auto`` choose.
        config: of the model.
        dtype: of the computation.
        device: where it is done.
        field: names the setting in messages.
        decodes: whether the decoding loop uses the model: its cache fits our function alone, which then serves every
            model that it can serve.

    Raises:
        ModelError: what is wanted cannot run here.
    """
    text = config.get_text_config()
    # A bound on attention scores is known to eager attention and to flash-attention.
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    ours = _fully_causal(text) and not capped
    on_gpu, half = device.type == "cuda", dtype in (torch.float16, torch.bfloat16)
    if decodes and ours:
        return NAME, True
    if wanted in (None, "auto"):
        if on_gpu and half and is_flash_attn_2_available():
            return _FLASH["fa2"], True
        return (NAME, True) if ours else ("eager" if capped else "sdpa", False)
    if wanted in _FLASH:
        installed = is_flash_attn_2_available() if wanted == "fa2" else is_flash_attn_3_available()
        if not (on_gpu and half and installed):
            raise ModelError(
                f"{field}: {wanted!r} needs CUDA, its package of flash-attention and dtype bf16 or fp16; use auto"
            )
        return _FLASH[wanted], True
    if wanted == "flex" and not on_gpu:
        raise ModelError(f"{field}: 'flex' needs a CUDA device; use auto")
    if wanted == "sdpa" and capped:
        raise ModelError(f"{field}: 'sdpa' would ignore the model's bound on attention scores; use auto or eager")
    return _DENSE[wanted], False


def _fully_causal(text_config: Any) -> bool:
    """Whether every layer attends to all earlier tokens."""
    layer_types = getattr(text_config, "layer_types", None) or []
    sliding = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
    return all(kind == "full_attention" for kind in layer_types) if layer_types else not sliding


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
        key, value, shape = key[:, :, :width], value[:, :, :width], query.shape
        if shape[2] == 1 and options["enable_gqa"]:
            # The heads that share keys are queries of one head: nothing has to be repeated for them.
            query, options["enable_gqa"] = query.reshape(shape[0], key.shape[1], -1, shape[3]), False
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout, **options)
        out = out.reshape(*shape[:3], value.shape[3])
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


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, _mask_of_caller)
