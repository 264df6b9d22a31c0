"""Advantages: estimators by hand, the order of the stages, episodes, what whitening may touch, invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from roll_opd.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    AdvantageSettings,
    clip,
    discounted_returns,
    final_advantages,
    gae,
    group_baseline,
    rl_advantages,
    token_rewards,
    whiten,
)
from roll_opd.algorithms.reward_shaping import EPS, RunningMoments

# Groups 1, 2, 3 (mean 2, unbiased std 1); one of one; two equal rewards.
REWARDS = torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, 4.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 7, 2, 9, 9])


def as_lists(tensors: list[Tensor]) -> list[list[float]]:
    return [t.tolist() for t in tensors]


def flat(tensors: list[Tensor]) -> list[float]:
    return torch.cat(tensors).tolist()


# ---- the group's baseline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "scores"),
    [
        ("grpo", [-1 / (1 + EPS), 0.0, 1 / (1 + EPS), 0.0, 0.0, 0.0]),
        ("rloo", [1 - 2.5, 0.0, 3 - 1.5, 0.0, 0.0, 0.0]),
        ("reinforce", REWARDS.tolist()),
        ("reinforce++", REWARDS.tolist()),
        ("gae", REWARDS.tolist()),
    ],
)
def test_group_baseline_by_hand(estimator: str, scores: list[float]) -> None:
    got = group_baseline(estimator, REWARDS, GROUPS)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(scores, abs=1e-12)
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    assert torch.allclose(group_baseline(estimator, REWARDS[order], GROUPS[order]), got[order], atol=1e-14, rtol=0)


def test_every_estimator_has_a_hand_computed_case() -> None:
    assert {case[0] for case in test_group_baseline_by_hand.pytestmark[0].args[1]} == set(ADVANTAGE_ESTIMATORS)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_equal_rewards_are_exactly_no_signal(estimator: str) -> None:
    assert group_baseline(estimator, torch.full((3,), 0.1).double(), torch.zeros(3).long()).tolist() == [0.0] * 3


def test_an_episode_counts_once_however_many_segments_it_has() -> None:
    # Episodes: rewards 0 (three segments), 1, and 2 (two segments): mean 1, std 1; without episodes it would be 0.67.
    rewards = torch.tensor([0.0, 2.0, 0.0, 1.0, 2.0, 0.0])
    episodes = torch.tensor([5, 8, 5, 1, 8, 5])
    groups = torch.zeros(6, dtype=torch.int64)
    unit = 1 / (1 + EPS)
    got = group_baseline("grpo", rewards, groups, episodes)
    assert got.tolist() == pytest.approx([-unit, unit, -unit, 0.0, unit, -unit], abs=1e-12)
    # 0 against the mean of 1 and 2; 2 against that of 0 and 1.
    got = group_baseline("rloo", rewards, groups, episodes)
    assert got.tolist() == pytest.approx([-1.5, 1.5, -1.5, 0.0, 1.5, -1.5], abs=1e-12)


def test_segments_of_an_episode_must_agree() -> None:
    episodes = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="episode 3 differ in their reward"):
        group_baseline("grpo", torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), episodes)
    with pytest.raises(ValueError, match="episode 3 differ in their group"):
        group_baseline("grpo", torch.tensor([1.0, 1.0]), torch.tensor([0, 1]), episodes)


# ---- along a sequence --------------------------------------------------------------------------------------------


def test_token_rewards_by_hand() -> None:
    assert token_rewards(2.0, 3).tolist() == [0.0, 0.0, 2.0]
    assert token_rewards(2.0, 3, torch.tensor([0.5, -1.0, 0.25])).tolist() == [-0.5, 1.0, 1.75]
    assert token_rewards(2.0, 0).shape == (0,)
    with pytest.raises(ValueError, match="for 3 tokens"):
        token_rewards(1.0, 3, torch.zeros(2))


def test_discounted_returns_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0])
    # 4; 2 + 4/2; 1 + 4/2
    assert discounted_returns(rewards, 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted_returns(rewards, 1.0).tolist() == [7.0, 6.0, 4.0]
    assert discounted_returns(rewards, 0.0).tolist() == [1.0, 2.0, 4.0]
    assert discounted_returns(rewards[:0], 1.0).shape == (0,)
    assert discounted_returns(rewards, 0.5).dtype == torch.float32


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 100])
def test_discounted_returns_of_any_length_are_the_recursion(length: int) -> None:
    rewards = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected, following = [0.0] * length, 0.0
    for t in reversed(range(length)):
        following = expected[t] = rewards[t].item() + 0.97 * following
    assert discounted_returns(rewards, 0.97).tolist() == pytest.approx(expected, abs=1e-12)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    # gamma 1/2: deltas 0 + 0.125 - 0.5, 0 + 0.375 - 0.25, 1 - 0.75 = -0.375, 0.125, 0.25
    # gamma lambda = 1/4: 0.25; 0.125 + 0.0625; -0.375 + 0.046875
    advantages, returns = gae(rewards, values, gamma=0.5, lambd=0.5)
    assert advantages.tolist() == pytest.approx([-0.328125, 0.1875, 0.25], abs=1e-7)
    assert returns.tolist() == pytest.approx([0.171875, 0.4375, 1.0], abs=1e-7)


def test_gae_ends_of_lambda() -> None:
    rewards = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.1, -0.4, 1.5], dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma=0.9, lambd=1.0)
    assert torch.allclose(returns, discounted_returns(rewards, 0.9), atol=1e-14)
    assert torch.allclose(advantages, discounted_returns(rewards, 0.9) - values, atol=1e-14)
    one_step, _ = gae(rewards, values, gamma=0.9, lambd=0.0)
    following = torch.tensor([0.1, -0.4, 1.5, 0.0], dtype=torch.float64)
    assert torch.allclose(one_step, rewards + 0.9 * following - values, atol=1e-14)
    assert gae(rewards[:0], values[:0], 0.9, 0.9)[0].shape == (0,)
    with pytest.raises(ValueError, match="values"):
        gae(rewards, values[:2], 0.9, 0.9)


# ---- whitening and clip ------------------------------------------------------------------------------------------


def test_whiten_by_hand() -> None:
    # 1, 2, 3 over two sequences: mean 2, unbiased std 1.
    assert as_lists(whiten([torch.tensor([1.0]), torch.zeros(0), torch.tensor([3.0, 2.0])])) == [
        [pytest.approx(-1.0, abs=1e-7)],
        [],
        [pytest.approx(1.0, abs=1e-7), 0.0],
    ]


def test_whitened_tokens_have_mean_0_and_std_1_whatever_the_cut() -> None:
    tokens = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4 + 9
    parts = whiten(list(tokens.split([10, 1, 0, 49])))
    whole = torch.cat(parts)
    assert whole.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whole.std().item() == pytest.approx(1.0, abs=1e-8)
    assert torch.allclose(whole, whiten([tokens])[0], atol=1e-14, rtol=0)


@pytest.mark.parametrize("tokens", [[], [5.0], [0.1, 0.1, 0.1]])
def test_what_cannot_be_told_apart_is_0(tokens: list[float]) -> None:
    assert flat(whiten([torch.tensor(tokens, dtype=torch.float64)])) == [0.0] * len(tokens)
    assert whiten([]) == []


def test_clip_by_hand() -> None:
    values, fraction = clip([torch.tensor([-3.0, 0.5]), torch.tensor([2.0, 1.0])], 1.0)
    assert as_lists(values) == [[-1.0, 0.5], [1.0, 1.0]] and fraction == 0.5
    assert clip([], 1.0) == ([], 0.0)


# ---- the whole way -----------------------------------------------------------------------------------------------


def run(
    rewards: list[float | None], lengths: list[int], groups: list[int], settings: dict[str, Any], **more: Any
) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    return rl_advantages(AdvantageSettings(**settings), rewards, lengths, groups, **more)


def test_reward_clip_comes_before_the_group_baseline() -> None:
    # 0 and 100, clipped to 0 and 1: mean 0.5, unbiased std sqrt(1/2).
    plain = {"estimator": "rloo", "reward_clip": 1.0}
    advantages, returns, metrics = run([0.0, 100.0], [2, 1], [4, 4], plain)
    assert as_lists(advantages) == [[-1.0, -1.0], [1.0]] and returns is None
    assert metrics["reward_mean"] == 50.0 and metrics["reward_clip_fraction"] == 0.5
    assert metrics["reward_std"] == pytest.approx(100 / math.sqrt(2))
    # What the baseline makes of clipped rewards is not clipped again.
    advantages, _, _ = run([-1.0, 1.0], [1, 1], [4, 4], plain)
    assert flat(advantages) == [-2.0, 2.0]
    # The other way round nothing would be clipped, and grpo would give the same with and without a bound.
    advantages, _, _ = run([0.0, 3.0, 100.0], [1, 1, 1], [4, 4, 4], {"estimator": "grpo", "reward_clip": 6.0})
    # 0, 3, 6: mean 3, std 3
    assert flat(advantages) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)


def test_group_baseline_sees_the_external_reward_alone_and_penalties_come_after() -> None:
    penalties = [torch.tensor([0.5, 0.25]), torch.tensor([1.0])]
    settings = {"estimator": "rloo", "gamma": 0.5}
    advantages, _, metrics = run([0.0, 1.0], [2, 1], [4, 4], settings, penalties=penalties)
    # Scores -1 and 1. Token rewards [-0.5, -1.25] and [0]; discounted [-0.5 - 0.625, -1.25].
    assert as_lists(advantages) == [[-1.125, -1.25], [0.0]]
    assert metrics["penalty_scale"] == 1.0


def test_normalisation_then_token_rewards_then_returns() -> None:
    # Batch mean 2, unbiased std 1 -> -1, 0, 1 (up to 1e-6); then a penalty of 1/2 a token, summed up with gamma 1.
    settings = {"estimator": "reinforce", "norm_mean_type": "batch", "norm_std_type": "batch"}
    penalties = [torch.tensor([0.5, 0.5]), torch.tensor([0.5]), torch.tensor([0.5])]
    advantages, _, _ = run([1.0, 2.0, 3.0], [2, 1, 1], [0, 1, 2], settings, penalties=penalties)
    assert flat(advantages) == pytest.approx([-2.0, -1.5, -0.5, 0.5], abs=2e-6)


def test_grpo_replaces_the_norm_types_and_rloo_comes_after_them() -> None:
    norm = {"norm_mean_type": "batch", "norm_std_type": "batch"}
    rewards, lengths, groups = [1.0, 2.0, 7.0, 6.0], [1, 1, 1, 1], [0, 0, 1, 1]
    plain, _, _ = run(rewards, lengths, groups, {"estimator": "grpo"})
    normed, _, _ = run(rewards, lengths, groups, {"estimator": "grpo", **norm})
    assert flat(normed) == flat(plain)
    # Squares around the mean 4: 9 + 4 + 9 + 4 = 26, unbiased std sqrt(26/3); rloo's differences are -1, 1, 1, -1.
    scaled, _, _ = run(rewards, lengths, groups, {"estimator": "rloo", **norm})
    unit = 1 / math.sqrt(26 / 3)
    assert flat(scaled) == pytest.approx([-unit, unit, unit, -unit], abs=1e-6)


def test_whitened_rewards_are_whitened_before_they_are_summed() -> None:
    # Token rewards 0, 1 and 2: mean 1, std 1 -> [-1, 0], [1]; returns with gamma 1.
    settings = {"estimator": "reinforce", "whiten_rewards": True}
    advantages, _, metrics = run([1.0, 2.0], [2, 1], [0, 1], settings)
    assert flat(advantages) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-7)
    assert metrics["reward_scale"] == pytest.approx(1.0, abs=1e-7) and metrics["advantage_scale"] == 1.0


def test_reinforce_plus_plus_always_whitens_its_returns() -> None:
    # Returns 1, 1, 4: mean 2, unbiased variance 3.
    unit = 1 / math.sqrt(3)
    for whitened in (False, True):
        settings = {"estimator": "reinforce++", "whiten_advantages": whitened}
        advantages, _, metrics = run([1.0, 4.0], [2, 1], [0, 1], settings)
        assert flat(advantages) == pytest.approx([-unit, -unit, 2 * unit], abs=1e-6)
        assert metrics["advantage_scale"] == pytest.approx(unit) == metrics["penalty_scale"]
        assert metrics["advantage_mean"] == pytest.approx(2.0)
        assert metrics["advantage_std"] == pytest.approx(math.sqrt(3))


def test_penalty_scale_is_what_whitening_leaves_of_a_penalty() -> None:
    """The derivative of an advantage by a penalty, apart from the small change of the moments themselves."""
    generator = torch.Generator().manual_seed(1)
    lengths = [20] * 50
    rewards: list[float | None] = torch.randn(50, generator=generator).tolist()
    settings = {"estimator": "reinforce", "gamma": 0.0, "whiten_rewards": True, "whiten_advantages": True}
    base = [torch.randn(20, generator=generator) for _ in lengths]
    before, _, metrics = run(rewards, lengths, list(range(50)), settings, penalties=base)
    nudged = [p.clone() for p in base]
    nudged[3][5] += 1e-2
    after, _, _ = run(rewards, lengths, list(range(50)), settings, penalties=nudged)
    left = -(after[3][5] - before[3][5]).item() / 1e-2
    assert left == pytest.approx(metrics["penalty_scale"], rel=0.02)
    assert metrics["penalty_scale"] == pytest.approx(metrics["reward_scale"] * metrics["advantage_scale"])


def test_gae_by_hand_over_a_batch_and_its_returns_stay_unwhitened() -> None:
    values = [torch.tensor([0.5, 0.25, 0.75]), torch.tensor([1.0])]
    settings = {"estimator": "gae", "gamma": 0.5, "lambd": 0.5}
    advantages, returns, _ = run([1.0, 0.0], [3, 1], [0, 1], settings, values=values)
    assert flat(advantages) == pytest.approx([-0.328125, 0.1875, 0.25, -1.0], abs=1e-7)
    assert returns is not None and flat(returns) == pytest.approx([0.171875, 0.4375, 1.0, 0.0], abs=1e-7)
    whitened, same, _ = run([1.0, 0.0], [3, 1], [0, 1], {**settings, "whiten_advantages": True}, values=values)
    assert torch.cat(whitened).std().item() == pytest.approx(1.0, abs=1e-6)
    assert same is not None and flat(same) == flat(returns)


def test_whitening_never_touches_a_teachers_term_added_afterwards() -> None:
    rewards: list[float | None] = [1.0, 4.0, 2.5]
    terms = [torch.tensor([0.5, -0.25]), torch.tensor([2.0]), torch.tensor([0.0, 1e-3, -7.0])]
    for estimator in ("reinforce", "reinforce++", "grpo", "rloo"):
        settings = {"estimator": estimator, "whiten_advantages": True, "whiten_rewards": True}
        advantages, _, _ = run(rewards, [2, 1, 3], [0, 0, 0], settings)
        total, metrics = final_advantages(advantages, terms, None)
        for got, own, term in zip(total, advantages, terms, strict=True):
            assert torch.equal(got, own + term)
        assert metrics == {}
        # Twice the teacher is twice the teacher.
        doubled, _ = final_advantages(advantages, [2 * t for t in terms], None)
        for once, twice, term in zip(total, doubled, terms, strict=True):
            assert torch.allclose(twice - once, term, atol=1e-6)


def test_the_clip_comes_last() -> None:
    total, metrics = final_advantages([torch.tensor([3.0, -0.5])], [torch.tensor([-2.5, -4.0])], 1.0)
    # 3 - 2.5 is inside; had 3 been clipped first, it would be 1 - 2.5.
    assert as_lists(total) == [[0.5, -1.0]] and metrics == {"advantage_clip_fraction": 0.5}
    alone, _ = final_advantages([torch.tensor([3.0])], None, 1.0)
    assert as_lists(alone) == [[1.0]]
    with pytest.raises(ValueError, match="shape"):
        final_advantages([torch.zeros(2)], [torch.zeros(1)], None)


def test_ungraded_sequences_are_in_no_statistic() -> None:
    settings = {"estimator": "reinforce++", "norm_mean_type": "group", "norm_std_type": "batch"}
    rewards, lengths, groups = [1.0, 2.0, 3.0, 0.5], [2, 1, 3, 2], [0, 0, 1, 1]
    penalties = [torch.full((n,), 0.1 * n) for n in lengths]
    alone, _, metrics = run(rewards, lengths, groups, settings, penalties=penalties)
    assert metrics["ungraded_fraction"] == 0.0
    mixed, _, metrics = run(
        [None, *rewards, None],
        [4, *lengths, 1],
        [0, *groups, 9],
        settings,
        penalties=[torch.full((4,), 9.0), *penalties, torch.zeros(1)],
    )
    assert as_lists(mixed[1:-1]) == as_lists(alone)
    assert mixed[0].tolist() == [0.0] * 4 and mixed[-1].tolist() == [0.0]
    assert metrics["ungraded_fraction"] == pytest.approx(1 / 3)
    assert metrics["reward_mean"] == 1.625


def test_masked_sequences_count_in_their_group_but_not_in_whitening() -> None:
    settings = {"estimator": "grpo", "whiten_advantages": True}
    rewards: list[float | None] = [1.0, 2.0, 3.0]
    advantages, _, metrics = run(rewards, [1, 1, 5], [0, 0, 0], settings, masked=[False, False, True])
    # Scores -1, 0, 1 within the group of three; whitening over -1 and 0: mean -1/2, std sqrt(1/2).
    assert flat(advantages) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)] + [0.0] * 5, abs=1e-5)
    assert metrics["advantage_mean"] == pytest.approx(-0.5, abs=1e-5)


def test_an_ungraded_or_masked_sequence_leaves_the_critic_where_it_is() -> None:
    values = [torch.tensor([0.5]), torch.tensor([0.3, 0.4]), torch.tensor([0.9])]
    rewards: list[float | None] = [1.0, None, 2.0]
    masked = [False, False, True]
    advantages, returns, _ = run(rewards, [1, 2, 1], [0, 0, 0], {"estimator": "gae"}, values=values, masked=masked)
    assert returns is not None
    assert as_lists(returns) == [[1.0], values[1].tolist(), values[2].tolist()]
    assert as_lists(advantages) == [[0.5], [0.0, 0.0], [0.0]]


def test_segments_of_an_episode_share_its_score_and_each_gets_it_at_its_end() -> None:
    settings = {"estimator": "grpo", "gamma": 0.5}
    rewards: list[float | None] = [0.0, 2.0, 2.0, 1.0, None]
    advantages, _, metrics = run(rewards, [1, 2, 1, 1, 2], [0] * 5, settings, episodes=[0, 1, 1, 2, 1])
    # Episodes 0, 2, 1: mean 1, std 1.
    assert flat(advantages) == pytest.approx([-1.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0], abs=2e-6)
    assert metrics["reward_mean"] == 1.0 and metrics["reward_std"] == 1.0


def test_running_moments_take_each_episode_in_once() -> None:
    running = RunningMoments()
    settings = {"estimator": "reinforce", "norm_mean_type": "running", "norm_std_type": "running"}
    rewards: list[float | None] = [1.0, 1.0, 3.0, None]
    run(rewards, [1, 1, 1, 1], [0, 0, 1, 1], settings, episodes=[0, 0, 1, 2], running=running)
    assert (running.count, running.mean) == (2, 2.0)


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_the_order_of_sequences_does_not_matter(estimator: str) -> None:
    generator = torch.Generator().manual_seed(7)
    lengths, groups, episodes = [3, 1, 0, 4, 2, 6, 1], [5, 5, 5, 2, 2, 5, 8], [0, 1, 2, 3, 4, 1, 6]
    rewards: list[float | None] = [0.2, 1.0, 0.7, None, -1.0, 1.0, 3.0]
    penalties = [torch.randn(n, generator=generator) for n in lengths]
    values = [torch.randn(n, generator=generator) for n in lengths] if estimator == "gae" else None
    masked = [False, False, False, False, True, False, False]
    settings = AdvantageSettings(
        estimator, 0.9, 0.8, whiten_advantages=True, whiten_rewards=True, reward_clip=2.0, norm_std_type="batch"
    )
    straight, targets, metrics = rl_advantages(settings, rewards, lengths, groups, episodes, penalties, values, masked)
    assert torch.cat(straight).abs().max() > 0.3 and [len(a) for a in straight] == lengths
    order = [6, 2, 0, 5, 3, 1, 4]
    shuffled, moved, same = rl_advantages(
        settings,
        [rewards[i] for i in order],
        [lengths[i] for i in order],
        [groups[i] for i in order],
        [episodes[i] for i in order],
        [penalties[i] for i in order],
        None if values is None else [values[i] for i in order],
        [masked[i] for i in order],
    )
    assert same == pytest.approx(metrics, abs=1e-12)
    for place, i in enumerate(order):
        assert torch.allclose(shuffled[place], straight[i], atol=1e-6, rtol=0)
        if targets is not None and moved is not None:
            assert torch.allclose(moved[place], targets[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", [e for e in ADVANTAGE_ESTIMATORS if e != "gae"])
def test_nothing_to_learn_from(estimator: str) -> None:
    settings = {"estimator": estimator, "whiten_rewards": True, "whiten_advantages": True}
    for rewards in ([], [None, None], [1.0, 1.0]):
        advantages, _, metrics = run(rewards, [2] * len(rewards), [0] * len(rewards), settings)
        assert all(torch.isfinite(a).all() and a.shape == (2,) for a in advantages)
        assert all(math.isfinite(m) for m in metrics.values())
        if rewards != [1.0, 1.0]:
            assert not any(a.any() for a in advantages) and "reward_mean" not in metrics


def test_results_are_fp32_and_inputs_are_left_alone() -> None:
    penalties, values = [torch.ones(2, requires_grad=True)], [torch.ones(2, requires_grad=True)]
    advantages, returns, _ = run([1.0], [2], [0], {"estimator": "gae"}, penalties=penalties, values=values)
    assert returns is not None and advantages[0].dtype == returns[0].dtype == torch.float32
    assert not advantages[0].requires_grad and not returns[0].requires_grad
    assert penalties[0].tolist() == [1.0, 1.0] == values[0].tolist()


def test_what_is_refused() -> None:
    for bad in ({"estimator": "gigpo"}, {"gamma": 1.1}, {"lambd": -0.1}, {"reward_clip": 0.0}, {"norm_std_type": "x"}):
        with pytest.raises(ValueError, match=r"estimator|gamma|lambd|reward_clip|norm type"):
            AdvantageSettings(**bad)  # type: ignore[arg-type]
    reinforce = {"estimator": "reinforce"}
    with pytest.raises(ValueError, match="not finite"):
        run([math.nan], [1], [0], reinforce)
    with pytest.raises(ValueError, match="groups"):
        run([1.0], [1], [0, 1], reinforce)
    with pytest.raises(ValueError, match="penalties of shape"):
        run([1.0], [2], [0], reinforce, penalties=[torch.zeros(3)])
    with pytest.raises(ValueError, match="gae needs values"):
        run([1.0], [1], [0], {"estimator": "gae"})
    with pytest.raises(ValueError, match="no other"):
        run([1.0], [1], [0], reinforce, values=[torch.zeros(1)])
    with pytest.raises(ValueError, match="running"):
        run([1.0], [1], [0], {"estimator": "reinforce", "norm_mean_type": "running"})
