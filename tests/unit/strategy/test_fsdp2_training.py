"""What FSDP2's settings are allowed to change: time and memory, and nothing else. With one rank, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from roll_opd.algorithms.loss import Loss
from roll_opd.algorithms.projection import Head
from roll_opd.distributed.strategy import sharded_trainer
from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.fsdp2_value import FSDP2ValueStrategy
from roll_opd.errors import ModelError
from roll_opd.pipeline.batching import micro_batches
from roll_opd.trajectory import PackedBatch

pytestmark = pytest.mark.usefixtures("process_group")
CPU = torch.device("cpu")


@pytest.fixture
def load(fsdp2_config, vocabulary, random_model) -> Callable[..., FSDP2Strategy]:
    def build(path: str = random_model, **settings) -> FSDP2Strategy:
        config = fsdp2_config(path, **settings)
        return FSDP2Strategy("student_train", config, vocabulary, CPU, max_grad_norm=1.0, total_updates=5)

    return build


def step(strategy, items) -> dict[str, float]:
    (rows,) = micro_batches(items, strategy.config, 1, "token-mean", 64)
    return strategy.train_step(rows, Loss())


def weights(strategy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in strategy.trainer.full_parameters(strategy.model)}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def two_steps(process_group, fsdp2_config, vocabulary, random_model, trained_items):
    """Metrics and weights after two steps with the plainest settings."""
    config = fsdp2_config(random_model)
    strategy = FSDP2Strategy("student_train", config, vocabulary, CPU, max_grad_norm=1.0, total_updates=5)
    return [step(strategy, trained_items) for _ in range(2)], weights(strategy)


def test_the_gradients_norm_is_that_of_all_its_parts(load, trained_items, monkeypatch) -> None:
    norms = []
    for numbers in (7, 100, 2**20):
        monkeypatch.setattr(sharded_trainer, "_NORM_NUMBERS", numbers)
        norms.append(step(load(), trained_items[:2])["grad_norm"])
    np.testing.assert_allclose(norms, norms[-1], rtol=1e-12)
    assert norms[0] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"disable_gradient_checkpointing": False}},
        {"fsdp2": {"reshard_after_forward": False}},
        {"fsdp2": {"offload_policy": True}},
        {"fsdp2": {"offload_policy": True}, "model": {"disable_gradient_checkpointing": False}},
    ],
    ids=["gradient checkpointing", "no resharding", "offload policy", "offload policy and checkpointing"],
)
def test_memory_settings_change_no_bit(load, trained_items, two_steps, settings) -> None:
    strategy = load(**settings)
    metrics = [step(strategy, trained_items) for _ in range(2)]
    assert metrics == two_steps[0]
    assert_equal(weights(strategy), two_steps[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_with_a_mask_for_the_row_trains_alike(load, trained_items, two_steps, attention) -> None:
    strategy = load(model={"attn_implementation": attention})
    assert not strategy.model.packs and strategy.model.lm.config._attn_implementation == attention
    for ours, theirs in zip([step(strategy, trained_items) for _ in range(2)], two_steps[0], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("model", [{}, {"lora_target": "all-linear"}], ids=["whole", "adapters on a frozen embedding"])
def test_gradient_checkpointing_recomputes(load, trained_items, model) -> None:
    calls = {True: 0, False: 0}
    for off in calls:
        strategy = load(model=model | {"disable_gradient_checkpointing": off})

        def count(*_, off=off) -> None:
            calls[off] += 1

        strategy.model.lm.model.layers[0].mlp.register_forward_pre_hook(count)
        assert step(strategy, trained_items[:3])["grad_norm"] > 0
    assert calls == {True: 1, False: 2}


def test_bf16_computes_in_bf16_and_keeps_fp32(load, trained_items, sequences) -> None:
    coarse, fine = load(model={"dtype": "bf16"}), load()
    seen = set()
    coarse.model.lm.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    for a, b in zip(coarse.score(sequences), fine.score(sequences), strict=True):
        assert 0 < np.abs(a.logprobs - b.logprobs).max() < 0.5
    assert seen == {torch.bfloat16}
    ours, theirs = step(coarse, trained_items), step(fine, trained_items)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    parameters = list(coarse.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {v.dtype for state in coarse.trainer.optimizer.state.values() for v in state.values()} == {torch.float32}


def test_logits_in_fp32_are_not_rounded(load, sequences) -> None:
    """With bf16 around it, the head alone in fp32: its logits are no bf16 numbers."""
    rounded, exact = (load(model={"dtype": "bf16"}, logits_in_fp32=on) for on in (False, True))
    heads = [s.model.head().weight_VH.dtype for s in (rounded, exact)]
    assert heads == [torch.float32, torch.float32]  # the shards; they are cast where they are gathered
    fine = load().score(sequences)
    worst = [
        max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(s.score(sequences), fine, strict=True))
        for s in (rounded, exact)
    ]
    seen: list[torch.dtype] = []

    def apply(hidden, head, targets):
        seen.extend((hidden.dtype, head.weight_VH.dtype))
        return hidden

    batch = PackedBatch.pack([sequences[1].tokens], [sequences[1].response_mask])
    with torch.no_grad():
        rounded.model.at_sampled_tokens(batch, apply)
        exact.model.at_sampled_tokens(batch, apply)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert worst[0] != worst[1]


def test_frozen_modules_stay_as_they_were(load, trained_items) -> None:
    strategy = load(model={"freeze_module_prefix": "model.embed_tokens, model.layers.0"})
    before = weights(strategy)
    metrics = step(strategy, trained_items)
    after = weights(strategy)
    assert metrics["grad_norm"] > 0
    for name, tensor in before.items():
        frozen = name.startswith(("lm.model.embed_tokens", "lm.model.layers.0."))
        assert torch.equal(tensor, after[name]) == frozen, name
    with pytest.raises(ModelError, match=r"student_train\.model_args\.freeze_module_prefix.*'visual'"):
        load(model={"freeze_module_prefix": "visual"})
    with pytest.raises(ModelError, match=r"freeze_module_prefix.*nothing is left"):
        load(model={"freeze_module_prefix": "model,lm_head"})


# ---- leaving the device --------------------------------------------------------------------------------------------


def memory(strategy) -> int:
    """Bytes under parameters, buffers, gradients and the optimizer's state."""
    trainer = strategy.trainer
    parameters = list(trainer.model.parameters())
    tensors = [*parameters, *trainer.model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    tensors += [v for state in trainer.optimizer.state.values() for v in state.values()]
    locals_ = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in locals_) if s.nbytes()}.values())


