"""LoRA under FSDP2: what is trained, what leaves, what PEFT makes of it. With one rank, in this process."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from roll_opd.algorithms.loss import Loss
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
from roll_opd.distributed.strategy.fsdp2_value import FSDP2ValueStrategy
from roll_opd.distributed.strategy.lora import Adapters
from roll_opd.errors import ConfigError, ModelError
from roll_opd.pipeline.batching import micro_batches

pytestmark = pytest.mark.usefixtures("process_group")
CPU = torch.device("cpu")
LORA = {"lora_target": "all-linear", "lora_rank": 4, "lora_alpha": 12}


@pytest.fixture
def load(fsdp2_config, vocabulary, random_model) -> Callable[..., FSDP2Strategy]:
    def build(path: str | Path = random_model, training: dict | None = None, **model) -> FSDP2Strategy:
        config = fsdp2_config(str(path), model=LORA | model, training=training)
        return FSDP2Strategy("student_train", config, vocabulary, CPU, max_grad_norm=0.0, total_updates=5)

    return build


def step(strategy, items) -> dict[str, float]:
    (rows,) = micro_batches(items, strategy.config, 1, "token-mean", 64)
    return strategy.train_step(rows, Loss())


def sent(strategy) -> dict[str, torch.Tensor]:
    """What a generator would get."""
    return {name: tensor.clone() for names, tensor in strategy.full_weights(None) for name in names}


def parameters(strategy) -> dict[str, torch.Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in strategy.model.lm.named_parameters()}


def plain(path: str | Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def logprobs(lm, sequence) -> np.ndarray:
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    with torch.no_grad():
        scores = lm(input_ids=tokens[None]).logits[0, :-1, :305].log_softmax(-1)
    out = np.concatenate([[0.0], scores.gather(-1, tokens[1:, None]).squeeze(-1).numpy()])
    return np.where(sequence.response_mask, out, 0.0)


def assert_scores(strategy, lm, sequences, atol: float = 2e-5) -> None:
    for result, sequence in zip(strategy.score(sequences), sequences, strict=True):
        np.testing.assert_allclose(result.logprobs, logprobs(lm, sequence), atol=atol)


def test_it_starts_as_the_model_and_trains_adapters_alone(load, random_model, sequences, trained_items) -> None:
    strategy = load()
    assert_scores(strategy, plain(random_model), sequences)
    before = parameters(strategy)
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapted = {n.split(".lora_A.")[0].rpartition(".")[2] for n in before if ".lora_A." in n}
    assert adapted == set(linear) and sum(".lora_A." in n for n in before) == 2 * len(linear)
    assert sum(p.numel() for g in strategy.trainer.optimizer.param_groups for p in g["params"]) == sum(
        t.numel() for n, t in before.items() if ".lora_" in n
    )
    step(strategy, trained_items)
    step(strategy, trained_items)
    for name, after in parameters(strategy).items():
        assert torch.equal(before[name], after) == (".lora_" not in name), name


def test_the_start_is_the_usual_one_and_the_same_every_time(load) -> None:
    one, other = parameters(load()), parameters(load())
    assert all(torch.equal(one[name], other[name]) for name in one)
    starts = [t for n, t in one.items() if ".lora_A." in n]
    for a in starts:
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert not torch.equal(starts[0], starts[1])
    assert all((t == 0).all() for n, t in one.items() if ".lora_B." in n)


def test_what_leaves_is_merged_and_has_its_plain_names(load, random_model, sequences, trained_items) -> None:
    strategy = load()
    step(strategy, trained_items)
    lm = plain(random_model)
    base = {name: tensor.detach().clone() for name, tensor in lm.named_parameters(remove_duplicate=False)}
    weights = sent(strategy)
    assert weights.keys() == base.keys()
    # By hand: W + alpha / rank * B A.
    held = parameters(strategy)
    layer = "model.layers.1.mlp.down_proj"
    a, b = (held[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
    expected = base[f"{layer}.weight"].double() + 12 / 4 * b @ a
    torch.testing.assert_close(weights[f"{layer}.weight"].double(), expected, atol=1e-7, rtol=1e-6)
    lm.load_state_dict(weights)
    assert_scores(strategy, lm, sequences)
    moved = max(float((weights[n] - base[n]).abs().max()) for n in base)
    assert moved > 1e-4


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("extra", [None, "lm_head, norm"])
def test_export_is_a_model_and_an_adapter(
    load, tiny_models, random_model, sequences, trained_items, tmp_path: Path, which: str, extra: str | None
) -> None:
    """The exported folder, PEFT over the base model, and a trainer that starts from the adapter: one function."""
    path = tiny_models.student if which == "tied" else random_model
    strategy = load(path, additional_target=extra)
    for _ in range(2):
        step(strategy, trained_items)
    strategy.export_hf(str(tmp_path / "out"))
    assert_scores(strategy, plain(tmp_path / "out"), sequences)
    adapter = str(tmp_path / "out" / "adapter")
    assert_scores(strategy, PeftModel.from_pretrained(plain(path), adapter).eval(), sequences)

    again = load(path, adapter_name_or_path=adapter, lora_target=None)
    one, other = parameters(strategy), parameters(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [p.requires_grad for p in strategy.model.parameters()] == [p.requires_grad for p in again.model.parameters()]
    if extra:
        lm = strategy.model.lm
        assert lm.lm_head.weight.requires_grad and lm.model.norm.weight.requires_grad
        assert lm.model.embed_tokens.weight.requires_grad == (which == "tied")
        base = plain(path).state_dict()
        assert not torch.equal(sent(strategy)["lm_head.weight"], base["lm_head.weight"])


def test_an_adapter_of_pefts_is_taken_over(load, random_model, sequences, tmp_path: Path) -> None:
    torch.manual_seed(2)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
    peft = get_peft_model(plain(random_model), LoraConfig(**settings, init_lora_weights=False, use_rslora=True))
    peft.save_pretrained(str(tmp_path))
    strategy = load(adapter_name_or_path=str(tmp_path))
    assert_scores(strategy, peft.eval(), sequences)


def test_a_checkpoint_of_adapters_goes_on_exactly(load, trained_items, tmp_path: Path) -> None:
    whole, resumed = load(additional_target="norm"), load(additional_target="norm")
    step(whole, trained_items)
    whole.save(str(tmp_path))
    written = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert all(".lora_" in name or ".norm." in name or "param_groups" in name for name in written), "frozen weights"
    resumed.load(str(tmp_path))
    assert step(whole, trained_items) == step(resumed, trained_items)
    one, other = parameters(whole), parameters(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_equal_pefts(load, random_model, sequences, trained_items) -> None:
    """With SGD at rate 1, old - new values are the gradient; PEFT's by autograd over its own forward."""
    strategy = load(training={"optimizer": "sgd", "learning_rate": 1.0})
    peft = get_peft_model(plain(random_model), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in strategy.model.lm.named_parameters():
            if ".lora_" in name:
                parameter.to_local().copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                peft.get_parameter(f"base_model.model.{name}").copy_(parameter.full_tensor())
    item = trained_items[1]
    tokens = torch.from_numpy(item.tokens.astype(np.int64))
    scores = peft(input_ids=tokens[None]).logits[0, :-1, :305].log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
    mask = torch.from_numpy(item.response_mask[1:])
    # Ratio 1 at old = now: the gradient of the loss is that of - 0.5 A logprob, averaged over the tokens.
    old = np.concatenate([[0.0], scores.detach().numpy()]).astype(np.float32)
    advantages = torch.from_numpy(item.advantages[1:])
    (-(0.5 * advantages * scores)[mask].mean()).backward()
    before = parameters(strategy)
    step(strategy, [dataclasses.replace(item, old_logprobs=old)])
    after = parameters(strategy)
    for name in before:
        if ".lora_" in name:
            expected = peft.get_parameter(f"base_model.model.{name}").grad
            torch.testing.assert_close(before[name] - after[name], expected, atol=2e-6, rtol=1e-3)


def test_a_critic_has_adapters_too(fsdp2_config, vocabulary, random_model, sequences, tmp_path: Path) -> None:
    config = fsdp2_config(random_model, model=LORA)
    critic = FSDP2ValueStrategy("critic", config, vocabulary, CPU, max_grad_norm=0.0, total_updates=5)
    trained = {name for name, p in critic.model.named_parameters() if p.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < trained and all("head" in n or ".lora_" in n for n in trained)
    with torch.no_grad():
        for name, parameter in critic.model.named_parameters():
            if name.startswith("value_head") or ".lora_B." in name:
                parameter.to_local().normal_(std=0.1)
    critic.export_hf(str(tmp_path))
    again = FSDP2ValueStrategy(
        "critic", fsdp2_config(str(tmp_path)), vocabulary, CPU, max_grad_norm=0.0, total_updates=5
    )
    for one, other in zip(critic.values(sequences), again.values(sequences), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.abs(one).max() > 1e-2


def test_a_scorer_may_have_an_adapter(
    load, fsdp2_config, vocabulary, random_model, sequences, trained_items, tmp_path: Path
) -> None:
    strategy = load()
    step(strategy, trained_items)
    strategy.export_hf(str(tmp_path))
    config = fsdp2_config(random_model, model={"adapter_name_or_path": str(tmp_path / "adapter")})
    scorer = FSDP2InferStrategy("teacher", config, vocabulary, CPU)
    for one, other in zip(strategy.score(sequences), scorer.score(sequences), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"lora_dropout": 0.1}, ConfigError, r"student_train\.model_args\.lora_dropout.*use 0"),
        ({"lora_target": "q_porj"}, ModelError, r"student_train\.model_args\.lora_target.*q_porj"),
        ({"lora_target": "q_proj,lm_head"}, ModelError, r"lora_target.*output projection.*additional_target"),
        ({"lora_target": "embed_tokens"}, ModelError, r"lora_target.*linear layers.*embed_tokens is a Embedding"),
        (
            {"additional_target": "score"},
            ModelError,
            r"student_train\.model_args\.additional_target.*no module 'score'",
        ),
        ({"additional_target": "layers.1.mlp"}, ConfigError, r"additional_target.*'layers\.1\.mlp' has adapters"),
        ({"lora_target": None, "additional_target": "norm"}, ConfigError, r"additional_target.*set lora_target"),
        ({"adapter_name_or_path": "/nowhere/adapter"}, ModelError, r"adapter_name_or_path.*cannot read.*/nowhere"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(load, model, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        load(**model)
    assert "\n" not in str(caught.value)


def test_adapters_that_do_not_fit_are_refused(load, random_model, tmp_path: Path) -> None:
    peft = get_peft_model(plain(random_model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    good = tmp_path / "good"
    peft.save_pretrained(str(good))
    with pytest.raises(ConfigError, match=r"lora_target.*is for q_proj, v_proj; remove this"):
        load(adapter_name_or_path=str(good), lora_target="q_proj")
    for damage in ("missing", "shape", "no file"):
        folder = tmp_path / damage
        shutil.copytree(good, folder)
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        name = sorted(state)[0]
        if damage == "missing":
            del state[name]
        elif damage == "shape":
            state[name] = state[name][:1].clone()
        save_file(state, file)
        if damage == "no file":
            file.unlink()
        with pytest.raises(ModelError, match=r"student_train\.model_args\.adapter_name_or_path"):
            load(adapter_name_or_path=str(folder))
    dora = get_peft_model(plain(random_model), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(ModelError, match="plain LoRA"):
        load(adapter_name_or_path=str(tmp_path / "dora"), lora_target=None)


def test_layers_of_another_kind_are_refused() -> None:
    """GPT-2's layers are convolutions of width 1, whose weights lie the other way round."""
    lm = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(ModelError, match=r"lora_target.*is a Conv1D"):
        Adapters.put_into(lm, ModelArguments("x", lora_target="c_attn"), "student_train")
