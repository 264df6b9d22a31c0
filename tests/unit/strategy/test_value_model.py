"""The critic's model and its training, in this process: packed equals one by one, gradients equal autograd's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Gemma2Config, Gemma2Model, Qwen3Config, Qwen3ForSequenceClassification

from roll_opd.configs import ModelArguments, TrainingArguments, WorkerConfig
from roll_opd.distributed.strategy.fsdp2_value import FSDP2ValueStrategy
from roll_opd.distributed.strategy.value_model import HEAD_FILE, load_value_model
from roll_opd.errors import ModelError
from roll_opd.pipeline.batching import micro_batches
from roll_opd.trajectory import PackedBatch, Trajectory

CPU = torch.device("cpu")


@pytest.fixture
def with_head(random_model, tmp_path: Path) -> str:
    """The random model with a value head of weights that are not 0, under the name that sequence classifiers give."""
    folder = tmp_path / "with_head"
    shutil.copytree(random_model, folder)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_file({"score.weight": weight}, folder / "extra.safetensors")
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def critic(
    path: str, vocabulary, *, rate: float = 1.0, total: int = 10, optimizer: str = "sgd",
    schedule: str = "constant", **settings,
) -> FSDP2ValueStrategy:  # fmt: skip
    config = WorkerConfig(
        model_args=ModelArguments(path, dtype="fp32", disable_gradient_checkpointing=True),
        training_args=TrainingArguments(
            optimizer=optimizer, learning_rate=rate, lr_scheduler_type=schedule, per_device_train_batch_size=3
        ),
        **settings,
    )
    return FSDP2ValueStrategy("critic", config, vocabulary, CPU, max_grad_norm=0.0, total_updates=total)


def plain_values(path: str, tokens: np.ndarray, head: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """All values of one sequence, ``[T]``, as transformers and one matrix product give them; entry t reads state t."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    hidden = model(torch.from_numpy(tokens.astype(np.int64))[None]).last_hidden_state[0]
    return model, hidden @ head


def trained_items(sequences, values: list[np.ndarray]) -> list[Trajectory]:
    rng = np.random.default_rng(4)
    return [
        Trajectory(
            id=r.id,
            tag="",
            tokens=r.tokens,
            response_mask=r.response_mask,
            infer_logprobs=np.zeros(len(r.tokens), np.float32),
            weight_version=np.zeros(len(r.tokens), np.int32),
            values=v,
            returns=rng.normal(size=len(r.tokens)).astype(np.float32),
        )
        for r, v in zip(sequences, values, strict=True)
    ]


def test_a_value_speaks_about_the_state_before_its_token(with_head, vocabulary, sequences) -> None:
    """By hand: state t - 1 of the plain model, times the head, is the value of token t; elsewhere it is 0."""
    strategy = critic(with_head, vocabulary)
    head = load_file(Path(with_head) / "extra.safetensors")["score.weight"][0]
    for request, values in zip(sequences, strategy.values(sequences), strict=True):
        with torch.no_grad():
            _, plain = plain_values(with_head, request.tokens, head)
        expected = np.where(request.response_mask, np.concatenate([[0], plain.numpy()[:-1]]), 0)
        np.testing.assert_allclose(values, expected, atol=2e-4)
        assert np.abs(values[request.response_mask]).max() > 0.05


def test_the_token_itself_and_what_follows_do_not_enter(with_head, vocabulary, sequences) -> None:
    strategy, request = critic(with_head, vocabulary), sequences[1]
    (before,) = strategy.values([request])
    changed = request.tokens.copy()
    changed[20] = (changed[20] + 7) % 300
    (after,) = strategy.values([replace(request, tokens=changed)])
    assert (before[:21] == after[:21]).all() and request.response_mask[21]
    assert abs(before[21] - after[21]) > 1e-3


@pytest.mark.parametrize("rows", ["one by one", "all in one row", "by tokens"])
def test_rows_do_not_change_values(with_head, vocabulary, sequences, rows) -> None:
    if rows == "by tokens":
        packing = {"max_packed_sequence_length_forward": 50}
        strategy = critic(with_head, vocabulary, use_sequence_packing=True)
        strategy.trainer.config = replace(
            strategy.config, sequence_packing_args=replace(strategy.config.sequence_packing_args, **packing)
        )
    else:
        strategy = critic(with_head, vocabulary, infer_batch_size=1 if rows == "one by one" else 99)
    with torch.no_grad():
        for request, values in zip(sequences, strategy.values(sequences), strict=True):
            alone, at = strategy.model.values(PackedBatch.pack([request.tokens], [request.response_mask]))
            np.testing.assert_allclose(values[at], alone.numpy(), atol=2e-5)


