"""Weights and schedules that steady distillation, by hand; what is invariant."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.stabilisers import (
    POSITION_WEIGHTS,
    SCHEDULES,
    entropy_gate,
    extrapolated_log_ratio,
    position_weight,
    scheduled_coef,
    trust_region_gate,
)


def test_trust_region_gate_by_hand() -> None:
    d = torch.tensor([0.0, 1.0, -1.0, 1.01, -7.0], requires_grad=True)
    gate = trust_region_gate(d, 1.0)
    assert gate.tolist() == [1, 1, 1, 0, 0] and not gate.requires_grad
    with pytest.raises(ValueError, match="above 0"):
        trust_region_gate(d, 0.0)


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        # Five tokens; the highest are 3.0, 2.0, 1.5.
        (0.2, [[0, 0], [], [1, 0, 0]]),
        (0.4, [[0, 1], [], [1, 0, 0]]),
        (0.41, [[0, 1], [], [1, 1, 0]]),
        (1.0, [[1, 1], [], [1, 1, 1]]),
        (0.001, [[0, 0], [], [1, 0, 0]]),
    ],
)
def test_entropy_gate_by_hand(fraction: float, kept: list[list[int]]) -> None:
    entropies = [torch.tensor([0.1, 2.0]), torch.zeros(0), torch.tensor([3.0, 1.5, 0.2])]
    assert [g.tolist() for g in entropy_gate(entropies, fraction)] == kept


def test_entropy_gate_counts_exactly_and_keeps_ties() -> None:
    distinct = [torch.arange(100.0)]
    assert 0.07 * 100 > 7  # the trap
    assert sum(g.sum() for g in entropy_gate(distinct, 0.07)) == 7
    assert entropy_gate([torch.tensor([1.0, 2.0, 2.0, 0.0])], 0.25)[0].tolist() == [0, 1, 1, 0]
    assert entropy_gate([], 0.5) == [] and entropy_gate([torch.zeros(0)], 0.5)[0].shape == (0,)


def test_entropy_gate_does_not_depend_on_how_the_batch_is_cut() -> None:
    tokens = torch.randn(40, generator=torch.Generator().manual_seed(1)).abs()
    whole = entropy_gate([tokens], 0.2)[0]
    parts = entropy_gate(list(tokens.split([7, 0, 13, 20])), 0.2)
    assert torch.equal(torch.cat(parts), whole) and whole.sum() == 8
    backwards = entropy_gate(list(tokens.split([7, 0, 13, 20]))[::-1], 0.2)
    assert torch.equal(torch.cat(backwards[::-1]), whole)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_entropy_gate_refuses(fraction: float) -> None:
    with pytest.raises(ValueError, match="keep_fraction"):
        entropy_gate([torch.ones(2)], fraction)


@pytest.mark.parametrize(
    ("kind", "scale", "weights"),
    [
        ("none", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 2.0, [1.0, 0.5, 0.0, 0.0]),
        ("exponential", 2.0, [1.0, 0.60653066, 0.36787944, 0.22313016]),  # e^0, e^-0.5, e^-1, e^-1.5
        ("prefix", 2.0, [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_position_weights_by_hand(kind: str, scale: float, weights: list[float]) -> None:
    got = position_weight(4, kind, scale)
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx(weights, abs=1e-7)
    # A prefix of a response is weighed as in the whole.
    assert torch.equal(position_weight(2, kind, scale), got[:2])
    assert position_weight(0, kind, scale).shape == (0,)


def test_every_position_weight_has_a_case_and_bad_ones_are_refused() -> None:
    assert {case[0] for case in test_position_weights_by_hand.pytestmark[0].args[1]} == set(POSITION_WEIGHTS)
    with pytest.raises(ValueError, match="one of none"):
        position_weight(3, "quadratic", 1.0)
    with pytest.raises(ValueError, match="above 0"):
        position_weight(3, "prefix", 0.0)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # From 2 to 1 in 4 steps, and one beyond.
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]),
        # 1 + (1 + cos(pi p)) / 2, cos(pi/4) = 0.70710678
        ("cosine", [2.0, 1.85355339, 1.5, 1.14644661, 1.0, 1.0]),
    ],
)
def test_schedules_by_hand(kind: str, values: list[float]) -> None:
    assert [scheduled_coef(kind, 2.0, 1.0, step, 4) for step in range(6)] == pytest.approx(values, abs=1e-8)
    assert scheduled_coef(kind, 0.1, 0.3, 7, 7) == (0.1 if kind == "constant" else 0.3)  # exactly


def test_every_schedule_has_a_case_and_bad_ones_are_refused() -> None:
    assert {case[0] for case in test_schedules_by_hand.pytestmark[0].args[1]} == set(SCHEDULES)
    with pytest.raises(ValueError, match="constant, linear"):
        scheduled_coef("exponential", 1.0, 0.0, 0, 1)
    for step, total in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="step"):
            scheduled_coef("linear", 1.0, 0.0, step, total)


def test_extrapolation_by_hand() -> None:
    student, teacher, base = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0]), torch.tensor([-1.5, -1.0])
    # lambda 2: (student - base) - 2 (teacher - base) = 0.5 - 2 and -1 + 4
    assert extrapolated_log_ratio(student, teacher, base, 2.0).tolist() == pytest.approx([-1.5, 3.0])
    # lambda 0: only the base holds the student
    assert extrapolated_log_ratio(student, teacher, base, 0.0).tolist() == pytest.approx([0.5, -1.0])
    assert torch.equal(extrapolated_log_ratio(student, teacher, 1e6 * base, 1.0), student - teacher)


@pytest.mark.parametrize("lambd", [0.5, 1.0, 1.5])
def test_extrapolation_leads_to_the_tilted_teacher(lambd: float) -> None:
    """The score has no expected gradient at ``base^(1 - lambda) teacher^lambda``, and has one elsewhere."""
    teacher = torch.log_softmax(torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64), 0)
    base = torch.log_softmax(torch.tensor([-0.5, 0.7, 0.2], dtype=torch.float64), 0)
    target = torch.log_softmax((1 - lambd) * base + lambd * teacher, 0)
    norms = []
    for logits in (target, torch.zeros(3, dtype=torch.float64)):
        leaf = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(leaf, 0)
        score = extrapolated_log_ratio(logprobs.detach(), teacher, base, lambd)
        (logprobs.detach().exp() * score * logprobs).sum().backward()
        norms.append(leaf.grad.norm().item())
    assert norms[0] < 1e-15 and norms[1] > 0.1
