"""KL estimates: values by hand, gradients against autograd of the divergence each is said to follow, controllers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from roll_opd.algorithms.kl import KL_ESTIMATES, AdaptiveKLController, FixedKLController, kl_estimate

LOGITS = torch.tensor([0.3, -1.0, 1.2, 0.1, -0.4], dtype=torch.float64)
REF_LOGPROBS = torch.log_softmax(torch.tensor([-0.5, 0.7, 0.2, 0.9, -1.5], dtype=torch.float64), 0)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # d = logprob - ref = [0.5, -0.5, 0]
        ("kl", [0.5, -0.5, 0.0]),
        ("abs", [0.5, 0.5, 0.0]),
        ("mse", [0.125, 0.125, 0.0]),
        # e^-0.5 - 1 + 0.5 and e^0.5 - 1 - 0.5
        ("k3", [0.1065306597, 0.1487212707, 0.0]),
    ],
)
def test_values_by_hand(kind: str, values: list[float]) -> None:
    logprobs = torch.tensor([-1.0, -1.5, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -2.0], dtype=torch.float64)
    assert kl_estimate(kind, logprobs, ref).tolist() == pytest.approx(values, abs=1e-10)


def test_every_kind_has_a_hand_computed_case() -> None:
    cases = test_values_by_hand.pytestmark[0].args[1]
    assert {case[0] for case in cases} == set(KL_ESTIMATES)


def divergence(kind: str, logprobs: Tensor) -> Tensor:
    """What the expected gradient of an estimate is the gradient of."""
    p, q = logprobs.exp(), REF_LOGPROBS.exp()
    if kind == "kl":
        return (p * 0.0).sum()
    if kind == "abs":
        return (p - q).abs().sum()
    if kind == "mse":
        return (p * (logprobs - REF_LOGPROBS)).sum()
    return (q * (REF_LOGPROBS - logprobs)).sum()


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_expected_gradient_is_the_one_named(kind: str) -> None:
    named = LOGITS.clone().requires_grad_()
    divergence(kind, torch.log_softmax(named, 0)).backward()
    sampled = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(sampled, 0)
    # The expectation over sampled tokens: the probabilities only say how often each comes.
    (logprobs.detach().exp() * kl_estimate(kind, logprobs, REF_LOGPROBS)).sum().backward()
    assert torch.allclose(sampled.grad, named.grad, atol=1e-14, rtol=0)
    assert kind == "kl" or named.grad.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_expected_value_is_the_reverse_kl(kind: str) -> None:
    logprobs = torch.log_softmax(LOGITS, 0)
    expected = (logprobs.exp() * kl_estimate(kind, logprobs, REF_LOGPROBS)).sum()
    assert expected.item() == pytest.approx((logprobs.exp() * (logprobs - REF_LOGPROBS)).sum().item(), abs=1e-14)
    assert expected.item() > 0.1


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_absurd_ratios_stay_finite_and_the_reference_gets_no_gradient(kind: str) -> None:
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -500.0], requires_grad=True)
    values = kl_estimate(kind, logprobs, ref)
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(logprobs.grad).all()
    assert ref.grad is None


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="full"):
        kl_estimate("full", torch.zeros(1), torch.zeros(1))


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # error 0.1: 1 + 0.1 * 0.1
    assert controller.coef == pytest.approx(0.2 * 1.01, rel=1e-12)
    controller.update(60.0, 100)  # error 9, cut to 0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02, rel=1e-12)
    controller.update(0.0, 500)  # error -1, cut to -0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.9, rel=1e-12)
    controller.update(6.0, 500)
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.9, rel=1e-12)


def test_a_batch_beyond_the_horizon_cannot_turn_the_sign() -> None:
    controller = AdaptiveKLController(0.2, target=1.0, horizon=10)
    controller.update(0.0, 1000)
    assert controller.coef == pytest.approx(0.2 * 0.8)


def test_controllers_go_on_from_their_state() -> None:
    first, second = AdaptiveKLController(0.2, 1.0, 100), AdaptiveKLController(0.9, 1.0, 100)
    first.update(2.0, 10)
    second.load(first.state())
    first.update(0.5, 7)
    second.update(0.5, 7)
    assert first.coef == second.coef != 0.2
    fixed = FixedKLController(0.3)
    fixed.update(100.0, 1000)
    fixed.load(first.state())
    assert fixed.coef == 0.3 and fixed.state() == {}


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, -1.0), (0.1, math.nan, 1.0)])
def test_controller_refuses_what_it_cannot_divide_by(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKLController(*numbers)
