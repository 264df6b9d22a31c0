"""The model forward over packed rows, and the one place where logits are shifted against tokens.

The logits at position ``t - 1`` predict token ``t``. :func:`shifted` turns "tokens wanted" into "hidden states to
read", and nothing outside this file knows about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from roll_opd.algorithms.chunked_head import FullTarget, Head, HeadOutputs, SupportTarget, head_outputs
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.base import HeadWeights
from roll_opd.distributed.strategy.pretrained import Checkpoint
from roll_opd.distributed.strategy.weight_transfer import as_bytes, read_only
from roll_opd.errors import ModelError
from roll_opd.trajectory import PackedBatch, RawTensor

Apply = Callable[[Tensor, Head, Tensor], Any]
"""What to compute at the head: hidden states ``[n, H]``, the head, target ids ``[n]``."""


def shifted(batch: PackedBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``(source, target)`` positions: the hidden state at ``source[i]`` predicts the token at ``target[i]``.

    Raises:
        ValueError: the first token of a sequence is marked as sampled; nothing predicts it.
    """
    target = np.flatnonzero(batch.response_mask)
    if np.isin(target, batch.cu_seqlens[:-1]).any():
        raise ValueError("the first token of a sequence cannot be a sampled one: it has no prompt before it")
    return target - 1, target