def test_a_new_head_says_zero_every_time(random_model, tiny_models, vocabulary, sequences) -> None:
    for path in (random_model, tiny_models.student):
        assert all((v == 0).all() for v in critic(path, vocabulary).values(sequences))


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("rows", [1, 3, 99])
def test_gradient_equals_autograd_of_a_plain_critic(with_head, vocabulary, sequences, rows, clip) -> None:
    """With SGD at rate 1, old - new weights are the gradient of ``mean_t 0.5 max((v - R)^2, (clip(v) - R)^2)``."""
    strategy = critic(with_head, vocabulary)
    values = strategy.values(sequences)
    if clip is not None:  # far enough from the trained values that some of them are cut
        noise = np.random.default_rng(9)
        values = [(v + noise.normal(0, 0.5, len(v))).astype(np.float32) for v in values]
    items = trained_items(sequences, values)

    head = load_file(Path(with_head) / "extra.safetensors")["score.weight"][0].clone().requires_grad_()
    reference = AutoModel.from_pretrained(with_head, dtype=torch.float32, attn_implementation="eager")
    total, count, num_clipped = torch.zeros(()), 0, 0
    for item in items:
        hidden = reference(torch.from_numpy(item.tokens.astype(np.int64))[None]).last_hidden_state[0]
        for t in np.flatnonzero(item.response_mask):
            v, old, target = hidden[t - 1] @ head, float(item.values[t]), float(item.returns[t])
            error = (v - target) ** 2
            if clip is not None:
                near = v.clamp(old - clip, old + clip)
                num_clipped += bool((near - target) ** 2 > error)
                error = torch.maximum(error, (near - target) ** 2)
            total, count = total + 0.5 * error, count + 1
    (total / count).backward()
    assert (num_clipped > 3) == (clip is not None)

    config = replace(strategy.config, training_args=TrainingArguments(per_device_train_batch_size=rows))
    before = dict(strategy.trainer.full_parameters(strategy.model))
    before = {name: tensor.clone() for name, tensor in before.items()}
    metrics = strategy.train_step(micro_batches(items, config, 1, "token-mean", 64)[0], clip)
    after = dict(strategy.trainer.full_parameters(strategy.model))
    assert metrics["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert metrics["sum/tokens"] == count and metrics["sum/clipped"] == num_clipped

    expected = {f"packed.lm.{name}": p.grad for name, p in reference.named_parameters()}
    expected["value_head.weight"] = head.grad[None]
    assert set(expected) | {"value_head.bias"} == set(after)
    square = 0.0
    for name, gradient in expected.items():
        difference = before[name] - after[name] - gradient
        assert difference.norm() <= 1e-3 * gradient.norm() + 1e-6, name
        square += float(gradient.double().square().sum())
    bias = float(before["value_head.bias"] - after["value_head.bias"])
    assert metrics["grad_norm"] == pytest.approx((square + bias**2) ** 0.5, rel=1e-4)


def test_save_and_load_go_on_exactly(with_head, vocabulary, sequences, tmp_path: Path) -> None:
    one = critic(with_head, vocabulary, rate=0.05)
    items = trained_items(sequences, one.values(sequences))
    batches = micro_batches(items, one.config, 1, "token-mean", 64)[0]
    one.train_step(batches, None)
    (tmp_path / "critic").mkdir()
    one.save(str(tmp_path / "critic"))
    two = critic(with_head, vocabulary, rate=0.05)
    two.load(str(tmp_path / "critic"))
    assert two.trainer.scheduler.last_epoch == 1
    assert one.train_step(batches, None) == two.train_step(batches, None)
    for a, b in zip(one.values(sequences), two.values(sequences), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_before_the_first_update_changes_nothing(
    with_head, vocabulary, sequences, tmp_path: Path, optimizer
) -> None:
    """As while a critic warms up. The run that goes on, and the one that is resumed, equal the run that saves nothing.

    Adam's first step is ``rate * g / |g|``. Behind a step with zero gradient it is
    ``(0.1 / 0.19) / sqrt(0.001 / 0.001999)`` = 0.74 of that: a step too many shows.
    """
    folder = str(tmp_path / "critic")
    (tmp_path / "critic").mkdir()

    def begin() -> FSDP2ValueStrategy:
        return critic(with_head, vocabulary, rate=0.01, optimizer=optimizer, schedule="linear")

    straight, saving, resumed = begin(), begin(), begin()
    items = trained_items(sequences, straight.values(sequences))
    batches = micro_batches(items, straight.config, 1, "token-mean", 64)[0]
    start = weights_of(straight)
    saving.save(folder)
    assert not saving.trainer.optimizer.state
    # What is loaded counts, not what the trainer has done before.
    resumed.train_step(batches, None)
    resumed.load(folder)
    assert not resumed.trainer.optimizer.state
    for step in range(2):
        metrics = [strategy.train_step(batches, None) for strategy in (straight, saving, resumed)]
        assert metrics[0] == metrics[1] == metrics[2]
        expected = weights_of(straight)
        assert any(not torch.equal(start[name], expected[name]) for name in start)
        for strategy in (saving, resumed):
            for name, weight in weights_of(strategy).items():
                assert torch.equal(weight, expected[name]), (step, name)
    # A checkpoint after an update still brings the optimizer's state along.
    (tmp_path / "later").mkdir()
    folder = str(tmp_path / "later")
    saving.save(folder)
    again = begin()
    again.load(folder)
    assert bool(again.trainer.optimizer.state) == (optimizer == "adamw")
    assert again.train_step(batches, None) == straight.train_step(batches, None)
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, weights_of(straight)[name]), name


def weights_of(strategy: FSDP2ValueStrategy) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in strategy.trainer.full_parameters(strategy.model)}


