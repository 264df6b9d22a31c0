"""Hugging Face's language models as Megatron-core's modules, with a forward over packed rows like ``PackedModel``'s.

A rank holds one or more chunks of consecutive layers. The first chunk of a model takes tokens, the last one applies the
head to the hidden states of the sampled tokens; what goes from chunk to chunk is Megatron-core's business. Only what is
computed exactly as transformers computes it is built; other families and features are refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roll_opd.algorithms.chunked_head import FullTarget, Head, HeadOutputs, SupportTarget, head_outputs
from roll_opd.algorithms.projection import WHOLE, VocabShard
from roll_opd.configs.backends.megatron import FAMILIES, MegatronSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.megatron.bridge import WeightBridge
from roll_opd.distributed.strategy.megatron.parallel import expert_tensor_size
from roll_opd.distributed.strategy.megatron.shim import cuda_shim
from roll_opd.distributed.strategy.packed_model import Apply, shifted
from roll_opd.distributed.strategy.pretrained import DTYPES
from roll_opd.errors import ConfigError, ModelError
from roll_opd.trajectory import PackedBatch

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # a CUDA extension that need not be there; torch's own attention is
    flash_attn_varlen_func = None

if not hasattr(moe_utils, "te_general_gemm"):
    # Version 0.16.1 asks whether there is such a kernel by a name that it defines only with TransformerEngine.
    moe_utils.te_general_gemm = None

logger = logging.getLogger(__name__)

_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies depend on nothing but the config, and which scale no attention score."""


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient Megatron-core sums over the ranks that share a sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedAttention(nn.Module):
    """Causal attention inside each sequence of a packed row."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """Attend; ``query [N, heads, D]``, ``key`` and ``value [N, groups, D]``; returns ``[N, heads * D]``."""
        bounds, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        if query.is_cuda and query.dtype != torch.float32 and flash_attn_varlen_func is not None:
            out = flash_attn_varlen_func(
                query, key, value, bounds, bounds, longest, longest, softmax_scale=self.scale, causal=True
            )
            return out.flatten(1)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        parts = [
            scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=self.scale, enable_gqa=True
            )
            for a, b in pairwise(bounds.tolist())
        ]
        return torch.cat(parts, dim=2)[0].transpose(0, 1).flatten(1)


class MegatronChunk(GPTModel):
    """Some consecutive layers, with the embedding before the first ones and the head behind the last ones.

    ``chunk(batch, apply)`` returns the hidden states ``[N, 1, H]`` for the next chunk or, at the last one, what
    ``apply`` makes of the sampled tokens. What comes from the chunk before is put in by :meth:`set_input_tensor`, as
    Megatron-core's schedules do.

    Args:
        config: Megatron-core's, see :func:`transformer_config`.
        hf_config: of the model.
        bridge: for its weights.
        vocab_size: of the tokenizer; ids at and above it are padding and take no part in any softmax.
        pre_process: whether it begins with the embedding.
        post_process: whether it ends with the head.
        vp_stage: which of this rank's chunks it is; None if there is one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: PretrainedConfig,
        bridge: WeightBridge,
        vocab_size: int,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        # Megatron-core's own torch norm refuses sequence parallelism, its own attention packed rows.
        parts: Any = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        parts.self_attention.submodules.core_attention = PackedAttention
        if config.qk_layernorm:
            parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = RMSNorm
        super().__init__(
            config,
            TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), RMSNorm),
            vocab_size=bridge.padded_vocab_size,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb.inv_freq = inverse_frequencies(hf_config)
        self.hf_config = hf_config
        self.bridge = bridge
        self.tokenizer_size = vocab_size
        for parameter in self.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, apply: Apply | None) -> Any:
        """Return hidden states ``[N, 1, H]`` for the next chunk or, at the last one, what ``apply`` gives.

        With sequence parallelism ``N`` is this rank's share of the row. Only the last chunk needs ``apply``.
        """
        tokens, packed = self._row(batch)
        hidden = super().forward(tokens, None, None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        assert apply is not None, "nothing to compute at the head"
        source, target = (self._put(positions) for positions in shifted(batch))
        hidden = hidden[:, 0]
        # The gradient of the hidden states that the head returns is that of its part of the vocabulary: these regions
        # sum it over the ranks.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)[source]
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden[source])
        return apply(hidden, self.head(), tokens[0, target])

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """Leave out Megatron-core's head and loss: ours makes no logits."""
        return hidden_states

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(np.array(array), device=next(self.parameters()).device)

    def _row(self, batch: PackedBatch) -> tuple[Tensor, PackedSeqParams]:
        """Turn a packed row into Megatron-core's terms: tokens ``[1, N]`` and the bounds of the sequences."""
        tokens, bounds = batch.tokens, batch.cu_seqlens
        if self.config.sequence_parallel:
            # Each rank takes an equal share: fill up with a sequence that no other sees.
            missing = -len(tokens) % self.config.tensor_model_parallel_size
            if missing:
                tokens = np.concatenate([tokens, np.zeros(missing, tokens.dtype)])
                bounds = np.append(bounds, np.int32(len(tokens)))
        longest = int(np.diff(bounds).max())
        cu_seqlens = self._put(bounds)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return self._put(tokens)[None], packed

    # ---- head ----------------------------------------------------------------------------------------------------

    def head(self) -> Head:
        """Return this rank's rows of the output projection; of the last chunk only."""
        assert self.post_process, "only the last chunk has a head"
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return Head(weight, vocab_size=self.tokenizer_size, shard=_shard(len(weight)))

    def at_sampled_tokens(self, batch: PackedBatch, apply: Apply) -> tuple[Any, NDArray[np.int64]]:
        """As :meth:`PackedModel.at_sampled_tokens`, at the last chunk."""
        return self(batch, apply), shifted(batch)[1]

    def token_logprobs(
        self, batch: PackedBatch, divergences: Sequence[FullTarget | SupportTarget] = ()
    ) -> tuple[HeadOutputs, NDArray[np.int64]]:
        """As :meth:`PackedModel.token_logprobs`, at the last chunk."""

        def apply(hidden: Tensor, head: Head, targets: Tensor) -> HeadOutputs:
            return head_outputs(hidden, head, targets, divergences)

        return self.at_sampled_tokens(batch, apply)