class PackedModel(nn.Module):
    """A causal language model whose forward computes at the head of a packed row.

    The head is applied chunk by chunk inside the forward, where FSDP2 has gathered its weight. What is computed there
    is the caller's choice; no logits leave it.

    Args:
        lm: a transformers causal language model.
        vocab_size: ids at and above this are padding and take no part in any softmax.
        packs: whether the attention of ``lm`` reads ``cu_seq_lens_q`` (see :class:`Checkpoint`).
        logits_in_fp32: apply the head in fp32, whatever the rest is computed in.
    """

    def __init__(self, lm: PreTrainedModel, vocab_size: int, packs: bool = True, logits_in_fp32: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.vocab_size = vocab_size
        self.packs = packs
        self.logits_in_fp32 = logits_in_fp32
        text_config = lm.config.get_text_config()
        self.soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)

    def head(self) -> Head:
        """Return the output projection. Its tensors are the parameters themselves, with their padding."""
        projection = self.lm.get_output_embeddings()
        weight, bias = projection.weight, getattr(projection, "bias", None)
        if self.logits_in_fp32:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return Head(weight, bias, self.soft_cap, self.vocab_size)

    def hidden_states(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the final hidden states ``[N, H]`` of a packed row."""
        extra: dict[str, Any] = {}
        if self.packs:
            longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
            extra = {
                "cu_seq_lens_q": cu_seqlens,
                "cu_seq_lens_k": cu_seqlens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        # use_cache=False is not a saving but a condition: with the default cache transformers builds a mask that
        # ignores the segment boundaries.
        output = self.lm.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, return_dict=True, **extra
        )
        return output.last_hidden_state[0]

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, source: Tensor, target: Tensor, apply: Apply
    ) -> Any:
        """Return what ``apply`` makes of the tokens at ``target``, read at ``source``."""
        head = self.head()
        hidden = self.hidden_states(tokens, positions, cu_seqlens)[source].to(head.weight_VH.dtype)
        return apply(hidden, head, tokens[target])

    @torch.no_grad()
    def ours_and_own(self) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of a few tokens, as this class computes them and as the transformers model does."""
        tokens, steps, bounds = self.few_tokens()
        ours = self.forward(tokens, steps, bounds, steps[:-1], steps[1:], apply=head_outputs).logprobs_n
        with own_attention(self.lm):
            logits = self.lm(input_ids=tokens[None], use_cache=False).logits[0]
        own = logits[:-1, : self.vocab_size].float().log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
        return ours, own

    def few_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, positions and bounds of a row of one short sequence."""
        steps = torch.arange(8, device=self.device)
        return (steps + 1) % self.vocab_size, steps, torch.tensor([0, 8], dtype=torch.int32, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes; the parameters may be kept elsewhere."""
        parameter = next(self.parameters())
        return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device

    def at_sampled_tokens(self, batch: PackedBatch, apply: Apply) -> tuple[Any, NDArray[np.int64]]:
        """Forward ``batch``; return what ``apply`` gives and the positions ``[n]`` that it speaks about."""
        device = self.device
        source, target = shifted(batch)

        def put(array: NDArray[Any]) -> Tensor:
            return torch.as_tensor(np.array(array), device=device)

        out = self(
            put(batch.tokens), put(batch.positions), put(batch.cu_seqlens), put(source), put(target), apply=apply
        )
        return out, target

    def token_logprobs(
        self, batch: PackedBatch, divergences: Sequence[FullTarget | SupportTarget] = ()
    ) -> tuple[HeadOutputs, NDArray[np.int64]]:
        """Return log-probability, entropy and divergences of the sampled tokens, and the positions ``[n]``."""

        def apply(hidden: Tensor, head: Head, targets: Tensor) -> HeadOutputs:
            return head_outputs(hidden, head, targets, divergences)

        return self.at_sampled_tokens(batch, apply)


def load_model(
    args: ModelArguments,
    *,
    role: str,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    decodes: bool = False,
    logits_in_fp32: bool = False,
) -> PackedModel:
    """Load a causal language model and check that our forward is its forward.

    Args:
        args: which model, in which dtype.
        role: named in error messages.
        vocab_size: size of the tokenizer's vocabulary.
        device: where the parameters are put.
        dtype: of the parameters; by default the one in ``args``.
        decodes: whether the decoding loop will sample from it.
        logits_in_fp32: see :class:`PackedModel`.

    Raises:
        ModelError: the path does not hold a loadable model, or a model whose head we would compute wrongly.
    """
    checkpoint = Checkpoint(AutoModelForCausalLM, args, role=role, device=device, dtype=dtype, decodes=decodes)
    model = packed_model_of(checkpoint, checkpoint.load(), vocab_size, logits_in_fp32).to(device).eval()
    check_forward(*model.ours_and_own(), checkpoint)
    return model


def packed_model_of(
    checkpoint: Checkpoint, lm: PreTrainedModel, vocab_size: int, logits_in_fp32: bool = False
) -> PackedModel:
    """Wrap what ``checkpoint`` gave.

    Raises:
        ModelError: the model has no head, or one that is too small for the tokenizer.
    """
    if lm.get_output_embeddings() is None:
        raise ModelError(f"{checkpoint.field}: {checkpoint.path!r} has no language-model head")
    projection: Any = lm.get_output_embeddings()
    rows = int(projection.weight.shape[0])
    if rows < vocab_size:
        raise ModelError(
            f"{checkpoint.role}: the head of {checkpoint.path!r} has {rows} rows, the tokenizer {vocab_size} tokens"
        )
    return PackedModel(lm, vocab_size, checkpoint.packs, logits_in_fp32)


@torch.no_grad()
def check_forward(ours: Tensor, own: Tensor, checkpoint: Checkpoint, rtol: float = 0.0) -> None:
    """Compare what we compute with what the transformers model computes itself.

    Some families scale or shift their logits after the head, or bound attention scores; better to refuse them here than
    to train on wrong scores.

    Args:
        ours: as we compute it.
        own: as the model's own code does.
        checkpoint: what the model was made from.
        rtol: tolerance relative to ``own``, beside the absolute one.

    Raises:
        ModelError: the two differ.
    """
    tolerance = 1e-3 if checkpoint.args.dtype == "fp32" else 0.25
    if not torch.allclose(ours.float(), own.float(), atol=tolerance, rtol=rtol):
        raise ModelError(
            f"{checkpoint.field}: we do not compute {checkpoint.family} as it does itself (off by "
            f"{float((ours - own).abs().max()):.2g}); this family is not supported"
        )


@contextlib.contextmanager
def own_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Have a transformers model attend with its own code, which knows everything about its family."""
    ours = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    yield
    lm.set_attn_implementation(ours)


def decoder_layers(lm: Any) -> Iterator[nn.Module]:
    """The layers that a transformers model is made of, in order."""
    layers = getattr(lm.base_model, "layers", None)
    yield from layers if layers is not None else []


def raw_of(tensor: Tensor) -> RawTensor:
    """Turn a tensor into what travels between processes."""
    return RawTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), as_bytes(tensor))


def tensor_of(raw: RawTensor, device: torch.device) -> Tensor:
    """Undo :func:`raw_of`. On a CPU it is the memory of ``raw`` itself: nobody may write to it."""
    return read_only(raw.raw).view(getattr(torch, raw.dtype)).reshape(raw.shape).to(device)


def head_of(weights: HeadWeights, device: torch.device) -> Head:
    """Rebuild another model's output projection from what travelled."""
    bias = None if weights.bias is None else tensor_of(weights.bias, device)
    return Head(tensor_of(weights.weight, device), bias, weights.soft_cap)
