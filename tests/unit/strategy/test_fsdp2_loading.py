"""Reading a checkpoint by shards gives what transformers reads, bit for bit, or the same refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
from roll_opd.distributed.strategy.pretrained import Checkpoint
from roll_opd.errors import ModelError

pytestmark = pytest.mark.usefixtures("process_group")
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def load(fsdp2_config, vocabulary):
    def build(path: str | Path, **settings) -> FSDP2Strategy:
        config = fsdp2_config(str(path), **settings)
        return FSDP2Strategy("student_train", config, vocabulary, CPU, max_grad_norm=1.0, total_updates=5)

    return build


@pytest.fixture
def never_whole(monkeypatch) -> None:
    def refuse(self) -> None:
        raise AssertionError("a rank read the whole model")

    monkeypatch.setattr(Checkpoint, "load", refuse)


def saved(folder: Path, model_cls, config, **options) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model_cls(config).float().save_pretrained(folder, **options)
    return folder


def assert_same_weights(strategy, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    held = dict(strategy.model.lm.named_parameters(remove_duplicate=False))
    for name, parameter in expected.named_parameters(remove_duplicate=False):
        assert held[name].dtype == dtype
        assert torch.equal(held[name].full_tensor(), parameter), name
    buffers = dict(strategy.model.lm.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("which", ["tied", "untied with padding"])
def test_shards_are_read_as_transformers_reads_the_whole(load, tiny_models, random_model, never_whole, which) -> None:
    path = tiny_models.student if which == "tied" else random_model
    strategy = load(path)
    assert_same_weights(strategy, path)
    lm = strategy.model.lm
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == (which == "tied")
    assert lm.generation_config.to_dict() == AutoModelForCausalLM.from_pretrained(path).generation_config.to_dict()


def test_a_scorer_rounds_once(fsdp2_config, vocabulary, random_model, never_whole) -> None:
    config = fsdp2_config(random_model, model={"dtype": "bf16"})
    assert_same_weights(FSDP2InferStrategy("teacher", config, vocabulary, CPU), random_model, torch.bfloat16)


def test_a_checkpoint_of_several_files(load, tmp_path: Path, never_whole) -> None:
    folder = saved(tmp_path, Qwen3ForCausalLM, Qwen3Config(**SMALL), max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_weights(load(folder), folder)


def test_a_checkpoint_without_the_prefix_of_the_base_model(load, tmp_path: Path, never_whole) -> None:
    """As a critic's backbone is written: the names of the inner model, here with tied embeddings."""
    folder = saved(tmp_path, Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=True))
    state = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(folder), folder)


def test_what_transformers_converts_is_sent_from_rank_0(load, tmp_path: Path) -> None:
    """The experts of a mixture are one tensor each in the files and one tensor together in the model."""
    config = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    folder = saved(tmp_path, Qwen3MoeForCausalLM, config)
    names = set(load_file(folder / "model.safetensors"))
    assert any("experts.3." in name for name in names)
    strategy = load(folder)
    assert_same_weights(strategy, folder)
    strategy.export_hf(str(folder / "again"))
    assert set(load_file(folder / "again" / "model.safetensors")) == names
    assert_same_weights(strategy, folder / "again")


@pytest.mark.parametrize("damage", ["missing", "mismatched", "cut", "no weights", "garbage"])
def test_a_damaged_checkpoint_is_refused(load, tmp_path: Path, random_model, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    match damage:
        case "missing":
            del state[name]
        case "mismatched":
            state[name] = state[name][:-1].clone()
    save_file(state, file, metadata={"format": "pt"})
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        case "no weights":
            file.unlink()
        case "garbage":
            file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match=r"student_train\.model_args\.model_name_or_path") as caught:
        load(folder)
    assert (name in str(caught.value)) == (damage in ("missing", "mismatched"))
    assert "\n" not in str(caught.value)


def test_a_model_that_we_would_compute_wrongly_is_refused_once_it_is_sharded(load, tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=8.0)
    saved(tmp_path, GraniteForCausalLM, config)
    with pytest.raises(ModelError, match=r"GraniteForCausalLM.*not supported"):
        load(tmp_path)


def test_entries_of_the_config_are_replaced(load, random_model) -> None:
    plain = AutoModelForCausalLM.from_pretrained(random_model)
    longer = load(random_model, model={"model_config_kwargs": {"max_position_embeddings": 777, "rms_norm_eps": 1e-3}})
    config = longer.model.lm.config
    assert (config.max_position_embeddings, config.rms_norm_eps) == (777, 1e-3)
    assert plain.config.max_position_embeddings == 512
    assert longer.model.lm.model.norm.variance_epsilon == 1e-3
    with pytest.raises(ModelError, match=r"student_train\.model_args\.model_config_kwargs.*no rms_norm_epsilon"):
        load(random_model, model={"model_config_kwargs": {"rms_norm_epsilon": 1e-3}})


def test_dropout_is_off_in_training(load, random_model, tmp_path: Path, sequences) -> None:
    folder = tmp_path / "dropout"
    shutil.copytree(random_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    dropped, plain = load(folder).score(sequences), load(random_model).score(sequences)
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(dropped, plain, strict=True))
