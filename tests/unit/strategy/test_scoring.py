"""Packed scoring against one sequence at a time and against a plain transformers forward."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.strategy_args import SequencePackingArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy import attention
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.packed_model import load_model, shifted
from roll_opd.distributed.strategy.scoring import rows_of, score_row
from roll_opd.errors import ModelError
from roll_opd.trajectory import PackedBatch, TrajectoryId

VOCAB = 305


def plain_logprobs(model, tokens: np.ndarray, vocab: int = VOCAB) -> np.ndarray:
    """Log-probability of every token but the first, by the book."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens, dtype=torch.long)[None]).logits[0, :-1, :vocab].float()
    chosen = torch.tensor(tokens[1:], dtype=torch.long)
    values = logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1).numpy()
    return np.concatenate([[0.0], values])


@pytest.mark.parametrize("which", ["student", "random"])
def test_packed_equals_single_equals_transformers(request, which, sequences) -> None:
    strategy = request.getfixturevalue({"student": "student", "random": "random_strategy"}[which])
    plain = request.getfixturevalue(f"plain_{which}")
    packed = strategy.score(sequences)
    for sequence, result in zip(sequences, packed, strict=True):
        (alone,) = strategy.score([sequence])
        expected = np.where(sequence.response_mask, plain_logprobs(plain, sequence.tokens), 0.0)
        assert (result.id, result.checksum) == (sequence.id, sequence.checksum)
        assert result.logprobs.dtype == np.float32
        np.testing.assert_allclose(result.logprobs, alone.logprobs, atol=1e-5, rtol=0)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5, rtol=0)


