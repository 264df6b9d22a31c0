"""Metrics by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from roll_opd.distributed.strategy.base import Sampling
from roll_opd.pipeline.metrics import (
    environment_metrics,
    episode_metrics,
    episodes_of,
    invalid_action_reports,
    opd_metrics,
    reverse_kl,
    reward_metrics,
    rollout_metrics,
)
from roll_opd.pipeline.validation import validation_metrics
from roll_opd.trajectory import TrajectoryId, Turn


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.fixture
def batch(fakes):
    """Two trajectories of 3 and 1 sampled tokens; what lies outside the mask must never show."""
    a = fakes.trajectory(
        0, prompt=1, response=3, tag="math", reward=1.0, correct=True, finish_reason="length", sampled_mass=0.5,
        infer_logprobs=f32(99, -1, -1, -1), old_logprobs=f32(99, -1, -2, -3), advantages=f32(99, 2, -1, 0),
        weight_version=np.array([-1, 4, 5, 5], dtype=np.int32),
        teacher_scores={"default": fakes.TeacherScores(f32(0, -3, -1, -3))},
    )  # fmt: skip
    b = fakes.trajectory(
        1, prompt=2, response=1, tag="code", reward=0.0, correct=False,
        infer_logprobs=f32(99, 99, -1), old_logprobs=f32(99, 99, -1), advantages=f32(99, 99, -5),
        weight_version=np.array([-1, -1, 5], dtype=np.int32),
        teacher_scores={"default": fakes.TeacherScores(f32(0, 0, -6))},
    )  # fmt: skip
    return [a, b]


def test_opd_by_hand(batch) -> None:
    metrics = opd_metrics(batch)
    # d = 2, -1, 0 and 5
    assert metrics["opd/reverse_kl"] == metrics["opd/reverse_kl/teacher/default"] == pytest.approx(6 / 4)
    assert metrics["opd/reverse_kl/tag/math"] == pytest.approx(1 / 3)
    assert metrics["opd/reverse_kl/tag/code"] == pytest.approx(5)
    assert metrics["opd/reverse_kl/position/0-15"] == pytest.approx(6 / 4)
    assert metrics["opd/teacher_logprob"] == pytest.approx(-13 / 4)
    assert metrics["opd/student_logprob"] == pytest.approx(-7 / 4)
    assert metrics["opd/advantage_mean"] == pytest.approx(-1)
    assert metrics["opd/advantage_std"] == pytest.approx(math.sqrt((9 + 0 + 1 + 16) / 4))
    assert metrics["opd/advantage_absmax"] == 5


def test_positions_count_from_the_first_sampled_token(fakes) -> None:
    mask = np.arange(40) >= 10
    d = np.where(np.arange(40) - 10 < 16, 1.0, 3.0)
    t = fakes.trajectory(
        0, prompt=10, response=30, old_logprobs=np.where(mask, d, 50).astype(np.float32),
        advantages=np.zeros(40, dtype=np.float32),
        teacher_scores={"default": fakes.TeacherScores(np.zeros(40, dtype=np.float32))},
    )  # fmt: skip
    metrics = opd_metrics([t])
    positions = {name: value for name, value in metrics.items() if "/position/" in name}
    assert positions == {
        "opd/reverse_kl/position/0-15": pytest.approx(1.0),
        "opd/reverse_kl/position/16-63": pytest.approx(3.0),
    }


def test_rollout_by_hand(batch) -> None:
    metrics = rollout_metrics(batch, version=5)
    assert metrics["rollout/num_trajectories"] == 2
    assert metrics["rollout/response_tokens"] == 4
    assert metrics["rollout/response_length"] == 2
    assert metrics["rollout/response_length_max"] == 3
    assert metrics["rollout/truncated"] == 0.5
    assert metrics["rollout/sampled_mass"] == 0.75
    assert metrics["staleness/mean"] == 0.25 and metrics["staleness/max"] == 1
    # differences 0, -1, -2, 0
    assert metrics["mismatch/abs_logprob_diff"] == pytest.approx(3 / 4)
    assert metrics["mismatch/abs_logprob_diff_max"] == pytest.approx(2)
    assert metrics["mismatch/kl"] == pytest.approx((math.exp(-1) - 1 + 1 + math.exp(-2) - 1 + 2) / 4, rel=1e-6)


def test_rollout_without_old_logprobs_has_no_mismatch(fakes) -> None:
    metrics = rollout_metrics([fakes.trajectory()], version=0)
    assert not [name for name in metrics if name.startswith(("mismatch", "reward"))]


def test_two_teachers_and_a_trajectory_that_neither_scored(fakes) -> None:
    def scored(draw, **teachers):
        return fakes.trajectory(
            draw, prompt=1, response=1, old_logprobs=f32(0, -1), advantages=f32(0, 0),
            teacher_scores={name: fakes.TeacherScores(f32(0, value)) for name, value in teachers.items()},
        )  # fmt: skip

    batch = [scored(0, a=-2.0, b=-4.0), scored(1, a=-3.0), scored(2)]
    metrics = opd_metrics(batch)
    assert metrics["opd/reverse_kl/teacher/a"] == pytest.approx(1.5)
    assert metrics["opd/reverse_kl/teacher/b"] == pytest.approx(3)
    assert metrics["opd/student_logprob"] == -1
    assert math.isnan(reverse_kl(batch, "nobody"))
    assert reverse_kl(batch[:1], "a", "infer_logprobs") == pytest.approx(1.5)


def test_rewards_by_hand(fakes) -> None:
    batch = [
        fakes.trajectory(0, tag="x", reward=1.0, correct=True),
        fakes.trajectory(1, tag="x", reward=0.0, correct=False),
        fakes.trajectory(2, tag="y", reward=0.5, correct=None),  # graded, no verdict
        fakes.trajectory(3, tag="y"),  # not graded
        fakes.trajectory(4, tag="", reward=1.0, correct=True),
    ]
    assert reward_metrics(batch, "reward") == {
        "reward/mean": pytest.approx(2.5 / 4),
        "reward/graded": pytest.approx(4 / 5),
        "reward/accuracy": pytest.approx(2 / 3),
        "reward/accuracy/tag/x": pytest.approx(0.5),
        "reward/accuracy/tag/untagged": 1.0,
    }
    assert reward_metrics([fakes.trajectory()], "reward") == {}


def segment(fakes, draw, sample, number, valid, *, tag="lake", stream="train", **fields):
    """A segment of two-token turns, one for each entry of ``valid``, behind a prompt of two tokens."""
    turns = tuple(
        Turn(index=i, start=2 + 2 * i, end=4 + 2 * i, observation="", reward=0.0, state="", is_valid=v)
        for i, v in enumerate(valid)
    )
    name = TrajectoryId(draw, sample, number, stream)
    return fakes.trajectory(draw, prompt=2, response=2 * len(valid), id=name, tag=tag, turns=turns, **fields)


@pytest.fixture
def episodes(fakes):
    """A success in two segments, which come apart and the later one first; a failure; and one of another tag."""
    won = {"reward": 3.0, "correct": True}
    return [
        segment(fakes, 0, 0, 1, [True], **won),
        segment(fakes, 0, 1, 0, [False, None], reward=0.0, correct=False, extras={"env_metrics": {"steps": 2}}),
        segment(fakes, 1, 0, 0, [None], tag="gem", reward=1.0, extras={"env_metrics": {"calls": 1.5}}),
        segment(fakes, 0, 0, 0, [True, False], **won, extras={"env_metrics": {"steps": 5, "won": True}}),
    ]


def test_an_episode_counts_once_however_many_segments(episodes) -> None:
    assert [[t.id.segment for t in group] for group in episodes_of(episodes)] == [[0, 1], [0], [0]]
    assert reward_metrics(episodes, "reward") == {
        "reward/mean": pytest.approx(4 / 3),
        "reward/graded": 1.0,
        "reward/accuracy": 0.5,
        "reward/accuracy/tag/lake": 0.5,
    }
    assert episode_metrics(episodes, "episode") == {
        "episode/num_episodes": 3.0,
        "episode/turns": pytest.approx(6 / 3),
        "episode/segments": pytest.approx(4 / 3),
        "episode/tokens_per_turn": 2.0,
        "episode/success_rate": 0.5,
        "episode/success_rate/tag/lake": 0.5,
        "episode/score": pytest.approx(4 / 3),
        "episode/score/tag/gem": 1.0,
        "episode/score/tag/lake": 1.5,
        "episode/valid_action_rate": 0.5,  # of four that the environment told of
        "episode/valid_action_rate/tag/lake": 0.5,
    }


def test_a_steps_metrics_have_the_episodes(episodes, batch) -> None:
    metrics = rollout_metrics(episodes, version=0)
    assert metrics["episode/num_episodes"] == 3 and metrics["env/lake/steps"] == 3.5
    assert not [name for name in rollout_metrics(batch, version=5) if name.startswith(("episode", "env"))]


def test_a_validation_counts_lengths_as_the_rollout_does(episodes) -> None:
    """Trajectories of 2, 4, 2 and 4 tokens, the second cut; the first and the last are one episode."""
    episodes[1] = dataclasses.replace(episodes[1], finish_reason="length")
    held_out, rollout = validation_metrics(episodes, Sampling()), rollout_metrics(episodes, version=0)
    assert (held_out["num_samples"], held_out["response_length"], held_out["truncated"]) == (3.0, 3.0, 0.25)
    assert (rollout["rollout/response_length"], rollout["rollout/truncated"]) == (3.0, 0.25)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.9), Sampling(top_p=0.9), Sampling(top_k=9), Sampling(greedy=True)]
)
def test_other_sampling_gives_no_kl(batch, sampling) -> None:
    # Engine minus teacher: 2, 0, 2 and 5.
    assert validation_metrics(batch, Sampling())["reverse_kl"] == pytest.approx(9 / 4)
    assert not [name for name in validation_metrics(batch, sampling) if name.startswith("reverse_kl")]


def test_environments_metrics_by_hand(episodes) -> None:
    assert environment_metrics(episodes) == {"env/gem/calls": 1.5, "env/lake/steps": 3.5, "env/lake/won": 1.0}


def test_an_id_that_comes_again_is_another_sample(fakes) -> None:
    """Several teachers answer the same held-out prompt; the streams' numbers say nothing about each other."""
    again = [fakes.trajectory(0, reward=1.0, correct=True), fakes.trajectory(0, reward=0.0, correct=False)]
    other = fakes.trajectory(0, id=TrajectoryId(0, 0, 0, "val"), reward=0.0, correct=False)
    assert reward_metrics([*again, other], "val")["val/accuracy"] == pytest.approx(1 / 3)


def test_actions_that_are_never_understood(fakes) -> None:
    def decode(ids: list[int]) -> str:
        return "go\x1b" if ids == [2, 3] else "x" * 200

    def reports(*valid, tag="lake"):
        return invalid_action_reports([segment(fakes, 0, 0, 0, valid, tag=tag)], decode)

    (report,) = reports(*[False] * 8, None).values()
    assert report is not None and report.startswith("lake: the environment understood 0 of 8 actions (0%).")
    # Each different text once, shortened, with nothing in it that acts on a terminal.
    assert report.endswith(f"The student wrote 'go\\x1b'; '{'x' * 157}...'")
    assert reports(*[False] * 7) == {} and reports(*[None] * 9) == {}
    assert reports(*[False] * 8, True) == {"lake": None}
    assert reports(True, tag="") == {"": None}