def test_on_a_cpu_nothing_leaves(load, trained_items) -> None:
    strategy = load()
    step(strategy, trained_items)
    there = memory(strategy)
    strategy.offload()
    assert memory(strategy) == there
    strategy.onload()


@pytest.mark.parametrize("settings", [{}, {"model": {"lora_target": "all-linear"}}], ids=["whole", "adapters"])
def test_a_trainer_goes_on_where_it_left(load, trained_items, sequences, settings) -> None:
    """The same movements as on a GPU, made on the CPU by hand."""
    stayed, moved = load(**settings), load(**settings)
    trainer = moved.trainer
    there = memory(moved)
    trainer._leave(False)
    trainer._leave(False)
    assert memory(moved) == 0
    with pytest.raises(AssertionError, match="left its device"):
        moved.score(sequences)
    trainer._come_back(False)
    trainer._come_back(False)
    assert memory(moved) == there
    assert step(moved, trained_items) == step(stayed, trained_items)
    # Now there is state of the optimizer too.
    there = memory(moved)
    trainer._leave(False)
    assert memory(moved) == 0
    trainer._come_back(True)  # what a weight update needs
    assert 0 < memory(moved) < there
    assert_equal(weights(moved), weights(stayed))
    with pytest.raises(AssertionError, match="left its device"):
        step(moved, trained_items)
    trainer._leave(True)  # nothing more to do
    trainer._come_back(False)
    assert memory(moved) == there
    assert step(moved, trained_items) == step(stayed, trained_items)
    assert_equal(weights(moved), weights(stayed))


def test_a_teachers_head_leaves_with_the_trainer(load) -> None:
    strategy = load()
    weight = torch.randn(305, 12)
    # A copy, as it would be on a device: memory that came from numpy is not torch's to free.
    strategy._teacher_heads["t"] = Head(weight.clone())
    strategy.trainer._leave(True)
    assert strategy._teacher_heads["t"].weight_VH.untyped_storage().nbytes() == 0
    strategy.trainer._come_back(False)
    assert torch.equal(strategy._teacher_heads["t"].weight_VH, weight)


def test_a_critic_goes_on_where_it_left(fsdp2_config, vocabulary, random_model, sequences) -> None:
    config = fsdp2_config(random_model)
    critic = FSDP2ValueStrategy("critic", config, vocabulary, CPU, max_grad_norm=0.0, total_updates=5)
    before = critic.values(sequences)
    critic.trainer._leave(False)
    assert memory(critic) == 0
    critic.trainer._come_back(False)
    for one, other in zip(before, critic.values(sequences), strict=True):
        assert (one == other).all()
    critic.offload()
    critic.onload()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"fsdp2": {"offload_policy": True}}, {"model": {"freeze_module_prefix": "model.embed_tokens"}}],
    ids=["plain", "offload policy", "frozen part"],
)
def test_a_checkpoint_goes_on_exactly(load, trained_items, tmp_path: Path, settings) -> None:
    whole, resumed = load(**settings), load(**settings)
    step(whole, trained_items)
    whole.save(str(tmp_path))
    resumed.load(str(tmp_path))
    assert step(whole, trained_items) == step(resumed, trained_items)
    assert_equal(weights(whole), weights(resumed))
