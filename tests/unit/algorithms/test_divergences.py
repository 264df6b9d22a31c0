"""Every divergence's score: by hand, and its expected gradient against autograd of the divergence itself."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.divergences import DIVERGENCES, policy_gradient_score

CASES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def divergence_of(name: str, beta: float, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The named divergence over the whole vocabulary, from its definition; arguments are log-probabilities."""
    p, q = student.exp(), teacher.exp()
    if name == "reverse_kl":
        return (p * (student - teacher)).sum()
    if name == "forward_kl":
        return (q * (teacher - student)).sum()
    mixture = (beta * q + (1 - beta) * p).log()
    return (beta * q * (teacher - mixture) + (1 - beta) * p * (student - mixture)).sum()


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_expected_gradient_is_that_of_the_divergence(name: str, beta: float) -> None:
    """All tokens enumerated, 16 of them, fp64."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 16, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    teacher = torch.randn(4, 16, dtype=torch.float64, generator=generator).mul_(2).log_softmax(-1)
    student = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(divergence_of(name, beta, student, teacher), logits, retain_graph=True)
    score = policy_gradient_score(name, (student - teacher).detach(), beta)
    (got,) = torch.autograd.grad(-(student.detach().exp() * score * student).sum(), logits)
    assert expected.abs().max() > 0.01
    assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_sampled_gradient_agrees(name: str, beta: float) -> None:
    """Monte Carlo: the mean over samples of score x gradient, within five standard errors."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(8, dtype=torch.float64, generator=generator).log_softmax(-1)
    student = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(divergence_of(name, beta, student, teacher), logits, retain_graph=True)
    tokens = torch.multinomial(student.detach().exp(), 200_000, replacement=True, generator=generator)
    score = policy_gradient_score(name, (student - teacher).detach()[tokens], beta)
    one_hot = torch.nn.functional.one_hot(tokens, 8).double()
    samples = -score[:, None] * (one_hot - student.detach().exp())
    error = samples.std(dim=0) / math.sqrt(len(tokens))
    assert ((samples.mean(dim=0) - expected).abs() <= 5 * error).all()


def test_by_hand() -> None:
    """Teacher 0.5, student 0.25: d = -log 2, r = 2."""
    d = torch.tensor([-math.log(2.0)], dtype=torch.float64)
    assert policy_gradient_score("reverse_kl", d).item() == pytest.approx(math.log(2.0))
    assert policy_gradient_score("forward_kl", d).item() == pytest.approx(1.0)
    # 0.75 log(0.25 * 2 + 0.75) = 0.75 log 1.25
    assert policy_gradient_score("jsd", d, 0.25).item() == pytest.approx(0.75 * math.log(1.25))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_signal_where_student_and_teacher_agree(name: str) -> None:
    assert policy_gradient_score(name, torch.zeros(3), 0.3).abs().max() <= 1e-7


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_the_teacher_prefers_gets_a_positive_score(name: str) -> None:
    scores = policy_gradient_score(name, torch.tensor([-1.0, 1.0]), 0.3)
    assert scores[0] > 0 > scores[1]


def test_jsd_stays_finite_where_the_teacher_is_far_surer() -> None:
    assert policy_gradient_score("jsd", torch.tensor([-200.0]), 0.5).item() == pytest.approx(0.5 * (200 - math.log(2)))


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        policy_gradient_score("kl", torch.zeros(1))
