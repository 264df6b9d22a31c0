"""Loading a transformers model, whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy import attention
from roll_opd.errors import ModelError

logger = logging.getLogger(__name__)


def load_pretrained(
    auto_class: Any, args: ModelArguments, *, role: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, bool, list[str]]:
    """Load a model with our attention, without dropout, on the CPU.

    Args:
        auto_class: of transformers: says which head is wanted (``AutoModel``: none).
        args: which model.
        role: named in error messages.
        dtype: of the parameters.

    Returns:
        The model; whether its attention is ours, which reads ``cu_seq_lens_q``; names of tensors in its files that it
        has no use for.

    Raises:
        ModelError: the path does not hold a loadable model, or only a part of one.
    """
    path = args.model_name_or_path
    field = f"{role}.model_args.model_name_or_path"
    if path is None:
        raise ModelError(f"{field} is not set")
    attention.register()
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{field}: the folder {path!r} holds no config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        _without_dropout(config, role)
        packs = _fully_causal(config)
        loaded: Any = auto_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME if packs else "sdpa",
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        # Policy: refuse. A damaged folder makes transformers raise anything, from its validators to ZeroDivisionError.
        where = "" if Path(path).exists() else " (no such folder here, and no cached or reachable hub model)"
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(f"{field}: cannot load {path!r}{where}: {reason}") from error
    lm, loading = loaded
    # transformers fills what a file lacks with random numbers and goes on; such a model must neither teach nor learn.
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{field}: the weights in {path!r} lack {len(absent)} tensor(s) of the model, or have them in another "
            f"shape; first {absent[0]}"
        )
    return lm, packs, sorted(loading["unexpected_keys"])


def _without_dropout(config: Any, role: str) -> None:
    """Switch every dropout of a model off.

    Old and new log-probabilities must be those of the same function; with dropout the ratio of an unchanged model would
    not be 1. Attention reads its rate from the config at every call, so modules alone would not do.
    """
    text = config.get_text_config()
    rates = [n for n, v in vars(text).items() if "drop" in n and isinstance(v, float) and v > 0]
    for name in rates:
        setattr(text, name, 0.0)
    if rates:
        logger.warning("%s: dropout of the model is switched off (%s)", role, ", ".join(rates))


def _fully_causal(config: Any) -> bool:
    """Whether every layer attends to all earlier tokens; only then may our attention function serve the model."""
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None) or []
    sliding = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return all(kind == "full_attention" for kind in layer_types) if layer_types else not sliding
