"""Every divergence's score, loss and value over buckets: by hand, and expected gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.divergences import (
    DIVERGENCES,
    bucket_divergence,
    bucket_score,
    direct_sampled_loss,
    policy_gradient_score,
)

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


# --- a loss on sampled tokens -----------------------------------------------------------------------------------------


def pair(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's logits, which want a gradient, and a teacher's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    return logits, torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(2).log_softmax(-1)


def direct_gradients(name: str, logits: torch.Tensor, teacher: torch.Tensor, clip: float | None = None):
    """Gradient of the loss of each token with respect to the logits: ``[V, V]``, a row a sampled token."""
    vocab = logits.shape[-1]
    logprobs = logits.log_softmax(-1)
    losses = direct_sampled_loss(name, logprobs, teacher, clip)
    return torch.stack([torch.autograd.grad(losses[v], logits, retain_graph=True)[0] for v in range(vocab)])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_expected_gradient_of_the_direct_loss_is_that_of_the_divergence(name: str) -> None:
    """All 16 tokens enumerated, fp64. The tokens are samples: what weighs them is a constant."""
    logits, teacher = pair(16, seed=5)
    student = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(divergence_of(name, 0.5, student, teacher), logits, retain_graph=True)
    got = student.exp().detach() @ direct_gradients(name, logits, teacher)
    assert expected.abs().max() > 0.01
    assert (got - expected).abs().max() <= 1e-6
    # The other divergence's gradient is another one: the test can tell k2 from k3.
    other = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}[name]
    (wrong,) = torch.autograd.grad(divergence_of(other, 0.5, student, teacher), logits)
    assert (got - wrong).abs().max() > 0.01


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_sampled_gradient_of_the_direct_loss_agrees(name: str) -> None:
    """Monte Carlo: the mean over 200,000 samples, within five standard errors, and these are small."""
    generator = torch.Generator().manual_seed(6)
    logits, teacher = pair(8, seed=7)
    student = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(divergence_of(name, 0.5, student, teacher), logits, retain_graph=True)
    tokens = torch.multinomial(student.detach().exp(), 200_000, replacement=True, generator=generator)
    samples = direct_gradients(name, logits, teacher)[tokens]
    error = samples.std(dim=0) / math.sqrt(len(tokens))
    assert error.max() <= 0.1 * expected.abs().max()
    assert ((samples.mean(dim=0) - expected).abs() <= 5 * error).all()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_slope_of_the_direct_loss_is_minus_the_score(name: str, clip: float | None) -> None:
    """One estimator, as loss and as advantage; the clip bounds ``d`` in both, and the slope stays beyond it."""
    d = torch.tensor([-3.0, -0.7, -0.2, 0.0, 0.5, 0.7, 4.0], dtype=torch.float64)
    student = (d - 5.0).requires_grad_()
    teacher = torch.full_like(d, -5.0).requires_grad_()
    direct_sampled_loss(name, student, teacher, clip).sum().backward()
    bounded = d if clip is None else d.clamp(-clip, clip)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, -policy_gradient_score(name, bounded))
    assert teacher.grad is None  # a target, not a parameter
    assert (student.grad != 0).tolist() == (d != 0).tolist()


def test_direct_loss_by_hand() -> None:
    """Student 0.25, teacher 0.5: d = -log 2, r = 2. k2 = (log 2)^2 / 2, k3 = 2 - 1 - log 2."""
    student, teacher = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    assert direct_sampled_loss("reverse_kl", student, teacher).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert direct_sampled_loss("forward_kl", student, teacher).item() == pytest.approx(1 - math.log(2))
    # Bounded at 0.5: 0.5^2 / 2 there, then a line of slope 0.5 over the remaining log 2 - 0.5.
    clipped = direct_sampled_loss("reverse_kl", student, teacher, 0.5).item()
    assert clipped == pytest.approx(0.125 + 0.5 * (math.log(2) - 0.5))


def test_k1_as_a_direct_loss_has_no_expected_gradient() -> None:
    """``d`` itself: E_pi[grad log pi] = 0 whatever the teacher says. The reason why it is refused."""
    logits, teacher = pair(16, seed=8)
    student = logits.log_softmax(-1)
    (got,) = torch.autograd.grad((student.detach().exp() * (student - teacher)).sum(), logits)
    assert got.abs().max() <= 1e-12


def test_jsd_has_no_direct_loss_on_samples() -> None:
    with pytest.raises(ValueError, match="'jsd' has no direct loss on sampled tokens"):
        direct_sampled_loss("jsd", torch.zeros(1), torch.zeros(1))


# --- buckets ----------------------------------------------------------------------------------------------------------


def coarse(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The named tokens, and the rest as one bucket."""
    inside = torch.zeros(logprobs.shape[-1], dtype=torch.bool).index_fill(0, ids, True)
    return torch.cat([logprobs[..., ids], logprobs[..., ~inside].logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_buckets_are_the_divergence_of_the_coarsened_distributions(name: str, beta: float) -> None:
    """Value from the definition; no more than the full divergence, equal to it where the tail is empty."""
    logits, teacher = pair(4, 16, seed=9)
    student = logits.log_softmax(-1)
    full = torch.stack([divergence_of(name, beta, p, q) for p, q in zip(student, teacher, strict=True)])
    assert (bucket_divergence(name, student, teacher, beta) - full).abs().max() <= 1e-12
    top = bucket_divergence(name, coarse(student, torch.arange(3)), coarse(teacher, torch.arange(3)), beta)
    assert (top > 0).all() and (top < full).all()
    everything = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    p, q = coarse(student, everything), coarse(teacher, everything)
    assert (p[:, -1] == -math.inf).all()
    whole = bucket_divergence(name, p, q, beta)
    assert (whole - full).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_bucket_score_is_the_derivative_by_the_log_mass(name: str, beta: float) -> None:
    """Also where the masses do not sum to 1."""
    generator = torch.Generator().manual_seed(10)
    p, q = (torch.randn(5, 6, dtype=torch.float64, generator=generator) - 2 for _ in range(2))
    p.requires_grad_()
    (expected,) = torch.autograd.grad(bucket_divergence(name, p, q, beta).sum(), p)
    assert (bucket_score(name, p.detach(), q, beta) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_buckets_that_are_impossible_on_both_sides_do_not_count(name: str, beta: float) -> None:
    logits, teacher = pair(3, 6, seed=11)
    padding = torch.full((3, 2), -math.inf, dtype=torch.float64)
    value, gradients = [], []
    for pad in (padding[:, :0], padding):
        p = torch.cat([logits, pad], -1).log_softmax(-1)
        q = torch.cat([teacher, pad], -1)
        value.append(bucket_divergence(name, p, q, beta))
        gradients.append(torch.autograd.grad(value[-1].sum(), logits)[0])
        assert torch.isfinite(bucket_score(name, p.detach(), q, beta)).all()
    torch.testing.assert_close(value[0], value[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_buckets_impossible_on_one_side_take_the_limit() -> None:
    """P = (1/2, 1/2, 0), Q = (1/2, 0, 1/2)."""
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    assert bucket_divergence("reverse_kl", p, q).item() == math.inf
    assert bucket_divergence("forward_kl", p, q).item() == math.inf
    # Where only Q has mass the reverse KL is finite: KL((1/2, 1/2, 0) || (1/4, 1/2, 1/4)) = log(2) / 2.
    wider = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    assert bucket_divergence("reverse_kl", p, wider).item() == pytest.approx(math.log(2) / 2)
    # KL((1/2, 0, 1/2) || (1/4, 1/2, 1/4)) = log 2, with the roles swapped.
    assert bucket_divergence("forward_kl", wider, q).item() == pytest.approx(math.log(2))
    # M = (1/2, 1/4, 1/4): JSD = 1/2 (1/2 log 2) + 1/2 (1/2 log 2).
    jsd = bucket_divergence("jsd", p, q)
    assert jsd.item() == pytest.approx(math.log(2) / 2)
    jsd.sum().backward()
    assert p.grad is not None
    # (1 - beta) P log(P / M) = (0, 1/4 log 2, 0)
    assert p.grad[0].tolist() == pytest.approx([0, math.log(2) / 4, 0])
    torch.testing.assert_close(bucket_score("jsd", p.detach(), q), p.grad)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_never_negative(name: str, beta: float) -> None:
    """Random pairs over 2 to 16 buckets, from nearly equal to far apart."""
    generator = torch.Generator().manual_seed(12)
    for trial in range(200):
        size, near = 2 + trial % 15, 10.0 ** (1 - trial % 6)
        logits = torch.randn(8, size, dtype=torch.float64, generator=generator).mul_(3)
        other = logits + near * torch.randn(8, size, dtype=torch.float64, generator=generator)
        value = bucket_divergence(name, logits.log_softmax(-1), other.log_softmax(-1), beta)
        assert value.min() >= -1e-14 and value.max() > 0


@pytest.mark.parametrize("function", [bucket_divergence, bucket_score])
def test_an_unknown_divergence_over_buckets_is_refused(function) -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        function("kl", torch.zeros(1, 1), torch.zeros(1, 1))