def test_neighbours_and_their_order_change_nothing(random_strategy, sequences) -> None:
    forward = random_strategy.score(sequences)
    backward = random_strategy.score(sequences[::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.id == b.id
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


def test_a_change_in_one_sequence_is_not_seen_by_the_next(random_strategy, sequences) -> None:
    changed = [dataclasses.replace(sequences[0], tokens=sequences[0].tokens + 1), *sequences[1:]]
    before, after = random_strategy.score(sequences), random_strategy.score(changed)
    assert not np.allclose(before[0].logprobs, after[0].logprobs)
    for a, b in zip(before[1:], after[1:], strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_tokens_out_of_the_mask_score_zero(random_strategy, sequences) -> None:
    for sequence, result in zip(sequences, random_strategy.score(sequences), strict=True):
        assert (result.logprobs[~sequence.response_mask] == 0).all()
        assert (result.logprobs[sequence.response_mask] < 0).all()


def test_shift_by_hand() -> None:
    batch = PackedBatch.pack(
        [np.array([5, 6, 7]), np.array([8, 9])], [np.array([False, False, True]), np.array([False, True])]
    )
    source, target = shifted(batch)
    assert (source.tolist(), target.tolist()) == ([1, 3], [2, 4])
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]


def test_a_sampled_first_token_is_refused() -> None:
    mask = [np.array([False, True]), np.array([True, True])]
    with pytest.raises(ValueError, match="first token"):
        shifted(PackedBatch.pack([np.array([1, 2]), np.array([3, 4])], mask))


def request_of(length: int) -> ScoreRequest:
    return ScoreRequest(TrajectoryId(length, 0), np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool))


def test_rows_by_count_and_by_tokens() -> None:
    requests = [request_of(n) for n in (3, 4, 5, 20, 1, 2)]

    def lengths(config: WorkerConfig) -> list[list[int]]:
        return [[len(r.tokens) for r in row] for row in rows_of(requests, config)]

    assert lengths(WorkerConfig(infer_batch_size=4)) == [[3, 4, 5, 20], [1, 2]]
    packing = SequencePackingArguments(max_packed_sequence_length_forward=8)
    # 3 + 4 fit into 8, 5 more do not; 20 is longer than a row and gets its own
    assert lengths(WorkerConfig(use_sequence_packing=True, sequence_packing_args=packing)) == [
        [3, 4],
        [5],
        [20],
        [1, 2],
    ]
    assert list(rows_of([], WorkerConfig())) == []


def test_row_limits_change_no_score(make_strategy, random_model, random_strategy, sequences) -> None:
    packing = SequencePackingArguments(max_packed_sequence_length_forward=20)
    other = make_strategy(random_model, use_sequence_packing=True, sequence_packing_args=packing)
    for a, b in zip(random_strategy.score(sequences), other.score(sequences), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


# ---- padded vocabulary ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padding_giant(tmp_path_factory, random_model) -> str:
    """The random model with rows of padding whose logits dwarf all others."""
    folder = tmp_path_factory.mktemp("padding_giant")
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        rows = torch.randn(15, 32, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight[VOCAB:] = rows * 1e4
    model.save_pretrained(folder)
    return str(folder)


def test_padding_rows_take_no_part_in_the_softmax(make_strategy, padding_giant, random_strategy, sequences) -> None:
    giant = make_strategy(padding_giant)
    with torch.no_grad():
        logits = giant.model.lm(input_ids=torch.tensor(sequences[1].tokens, dtype=torch.long)[None]).logits[0]
    assert (logits.argmax(-1) >= VOCAB).all(), "the model is meant to put all its mass on padding"
    for got, expected in zip(giant.score(sequences), random_strategy.score(sequences), strict=True):
        assert np.isfinite(got.logprobs).all()
        np.testing.assert_array_equal(got.logprobs, expected.logprobs)


@pytest.mark.parametrize("padding_bias", [1e4, float("inf"), float("-inf"), float("nan")])
def test_a_bias_of_the_head_counts_and_its_padding_does_not(vocabulary, random_model, sequences, padding_bias) -> None:
    args = ModelArguments(random_model, dtype="fp32")
    model = load_model(args, role="student_train", vocab_size=vocabulary.size, device=torch.device("cpu"))
    bias = torch.randn(320, generator=torch.Generator().manual_seed(3))
    bias[VOCAB:] = padding_bias
    head = torch.nn.Linear(32, 320)
    with torch.no_grad():
        head.weight.copy_(model.lm.lm_head.weight)
        head.bias.copy_(bias)
    model.lm.lm_head = head
    batch = PackedBatch.pack([s.tokens for s in sequences], [s.response_mask for s in sequences])
    outputs, target = model.token_logprobs(batch)
    logprobs, entropy = outputs.logprobs_n, outputs.entropy_n
    (logprobs.sum() + entropy.sum()).backward()

    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
        expected = []
        for s in sequences:
            logits = plain(input_ids=torch.tensor(s.tokens, dtype=torch.long)[None]).logits[0, :-1, :VOCAB]
            scores = (logits + bias[:VOCAB]).log_softmax(-1)[range(len(s.tokens) - 1), s.tokens[1:]]
            expected.append(np.concatenate([[0.0], scores]))
    np.testing.assert_allclose(logprobs.detach(), np.concatenate(expected)[target], atol=1e-5, rtol=0)
    for name, parameter in model.lm.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert head.weight.grad[VOCAB:].abs().max() == 0 and head.bias.grad[VOCAB:].abs().max() == 0
    assert head.weight.grad[:VOCAB].abs().max() > 0


def test_gradients_equal_those_of_a_plain_forward(vocabulary, random_model, sequences) -> None:
    args = ModelArguments(random_model, dtype="fp32")
    model = load_model(args, role="student_train", vocab_size=vocabulary.size, device=torch.device("cpu"))
    batch = PackedBatch.pack([s.tokens for s in sequences], [s.response_mask for s in sequences])
    logprobs = model.token_logprobs(batch)[0].logprobs_n
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()

    plain = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32, attn_implementation="eager")
    parts = []
    for s in sequences:
        tokens = torch.tensor(s.tokens, dtype=torch.long)
        scores = plain(input_ids=tokens[None]).logits[0, :-1, :VOCAB].log_softmax(-1)
        parts.append(scores.gather(-1, tokens[1:, None]).squeeze(-1)[torch.tensor(s.response_mask[1:])])
    expected = torch.cat(parts)
    (expected * torch.linspace(-1, 1, len(expected))).sum().backward()
    ours = dict(model.lm.named_parameters())
    for name, parameter in plain.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5 * scale, rtol=1e-4)


# ---- other families ----------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def save(tmp_path, model_cls, config) -> ModelArguments:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model_cls(config).float().save_pretrained(tmp_path)
    return ModelArguments(str(tmp_path), dtype="fp32")


@pytest.mark.parametrize("family", ["sliding window", "soft-capped"])
def test_models_that_our_attention_does_not_serve_pack_as_well(tmp_path, family) -> None:
    """A sliding window shorter than the sequences, and Gemma 2's bounded logits."""
    if family == "sliding window":
        args = save(tmp_path, MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8))
    else:
        config = Gemma2Config(
            **SMALL, sliding_window=8, final_logit_softcapping=3.0, attn_logit_softcapping=None, query_pre_attn_scalar=8
        )
        args = save(tmp_path, Gemma2ForCausalLM, config)
    model = load_model(args, role="teacher", vocab_size=60, device=torch.device("cpu"))
    assert not model.packs
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    rng = np.random.default_rng(0)
    row = [
        ScoreRequest(TrajectoryId(n, 0), rng.integers(0, 60, n).astype(np.int32), np.arange(n) > 0) for n in (30, 3, 14)
    ]
    with torch.no_grad():
        results = score_row(model, row)
    for sequence, result in zip(row, results, strict=True):
        expected = plain_logprobs(plain, sequence.tokens, 60)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packs", [False, True], ids=["a mask for the row", "an attention that packs"])
