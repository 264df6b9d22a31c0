"""The critic's loss: hand-worked cases and where the gradient ends."""

from __future__ import annotations

import pytest
import torch

from roll_opd.algorithms.value_loss import value_loss


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "clipped", "gradient"),
    [
        (1.0, 0.0, 3.0, None, 2.0, 0, -2.0),  # 0.5 * 4
        (1.0, 0.0, 3.0, 0.5, 3.125, 1, 0.0),  # went 1 towards 3, 0.5 allowed: 0.5 * 2.5^2, no further
        (0.4, 0.0, 3.0, 0.5, 3.38, 0, -2.6),  # inside: 0.5 * 2.6^2
        (-1.0, 0.0, 3.0, 0.5, 8.0, 0, -4.0),  # went away from the target: the larger loss, with its gradient
        (-1.0, 0.0, -3.0, 0.5, 3.125, 1, 0.0),
        (2.0, 2.0, 2.0, 0.5, 0.0, 0, 0.0),
    ],
)
def test_by_hand(
    value: float, old: float, target: float, clip: float | None, loss: float, clipped: int, gradient: float
) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    got, stats = value_loss(values, torch.tensor([old]).double(), torch.tensor([target]).double(), clip)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert stats["clipped"].item() == clipped
    assert stats["squared_error"].item() == pytest.approx((value - target) ** 2)
    assert values.grad.item() == pytest.approx(gradient)


def test_at_the_old_values_the_clip_changes_nothing() -> None:
    old = torch.tensor([0.3, -1.0, 2.0])
    returns = torch.tensor([1.0, -1.5, 2.0])
    gradients = []
    for clip in (None, 0.2):
        values = old.clone().requires_grad_()
        value_loss(values, old, returns, clip)[0].sum().backward()
        gradients.append(values.grad)
    assert gradients[0].tolist() == pytest.approx([-0.7, 0.5, 0.0]) == gradients[1].tolist()


def test_no_gradient_to_targets_and_no_tokens() -> None:
    old, returns = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss, stats = value_loss(torch.full((2,), 0.5, requires_grad=True), old, returns, 0.2)
    loss.sum().backward()
    assert old.grad is None and returns.grad is None and not any(s.requires_grad for s in stats.values())
    empty, stats = value_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0.2)
    assert empty.shape == (0,) == stats["clipped"].shape