def test_what_is_exported_is_loaded_again(with_head, vocabulary, sequences, tmp_path: Path) -> None:
    """Ours wins over the head that came with the folder: the export lies in a copy of it."""
    strategy = critic(with_head, vocabulary, rate=0.05)
    items = trained_items(sequences, strategy.values(sequences))
    strategy.train_step(micro_batches(items, strategy.config, 1, "token-mean", 64)[0], None)
    shutil.copytree(with_head, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    strategy.export_hf(str(tmp_path / "out"))
    assert (tmp_path / "out" / HEAD_FILE).is_file()
    for a, b in zip(
        strategy.values(sequences), critic(str(tmp_path / "out"), vocabulary).values(sequences), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def classifier(folder: Path, labels: int) -> str:
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, pad_token_id=0, num_labels=labels,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        Qwen3ForSequenceClassification(config).float().save_pretrained(folder)
    return str(folder)


def test_a_reward_model_brings_its_head(tmp_path: Path) -> None:
    """It has no language-model head, and its weights carry a prefix."""
    path = classifier(tmp_path / "reward", 1)
    model = load_value_model(ModelArguments(path), role="critic", vocab_size=305, device=CPU)
    files = load_file(Path(path) / "model.safetensors")
    assert torch.equal(model.value_head.weight, files["score.weight"])
    assert torch.equal(model.backbone.embed_tokens.weight, files["model.embed_tokens.weight"])


def test_models_that_cannot_be_a_critic_are_refused(tmp_path: Path, tiny_models, random_model) -> None:
    def load(path: str, vocab_size: int = 305) -> None:
        load_value_model(ModelArguments(path), role="critic", vocab_size=vocab_size, device=CPU)

    with pytest.raises(ModelError, match=r"critic\.model_args.*score\.weight has shape \[3, 32\]"):
        load(classifier(tmp_path / "classes", 3))
    with pytest.raises(ModelError, match=r"embeds 320 tokens, the student's tokenizer has 400"):
        load(random_model, 400)
    with pytest.raises(ModelError, match=r"critic\.model_args\.model_name_or_path.*no such folder"):
        load(str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(random_model, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensor\(s\) of the model.*norm\.weight"):
        load(str(broken))


def test_a_family_with_bounded_attention_scores_has_its_own_attention(tmp_path: Path) -> None:
    """Gemma 2, and no sliding window that would keep our attention away."""
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, attn_logit_softcapping=0.5,
        layer_types=["full_attention"] * 2, query_pre_attn_scalar=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        Gemma2Model(config).float().save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path))
    model = load_value_model(args, role="critic", vocab_size=305, device=CPU)
    ours, own = model.ours_and_own()
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"critic\.model_args\.attn_implementation.*'sdpa' would ignore.*eager"):
        load_value_model(replace(args, attn_implementation="sdpa"), role="critic", vocab_size=305, device=CPU)


def test_the_head_works_in_fp32_under_bf16(with_head, vocabulary, sequences) -> None:
    config = WorkerConfig(model_args=ModelArguments(with_head, dtype="bf16"))
    strategy = FSDP2ValueStrategy("critic", config, vocabulary, CPU, max_grad_norm=1.0, total_updates=1)
    exact = critic(with_head, vocabulary).values(sequences)
    for coarse, fine, request in zip(strategy.values(sequences), exact, sequences, strict=True):
        np.testing.assert_allclose(coarse, fine, atol=0.3)
        if len(coarse) > 5:  # values of a head in bf16 would be bf16 numbers
            values = torch.from_numpy(coarse[request.response_mask])
            assert not torch.equal(values, values.bfloat16().float())
