"""Which rows of Hugging Face's tensors make up Megatron-core's, and which models, layouts and files are refused.

What needs ranks is in ``tests/integration/test_megatron_model.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.megatron.bridge import Run, WeightBridge
from roll_opd.distributed.strategy.megatron.model import check_sizes, read_config, transformer_config
from roll_opd.errors import ConfigError, ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
QWEN3 = Qwen3Config(**SIZES)
MOE = Qwen3MoeConfig(**SIZES, **EXPERTS)


def bridge_of(config: Any, world_size: int, **settings: Any) -> WeightBridge:
    layout = MegatronSettings(**settings)
    ours = transformer_config(config, layout, torch.device("cpu"), torch.float32, trains=True)
    return WeightBridge(config, ours, layout, world_size)


def rows(runs: tuple[Run, ...], stem: str) -> list[tuple[str | None, int, int]]:
    return [(run.name and run.name.removeprefix(stem), run.start, run.length) for run in runs]


class TestRecipes:
    def test_queries_keys_and_values_are_laid_group_by_group(self):
        """4 heads of width 3 in 2 groups: the two heads of a group, then its key, then its value."""
        recipe = bridge_of(QWEN3, 1).recipes["decoder.layers.1.self_attention.linear_qkv.weight"]
        assert rows(recipe.runs, "model.layers.1.self_attn.") == [
            ("q_proj.weight", 0, 6), ("k_proj.weight", 0, 3), ("v_proj.weight", 0, 3),
            ("q_proj.weight", 6, 6), ("k_proj.weight", 3, 3), ("v_proj.weight", 3, 3),
        ]  # fmt: skip
        assert recipe.part == (24, 8)

    def test_each_tensor_parallel_rank_gets_its_rows_of_gate_above_its_rows_of_up(self):
        recipe = bridge_of(QWEN3, 2, tensor_model_parallel_size=2).recipes["decoder.layers.0.mlp.linear_fc1.weight"]
        assert rows(recipe.runs, "model.layers.0.mlp.") == [
            ("gate_proj.weight", 0, 6), ("up_proj.weight", 0, 6), ("gate_proj.weight", 6, 6), ("up_proj.weight", 6, 6),
        ]  # fmt: skip
        assert recipe.part == (12, 8) and recipe.holders == (0, 1)

    def test_the_vocabulary_is_filled_up_until_it_divides(self):
        bridge = bridge_of(QWEN3, 4, tensor_model_parallel_size=4)
        assert bridge.padded_vocab_size == 12
        assert bridge.recipes["output_layer.weight"].runs == (Run("lm_head.weight", 0, 11), Run(None, 0, 1))

    def test_a_tied_head_is_a_copy_of_the_embedding_on_the_last_stage_only(self):
        tied = Qwen3Config(**SIZES, tie_word_embeddings=True)
        assert "output_layer.weight" not in bridge_of(tied, 1).recipes
        bridge = bridge_of(tied, 2, pipeline_model_parallel_size=2)
        assert bridge.recipes["output_layer.weight"].runs[0].name == "model.embed_tokens.weight"
        assert bridge.aliases == {"model.embed_tokens.weight": ["lm_head.weight"]}
        assert bridge_of(QWEN3, 1).aliases == {}

    def test_interleaved_stages_hold_layers_in_turn(self):
        """4 layers, 2 stages, 2 parts each: stage 0 has the layers 0 and 2."""
        bridge = bridge_of(QWEN3, 2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        stages = [bridge.recipes[f"decoder.layers.{i}.input_layernorm.weight"].holders for i in range(4)]
        assert stages == [(0,), (1,), (0,), (1,)]

    def test_experts_are_on_ranks_of_their_own(self):
        """2 stages of 4 ranks, tensor 2 x data 2; experts on 4 ranks, whole: rank 2 of a stage has expert 2."""
        bridge = bridge_of(
            MOE, 8, tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2,
            expert_model_parallel_size=4,
        )  # fmt: skip
        recipe = bridge.recipes["decoder.layers.3.mlp.experts.local_experts.2.linear_fc2.weight"]
        assert recipe.holders == (6,) and recipe.part == (8, 6)
        assert bridge.recipes["decoder.layers.3.self_attention.linear_proj.weight"].holders == (4, 5)

    def test_without_expert_parallelism_an_expert_is_split_like_any_matrix(self):
        bridge = bridge_of(MOE, 2, tensor_model_parallel_size=2, sequence_parallel=True)
        recipe = bridge.recipes["decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight"]
        assert recipe.holders == (0, 1) and recipe.part == (8, 3)


def moe(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES, **EXPERTS | changes)


REFUSED_SIZES: list[tuple[Any, dict[str, Any], str, str]] = [
    (QWEN3, {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size", "4 attention heads"),
    (Qwen3Config(**SIZES | {"num_attention_heads": 12, "num_key_value_heads": 3}), {"tensor_model_parallel_size": 2},
     "tensor_model_parallel_size", "3 key-value heads"),
    (Qwen3Config(**SIZES | {"intermediate_size": 13}), {"tensor_model_parallel_size": 2},
     "tensor_model_parallel_size", "13 rows"),
    (QWEN3, {"pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size", "4 layers"),
    (QWEN3, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
     "virtual_pipeline_model_parallel_size", "4 layers"),
    (QWEN3, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
     "virtual_pipeline_model_parallel_size", "at least 3"),
    (QWEN3, {"expert_model_parallel_size": 2}, "expert_model_parallel_size", "no experts"),
    (MOE, {"expert_model_parallel_size": 3}, "expert_model_parallel_size", "4 experts"),
    (MOE, {"tensor_model_parallel_size": 2}, "sequence_parallel", "must be true"),
    (moe(moe_intermediate_size=7), {"tensor_model_parallel_size": 2, "sequence_parallel": True},
     "tensor_model_parallel_size", "7 rows"),
    (MOE, {"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type", "alltoall"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "settings", "field", "words"), REFUSED_SIZES)
def test_a_layout_that_does_not_divide_the_model_is_refused_by_the_setting(config, settings, field, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_sizes(config, MegatronSettings(**settings), "student_train")
    assert f"student_train.strategy_args.strategy_config.{field}" in str(caught.value)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
REFUSED_MODELS: list[tuple[Any, str]] = [
    (GPT2Config(), "'gpt2'"),
    (Qwen3Config(**SIZES, hidden_act="gelu"), "activation"),
    (Qwen2Config(vocab_size=11, num_hidden_layers=2, use_sliding_window=True, max_window_layers=1), "sliding-window"),
    (Qwen3Config(**SIZES, attention_bias=True), "biases"),
    (LlamaConfig(**SIZES, mlp_bias=True), "biases"),
    (Qwen3Config(**SIZES, rope_parameters=YARN), "'yarn'"),
    (moe(mlp_only_layers=[1]), "dense layers"),
    (moe(decoder_sparse_step=2), "dense layers"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED_MODELS)
def test_a_model_that_would_be_computed_otherwise_than_by_transformers_is_refused(config, words, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        read_config(ModelArguments(str(tmp_path)), "teacher")
    assert "teacher.model_args.model_name_or_path" in str(caught.value)


class _Norm(torch.nn.Module):
    """A chunk of nothing but the final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.final_layernorm = torch.nn.RMSNorm(8)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A checkpoint with all tensors of the model."""
        tensors = {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
            for i, (name, shape) in enumerate(bridge_of(QWEN3, 1).shapes.items())
        }
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    def read(self, folder: Path) -> torch.Tensor:
        chunk = _Norm()
        bridge_of(QWEN3, 1).read([chunk], str(folder), "student_train.model_args.model_name_or_path")
        return chunk.decoder.final_layernorm.weight.data

    def change(self, folder: Path, **changes: torch.Tensor | None) -> None:
        tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")

    def test_a_rank_reads_its_part(self, folder):
        assert torch.equal(self.read(folder), load_file(folder / "model.safetensors")["model.norm.weight"])

    def test_several_files_are_found_by_their_index(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert torch.equal(self.read(folder), tensors["model.norm.weight"])

    def test_a_tensor_that_is_not_there_is_named(self, folder):
        self.change(folder, model__layers__2__mlp__up_proj__weight=None)
        with pytest.raises(ModelError, match=r"lack 1 tensor.*model\.layers\.2\.mlp\.up_proj\.weight"):
            self.read(folder)

    def test_a_tensor_that_the_model_would_ignore_is_named(self, folder):
        """Such as the scale of a quantised matrix, or a bias that the config denies."""
        self.change(folder, model__layers__0__mlp__up_proj__bias=torch.zeros(12))
        with pytest.raises(ModelError, match=r"1 tensor.*no use for.*up_proj\.bias"):
            self.read(folder)

    def test_a_tensor_of_another_shape_is_named(self, folder):
        self.change(folder, model__norm__weight=torch.ones(9))
        with pytest.raises(ModelError, match=r"model\.norm\.weight.*\(9,\).*\(8,\)"):
            self.read(folder)

    def test_a_folder_without_safetensors_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="safetensors only"):
            self.read(tmp_path)

    @pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
    def test_damaged_files_are_refused(self, folder, file):
        (folder / file).write_bytes(b"{ not")
        with pytest.raises(ModelError, match=r"student_train\.model_args"):
            self.read(folder)

    def test_a_weight_update_with_an_unknown_tensor_is_refused(self, folder):
        with pytest.raises(ModelError, match=r"lm_head\.bias"):
            bridge_of(QWEN3, 1).put([_Norm()], [("lm_head.bias", torch.zeros(11))])
