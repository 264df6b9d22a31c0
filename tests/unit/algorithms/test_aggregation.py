"""Loss weights: each mode by hand, and the sum over any split equals the whole."""

from __future__ import annotations

import random

import pytest

from roll_opd.algorithms.aggregation import LOSS_AGG_MODES, sequence_weights

# Two sequences of 2 and 3 sampled tokens and an empty one; the losses of their tokens; limit 10.
LENGTHS = [2, 0, 3]
LOSSES = [[1.0, 3.0], [], [6.0, 0.0, 3.0]]


def total(weights: list[float], losses: list[list[float]]) -> float:
    return sum(w * x for w, row in zip(weights, losses, strict=True) for x in row)


@pytest.mark.parametrize(
    ("mode", "weights", "loss"),
    [
        # 13 over 5 tokens
        ("token-mean", [1 / 5, 0.0, 1 / 5], 13 / 5),
        # (4 + 9) over 2 sequences: the empty one is not a sequence
        ("seq-mean-token-sum", [1 / 2, 0.0, 1 / 2], 13 / 2),
        # (4/2 + 9/3) / 2
        ("seq-mean-token-mean", [1 / 4, 0.0, 1 / 6], 5 / 2),
        # (4/10 + 9/10) / 2
        ("seq-mean-token-sum-norm", [1 / 20, 0.0, 1 / 20], 13 / 20),
    ],
)
def test_each_mode_by_hand(mode: str, weights: list[float], loss: float) -> None:
    got = sequence_weights(mode, LENGTHS, 10)
    assert got == pytest.approx(weights, abs=0, rel=1e-15)
    assert total(got, LOSSES) == pytest.approx(loss, rel=1e-15)


def test_every_mode_has_a_hand_computed_case() -> None:
    cases = test_each_mode_by_hand.pytestmark[0].args[1]
    assert {case[0] for case in cases} == set(LOSS_AGG_MODES)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_split_anywhere_sums_to_the_whole(mode: str) -> None:
    rng = random.Random(3)
    lengths = [rng.choice([0, 1, 2, 7, 30]) for _ in range(20)]
    losses = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    weights = sequence_weights(mode, lengths, 64)
    whole = total(weights, losses)
    for parts in (2, 3, 7, 20):
        shares = [
            total([weights[i] for i in members], [losses[i] for i in members])
            for members in (range(part, 20, parts) for part in range(parts))
        ]
        assert sum(shares) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_order_changes_nothing(mode: str) -> None:
    lengths = [4, 1, 0, 9]
    weights = sequence_weights(mode, lengths, 16)
    assert sequence_weights(mode, lengths[::-1], 16) == weights[::-1]


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_empty_sequences_neither_count_nor_divide_by_zero(mode: str) -> None:
    assert sequence_weights(mode, [0, 0], 16) == [0.0, 0.0]
    assert sequence_weights(mode, [], 16) == []
    with_empty = sequence_weights(mode, [0, 5, 0, 3], 16)
    without = sequence_weights(mode, [5, 3], 16)
    assert [w for w in with_empty if w] == without


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="token-meen"):
        sequence_weights("token-meen", [1], 1)
