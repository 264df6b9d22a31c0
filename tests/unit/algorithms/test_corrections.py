"""Train/infer mismatch: exactness by enumeration, truncation and filters by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from roll_opd.algorithms.corrections import CORRECTION_SPANS, correction_weights, filter_mask

# Sequence 0: probabilities 0.5 and 0.4 by the trainer, 0.25 and 0.8 by the engine. Sequence 2: 0.9 against 0.6.
OLD = torch.log(torch.tensor([0.5, 0.4, 0.9], dtype=torch.float64))
INFER = torch.log(torch.tensor([0.25, 0.8, 0.6], dtype=torch.float64))
SEGMENTS = torch.tensor([0, 0, 2])
# Ratios 2, 0.5, 1.5; differences of probability 0.25, -0.4, 0.3.


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("token", [2.0, 0.5, 1.5]),
        ("sequence", [1.0, 1.0, 1.5]),  # 2 * 0.5
        ("geometric", [1.0, 1.0, 1.5]),  # its root
        ("segment", [1.0, 1.0, 1.5]),
    ],
)
def test_weights_by_hand(kind: str, weights: list[float]) -> None:
    assert correction_weights(kind, OLD, INFER, SEGMENTS, 3, None).tolist() == pytest.approx(weights)


def test_geometric_is_the_root_of_sequence() -> None:
    old = torch.log(torch.tensor([0.8, 0.5, 0.3]).double())
    infer = torch.log(torch.tensor([0.1, 0.5, 0.3]).double())
    segments = torch.zeros(3, dtype=torch.int64)
    # Ratios 8, 1, 1.
    assert correction_weights("sequence", old, infer, segments, 1, None).tolist() == pytest.approx([8.0] * 3)
    assert correction_weights("geometric", old, infer, segments, 1, None).tolist() == pytest.approx([2.0] * 3)
    # An episode of two runs, named as such: a mean for each.
    runs = torch.tensor([0, 1, 1])
    assert correction_weights("segment", old, infer, runs, 2, None).tolist() == pytest.approx([8.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", CORRECTION_SPANS)
def test_never_above_the_bound(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    old, infer = -3 * torch.rand(50, generator=generator), -3 * torch.rand(50, generator=generator)
    segments = torch.randint(0, 7, (50,), generator=generator)
    free = correction_weights(kind, old, infer, segments, 7, None)
    capped = correction_weights(kind, old, infer, segments, 7, upper=1.2, lower=0.9)
    assert free.max() > 1.2 and free.min() < 0.9  # else the bounds are not tested
    assert torch.equal(capped, free.clamp(0.9, 1.2))
    assert capped.dtype == torch.float32


def test_order_does_not_matter_and_no_gradient_flows() -> None:
    order = torch.tensor([2, 0, 1])
    for kind in CORRECTION_SPANS:
        straight = correction_weights(kind, OLD, INFER, SEGMENTS, 3, None)
        shuffled = correction_weights(kind, OLD[order], INFER[order], SEGMENTS[order], 3, None)
        assert torch.allclose(shuffled, straight[order], atol=1e-15, rtol=0)
        leaf = OLD.clone().requires_grad_()
        assert not correction_weights(kind, leaf, INFER, SEGMENTS, 3, 1.2).requires_grad


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the first token ``[3]`` and of the second given the first ``[3, 3]``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1:], -1)


def enumerate_sequences(kind: str) -> tuple[float, float, float]:
    """Of all sequences of length 2: ``E_infer[sum_t w_t f_t]``, ``E_old[sum_t f_t]``, and without weights."""
    (old1, old2), (infer1, infer2) = distributions(0), distributions(1)
    f1 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    f2 = torch.arange(9, dtype=torch.float64).reshape(3, 3).sin() * 3
    weighted = wanted = plain = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        old, infer = torch.stack([old1[a], old2[a, b]]), torch.stack([infer1[a], infer2[a, b]])
        f = torch.stack([f1[a], f2[a, b]])
        w = correction_weights(kind, old, infer, torch.zeros(2, dtype=torch.int64), 1, None)
        weighted += float(infer.sum().exp() * (w * f).sum())
        plain += float(infer.sum().exp() * f.sum())
        wanted += float(old.sum().exp() * f.sum())
    return weighted, wanted, plain


def test_sequence_weights_are_exact_for_sequences() -> None:
    weighted, wanted, plain = enumerate_sequences("sequence")
    assert weighted == pytest.approx(wanted, abs=1e-14)
    assert abs(plain - wanted) > 0.05  # there was something to correct
    # The others only come nearer: the weight of a second token does not know how likely its prefix was.
    for kind in ("token", "geometric"):
        assert abs(enumerate_sequences(kind)[0] - wanted) > 1e-3


def test_token_weights_are_exact_at_a_fixed_prefix() -> None:
    (old, _), (infer, _) = distributions(0), distributions(1)
    f = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = correction_weights("token", old, infer, torch.zeros(3, dtype=torch.int64), 1, None)
    assert (infer.exp() * w * f).sum().item() == pytest.approx((old.exp() * f).sum().item(), abs=1e-15)
    assert abs(((infer.exp() - old.exp()) * f).sum().item()) > 0.05


@pytest.mark.parametrize(
    ("kind", "bounds", "kept"),
    [
        ("token", (0.5, 1.5), [False, True, True]),  # bounds included
        ("token", (0.6, 2.5), [True, False, True]),
        ("sequence", (0.9, 1.2), [True, True, False]),
        ("geometric", (0.9, 1.2), [True, True, False]),
        ("segment", (1.1, 1.6), [False, False, True]),
    ],
)
def test_ratio_filter_by_hand(kind: str, bounds: tuple[float, float], kept: list[bool]) -> None:
    slack = (bounds[0] - 1e-12, bounds[1] + 1e-12)
    assert filter_mask(kind, OLD, INFER, SEGMENTS, 3, ratio=slack).tolist() == kept


@pytest.mark.parametrize(
    ("kind", "bounds", "kept"),
    [
        ("token", (-0.2, 0.28), [True, False, False]),
        ("sequence", (-0.16, -0.14), [True, True, False]),  # 0.25 - 0.4
        ("geometric", (-0.08, -0.07), [True, True, False]),  # half of it
        ("segment", (-0.08, 0.31), [True, True, True]),
    ],
)
def test_difference_filter_by_hand(kind: str, bounds: tuple[float, float], kept: list[bool]) -> None:
    assert filter_mask(kind, OLD, INFER, SEGMENTS, 3, diff=bounds).tolist() == kept


def test_both_tests_of_a_filter_must_pass() -> None:
    assert filter_mask("token", OLD, INFER, SEGMENTS, 3).tolist() == [True, True, True]
    both = filter_mask("token", OLD, INFER, SEGMENTS, 3, ratio=(0.4, 1.6), diff=(-0.2, 0.5))
    assert both.tolist() == [False, False, True]


def test_bounds_are_included() -> None:
    same = torch.log(torch.tensor([0.5]))
    zero = torch.zeros(1, dtype=torch.int64)
    assert filter_mask("token", same, same, zero, 1, ratio=(1.0, 1.0), diff=(0.0, 0.0)).tolist() == [True]


def test_what_is_broken_is_dropped_or_bounded() -> None:
    old, infer = torch.tensor([0.0, math.nan]), torch.tensor([-500.0, 0.0])
    segments = torch.tensor([0, 1])
    assert filter_mask("token", old, infer, segments, 2, ratio=(0.5, 2.0)).tolist() == [False, False]
    assert correction_weights("token", old[:1], infer[:1], segments[:1], 1, None).item() == pytest.approx(math.exp(20))
    assert correction_weights("token", old[:0], infer[:0], segments[:0], 0, 1.2).shape == (0,)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="token, segment"):
        correction_weights("seq", OLD, INFER, SEGMENTS, 3, None)
    with pytest.raises(ValueError, match="token, segment"):
        filter_mask("seq", OLD, INFER, SEGMENTS, 3, ratio=(0.0, 1.0))
    with pytest.raises(ValueError, match="above upper"):
        correction_weights("token", OLD, INFER, SEGMENTS, 3, upper=1.0, lower=2.0)
