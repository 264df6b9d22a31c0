"""What becomes of vLLM's prompt log-probabilities; numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from roll_opd.algorithms.support import tail_logprob
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.prompt_logprobs import check_want, padding_mass, score_result
from roll_opd.errors import ModelError
from roll_opd.trajectory import TrajectoryId

# Tokens 4, 1, 2; the last two are scored. Over ids 0..3 (and 4, 5, where a test has padding):
PROBS = [
    [0.40, 0.30, 0.20, 0.10, 0.00, 0.00],  # predicts token 1, second of its row
    [0.05, 0.25, 0.10, 0.60, 0.00, 0.00],  # predicts token 2, third of its row
]
PADDED = [
    [0.20, 0.15, 0.10, 0.05, 0.30, 0.20],  # half of the mass is on padding
    [0.05, 0.25, 0.10, 0.50, 0.00, 0.10],
]


@dataclass
class Entry:
    """An entry as the engine gives it."""

    logprob: float
    rank: int | None = None


@dataclass
class Flat:
    """vLLM's flat form."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)


def request(tokens=(0, 1, 2), mask=(False, True, True)) -> ScoreRequest:
    return ScoreRequest(TrajectoryId(3, 1), np.array(tokens, np.int32), np.array(mask))


def log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf


def answer(probs, k: int, tokens=(0, 1, 2)) -> list[dict[int, Entry] | None]:
    """What the engine answers: the token that stands there first, then the best ``k`` that are others."""
    out: list[dict[int, Entry] | None] = [None]
    for token, row in zip(tokens[1:], probs, strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        out.append({i: Entry(log(row[i])) for i in dict.fromkeys([token, *best])})
    return out


def flat(probs, k: int, tokens=(0, 1, 2)) -> Flat:
    """The same in the flat form, where the token stands there even if it is one of the best."""
    out = Flat([0], [0])
    for token, row in zip(tokens[1:], probs, strict=True):
        ids = [token, *sorted(range(len(row)), key=lambda i: -row[i])[:k]]
        out.start_indices.append(len(out.token_ids))
        out.token_ids += ids
        out.logprobs += [log(row[i]) for i in ids]
        out.end_indices.append(len(out.token_ids))
    return out


def as_json(entries) -> list[dict[str, dict[str, float]] | None]:
    """The same as the server sends it: ids are strings, minus infinity is clamped."""
    dicts = [
        e and {str(i): {"logprob": max(x.logprob, -9999.0), "rank": x.rank} for i, x in e.items()} for e in entries
    ]
    return json.loads(json.dumps(dicts))


FORMS = {
    "engine": answer,
    "flat": flat,
    "server": lambda probs, k: as_json(answer(probs, k)),
}


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    def test_sampled_tokens(self, form):
        result = score_result(request(), FORMS[form](PROBS, 0), ScoreWant(), vocab_size=4)
        assert result.id == TrajectoryId(3, 1)
        assert result.checksum == request().checksum
        assert result.logprobs.dtype == np.float32
        np.testing.assert_allclose(result.logprobs, [0.0, math.log(0.30), math.log(0.10)], rtol=1e-6)
        assert result.entropies is None
        assert result.details is None

    def test_top_k_with_the_token_inside_and_outside_of_it(self, form):
        # Token 1 is the second best of its row: 2 entries. Token 2 is the third best of its row: 3 entries.
        result = score_result(request(), FORMS[form](PROBS, 2), ScoreWant(top_k=2), vocab_size=4)
        np.testing.assert_allclose(result.logprobs, [0.0, math.log(0.30), math.log(0.10)], rtol=1e-6)
        details = result.details
        assert details.ids.tolist() == [[0, 1], [3, 1]]
        assert (details.ids.dtype, details.logprobs.dtype, details.tail.dtype) == (np.int32, np.float32, np.float32)
        np.testing.assert_allclose(np.exp(details.logprobs), [[0.4, 0.3], [0.6, 0.25]], rtol=1e-6)
        np.testing.assert_allclose(np.exp(details.tail), [0.3, 0.15], rtol=1e-6)

    def test_the_whole_vocabulary_has_no_tail(self, form):
        details = score_result(request(), FORMS[form](PROBS, 4), ScoreWant(top_k=4), vocab_size=4).details
        assert details.ids.tolist() == [[0, 1, 2, 3], [3, 1, 2, 0]]
        assert details.tail.tolist() == [-np.inf, -np.inf]

    def test_visible_padding_is_taken_out_and_the_rest_normalised(self, form):
        result = score_result(request(), FORMS[form](PADDED, 6), ScoreWant(top_k=6), vocab_size=4)
        # 0.15 of 0.5, and 0.10 of 0.9
        np.testing.assert_allclose(np.exp(result.logprobs), [1.0, 0.30, 1 / 9], rtol=1e-6)
        details = result.details
        assert details.ids.tolist() == [[0, 1, 2, 3, -1, -1], [3, 1, 2, 0, -1, -1]]
        expected = [[0.4, 0.3, 0.2, 0.1, 0, 0], [5 / 9, 2.5 / 9, 1 / 9, 0.5 / 9, 0, 0]]
        np.testing.assert_allclose(np.exp(details.logprobs), expected, rtol=1e-6)
        assert details.tail.tolist() == [-np.inf, -np.inf]

    def test_padding_that_shows_in_part(self, form):
        # Best three of row 0: 4 (padding, 0.30), then 0 and 5 (0.20 each, one of them padding).
        details = score_result(request(), FORMS[form](PADDED, 3), ScoreWant(top_k=3), vocab_size=4).details
        assert details.ids[0].tolist() == [0, -1, -1]
        np.testing.assert_allclose(np.exp(details.logprobs[0, 0]), 0.4, rtol=1e-6)
        np.testing.assert_allclose(np.exp(details.tail[0]), 0.6, rtol=1e-6)


def test_scores_of_a_softmax_equal_those_of_the_whole_row():
    """Against ``tail_logprob``, which takes the tail from the whole row."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    probs = logits.softmax(-1).tolist()
    tokens = (0, 7, 31)
    details = score_result(request(tokens), answer(probs, 5, tokens), ScoreWant(top_k=5), vocab_size=50).details
    assert details.ids.tolist() == logits.topk(5).indices.tolist()
    np.testing.assert_allclose(details.tail, tail_logprob(logits, torch.from_numpy(details.ids).long()), atol=1e-6)


def test_a_tail_is_never_below_the_floor():
    probs = [[1 - 1e-9, 1e-9, 0, 0], [0, 0, 1.0, 0]]
    details = score_result(request(), answer(probs, 2), ScoreWant(top_k=2), vocab_size=4).details
    np.testing.assert_allclose(np.exp(details.tail), [1e-6, 1e-6], rtol=1e-6)
    assert details.ids.tolist() == [[0, 1], [2, -1]], "an id of probability 0 is in no set"


def test_positions_that_are_not_wanted_may_be_anything():
    entries = answer(PROBS, 0)
    entries[1] = None
    result = score_result(request(mask=(False, False, True)), entries, ScoreWant(), vocab_size=4)
    np.testing.assert_allclose(result.logprobs, [0.0, 0.0, math.log(0.10)], rtol=1e-6)


def test_nothing_wanted():
    result = score_result(request(mask=(False,) * 3), answer(PROBS, 2), ScoreWant(top_k=2), vocab_size=4)
    assert not result.logprobs.any()
    assert result.details.ids.shape == result.details.logprobs.shape == (0, 2)
    assert result.details.tail.shape == (0,)


def _changed(position: int, entry) -> list:
    entries = answer(PROBS, 2)
    entries[position] = entry
    return entries


def _flat_with(**changes) -> Flat:
    out = flat(PROBS, 2)
    for name, (index, value) in changes.items():
        getattr(out, name)[index] = value
    return out


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (answer(PROBS, 2)[:-1], "2 prompt log-probabilities for 3 tokens"),
        (_changed(2, None), "position 2: none of token 2"),
        (_changed(1, {0: Entry(-1.0), 3: Entry(-2.0)}), "position 1: none of token 1"),
        (_changed(1, {1: Entry(-1.0)}), "position 1: 1 entries, expected 2 or 3"),
        (_changed(1, {i: Entry(-2.0) for i in range(4)}), "position 1: 4 entries, expected 2 or 3"),
        (_changed(1, {1: Entry(-1.0), "x": Entry(-1.0)}), "position 1: not understood"),
        (_changed(1, {1: Entry(-1.0), 2: {"log": -1.0}}), "position 1: not understood"),
        (_changed(1, [1, 2]), "position 1: not understood"),
        (_changed(2, {2: Entry(-1.0), -1: Entry(-1.0)}), "position 2: token id -1"),
        (_changed(2, {2: Entry(-1.0), 0: Entry(math.nan)}), "position 2: not a number"),
        (_changed(2, {2: Entry(-math.inf), 0: Entry(-0.1)}), "position 2: token 2 has probability 0"),
        (_changed(2, {2: Entry(-9999.0), 0: Entry(-0.1)}), "position 2: token 2 has probability 0"),
        (_changed(2, {2: Entry(11.5), 0: Entry(-0.1)}), "position 2: 11.5 is the largest.*logprobs_mode"),
        (_changed(2, {2: Entry(-0.1), 0: Entry(-0.1)}), "position 2: .* sum to a probability of 1.81"),
        (_changed(2, {2: Entry(-3.0), 9: Entry(-0.1)}), "position 2: 90% on ids beyond the vocabulary of 4"),
        (_flat_with(end_indices=(1, 2)), "position 1: 2 entries, expected 3"),
        (_flat_with(token_ids=(0, 3)), "position 1: speaks about token 3, the prompt has 1"),
    ],
)
def test_what_cannot_be_true_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        score_result(request(), entries, ScoreWant(top_k=2), vocab_size=4)


def test_padding_mass():
    assert padding_mass(answer(PROBS, 4), vocab_size=4) == 0.0
    assert padding_mass(answer(PADDED, 2), vocab_size=4) == pytest.approx(0.30)  # 0.20 of id 5 does not show
    assert padding_mass(as_json(answer(PADDED, 6)), vocab_size=4) == pytest.approx(0.50)


def test_a_token_beyond_the_vocabulary_is_refused():
    tokens = (0, 1, 5)
    with pytest.raises(ValueError, match="position 2: token 5, but the vocabulary has 4"):
        score_result(request(tokens), answer(PADDED, 0, tokens), ScoreWant(), vocab_size=4)


def test_the_first_token_cannot_be_scored():
    with pytest.raises(ValueError, match="first token"):
        score_result(request(mask=(True,) * 3), answer(PROBS, 0), ScoreWant(), vocab_size=4)


@pytest.mark.parametrize(("want", "what"), [(ScoreWant(given=True), "given ids"), (ScoreWant(hidden=True), "hidden")])
def test_what_an_engine_cannot_give(want, what):
    with pytest.raises(ModelError, match=f"teacher.*{what}.*teacher_topk"):
        check_want("teacher", want)
    check_want("teacher", ScoreWant(top_k=3))