def _shard(rows: int) -> VocabShard:
    """This rank's part of a vocabulary of which each tensor-parallel rank holds ``rows``."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return WHOLE
    group = parallel_state.get_tensor_model_parallel_group()

    def sum_over_ranks(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    return VocabShard(parallel_state.get_tensor_model_parallel_rank() * rows, ranks, sum_over_ranks, gather)


@torch.no_grad()
def whole_head(chunk: MegatronChunk) -> Head:
    """Return the whole output projection, trimmed, on every tensor-parallel rank of the last stage; all must ask."""
    head = chunk.head()
    weight = head.weight_VH if head.shard is WHOLE else head.shard.gather(head.weight_VH.t()).t()
    return Head(weight[: head.total].contiguous())


# ---- from a checkpoint -------------------------------------------------------------------------------------------


def load_chunks(
    args: ModelArguments,
    settings: MegatronSettings,
    *,
    role: str,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trains: bool,
) -> list[MegatronChunk]:
    """Build this rank's chunks of a model and read their weights; Megatron-core's groups must exist.

    Args:
        args: which model, in which dtype.
        settings: how it is spread.
        role: named in error messages.
        vocab_size: size of the tokenizer's vocabulary.
        device: of this rank.
        dtype: overrides ``args.dtype``.
        trains: whether there will be a backward pass.

    Raises:
        ConfigError: sizes that do not divide the model.
        ModelError: the path does not hold a loadable model, or one that would be computed wrongly.
    """
    field = f"{role}.model_args.model_name_or_path"
    hf_config = read_config(args, role)
    check_sizes(hf_config, settings, role)
    if hf_config.vocab_size < vocab_size:
        raise ModelError(f"{role}: the head has {hf_config.vocab_size} rows, the tokenizer {vocab_size} tokens")
    config = transformer_config(hf_config, settings, device, dtype or DTYPES[args.dtype], trains=trains)
    bridge = WeightBridge(hf_config, config, settings, dist.get_world_size())
    parts = settings.virtual_pipeline_model_parallel_size
    stages = [None] if parts is None else range(parts)
    with cuda_shim():
        chunks = [
            MegatronChunk(
                config,
                hf_config,
                bridge,
                vocab_size,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            ).to(device)  # Megatron-core leaves the weights of routers on the CPU
            for stage in stages
        ]
    bridge.mark_parts(chunks)
    bridge.read(chunks, str(args.model_name_or_path), field)
    return [chunk.train(trains) for chunk in chunks]


def read_config(args: ModelArguments, role: str) -> PretrainedConfig:
    """Read a model's config and refuse what would be computed otherwise than transformers does.

    Raises:
        ModelError: there is none, or it names a family or a feature that we do not compute.
    """
    path, field = args.model_name_or_path, f"{role}.model_args.model_name_or_path"
    if path is None:
        raise ModelError(f"{field} is not set")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        # Policy: refuse. A damaged folder makes transformers raise anything.
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(f"{field}: cannot read the config of {path!r}: {reason}") from error
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{field}: Megatron-core runs {', '.join(FAMILIES)} here, {path!r} is {config.model_type!r}; "
            f"use an fsdp2 strategy"
        )
    problem = _unlike_transformers(config)
    if problem:
        raise ModelError(
            f"{field}: {path!r} {problem}, which Megatron-core does not compute here; use an fsdp2 strategy"
        )
    if config.attention_dropout:
        logger.warning("%s: dropout of the model is switched off (attention_dropout)", role)
    return config


def _unlike_transformers(config: Any) -> str | None:
    """What a model has that we would compute wrongly."""
    layer_types = getattr(config, "layer_types", None) or []
    rope = config.rope_parameters
    if config.hidden_act != "silu":
        return f"has the activation {config.hidden_act!r}"
    if any(kind != "full_attention" for kind in layer_types) or getattr(config, "use_sliding_window", False):
        return "has sliding-window attention"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "has biases in its projections"
    if rope["rope_type"] not in _ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"has a rotary embedding of type {rope['rope_type']!r}"
    if config.model_type == "qwen3_moe" and (config.decoder_sparse_step != 1 or config.mlp_only_layers):
        return "has dense layers between its mixtures of experts"
    if getattr(config, "quantization_config", None):
        return "is quantised"
    return None


def check_sizes(hf_config: PretrainedConfig, settings: MegatronSettings, role: str) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        ConfigError: says which setting, and why.
    """
    tensor, experts = settings.tensor_model_parallel_size, settings.expert_model_parallel_size
    pipeline, parts = settings.pipeline_model_parallel_size, settings.virtual_pipeline_model_parallel_size or 1

    def require(fits: bool, setting: str, problem: str) -> None:
        if not fits:
            raise ConfigError(f"{role}.strategy_args.strategy_config.{setting}", problem)

    def divides(setting: str, size: int, number: int, what: str) -> None:
        require(number % size == 0, setting, f"{size} does not divide the model's {number} {what}")

    groups, mixture = hf_config.num_key_value_heads, hf_config.model_type == "qwen3_moe"
    divides("tensor_model_parallel_size", tensor, hf_config.num_attention_heads, "attention heads")
    require(
        groups % tensor == 0 or tensor % groups == 0,
        "tensor_model_parallel_size",
        f"{tensor} neither divides the model's {groups} key-value heads nor is a multiple of them",
    )
    divides("pipeline_model_parallel_size", pipeline, hf_config.num_hidden_layers, "layers")
    divides(
        "virtual_pipeline_model_parallel_size", pipeline * parts, hf_config.num_hidden_layers, "layers (stages x parts)"
    )
    # Of two stages each follows the other, and Megatron-core then mistakes one direction's row lengths for the other's.
    require(
        parts == 1 or pipeline > 2,
        "virtual_pipeline_model_parallel_size",
        f"interleaves the stages of a pipeline_model_parallel_size of at least 3, and it is {pipeline}; remove it",
    )
    if not mixture:
        divides("tensor_model_parallel_size", tensor, hf_config.intermediate_size, "rows of an MLP's matrix")
        require(experts == 1, "expert_model_parallel_size", f"is {experts}, and the model has no experts; remove it")
        return
    divides("expert_model_parallel_size", experts, hf_config.num_experts, "experts")
    divides(
        "tensor_model_parallel_size",
        expert_tensor_size(settings),
        hf_config.moe_intermediate_size,
        "rows of an expert's matrix",
    )
    require(
        tensor == 1 or settings.sequence_parallel,
        "sequence_parallel",
        "must be true for a mixture of experts with tensor_model_parallel_size above 1: else each tensor-parallel rank "
        "would route every token",
    )
    require(
        settings.moe_token_dispatcher_type == "alltoall",
        "moe_token_dispatcher_type",
        f"{settings.moe_token_dispatcher_type} needs rows of one length, or a CUDA library; use alltoall",
    )
    if settings.moe_grouped_gemm:
        logger.warning("%s: moe_grouped_gemm has no effect: experts are computed one by one", role)


