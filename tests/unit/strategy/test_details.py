"""What a scorer says besides one number a token: supports, hidden states and the head that turns these into logits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import HeadWeights, ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.packed_model import head_of, raw_of, tensor_of
from roll_opd.trajectory import RawTensor, SupportScores

VOCAB = 305
CPU = torch.device("cpu")
WANTS = {
    "top k": ScoreWant(top_k=5),
    "given": ScoreWant(given=True),
    "top k and given": ScoreWant(top_k=5, given=True),
    "hidden": ScoreWant(hidden=True),
}


@pytest.fixture(scope="module")
def requests(sequences) -> list[ScoreRequest]:
    """With ids to report on: sets of 3 or 4 ids, some of which are -1; the sampled token is among them."""
    rng = np.random.default_rng(2)
    out = []
    for i, s in enumerate(sequences):
        n = int(s.response_mask.sum())
        ids = np.stack([rng.choice(VOCAB, 3 + i % 2, replace=False) for _ in range(n)]).astype(np.int32)
        sampled = s.tokens[s.response_mask]
        ids[:, 0] = np.where((ids[:, 1:] == sampled[:, None]).any(-1), ids[:, 0], sampled)
        ids[::3, -1] = -1
        out.append(dataclasses.replace(s, given_ids=ids))
    return out


@pytest.fixture(scope="module")
def logprobs(plain_random, sequences) -> list[np.ndarray]:
    """``[n, V]`` of every sampled token, by the book."""
    out = []
    with torch.no_grad():
        for s in sequences:
            logits = plain_random(input_ids=torch.tensor(s.tokens, dtype=torch.long)[None]).logits[0, :, :VOCAB]
            out.append(logits.double().log_softmax(-1).numpy()[np.flatnonzero(s.response_mask) - 1])
    return out


def outside(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log of the mass that is not on ``ids``, position by position."""
    out = []
    for row, chosen in zip(logprobs, ids, strict=True):
        rest = np.delete(row, chosen[chosen >= 0])
        out.append(np.log(np.exp(rest).sum()))
    return np.array(out)


@pytest.mark.parametrize("name", WANTS)
def test_packed_equals_one_by_one(random_strategy, requests, name) -> None:
    want = WANTS[name]
    packed = random_strategy.score(requests, want)
    plain = random_strategy.score(requests)
    for request, result, sampled_only in zip(requests, packed, plain, strict=True):
        (alone,) = random_strategy.score([request], want)
        assert (result.id, result.checksum) == (request.id, request.checksum)
        np.testing.assert_allclose(result.logprobs, sampled_only.logprobs, atol=1e-6, rtol=0)
        assert sampled_only.details is None
        if name == "hidden":
            assert isinstance(result.details, RawTensor)
            got, expected = tensor_of(result.details, CPU), tensor_of(alone.details, CPU)
            assert got.shape == (request.response_mask.sum(), 32)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        else:
            assert isinstance(result.details, SupportScores)
            # A row of sets of several sizes is filled to the widest one.
            width = alone.details.ids.shape[1]
            assert result.details.ids.dtype == np.int32 and (result.details.ids[:, width:] == -1).all()
            np.testing.assert_array_equal(result.details.ids[:, :width], alone.details.ids)
            np.testing.assert_allclose(result.details.logprobs[:, :width], alone.details.logprobs, atol=1e-5, rtol=0)
            assert (result.details.logprobs[:, width:] == -np.inf).all()
            np.testing.assert_allclose(result.details.tail, alone.details.tail, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["top k", "given", "top k and given"])
def test_supports_by_the_book(random_strategy, requests, logprobs, name) -> None:
    want = WANTS[name]
    dropped = 0
    for request, result, rows in zip(requests, random_strategy.score(requests, want), logprobs, strict=True):
        details = result.details
        best = np.argsort(-rows, axis=-1)[:, : want.top_k]
        np.testing.assert_array_equal(details.ids[:, : want.top_k], best)
        if want.given:
            given = details.ids[:, want.top_k : want.top_k + request.given_ids.shape[1]]
            repeated = (request.given_ids[:, :, None] == best[:, None, :]).any(-1)
            np.testing.assert_array_equal(given, np.where(repeated, -1, request.given_ids))
            dropped += int(repeated.sum())
        expected = np.take_along_axis(rows, np.maximum(details.ids, 0).astype(np.int64), -1)
        np.testing.assert_allclose(details.logprobs, np.where(details.ids < 0, -np.inf, expected), atol=1e-5, rtol=0)
        np.testing.assert_allclose(details.tail, outside(rows, details.ids), atol=1e-5, rtol=0)
        assert result.entropies is None
    assert (dropped > 0) == (name == "top k and given")


def test_top_k_beyond_the_padding(random_strategy, requests) -> None:
    """The whole vocabulary is the largest set there is: the head's padding rows are no tokens."""
    (result,) = random_strategy.score(requests[:1], ScoreWant(top_k=VOCAB))
    assert sorted(result.details.ids[0].tolist()) == list(range(VOCAB))
    assert (result.details.tail == -np.inf).all()


def test_ids_that_were_not_brought_are_noticed(random_strategy, sequences) -> None:
    with pytest.raises(AssertionError, match="brings none"):
        random_strategy.score(sequences, WANTS["given"])


# ---- hidden states and the head ----------------------------------------------------------------------------------


