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


# Two sequences, interleaved; a third, of no tokens, is between them in number.
SEGMENTS = torch.tensor([0, 2, 0, 2, 2])
LOG_RATIOS = torch.tensor([0.3, -0.2, -0.1, 0.0, 0.8], dtype=torch.float64)
# Means: 0.1 and 0.2.
SEQUENCE_RATIOS = [math.exp(0.1), math.exp(0.2), math.exp(0.1), math.exp(0.2), math.exp(0.2)]


def test_one_ratio_for_each_sequence_by_hand() -> None:
    old = torch.full((5,), -2.0, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 3.0, -2.0, 0.5], dtype=torch.float64)
    logprobs = (old + LOG_RATIOS).requires_grad_()
    value, stats = PolicyLoss(None, None, ratio="seq")(logprobs, old, advantages, SEGMENTS, 3)
    assert stats["ratio"].tolist() == pytest.approx(SEQUENCE_RATIOS)
    assert value.tolist() == pytest.approx([-r * a for r, a in zip(SEQUENCE_RATIOS, advantages.tolist(), strict=True)])
    value.sum().backward()
    # Every token gets - ratio * (sum of its sequence's advantages) / (its length): 4/2 and -2.5/3.
    first, second = -math.exp(0.1) * 4.0 / 2, math.exp(0.2) * 2.5 / 3
    assert logprobs.grad.tolist() == pytest.approx([first, second, first, second, second])
    assert stats["old_minus_new"].tolist() == pytest.approx((-LOG_RATIOS).tolist())


def test_a_single_tokens_loss_reaches_all_tokens_of_its_sequence_and_no_other() -> None:
    old = torch.zeros(5, dtype=torch.float64)
    logprobs = LOG_RATIOS.clone().requires_grad_()
    value, _ = PolicyLoss(ratio="seq")(logprobs, old, torch.ones(5, dtype=torch.float64), SEGMENTS, 3)
    value[0].backward()
    share = -math.exp(0.1) / 2
    assert logprobs.grad.tolist() == pytest.approx([share, 0.0, share, 0.0, 0.0])


def test_the_clip_acts_on_the_sequence_ratio() -> None:
    old = torch.zeros(5, dtype=torch.float64)
    logprobs = LOG_RATIOS.clone().requires_grad_()
    # e^0.1 = 1.105 is inside 1.15, e^0.2 = 1.221 is not, although one of its tokens went down.
    value, stats = PolicyLoss(0.15, 0.15, ratio="seq")(logprobs, old, torch.ones(5, dtype=torch.float64), SEGMENTS, 3)
    value.sum().backward()
    assert stats["clipped"].tolist() == [0, 1, 0, 1, 1]
    assert value.tolist() == pytest.approx([-math.exp(0.1), -1.15, -math.exp(0.1), -1.15, -1.15])
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1), 0.0, -math.exp(0.1), 0.0, 0.0])


@pytest.mark.parametrize("ratio", ["token", "seq", "turn"])
def test_packing_order_does_not_matter(ratio: str) -> None:
    generator = torch.Generator().manual_seed(5)
    segments = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    old = -torch.rand(10, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(10, generator=generator, dtype=torch.float64)
    advantages = torch.randn(10, generator=generator, dtype=torch.float64)
    loss = PolicyLoss(0.2, 0.28, 3.0, ratio)  # type: ignore[arg-type]

    def gradient(order: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = new[order].requires_grad_()
        value, _ = loss(logprobs, old[order], advantages[order], names[segments[order]], 4)
        value.sum().backward()
        back = torch.argsort(order)
        return value.detach()[back], logprobs.grad[back]

    straight = gradient(torch.arange(10), torch.arange(4))
    for _ in range(5):
        order, names = torch.randperm(10, generator=generator), torch.randperm(4, generator=generator)
        for got, wanted in zip(gradient(order, names), straight, strict=True):
            assert torch.allclose(got, wanted, atol=1e-14, rtol=0)

    # Split over two calls, sequences whole.
    for part, count in ((segments < 2, 2), (segments >= 2, 2)):
        value, _ = loss(new[part], old[part], advantages[part], segments[part] % 2, count)
        assert torch.allclose(value, straight[0][part], atol=1e-14, rtol=0)


def test_for_one_token_sequences_both_ratios_are_the_same() -> None:
    old, advantages = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    by_token, _ = PolicyLoss()(LOG_RATIOS, old, advantages)
    by_sequence, _ = PolicyLoss(ratio="seq")(LOG_RATIOS, old, advantages, torch.arange(5), 5)
    assert torch.equal(by_token, by_sequence)


def test_what_is_refused() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="segments"):
        PolicyLoss(ratio="seq")(zeros, zeros, zeros)
    with pytest.raises(ValueError, match="token, seq"):
        PolicyLoss(ratio="sequence")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both"):
        PolicyLoss(0.2, None)


def test_an_absurd_ratio_stays_finite() -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    value, _ = PolicyLoss(None, None)(logprobs, torch.tensor([-500.0]), torch.tensor([-1.0]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logprobs.grad).all()


def test_no_tokens_no_loss() -> None:
    empty = torch.zeros(0)
    for ratio in ("token", "seq"):
        value, stats = PolicyLoss(0.2, 0.2, 3.0, ratio)(empty, empty, empty, empty.long(), 0)  # type: ignore[arg-type]
        assert value.shape == (0,) and all(v.shape == (0,) for v in stats.values())