def transformer_config(
    hf_config: Any, settings: MegatronSettings, device: torch.device, dtype: torch.dtype, *, trains: bool
) -> TransformerConfig:
    """Put a model's architecture and its layout into Megatron-core's terms.

    Fused kernels are off: they need extensions of CUDA, and the same code runs on both kinds of device.
    """
    mixture: dict[str, Any] = {}
    if hf_config.model_type == "qwen3_moe":
        mixture = {
            "num_moe_experts": hf_config.num_experts,
            "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
            "moe_router_topk": hf_config.num_experts_per_tok,
            # transformers takes the softmax over all experts and, if asked, normalises what is left of it. After a
            # softmax over the chosen ones nothing is left to normalise: the same numbers.
            "moe_router_pre_softmax": not hf_config.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": settings.expert_model_parallel_size,
            "expert_tensor_parallel_size": expert_tensor_size(settings),
        }
    recompute: dict[str, Any] = {}
    if trains and settings.recompute_granularity is not None:
        recompute = {
            "recompute_granularity": settings.recompute_granularity,
            "recompute_method": settings.recompute_method,
            "recompute_num_layers": settings.recompute_num_layers,
        }
    heads = hf_config.num_attention_heads
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=hf_config.model_type == "qwen2",
        qk_layernorm=hf_config.model_type.startswith("qwen3"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline_model_parallel_size,
        sequence_parallel=settings.sequence_parallel,
        # Rows differ in length.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # A loss is a sum with weights of its own: nothing is to be divided by what Megatron-core counts.
        calculate_per_token_loss=True,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        **mixture,
        **recompute,
    )


def inverse_frequencies(hf_config: Any) -> Tensor:
    """Return the rotary embedding's frequencies ``[D / 2]``, as transformers computes them."""
    parameters = hf_config.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, torch.device("cpu"))[0]
    width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