def test_a_sliding_window_is_scored_and_not_decoded(tmp_path, monkeypatch, vocabulary, packs: bool) -> None:
    """Also where its attention packs rows, as flash-attention does: the decoding loop's cache fits ours alone."""
    args = save(tmp_path, MistralForCausalLM, MistralConfig(**SMALL | {"vocab_size": 320}, sliding_window=8))
    monkeypatch.setattr(attention, "choose", lambda *_, **__: ("sdpa", packs))
    config = WorkerConfig(model_args=args)
    HFStrategy("teacher", config, vocabulary, torch.device("cpu"), generates=False)
    with pytest.raises(ModelError, match=r"student_infer\.model_args\.model_name_or_path.*sliding windows"):
        HFStrategy("student_infer", config, vocabulary, torch.device("cpu"), generates=True)


def test_a_family_that_rescales_its_logits_is_refused(tmp_path) -> None:
    config = {k: v for k, v in SMALL.items() if k != "head_dim"}
    args = save(tmp_path, GraniteForCausalLM, GraniteConfig(**config, logits_scaling=8.0))
    with pytest.raises(ModelError, match=r"teacher\.model_args\.model_name_or_path.*GraniteForCausalLM.*not supported"):
        load_model(args, role="teacher", vocab_size=60, device=torch.device("cpu"))


# ---- load errors ----------------------------------------------------------------------------


def load(path: str | None, vocab_size: int = VOCAB):
    args = ModelArguments(path, dtype="fp32")
    return load_model(args, role="teacher.math", vocab_size=vocab_size, device=torch.device("cpu"))


def test_a_missing_model_names_role_and_path(tmp_path) -> None:
    path = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"teacher\.math\.model_args\.model_name_or_path") as caught:
        load(path)
    assert path in str(caught.value) and "no such folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="not set"):
        load(None)


@pytest.mark.parametrize("damage", ["no config", "bad config", "unknown type", "no weights", "cut weights", "garbage"])
def test_a_damaged_checkpoint_names_role_and_path(tmp_path, random_model, damage) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no config":
        config.unlink()
    elif damage == "bad config":
        config.write_text("{")
    elif damage == "unknown type":
        config.write_text(config.read_text().replace('"qwen3"', '"qwen33"'))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        weights.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match=r"teacher\.math\.model_args\.model_name_or_path") as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)


def test_a_head_smaller_than_the_tokenizer_is_refused(random_model) -> None:
    with pytest.raises(ModelError, match=r"teacher\.math.*320 rows.*321"):
        load(random_model, 321)


def test_missing_parameters_are_not_made_up(tmp_path, random_model) -> None:
    """transformers fills absent weights with random numbers and a warning: a teacher like that trains noise."""
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load(str(folder))


def test_dropout_of_a_model_is_switched_off(tiny_models, tmp_path) -> None:
    """Old and new log-probabilities must come from the same function, in training mode too."""
    folder = tmp_path / "dropout"
    shutil.copytree(tiny_models.student, folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    args = ModelArguments(model_name_or_path=str(folder), dtype="fp32")
    model = load_model(args, role="r", vocab_size=305, device=torch.device("cpu"))
    tokens, mask = np.arange(3, 23, dtype=np.int32), np.arange(20) > 4
    batch = PackedBatch.pack([tokens], [mask])
    model.train()
    first, second = (model.token_logprobs(batch)[0].logprobs_n for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("want", [ScoreWant(hidden=True), ScoreWant(hidden=True, logprobs=False)])
def test_hidden_states_that_are_not_finite_are_told(make_strategy, tiny_models, sequences, want) -> None:
    """Also where no log-probabilities were asked for: they are what is looked at before a score is accepted."""
    fresh = make_strategy(tiny_models.student)
    clean = fresh.score(sequences, want)
    assert all((r.logprobs is None) == (not want.logprobs) for r in clean)
    with torch.inference_mode():
        next(p for p in fresh.model.parameters() if p.ndim == 1).view(-1)[3] = float("nan")
    assert any(r.logprobs is not None and np.isnan(r.logprobs).any() for r in fresh.score(sequences, want))
