"""The teacher's signal: sign, mask, clip, coefficients, and its gradient against autograd of the full reverse KL."""

from __future__ import annotations

import pytest
import torch

from roll_opd.algorithms.opd import log_ratio, opd_advantages

ALL = torch.ones(4, dtype=torch.bool)


def test_a_token_the_teacher_prefers_gets_a_positive_advantage() -> None:
    # student gives it 1/8, teacher 1/2: A = log(1/2) - log(1/8) = log 4.
    d = log_ratio(torch.tensor([0.125]).log(), torch.tensor([0.5]).log(), torch.tensor([True]))
    assert d.item() == pytest.approx(-1.3862944, abs=1e-6)
    assert opd_advantages([d], [1.0]).item() == pytest.approx(1.3862944, abs=1e-6)


def test_by_hand_with_mask_and_clip() -> None:
    student = torch.tensor([-1.0, -2.0, -0.5, -9.0])
    teacher = torch.tensor([-3.0, -1.5, -0.5, -1.0])
    assert log_ratio(student, teacher, ALL).tolist() == [2.0, -0.5, 0.0, -8.0]
    mask = torch.tensor([False, True, True, True])
    assert log_ratio(student, teacher, mask).tolist() == [0.0, -0.5, 0.0, -8.0]
    assert log_ratio(student, teacher, ALL, clip=1.5).tolist() == [1.5, -0.5, 0.0, -1.5]


def test_the_mask_hides_whatever_lies_beneath_it() -> None:
    mask = torch.tensor([True, False, False, True])
    student = torch.tensor([-1.0, float("nan"), float("-inf"), -2.0])
    teacher = torch.tensor([-2.0, float("inf"), float("-inf"), -1.0])
    assert log_ratio(student, teacher, mask).tolist() == [1.0, 0.0, 0.0, -1.0]


def test_teacher_equal_to_student_is_no_signal() -> None:
    logprobs = torch.randn(4)
    assert opd_advantages([log_ratio(logprobs, logprobs.clone(), ALL)], [3.0]).abs().max() == 0


def test_teachers_are_summed_with_their_coefficients() -> None:
    # -(2 * 1 + 0.5 * 4) and -(2 * -3 + 0.5 * 0)
    assert opd_advantages([torch.tensor([1.0, -3.0]), torch.tensor([4.0, 0.0])], [2.0, 0.5]).tolist() == [-4.0, 6.0]


@pytest.mark.parametrize(("ratios", "coefs"), [([], []), ([torch.zeros(1)], []), ([torch.zeros(1)], [1.0, 2.0])])
def test_coefficients_must_match_teachers(ratios: list, coefs: list) -> None:
    with pytest.raises(ValueError, match="coefficients"):
        opd_advantages(ratios, coefs)


def test_no_gradient_flows_through_the_log_ratio() -> None:
    student = torch.randn(4, requires_grad=True)
    teacher = torch.randn(4, requires_grad=True)
    assert not log_ratio(student, teacher, ALL).requires_grad


def _both_gradients(coef: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient by logits of ``-E[A log pi]`` enumerated over the vocabulary, and of ``c * KL(student || teacher)``."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 7, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    teacher = torch.randn(3, 7, dtype=torch.float64, generator=generator).mul_(2).log_softmax(-1)
    logprobs = logits.log_softmax(-1)

    divergence = coef * (logprobs.exp() * (logprobs - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)

    # The estimator: every token is sampled with its probability; its advantage is the weight of its log-probability.
    everything = torch.ones(21, dtype=torch.bool)
    advantages = opd_advantages([log_ratio(logprobs.flatten(), teacher.flatten(), everything)], [coef])
    surrogate = -(logprobs.detach().exp().flatten() * advantages * logprobs.flatten()).sum()
    (got,) = torch.autograd.grad(surrogate, logits)
    return got, expected


@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_expected_policy_gradient_is_that_of_the_full_reverse_kl(coef: float) -> None:
    got, expected = _both_gradients(coef)
    assert expected.abs().max() > 0.05
    assert (got - expected).abs().max() <= 1e-6


def test_descending_the_policy_gradient_lowers_the_reverse_kl() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(5).log_softmax(-1)
    logits = torch.randn(5, requires_grad=True)
    divergences = []
    for _ in range(200):
        logprobs = logits.log_softmax(-1)
        divergences.append(float((logprobs.exp() * (logprobs - teacher)).sum().detach()))
        advantages = opd_advantages([log_ratio(logprobs, teacher, torch.ones(5, dtype=torch.bool))], [1.0])
        (gradient,) = torch.autograd.grad(-(logprobs.detach().exp() * advantages * logprobs).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert divergences[-1] < 1e-3 < divergences[0]
