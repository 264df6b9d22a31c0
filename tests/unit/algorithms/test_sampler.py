"""The sampler against the exact distribution: chi-square with fixed seeds, and grids of uniforms, which are sharper."""

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


def exact(logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """The distribution ``[V]`` to be sampled from, in fp64 and one token after the other."""
    probs = (logits.double() / temperature).softmax(-1)
    ranked = sorted(range(len(probs)), key=lambda i: (-float(probs[i]), i))[: top_k if top_k > 0 else None]
    held = sum(float(probs[i]) for i in ranked)
    kept = torch.zeros_like(probs)
    for i in ranked:
        if float(kept.sum()) >= top_p * held:
            break
        kept[i] = probs[i]
    return kept / kept.sum()


def skewed(vocab: int) -> torch.Tensor:
    """Zipf's law over shuffled ids, every fifth token impossible."""
    generator = torch.Generator().manual_seed(vocab)
    logits = -1.2 * torch.arange(1, vocab + 1).float().log()[torch.randperm(vocab, generator=generator)]
    logits[torch.randperm(vocab, generator=generator)[: vocab // 5]] = float("-inf")
    return logits


TRUNCATIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_k": 7},
    {"top_k": 40, "temperature": 1.5},
    {"top_p": 0.8},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_k": 30, "top_p": 0.9},
]


@pytest.mark.parametrize("options", TRUNCATIONS)
# Less than a block; no multiple of one; so many that top-k looks at a few blocks only and top-p needs several guesses.
@pytest.mark.parametrize("vocab", [50, 300, 12_000])
def test_a_fine_grid_of_uniforms_gives_each_token_its_share(vocab: int, options: dict) -> None:
    count = 3_000
    logits = skewed(vocab)
    expected = exact(logits, **options)
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs, kept = sample(logits.expand(count, -1), uniform, **options)
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    # An interval of length p holds N p points of the grid, give or take one.
    assert float((counts - count * expected).abs().max()) <= 1.0 + 1e-3
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens], atol=2e-6, rtol=0)
    if options.get("temperature", 1.0) == 1.0:
        torch.testing.assert_close((logprobs.exp() / kept).double(), expected[tokens], atol=0, rtol=1e-5)


@pytest.mark.parametrize("options", TRUNCATIONS)
def test_random_uniforms_give_a_skewed_distribution(options: dict) -> None:
    logits = skewed(300)
    uniform = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    counts = torch.bincount(sample(logits.expand(DRAWS, -1), uniform, **options)[0], minlength=300).double()
    wanted = exact(logits, **options) * DRAWS
    # Chi-square wants five draws a cell: the rare tokens share one.
    rare = wanted < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    assert p_value(float(((counts - wanted).square() / wanted).sum()), len(wanted) - 1) > 1e-3


@pytest.mark.parametrize("ranks", [1, 3, 100, 900])
def test_of_equal_probabilities_the_lower_id_ranks_first(ranks: int) -> None:
    """Logits in steps of 1/4: the border of top-k lies among equals."""
    logits = (4 * torch.randn(9_000, generator=torch.Generator().manual_seed(3))).round().clamp(max=8) / 4
    best = logits.sort(descending=True, stable=True).indices[: ranks + 1]
    assert logits[best[-2]] == logits[best[-1]]
    best = best[:-1]
    grid = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
    tokens, _, kept = sample(logits.expand(2_000, -1), grid, top_k=ranks)
    assert tokens.unique().tolist() == best.sort().values.tolist()
    # top-p that asks for exactly those tokens, and for a hair more
    share = float(kept[0])
    assert set(sample(logits.expand(2_000, -1), grid, top_p=share * (1 - 1e-6))[0].tolist()) == set(best.tolist())
    assert len(sample(logits.expand(2_000, -1), grid, top_p=share * (1 + 1e-6))[0].unique()) == ranks + 1


def test_a_uniform_of_zero_draws_the_first_possible_token() -> None:
    """The sum of a block and the sum of its tokens are rounded apart: in some rows one is larger, in some the other."""
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(4))
    logits[:, :5] = float("-inf")
    assert sample(logits, torch.zeros(200))[0].tolist() == [5] * 200


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 3.0}])
@pytest.mark.parametrize("token", [0, 127, 128, 299])
def test_a_distribution_of_one_token(token: int, options: dict) -> None:
    logits = torch.full((3, 300), float("-inf"))
    logits[:, token] = -40.0
    tokens, logprobs, kept = sample(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64), **options)
    assert tokens.tolist() == [token] * 3 and logprobs.tolist() == [0.0] * 3 and kept.tolist() == [1.0] * 3


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.999}, {"temperature": 0.01}])
def test_the_ends_of_the_unit_interval_hit_possible_tokens(options: dict) -> None:
    logits = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf")]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs, _ = sample(logits, uniform, **options)
    assert set(tokens.tolist()) <= {1, 2}
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 20, "top_p": 0.8}, {"top_p": 0.5}])
@pytest.mark.parametrize("vocab", [50, 301, 12_001])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_to_the_last_bit_whatever_the_batch(vocab: int, options: dict, threads: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Flat rows and peaked ones: they need different numbers of ranks.
    logits = torch.randn(70, vocab, generator=generator) * torch.linspace(0.1, 6.0, 70)[:, None]
    uniform = torch.rand(70, dtype=torch.float64, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = sample(logits, uniform, **options)
        assert torch.equal(token_logprob(logits, together[0]), together[1])
        for rows in [slice(0, 1), slice(69, 70), slice(34, 35), slice(5, 12), slice(21, 58)]:
            alone = sample(logits[rows], uniform[rows], **options)
            assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(4, 1000).bfloat16()
    tokens = torch.tensor([1, 2, 3, 4])
    got = token_logprob(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float().log_softmax(-1)[torch.arange(4), tokens], atol=1e-5, rtol=0)
