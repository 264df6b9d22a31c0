"""The loss of a token: each component by hand, their sum, and which of them a weight reaches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from roll_opd.algorithms.divergences import DIVERGENCES, bucket_divergence
from roll_opd.algorithms.kl import KL_ESTIMATES, kl_estimate
from roll_opd.algorithms.loss import DivergenceLoss, Loss, LossInputs
from roll_opd.algorithms.policy_loss import PolicyLoss

LOGPROBS = [-1.0, -2.0, -0.5]
PLAIN = PolicyLoss(None, None)
"""-ratio * A: what there is to hand-compute without a clip."""


def inputs(**changes) -> LossInputs:
    """Two sequences of two tokens and one; the old policy is the current one, so every ratio is 1."""
    logprobs = torch.tensor(LOGPROBS)
    values = {
        "logprobs": logprobs.clone().requires_grad_(),
        "entropy": torch.tensor([0.5, 1.0, 2.0], requires_grad=True),
        "old_logprobs": logprobs,
        "advantages": torch.tensor([1.0, -2.0, 3.0]),
        "policy_weights": torch.ones(3),
        "segments": torch.tensor([0, 0, 1]),
        "num_segments": 2,
    }
    return LossInputs(**(values | changes))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def same(got: torch.Tensor, expected: list[float]) -> None:
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_policy_component() -> None:
    loss, stats = Loss(PLAIN)(inputs())
    same(loss, [-1.0, 2.0, -3.0])
    assert sorted(stats) == ["clipped", "old_minus_new", "policy_loss", "ratio"]
    same(stats["policy_loss"], [-1.0, 2.0, -3.0])
    assert not any(values.requires_grad for values in stats.values())


def test_the_policy_component_is_clipped_by_its_own_numbers() -> None:
    # The ratios are 2, 1/2 and 2: A > 0 is cut at 1.2, A < 0 at 0.8 from below (the maximum of 1 and 1.6), 3 at 1.2.
    old = tensor(*LOGPROBS) - tensor(math.log(2), -math.log(2), math.log(2))
    loss, stats = Loss(PolicyLoss(0.2, 0.2))(inputs(old_logprobs=old))
    same(loss, [-1.2, 1.6, -3.6])
    assert stats["clipped"].tolist() == [1.0, 1.0, 1.0]
    same(stats["ratio"], [2.0, 0.5, 2.0])


def test_one_ratio_per_sequence() -> None:
    # Differences 0.4 and 0 in the first sequence, 0.3 in the second: ratios exp(0.2), exp(0.2), exp(0.3).
    old = tensor(*LOGPROBS) - tensor(0.4, 0.0, 0.3)
    loss, _ = Loss(PolicyLoss(None, None, ratio="seq"))(inputs(old_logprobs=old))
    same(loss, [-math.exp(0.2), 2 * math.exp(0.2), -3 * math.exp(0.3)])


def test_policy_weights_reach_the_policy_alone() -> None:
    x = inputs(
        policy_weights=tensor(0.5, 0.0, 2.0),
        ref_logprobs=tensor(-1.5, -1.0, -0.5),
        divergences={"a": tensor(0.1, 0.2, 0.3)},
        divergence_weights={"a": tensor(1.0, 1.0, 1.0)},
    )
    loss, stats = Loss(PLAIN, DivergenceLoss(), entropy_coef=0.1, kl_coef=2.0, kl_kind="mse")(x)
    # policy -0.5, 0, -6; divergence 0.1, 0.2, 0.3; KL 2 * d^2 / 2 with d = 0.5, -1, 0; entropy 0.05, 0.1, 0.2
    same(loss, [-0.5 + 0.1 + 0.25 - 0.05, 0.2 + 1.0 - 0.1, -6.0 + 0.3 - 0.2])
    same(stats["policy_loss"], [-0.5, 0.0, -6.0])
    same(stats["divergence_loss"], [0.1, 0.2, 0.3])
    same(stats["kl_loss"], [0.125, 0.5, 0.0])


def test_divergences_are_summed_with_the_weight_of_each_token() -> None:
    x = inputs(
        divergences={"a": tensor(1.0, 2.0, 3.0), "b": tensor(10.0, 20.0, 30.0)},
        divergence_weights={"a": tensor(1.0, 0.5, 0.0), "b": tensor(0.1, 0.0, 0.2)},
    )
    loss, stats = Loss(PLAIN, DivergenceLoss())(x)
    same(loss - torch.tensor([-1.0, 2.0, -3.0]), [2.0, 1.0, 6.0])
    same(stats["divergence_loss"], [2.0, 1.0, 6.0])
    assert not stats["divergence_loss"].requires_grad


@pytest.mark.parametrize(
    ("divergence", "clip", "values", "slopes"),
    [
        # d = 2, -0.5, 0: d^2 / 2 with slope d, and exp(-d) - 1 + d with slope 1 - exp(-d)
        ("reverse_kl", None, [2.0, 0.125, 0.0], [2.0, -0.5, 0.0]),
        ("forward_kl", None, [math.exp(-2) + 1, math.exp(0.5) - 1.5, 0.0], [1 - math.exp(-2), 1 - math.exp(0.5), 0.0]),
        # beyond the bound of 1 a straight line: 1/2 + 1 * (2 - 1)
        ("reverse_kl", 1.0, [1.5, 0.125, 0.0], [1.0, -0.5, 0.0]),
    ],
)
def test_the_divergence_of_the_sampled_token(divergence, clip, values, slopes) -> None:
    x = inputs(
        advantages=torch.zeros(3),
        teacher_logprobs={"a": tensor(-3.0, -1.5, -0.5)},
        divergence_weights={"a": torch.full((3,), 2.0)},
    )
    loss, _ = Loss(PLAIN, DivergenceLoss(divergence, "sampled", log_ratio_clip=clip))(x)
    same(loss, [2.0 * v for v in values])
    loss.sum().backward()
    same(x.logprobs.grad, [2.0 * s for s in slopes])


def test_a_sampled_divergence_does_not_read_what_the_head_made() -> None:
    x = inputs(
        teacher_logprobs={"a": tensor(*LOGPROBS)},
        divergences={"a": torch.full((3,), 1e6)},
        divergence_weights={"a": torch.ones(3)},
    )
    same(Loss(PLAIN, DivergenceLoss(support="sampled"))(x)[0], [-1.0, 2.0, -3.0])


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_the_kl_component(kind) -> None:
    reference = tensor(-1.5, -1.0, -1.5)
    x = inputs(advantages=torch.zeros(3), ref_logprobs=reference)
    loss, stats = Loss(PLAIN, kl_coef=0.5, kl_kind=kind)(x)
    expected = kl_estimate(kind, tensor(*LOGPROBS), reference)
    same(loss, (0.5 * expected).tolist())
    same(stats["kl_loss"], expected.tolist())


def test_a_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference"):
        Loss(kl_coef=0.1)(inputs())
    Loss(kl_coef=0.0)(inputs())


def test_the_entropy_component_pulls_towards_more_of_it() -> None:
    x = inputs(advantages=torch.zeros(3))
    loss, _ = Loss(PLAIN, entropy_coef=0.3)(x)
    same(loss, [-0.15, -0.3, -0.6])
    loss.sum().backward()
    assert x.entropy.grad.tolist() == pytest.approx([-0.3] * 3)
    off = inputs()
    Loss(PLAIN)(off)[0].sum().backward()
    assert off.entropy.grad is None


def test_what_is_switched_off_is_not_computed() -> None:
    """A run without a divergence may carry a teacher's numbers; they must not show."""
    x = inputs(
        ref_logprobs=tensor(-9.0, -9.0, -9.0),
        divergences={"a": torch.full((3,), 5.0)},
        divergence_weights={"a": torch.ones(3)},
    )
    loss, stats = Loss(PLAIN)(x)
    same(loss, [-1.0, 2.0, -3.0])
    assert "divergence_loss" not in stats and "kl_loss" not in stats


