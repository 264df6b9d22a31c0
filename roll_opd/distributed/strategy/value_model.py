"""A value for every sampled token: a language model's backbone with a head ``[H] -> 1``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.packed_model import PackedModel, check_forward, own_attention, shifted
from roll_opd.distributed.strategy.pretrained import Checkpoint
from roll_opd.errors import ModelError
from roll_opd.trajectory import PackedBatch

logger = logging.getLogger(__name__)

HEAD_FILE = "value_head.safetensors"
HEAD_PREFIXES = ("value_head", "score", "v_head.summary", "v_head")
"""Names that a scalar head goes by: ours, transformers' sequence classification, the usual ones of PPO libraries."""


class ValueModel(nn.Module):
    """Predicts the return from the state in which each token is sampled.

    The head works in fp32 whatever the backbone computes in: a return is a sum of small terms.

    Args:
        backbone: a transformers model without an output head.
        vocab_size: see :class:`PackedModel`.
        packs: see :class:`PackedModel`.
    """

    def __init__(self, backbone: Any, vocab_size: int, packs: bool = True) -> None:
        super().__init__()
        self.packed = PackedModel(backbone, vocab_size, packs)
        self.value_head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
        # A new critic predicts 0 for everything: no guess, and the same one in every run.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def backbone(self) -> Any:
        """The transformers model under the head."""
        return self.packed.lm

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, source: Tensor) -> Tensor:
        """Return the values ``[n, 1]`` fp32 of the states after the tokens at ``source``."""
        hidden = self.packed.hidden_states(tokens, positions, cu_seqlens)[source]
        return self.value_head(hidden.float())

    @torch.no_grad()
    def ours_and_own(self) -> tuple[Tensor, Tensor]:
        """Return hidden states of a few tokens, as this class computes them and as the backbone does."""
        tokens, steps, bounds = self.packed.few_tokens()
        ours = self.packed.hidden_states(tokens, steps, bounds)
        with own_attention(self.backbone):
            return ours, self.backbone(input_ids=tokens[None], use_cache=False).last_hidden_state[0]

    def values(self, batch: PackedBatch) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the value ``[n]`` before each sampled token is sampled, and the positions ``[n]`` of those tokens."""
        device = self.packed.device
        source, target = shifted(batch)
        arrays = (batch.tokens, batch.positions, batch.cu_seqlens, source)
        values: Tensor = self(*(torch.as_tensor(np.array(array), device=device) for array in arrays))
        return values.squeeze(-1), target


def load_value_model(args: ModelArguments, *, role: str, vocab_size: int, device: torch.device) -> ValueModel:
    """Load a backbone in fp32, and the value head that lies beside it, or else one that says 0.

    Args:
        args: which model: a causal language model, a sequence classifier with one label, or what
            :func:`save_value_model` wrote.
        role: named in error messages.
        vocab_size: size of the tokenizer's vocabulary.
        device: where the parameters are put.

    Raises:
        ModelError: the path does not hold a loadable model, one that we would compute wrongly, or a head with more
            than one output.
    """
    checkpoint = Checkpoint(AutoModel, args, role=role, device=device, dtype=torch.float32)
    model = value_model_of(checkpoint, checkpoint.load(), vocab_size).to(device).eval()
    check_forward(*model.ours_and_own(), checkpoint, rtol=1e-3)
    return model


def value_model_of(checkpoint: Checkpoint, backbone: PreTrainedModel, vocab_size: int) -> ValueModel:
    """Put the head that lies beside the checkpoint, or a new one, onto its backbone.

    Raises:
        ModelError: the backbone knows fewer tokens than the tokenizer, or the head has more than one output.
    """
    embeddings: Any = backbone.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    if rows < vocab_size:
        raise ModelError(
            f"{checkpoint.field}: {checkpoint.path!r} embeds {rows} tokens, the student's tokenizer has {vocab_size}"
        )
    model = ValueModel(backbone, vocab_size, checkpoint.packs)
    tensors = _head_tensors(checkpoint.folder())
    if tensors:
        _set_head(model.value_head, tensors, checkpoint.field)
        logger.info("%s: the value head is %s", checkpoint.role, ", ".join(sorted(tensors)))
    else:
        logger.info("%s: the model holds no value head; a new one starts at 0", checkpoint.role)
    return model


def save_value_model(model: ValueModel, state: dict[str, Tensor], folder: str, dtype: torch.dtype) -> None:
    """Write the backbone in Hugging Face format, in ``dtype``, and the head beside it, in fp32.

    Args:
        model: gives the config.
        state: the whole parameters of ``model`` by name.
        folder: is made if it does not exist.
        dtype: of the backbone.
    """
    prefix = "packed.lm."
    backbone = {n.removeprefix(prefix): t.to(dtype) for n, t in state.items() if n.startswith(prefix)}
    model.backbone.config.dtype = dtype
    model.backbone.save_pretrained(folder, state_dict=backbone)
    head = {n: t.float().contiguous() for n, t in state.items() if not n.startswith(prefix)}
    save_file(head, Path(folder) / HEAD_FILE, metadata={"format": "pt"})


def _head_tensors(folder: Path | None) -> dict[str, Tensor]:
    """Read the head's tensors from the model's files; empty if there is none."""
    # Ours first: the folder may have been made from a model that brought a head of its own.
    files = sorted(folder.glob("*.safetensors"), key=lambda f: (f.name != HEAD_FILE, f.name)) if folder else []
    for prefix in HEAD_PREFIXES:
        found: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in (f"{prefix}.weight", f"{prefix}.bias"):
                    if name in tensors.keys():  # noqa: SIM118 - not a dict
                        found[name] = tensors.get_tensor(name)
        if any(name.endswith(".weight") for name in found):
            return found
    return {}


@torch.no_grad()
def _set_head(head: nn.Linear, tensors: dict[str, Tensor], field: str) -> None:
    for name, tensor in tensors.items():
        parameter = head.bias if name.endswith(".bias") else head.weight
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{field}: {name} has shape {list(tensor.shape)}, and a value needs {list(parameter.shape)}: one "
                f"number for each token"
            )
        parameter.copy_(tensor)
