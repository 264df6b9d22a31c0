"""Rewards before they become advantages: normalisation by hand, running moments, masks and filters."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.reward_shaping import (
    EPS,
    RunningMoments,
    clip_rewards,
    difficulty_mask,
    error_max_len_mask,
    group_moments,
    max_len_mask,
    normalise_rewards,
    query_filter,
)

# Three groups: 1, 2, 3 (mean 2, unbiased std 1); a group of one; two equal rewards.
REWARDS = torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, 4.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 7, 2, 9, 9])
# Over the batch: mean 19/6, sum of squares 71 - 361/6 = 65/6, unbiased variance 13/6.
MEAN, STD = 19 / 6, math.sqrt(13 / 6)


@pytest.mark.parametrize(
    ("mean_type", "std_type", "expected"),
    [
        (None, None, REWARDS.tolist()),
        ("group", None, [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ("group", "group", [-1 / (1 + EPS), 0.0, 1 / (1 + EPS), 0.0, 0.0, 0.0]),
        (None, "group", [1 / (1 + EPS), 2 / (1 + EPS), 3 / (1 + EPS), 0.0, 0.0, 0.0]),
        ("batch", None, [r - MEAN for r in REWARDS.tolist()]),
        ("batch", "batch", [(r - MEAN) / (STD + EPS) for r in REWARDS.tolist()]),
        ("group", "batch", [x / (STD + EPS) for x in (-1.0, 0.0, 1.0, 0.0, 0.0, 0.0)]),
        (None, "batch", [r / (STD + EPS) for r in REWARDS.tolist()]),
        ("batch", "group", [(1 - MEAN) / (1 + EPS), (2 - MEAN) / (1 + EPS), (3 - MEAN) / (1 + EPS), 0, 0, 0]),
        # The first batch of a run: its moments are the batch's.
        ("running", "running", [(r - MEAN) / (STD + EPS) for r in REWARDS.tolist()]),
        ("group", "running", [x / (STD + EPS) for x in (-1.0, 0.0, 1.0, 0.0, 0.0, 0.0)]),
        ("running", None, [r - MEAN for r in REWARDS.tolist()]),
    ],
)
def test_normalisation_by_hand(mean_type: str | None, std_type: str | None, expected: list[float]) -> None:
    got = normalise_rewards(REWARDS, GROUPS, mean_type, std_type, RunningMoments())
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_that_are_equal_up_to_rounding_of_their_mean_give_exactly_0() -> None:
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert rewards.mean().item() != 0.1  # the trap
    for mean_type, std_type in (("group", None), ("group", "group"), ("batch", "batch"), (None, "group")):
        assert normalise_rewards(rewards, torch.zeros(3).long(), mean_type, std_type).tolist() == [0.0] * 3


@pytest.mark.parametrize("types", [("batch", "batch"), ("group", "group"), ("running", "running"), (None, "running")])
def test_a_single_reward_gives_0_and_no_nan(types: tuple[str | None, str]) -> None:
    one = torch.tensor([0.7], dtype=torch.float64)
    assert normalise_rewards(one, torch.tensor([0]), *types, RunningMoments()).tolist() == [0.0]
    assert normalise_rewards(one[:0], torch.zeros(0).long(), *types, RunningMoments()).shape == (0,)


def test_the_order_of_rewards_does_not_matter() -> None:
    order = torch.tensor([4, 0, 3, 2, 5, 1])
    for types in (("group", "group"), ("batch", "batch"), ("group", "batch")):
        straight = normalise_rewards(REWARDS, GROUPS, *types)
        shuffled = normalise_rewards(REWARDS[order], GROUPS[order], *types)
        assert torch.allclose(shuffled, straight[order], atol=1e-14, rtol=0)


def test_a_large_offset_does_not_drown_the_differences() -> None:
    straight = normalise_rewards(REWARDS, GROUPS, "group", "group")
    far = normalise_rewards(REWARDS + 1e9, GROUPS, "group", "group")
    assert torch.allclose(far, straight, atol=1e-5, rtol=0)


def test_group_moments_by_hand() -> None:
    mean, std, size = group_moments(REWARDS, GROUPS)
    assert mean.tolist() == [2, 2, 2, 5, 4, 4]
    assert std.tolist() == [1, 1, 1, 0, 0, 0]
    assert size.tolist() == [3, 3, 3, 1, 2, 2]


def test_running_moments_by_hand_and_over_any_split() -> None:
    running = RunningMoments()
    assert (running.mean, running.std, running.count) == (0.0, 0.0, 0)
    running.update(torch.tensor([1.0, 2.0]))
    assert (running.mean, running.std) == (1.5, pytest.approx(math.sqrt(0.5)))
    running.update(torch.tensor([3.0]))  # 1, 2, 3
    assert (running.mean, running.std, running.count) == (pytest.approx(2.0), pytest.approx(1.0), 3)
    running.update(torch.zeros(0))
    assert running.count == 3
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 50
    for parts in ([100], [1, 99], [30, 0, 30, 40], [1] * 100):
        split = RunningMoments()
        for part in rewards.split(parts):
            split.update(part)
        assert split.mean == pytest.approx(rewards.mean().item(), rel=1e-13)
        assert split.std == pytest.approx(rewards.std().item(), rel=1e-12)


def test_running_moments_go_on_from_their_state() -> None:
    first, second = RunningMoments(), RunningMoments()
    first.update(REWARDS)
    second.load(first.state())
    for moments in (first, second):
        moments.update(torch.tensor([10.0, -3.0]))
    assert first.state() == second.state() and first.count == 8


def test_running_uses_what_came_before() -> None:
    running = RunningMoments()
    running.update(torch.tensor([1.0, 2.0]))
    # With 3: mean 2, std 1.
    got = normalise_rewards(torch.tensor([3.0]), torch.tensor([0]), "running", "running", running)
    assert got.tolist() == pytest.approx([1 / (1 + EPS)])


def test_what_normalisation_refuses() -> None:
    with pytest.raises(ValueError, match="batch, group, running"):
        normalise_rewards(REWARDS, GROUPS, "prompt", None)
    with pytest.raises(ValueError, match="running moments"):
        normalise_rewards(REWARDS, GROUPS, None, "running")
    with pytest.raises(ValueError, match="groups"):
        normalise_rewards(REWARDS, GROUPS[:2], None, None)


def test_clip() -> None:
    assert clip_rewards(torch.tensor([-5.0, 0.5, 2.0]), 1.0).tolist() == [-1.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="above 0"):
        clip_rewards(REWARDS, 0.0)


def test_difficulty_mask_by_hand() -> None:
    # Means 0, 1/2, 1; a group of one; ungraded members follow their group, and do not count in its mean.
    scores = [0.0, 0.0, None, 1.0, 0.0, 1.0, 1.0, None, 1.0, None]
    groups = [1, 1, 1, 2, 2, 3, 3, 2, 4, 5]
    kept = [False, False, False, True, True, False, False, True, True, True]
    assert difficulty_mask(scores, groups, 0.0, 1.0) == kept
    assert difficulty_mask([1.0, 0.0], [0, 0], 0.5, 1.0) == [False, False]  # strictly between
    assert difficulty_mask([1.0, 0.0], [0, 0], 0.4, 0.6) == [True, True]


def test_length_masks_by_hand() -> None:
    assert max_len_mask([True, False]) == [False, True]
    scores = [0.0, 0.0, 0.0, 1.0, -1.0, 0.5, None]
    lengths = [9, 10, 11, 11, 11, 11, 11]
    assert error_max_len_mask(scores, lengths, 10) == [True, False, False, True, False, True, True]


@pytest.mark.parametrize(
    ("kind", "args", "rewards", "kept"),
    [
        ("no_filter", {}, [1.0, 1.0], True),
        ("mean_filter", {"threshold_up": 0.9, "threshold_down": 0.1}, [1.0, 0.0], True),
        ("mean_filter", {"threshold_up": 0.9, "threshold_down": 0.1}, [1.0, 1.0], False),
        ("mean_filter", {"threshold_up": 0.9, "threshold_down": 0.1}, [0.0, 0.0], False),
        ("mean_filter", {"threshold_up": 0.5}, [1.0, 0.0], False),  # the bounds themselves are out
        ("mean_filter", {"threshold_down": 0.5}, [1.0, 0.0], False),
        ("mean_filter", {}, [50.0, 70.0], True),
        ("mean_filter", {}, [-1.0, -1.0], False),
        ("std_filter", {"std_threshold": 0}, [0.1, 0.1, 0.1], False),  # exactly 0, whatever the rounding
        ("std_filter", {"std_threshold": 0}, [0.1, 0.2], True),
        ("std_filter", {"std_threshold": 0.7}, [1.0, 0.0], True),  # unbiased: sqrt(1/2) = 0.7071
        ("std_filter", {"std_threshold": 0.71}, [1.0, 0.0], False),
        ("std_filter", {}, [1.0, 1.0], True),
        ("std_filter", {"std_threshold": 0}, [1.0], True),  # a single response tells nothing
        ("mean_filter", {"threshold_up": 0.9}, [], True),
    ],
)
def test_query_filter_by_hand(kind: str, args: dict[str, float], rewards: list[float], kept: bool) -> None:
    assert query_filter(kind, args, rewards) is kept


def test_query_filter_refuses() -> None:
    with pytest.raises(ValueError, match="no_filter, mean_filter"):
        query_filter("median_filter", {}, [1.0])
    with pytest.raises(ValueError, match=r"threshold_up, threshold_down, not threshold\b"):
        query_filter("mean_filter", {"threshold": 0.5}, [1.0])
    with pytest.raises(ValueError, match="no arguments"):
        query_filter("no_filter", {"std_threshold": 0.5}, [1.0])