def test_the_sum_of_components_is_the_loss() -> None:
    x = inputs(
        policy_weights=tensor(0.5, 1.0, 2.0),
        ref_logprobs=tensor(-1.5, -1.0, -1.5),
        teacher_logprobs={"a": tensor(-3.0, -1.5, -0.5)},
        divergence_weights={"a": tensor(0.1, 0.2, 0.3)},
    )
    whole = Loss(PolicyLoss(), DivergenceLoss(support="sampled"), 0.2, 0.7, "k3")
    none = dataclasses.replace(x, policy_weights=torch.zeros(3))
    parts = [
        Loss(PolicyLoss())(x)[0],
        Loss(PolicyLoss(), whole.divergence)(none)[0],
        Loss(PolicyLoss(), entropy_coef=0.2)(none)[0],
        Loss(PolicyLoss(), kl_coef=0.7)(none)[0],
    ]
    assert all(part.abs().max() > 0.01 for part in parts)
    torch.testing.assert_close(whole(x)[0], torch.stack(parts).sum(0), atol=1e-6, rtol=0)


def test_only_the_student_gets_a_gradient() -> None:
    others = {
        "old_logprobs": torch.tensor(LOGPROBS, requires_grad=True),
        "advantages": torch.ones(3, requires_grad=True),
        "ref_logprobs": torch.full((3,), -1.0, requires_grad=True),
    }
    teacher = torch.full((3,), -1.0, requires_grad=True)
    x = inputs(**others, teacher_logprobs={"a": teacher}, divergence_weights={"a": torch.ones(3)})
    Loss(PLAIN, DivergenceLoss(support="sampled"), 0.1, 0.1)(x)[0].sum().backward()
    assert x.logprobs.grad.abs().min() > 0 and x.entropy.grad.abs().min() > 0
    assert teacher.grad is None and all(value.grad is None for value in others.values())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_of_the_head_is_taken_as_it_is(divergence) -> None:
    """Whatever its name: it has been formed where the logits are."""
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    value = bucket_divergence(divergence, student.log_softmax(-1), teacher)
    x = inputs(advantages=torch.zeros(3), divergences={"a": value}, divergence_weights={"a": tensor(1.0, 0.0, 2.0)})
    loss, _ = Loss(PLAIN, DivergenceLoss(divergence, "full"))(x)
    same(loss, (value * tensor(1.0, 0.0, 2.0)).tolist())
    loss.sum().backward()
    assert student.grad[0].abs().max() > 0 and student.grad[1].abs().max() == 0


def test_an_empty_row_is_an_empty_loss() -> None:
    none = torch.zeros(0)
    x = LossInputs(none, none, none, none, none, torch.zeros(0, dtype=torch.int64), 0, none, {"a": none}, {"a": none},
                   {"a": none})  # fmt: skip
    loss, stats = Loss(PolicyLoss(), DivergenceLoss(support="sampled"), 0.1, 0.1)(x)
    assert loss.shape == (0,) and all(values.shape == (0,) for values in stats.values())
