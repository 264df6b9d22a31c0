"""The sampler against the exact distribution, by chi-square with fixed seeds."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.sampler import sample, token_logprob

# Probabilities at temperature 1, deliberately not sorted; tokens 2 and 6 are impossible.
PROBS = torch.tensor([0.05, 0.30, 0.0, 0.02, 0.25, 0.08, 0.0, 0.30])
LOGITS = PROBS.log() + 3.0
DRAWS = 20_000


def p_value(chi_square: float, degrees: int) -> float:
    """Upper tail of the chi-square distribution: the regularised incomplete gamma function by its series."""
    a, x = degrees / 2, chi_square / 2
    term = total = 1.0 / a
    n = a
    while term > total * 1e-15:
        n += 1
        term *= x / n
        total += term
    return 1.0 - total * math.exp(a * math.log(x) - x - math.lgamma(a))


def test_the_p_value_itself() -> None:
    assert p_value(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert p_value(15.50731, 8) == pytest.approx(0.05, abs=1e-6)


def draw(**options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    uniform = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return sample(LOGITS.expand(DRAWS, -1), uniform, **options)


TEMPERED = PROBS.sqrt() / PROBS.sqrt().sum()  # temperature 2
CASES = [
    ({}, PROBS, 1.0),
    ({"temperature": 2.0}, TEMPERED, 1.0),
    ({"top_k": 3}, torch.tensor([0, 0.30, 0, 0, 0.25, 0, 0, 0.30]) / 0.85, 0.85),
    ({"top_k": 100}, PROBS, 1.0),
    # 0.30 + 0.30 + 0.25 reaches 0.7; 0.60 does not
    ({"top_p": 0.7}, torch.tensor([0, 0.30, 0, 0, 0.25, 0, 0, 0.30]) / 0.85, 0.85),
    # the first two of equal probability: the stable order keeps both
    ({"top_p": 0.5}, torch.tensor([0, 0.5, 0, 0, 0, 0, 0, 0.5]), 0.60),
    ({"top_k": 2, "top_p": 0.99}, torch.tensor([0, 0.5, 0, 0, 0, 0, 0, 0.5]), 0.60),
    ({"top_k": 5, "top_p": 0.9}, torch.tensor([0, 0.30, 0, 0, 0.25, 0.08, 0, 0.30]) / 0.93, 0.93),
    ({"top_p": 1e-6}, torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), 0.30),
]


@pytest.mark.parametrize(("options", "expected", "kept_mass"), CASES)
def test_frequencies_follow_the_exact_distribution(options: dict, expected: torch.Tensor, kept_mass: float) -> None:
    tokens, logprobs, kept = draw(**options)
    counts = torch.bincount(tokens, minlength=8).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a token of probability 0 was sampled"
    if int(possible.sum()) > 1:
        wanted = expected[possible].double() * DRAWS
        chi_square = float(((counts[possible] - wanted).square() / wanted).sum())
        assert p_value(chi_square, int(possible.sum()) - 1) > 1e-3
    # Whatever was cut or tempered, the reported log-probability is the model's own.
    torch.testing.assert_close(logprobs, PROBS.log()[tokens], atol=1e-6, rtol=0)
    assert kept.tolist() == pytest.approx([kept_mass] * DRAWS, abs=1e-6)


def test_the_chi_square_would_notice_a_wrong_distribution() -> None:
    counts = torch.bincount(draw(temperature=1.1)[0], minlength=8).double()
    wanted = PROBS.double() * DRAWS
    possible = PROBS > 0
    chi_square = float(((counts - wanted).square()[possible] / wanted[possible]).sum())
    assert p_value(chi_square, int(possible.sum()) - 1) < 1e-6


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.999}, {"temperature": 0.01}])
def test_the_ends_of_the_unit_interval_hit_possible_tokens(options: dict) -> None:
    logits = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf")]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs, _ = sample(logits, uniform, **options)
    assert set(tokens.tolist()) <= {1, 2}
    assert torch.isfinite(logprobs).all()


def test_rows_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 50, generator=generator)
    uniform = torch.rand(16, dtype=torch.float64, generator=generator)
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    together = sample(logits, uniform, **options)
    for i in range(16):
        alone = sample(logits[i : i + 1], uniform[i : i + 1], **options)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(4, 1000).bfloat16()
    tokens = torch.tensor([1, 2, 3, 4])
    got = token_logprob(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float().log_softmax(-1)[torch.arange(4), tokens], atol=1e-5, rtol=0)