def test_hidden_states_and_head_give_the_scorers_distributions(random_strategy, requests, logprobs) -> None:
    head = head_of(random_strategy.head(), CPU)
    assert head.weight_VH.shape == (VOCAB, 32) and head.bias_V is None and head.soft_cap is None
    for result, rows in zip(random_strategy.score(requests, WANTS["hidden"]), logprobs, strict=True):
        logits = tensor_of(result.details, CPU).double() @ head.weight_VH.double().T
        np.testing.assert_allclose(logits.log_softmax(-1).numpy(), rows, atol=1e-5, rtol=0)


def test_a_scorer_in_bf16(vocabulary, tiny_models, sequences) -> None:
    """Sixteen bits travel as they are: what is rebuilt gives the scorer's own log-probabilities."""
    config = WorkerConfig(model_args=ModelArguments(tiny_models.teacher, dtype="bf16"))
    strategy = HFStrategy("teacher", config, vocabulary, CPU, generates=False)
    weights = strategy.head()
    assert weights.weight.dtype == "bfloat16" and weights.weight.raw.dtype == np.uint8
    head = head_of(weights, CPU)
    assert torch.equal(head.weight_VH, strategy.model.head().trimmed().weight_VH)
    for request, result in zip(sequences, strategy.score(sequences, WANTS["hidden"]), strict=True):
        hidden = tensor_of(result.details, CPU)
        assert hidden.dtype == torch.bfloat16 and result.details.raw.nbytes == 2 * hidden.numel()
        logits = torch.nn.functional.linear(hidden, head.weight_VH).float()
        tokens = torch.tensor(request.tokens[request.response_mask], dtype=torch.long)
        rebuilt = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        np.testing.assert_allclose(rebuilt.numpy(), result.logprobs[request.response_mask], atol=1e-5, rtol=0)


def test_a_scorer_tells_of_its_heads_bias_and_bound(make_strategy, random_model, sequences) -> None:
    """Trimmed like its rows: the padding's bias is nobody's business."""
    strategy = make_strategy(random_model)
    head = torch.nn.Linear(32, 320)
    head.weight.data.copy_(strategy.model.lm.lm_head.weight)
    strategy.model.lm.lm_head, strategy.model.soft_cap = head.requires_grad_(False), 2.0
    rebuilt = head_of(strategy.head(), CPU)
    assert torch.equal(rebuilt.bias_V, head.bias[:VOCAB]) and rebuilt.soft_cap == 2.0
    for request, result in zip(sequences, strategy.score(sequences, WANTS["hidden"]), strict=True):
        logits = torch.nn.functional.linear(tensor_of(result.details, CPU), rebuilt.weight_VH, rebuilt.bias_V)
        logprobs = (2.0 * torch.tanh(logits / 2.0)).log_softmax(-1).numpy()
        tokens = request.tokens[request.response_mask]
        expected = result.logprobs[request.response_mask]
        np.testing.assert_allclose(logprobs[np.arange(len(tokens)), tokens], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, None), (True, 30.0)])
def test_the_head_survives_the_way(dtype, bias, cap) -> None:
    weight = torch.randn(7, 3).to(dtype)
    offset = torch.randn(7).to(dtype) if bias else None
    sent = HeadWeights(raw_of(weight), None if offset is None else raw_of(offset), cap)
    for raw in (sent.weight, sent.bias):
        if raw is not None:
            raw.raw.setflags(write=False)  # as it comes from the object store
    head = head_of(sent, CPU)
    assert torch.equal(head.weight_VH, weight) and head.weight_VH.dtype == dtype and head.soft_cap == cap
    assert (head.bias_V is None) == (offset is None)
    assert offset is None or torch.equal(head.bias_V, offset)
    assert head.weight_VH.data_ptr() == sent.weight.raw.ctypes.data, "what all processes share is copied nowhere"


def test_a_tensor_that_is_not_contiguous_travels_in_order() -> None:
    matrix = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert torch.equal(tensor_of(raw_of(matrix.T), CPU), matrix.T)


# ---- a scorer whose weights move ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_saved_weights_come_back_bit_for_bit(make_strategy, tiny_models, random_model, sequences, tmp_path, tied):
    strategy = make_strategy(tiny_models.student if tied else random_model)
    moved = [p + 0.01 for p in strategy.model.lm.parameters()]
    with torch.no_grad():
        for parameter, value in zip(strategy.model.lm.parameters(), moved, strict=True):
            parameter.copy_(value)
    scores = strategy.score(sequences)
    strategy.save_model(str(tmp_path / "teacher-a"))
    with torch.no_grad():
        for parameter in strategy.model.lm.parameters():
            parameter.zero_()
    other = make_strategy(tiny_models.student if tied else random_model)
    for strategy_ in (strategy, other):
        strategy_.load_model(str(tmp_path / "teacher-a"))
        for parameter, value in zip(strategy_.model.lm.parameters(), moved, strict=True):
            assert torch.equal(parameter, value)
        assert not any(p.requires_grad for p in strategy_.model.parameters())
        for a, b in zip(strategy_.score(sequences), scores, strict=True):
            np.testing.assert_array_equal(a.logprobs, b.logprobs)
    names = dict(strategy.model.lm.named_parameters(remove_duplicate=False))
    assert (names["lm_head.weight"] is names["model.embed_tokens.weight"]) == tied
