"""The clipped loss: hand-worked cases, both signs of the advantage, and no gradient where it is clipped."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.policy_loss import PolicyLoss


def run(loss: PolicyLoss, ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, clipped, and derivative by the log-probability, at a ratio."""
    old = torch.tensor([-3.0], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    value, stats = loss(new, old, torch.tensor([advantage], dtype=torch.float64))
    value.sum().backward()
    assert stats["ratio"].item() == pytest.approx(ratio)
    assert stats["old_minus_new"].item() == pytest.approx(-math.log(ratio))
    return value.item(), stats["clipped"].item(), new.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.1, 2.0, -2.2, 0),
        (1.5, 2.0, -2.4, 1),  # up already, and wanted up: stop at 1.2
        (0.5, 2.0, -1.0, 0),  # down, but wanted up: the pessimistic side keeps the gradient
        (1.0, -2.0, 2.0, 0),
        (0.9, -2.0, 1.8, 0),
        (0.5, -2.0, 1.6, 1),  # down already, and wanted down: stop at 0.8
        (1.5, -2.0, 3.0, 0),  # up, but wanted down
    ],
)
def test_symmetric_clip_by_hand(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    value, was_clipped, gradient = run(PolicyLoss(0.2, 0.2), ratio, advantage)
    assert (value, was_clipped) == (pytest.approx(loss), clipped)
    # d(-r A)/d logprob = -r A, and nothing at all where clipped.
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.25, 1.0, -1.25, 0),
        (1.5, 1.0, -1.3, 1),
        (0.85, -1.0, 0.9, 1),
        (0.95, -1.0, 0.95, 0),
    ],
)
def test_asymmetric_bounds(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    value, was_clipped, gradient = run(PolicyLoss(clip_low=0.1, clip_high=0.3), ratio, advantage)
    assert (value, was_clipped) == (pytest.approx(loss), clipped)
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (5.0, -1.0, 3.0, 1),  # 5 bounded by 3
        (2.0, -1.0, 2.0, 0),
        (5.0, 1.0, -1.2, 1),  # positive advantage: the ordinary clip, no ceiling
        (0.5, -1.0, 0.8, 1),
    ],
)
def test_dual_clip(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    value, was_clipped, gradient = run(PolicyLoss(0.2, 0.2, dual_clip=3.0), ratio, advantage)
    assert (value, was_clipped) == (pytest.approx(loss), clipped)
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_without_a_clip_the_loss_is_plain() -> None:
    assert run(PolicyLoss(None, None), 5.0, 2.0) == (pytest.approx(-10.0), 0, pytest.approx(-10.0))


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient() -> None:
    for loss in (PolicyLoss(), PolicyLoss(0.0, 0.0), PolicyLoss(None, None), PolicyLoss(0.2, 0.28, 3.0)):
        logprobs = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
        advantages = torch.tensor([0.5, -4.0, 0.0])
        value, stats = loss(logprobs, logprobs.detach().clone(), advantages)
        value.sum().backward()
        assert logprobs.grad.tolist() == pytest.approx([-0.5, 4.0, 0.0])
        assert stats["clipped"].sum() == 0


def test_no_gradient_to_old_logprobs_or_advantages() -> None:
    old, advantages = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    value, stats = PolicyLoss()(torch.zeros(3, requires_grad=True), old, advantages)
    value.sum().backward()
    assert old.grad is None and advantages.grad is None
    assert not any(values.requires_grad for values in stats.values())


def test_entropy_bonus_lowers_the_loss_and_must_be_computed() -> None:
    zeros, entropy = torch.zeros(2), torch.tensor([1.0, 3.0], requires_grad=True)
    value, _ = PolicyLoss(entropy_coef=0.1)(zeros, zeros, torch.tensor([1.0, 1.0]), entropy)
    assert value.tolist() == pytest.approx([-1.1, -1.3])
    value.sum().backward()
    assert entropy.grad.tolist() == pytest.approx([-0.1, -0.1])
    with pytest.raises(ValueError, match="entropy"):
        PolicyLoss(entropy_coef=0.1)(zeros, zeros, zeros)


def test_an_absurd_ratio_stays_finite() -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    value, _ = PolicyLoss(None, None)(logprobs, torch.tensor([-500.0]), torch.tensor([-1.0]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logprobs.grad).all()


def test_no_tokens_no_loss() -> None:
    empty = torch.zeros(0)
    value, stats = PolicyLoss(0.2, 0.2, 3.0)(empty, empty, empty)
    assert value.shape == (0,) and all(v.shape == (0,) for v in stats.values())
