"""Estimators over the turns of episodes, against numbers worked out by hand and the gradient of the expected return."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch

from roll_opd.algorithms.advantages import (
    AdvantageSettings,
    discounted_returns,
    discounted_returns_by_turn,
    rl_advantages,
)
from roll_opd.algorithms.agent_advantages import AgentAdvantageSettings, Episode, agent_advantages

# Two episodes of one draw. Both begin in state s; A reaches the goal in its second turn, B does not.
A = Episode(draw=0, tag="lake", score=1.0, rewards=[0.0, 1.0], lengths=[2, 1], states=["s", "u"])
B = Episode(draw=0, tag="lake", score=0.0, rewards=[0.0, 0.0], lengths=[1, 2], states=["s", "v"])
# Their returns at a discount of 1/2 per turn: 1/2, 1 and 0, 0.
HALF = 0.5 / (math.sqrt(0.5) + 1e-6)
"""Scores 1 and 0, centred and scaled: 0.5 over their unbiased standard deviation."""


def settings(estimator: str, **fields) -> AgentAdvantageSettings:
    return AgentAdvantageSettings(**({"estimator": estimator, "step_gamma": 0.5} | fields))


def run(spec: AgentAdvantageSettings, episodes=(A, B), **tensors) -> list[list[float]]:
    rows, returns, _ = agent_advantages(spec, episodes, **tensors)
    assert all(row.dtype == torch.float32 for row in rows)
    assert (returns is None) == (spec.estimator != "gae")
    return [row.tolist() for row in rows]


def close(got, wanted) -> None:
    assert [len(row) for row in got] == [len(row) for row in wanted]
    for row, expected in zip(got, wanted, strict=True):
        assert row == pytest.approx(expected, abs=2e-6)


GROUP_MEAN = {"grouping": "traj_group_id", "norm_mean_type": "group"}
GROUP = GROUP_MEAN | {"norm_std_type": "group"}
BATCH_MEAN = {"norm_mean_type": "batch"}
# Mean of the four returns 3/8; squares 1/64 + 25/64 + 9/64 + 9/64 over 3.
STD = math.sqrt(44 / 64 / 3) + 1e-6

CASES = [
    # The episode's score on every token, whatever the turn; at a discount per token it fades towards the start.
    ("reinforce", {}, [[1.0] * 3, [0.0] * 3]),
    ("reinforce", {"gamma": 0.5}, [[0.25, 0.5, 1.0], [0.0] * 3]),
    ("reinforce", BATCH_MEAN, [[0.5] * 3, [-0.5] * 3]),
    ("reinforce", {"norm_std_type": "batch"}, [[2 * HALF] * 3, [0.0] * 3]),
    ("reinforce", GROUP, [[HALF] * 3, [-HALF] * 3]),
    ("reinforce++", {}, [[0.5 / math.sqrt(0.3)] * 3, [-0.5 / math.sqrt(0.3)] * 3]),
    ("grpo", {}, [[HALF] * 3, [-HALF] * 3]),
    ("rloo", {}, [[1.0] * 3, [-1.0] * 3]),
    # Each turn its return, and nothing of the turn before.
    ("step_reinforce", {}, [[0.5, 0.5, 1.0], [0.0] * 3]),
    ("step_reinforce", {"gamma": 0.5}, [[0.25, 0.5, 1.0], [0.0] * 3]),
    ("step_reinforce", BATCH_MEAN, [[0.125, 0.125, 0.625], [-0.375] * 3]),
    ("step_reinforce", BATCH_MEAN | {"norm_std_type": "batch"},
     [[0.125 / STD, 0.125 / STD, 0.625 / STD], [-0.375 / STD] * 3]),
    # R_k = r_k + gamma R_{k+1}; the mean of the scores, 1/2, comes off the last turn.
    ("agentic_reinforce", {"gamma": 0.5}, [[0.5, 0.5, 1.0], [0.0] * 3]),
    ("agentic_reinforce", {"gamma": 0.5} | BATCH_MEAN, [[0.25, 0.25, 0.5], [-0.25, -0.5, -0.5]]),
    ("agentic_reinforce", GROUP, [[HALF] * 3, [-HALF] * 3]),
    # Scores +-1/2; in s the returns 1/2 and 0 are +-1/4, and u and v were seen once.
    ("gigpo", GROUP_MEAN, [[0.75, 0.75, 0.5], [-0.75, -0.5, -0.5]]),
    ("gigpo", GROUP_MEAN | {"episode_weight": 0.0, "step_weight": 2.0}, [[0.5, 0.5, 0.0], [-0.5, 0.0, 0.0]]),
    ("gigpo", GROUP, [[2 * HALF, 2 * HALF, HALF], [-2 * HALF, -HALF, -HALF]]),
    ("gigpo", GROUP_MEAN | {"gamma": 0.5}, [[0.375, 0.75, 0.5], [-0.75, -0.25, -0.5]]),
]  # fmt: skip


@pytest.mark.parametrize(("estimator", "fields", "wanted"), CASES)
def test_by_hand(estimator, fields, wanted) -> None:
    close(run(settings(estimator, **fields)), wanted)


def test_gae_by_hand() -> None:
    """Each turn's reward is on its last token, and the value of the next turn follows that of the last one."""
    episode = dataclasses.replace(A, rewards=[2.0, 1.0], score=3.0)
    values = [torch.tensor([0.5, 1.0, 0.25])]
    rows, returns, _ = agent_advantages(settings("gae", lambd=1.0), [episode], values=values)
    close([rows[0].tolist()], [[2.5, 2.0, 0.75]])  # 3, 3 and 1, minus the values
    assert returns[0].tolist() == pytest.approx([3.0, 3.0, 1.0])
    # lambda 0: 0 + 1 - 0.5, 2 + 0.25 - 1, 1 - 0.25
    close(run(settings("gae", lambd=0.0), [episode], values=values), [[0.5, 1.25, 0.75]])


def test_every_estimator_has_a_hand_computed_case() -> None:
    assert {case[0] for case in CASES} | {"gae"} == set(AgentAdvantageSettings.ESTIMATORS)


@pytest.mark.parametrize("estimator", ["reinforce", "grpo", "rloo", "reinforce++"])
def test_over_episodes_they_are_the_estimators_of_responses(estimator) -> None:
    """An episode is a response that the environment interrupts."""
    episodes = many(7)
    plain, _, wanted = rl_advantages(
        AdvantageSettings(estimator=estimator, gamma=0.9),
        rewards=[e.score for e in episodes],
        lengths=[sum(e.lengths) for e in episodes],
        groups=[e.draw for e in episodes],
    )
    rows, _, metrics = agent_advantages(settings(estimator, gamma=0.9), episodes)
    close([r.tolist() for r in rows], [r.tolist() for r in plain])
    assert metrics == pytest.approx(wanted)


def test_grpo_is_what_rolls_reward_normalization_makes_of_reinforce() -> None:
    episodes = many(3)
    close(run(settings("grpo"), episodes), run(settings("reinforce", **GROUP), episodes))


def test_the_grouping_is_the_draw_the_tag_or_the_batch() -> None:
    scores = {(0, "x"): [1.0, 0.0], (1, "x"): [3.0, 2.0], (2, "y"): [5.0, 1.0]}
    episodes = [
        Episode(draw, tag, score, [score], [1], ["s"]) for (draw, tag), pair in scores.items() for score in pair
    ]
    wanted = {
        "traj_group_id": [0.5, -0.5, 0.5, -0.5, 2.0, -2.0],
        "tags": [-0.5, -1.5, 1.5, 0.5, 2.0, -2.0],
        "batch": [-1.0, -2.0, 1.0, 0.0, 3.0, -1.0],
    }
    for grouping, centred in wanted.items():
        for estimator in ("reinforce", "step_reinforce", "agentic_reinforce"):
            spec = settings(estimator, grouping=grouping, norm_mean_type="group")
            close(run(spec, episodes), [[value] for value in centred])
    # Centred within the draw and scaled over the batch, as ROLL's norm_mean_type and norm_std_type may ask.
    spec = settings("step_reinforce", grouping="traj_group_id", norm_mean_type="group", norm_std_type="batch")
    std = math.sqrt((1 + 4 + 1 + 0 + 9 + 1) / 5) + 1e-6
    close(run(spec, episodes), [[value / std] for value in wanted["traj_group_id"]])


def test_a_state_is_one_of_its_draw() -> None:
    """Another draw's s is another s, and an episode that comes back to a state is compared with itself."""
    back = Episode(1, "lake", 1.0, [0.0, 0.0, 1.0], [1, 1, 1], ["s", "t", "s"])
    rows, _, metrics = agent_advantages(settings("gigpo", **GROUP_MEAN), [A, back, B])
    # Returns of back: 1/4, 1/2, 1. In s their mean is 5/8; its score has nobody to be compared with.
    close([r.tolist() for r in rows], [[0.75, 0.75, 0.5], [-0.375, 0.0, 0.375], [-0.75, -0.5, -0.5]])
    # Groups (0, s), (0, u), (0, v), (1, s), (1, t): 7 turns in 5 of them; 4 turns are not alone.
    assert metrics["state_group_size_mean"] == pytest.approx(7 / 5)
    assert metrics["state_compared_fraction"] == pytest.approx(4 / 7)
    assert metrics["step_return_mean"] == pytest.approx((0.5 + 1.0 + 0.25 + 0.5 + 1.0) / 7)


@pytest.mark.parametrize("estimator", AgentAdvantageSettings.ESTIMATORS)
@pytest.mark.parametrize("episodes", [[A], [A, dataclasses.replace(A), dataclasses.replace(A)]], ids=["one", "equal"])
def test_without_anything_to_compare_with_there_is_no_signal(estimator, episodes) -> None:
    """Except for turns, which may differ within an episode."""
    kinds = {} if estimator in ("grpo", "rloo") else GROUP
    values = [torch.zeros(3) for _ in episodes] if estimator == "gae" else None
    rows = run(settings(estimator, **kinds), episodes, values=values)
    if estimator == "step_reinforce":
        assert rows[0][0] < 0 < rows[0][2]
    else:
        close(rows, [[0.0] * 3 for _ in episodes])


def test_penalties_are_summed_over_what_the_rewards_are_summed_over() -> None:
    penalty = {"penalties": [torch.tensor([0.5, 0.25, 0.125]), torch.zeros(3)]}
    # reinforce: the rest of the episode
    close(run(settings("reinforce"), **penalty), [[0.125, 0.625, 0.875], [0.0] * 3])
    # step_reinforce and gigpo: the rest of the turn
    close(run(settings("step_reinforce"), **penalty), [[-0.25, 0.25, 0.875], [0.0] * 3])
    close(run(settings("gigpo", **GROUP_MEAN), **penalty), [[0.0, 0.5, 0.375], [-0.75, -0.5, -0.5]])
    # agentic_reinforce: the rest of the turn, and half of what the next turn's first token gets
    close(run(settings("agentic_reinforce", gamma=0.5), **penalty), [[-0.3125, 0.1875, 0.875], [0.0] * 3])


def test_the_clip_bounds_a_turns_reward_where_turns_are_credited_and_else_the_score() -> None:
    episode = Episode(0, "lake", 5.0, [1.0, 4.0], [1, 1], ["s", "t"])
    spec = {"reward_clip": 2.0, "step_gamma": 1.0}
    close(run(settings("reinforce", **spec), [episode]), [[2.0, 2.0]])
    for estimator in ("step_reinforce", "agentic_reinforce"):
        rows, _, metrics = agent_advantages(settings(estimator, **spec), [episode])
        close([rows[0].tolist()], [[3.0, 2.0]])
        assert metrics["reward_clip_fraction"] == 0.5 and metrics["reward_mean"] == 5.0
    # The score that gigpo compares is the sum of what is left: 3 and 0.
    low = dataclasses.replace(episode, score=0.0, rewards=[0.0, 0.0])
    close(run(settings("gigpo", **spec, **GROUP_MEAN, step_weight=0.0), [episode, low]), [[1.5] * 2, [-1.5] * 2])


def test_an_ungraded_episode_is_in_no_statistic() -> None:
    lost = Episode(0, "lake", None, [9.0, 9.0], [2, 2], ["s", "u"])
    for estimator in AgentAdvantageSettings.ESTIMATORS:
        spec = settings(estimator, **({} if estimator in ("grpo", "rloo") else GROUP))
        values = {"values": [torch.ones(3), torch.ones(3)]} if estimator == "gae" else {}
        alone = run(spec, **values)
        if values:
            values = {"values": [torch.ones(3), torch.full((4,), 0.5), torch.ones(3)]}
        rows, returns, metrics = agent_advantages(spec, [A, lost, B], **values)
        close([rows[0].tolist(), rows[2].tolist()], alone)
        assert rows[1].tolist() == [0.0] * 4 and metrics["ungraded_fraction"] == pytest.approx(1 / 3)
        if returns is not None:
            assert returns[1].tolist() == [0.5] * 4


def many(seed: int) -> list[Episode]:
    """Twelve episodes of four draws and two tags, of one to four turns, with few rewards and states to choose from."""
    rng = random.Random(seed)
    episodes = []
    for i in range(12):
        turns = rng.randint(1, 4)
        rewards = [rng.choice([0.0, 0.0, 1.0, -0.5]) for _ in range(turns)]
        lengths = [rng.randint(1, 4) for _ in range(turns)]
        states = [rng.choice("st") for _ in range(turns)]
        episodes.append(Episode(i % 4, "xy"[i % 2], sum(rewards), rewards, lengths, states))
    return episodes


@pytest.mark.parametrize("estimator", AgentAdvantageSettings.ESTIMATORS)
def test_the_order_of_episodes_does_not_matter(estimator) -> None:
    episodes, generator = many(1), torch.Generator().manual_seed(0)
    sizes = [sum(e.lengths) for e in episodes]
    tensors = {"penalties": [torch.rand(n, generator=generator) for n in sizes]}
    if estimator == "gae":
        tensors["values"] = [torch.rand(n, generator=generator) for n in sizes]
    kinds = {} if estimator in ("grpo", "rloo") else GROUP
    spec = settings(estimator, gamma=0.9, whiten_rewards=True, whiten_advantages=True, **kinds)
    straight, _, metrics = agent_advantages(spec, episodes, **tensors)
    order = random.Random(2).sample(range(12), 12)
    moved = {name: [rows[i] for i in order] for name, rows in tensors.items()}
    shuffled, _, moved_metrics = agent_advantages(spec, [episodes[i] for i in order], **moved)
    close([row.tolist() for row in shuffled], [straight[i].tolist() for i in order])
    assert moved_metrics == pytest.approx(metrics)


def test_returns_by_turn_are_the_recursion() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    # One token a turn is the discount per token; one turn is none at all.
    assert discounted_returns_by_turn(rewards, [1] * 6, 0.5).equal(discounted_returns(rewards, 0.5))
    assert discounted_returns_by_turn(rewards, [6], 0.5).equal(discounted_returns(rewards, 1.0))
    # Turns 1 2 | 4 | 8 16 32: 56, 48, 32; then 4 + 28; then 3 + 16 and 2 + 16
    assert discounted_returns_by_turn(rewards, [2, 1, 3], 0.5).tolist() == [19.0, 18.0, 32.0, 56.0, 48.0, 32.0]


@pytest.mark.parametrize("estimator", ["reinforce", "agentic_reinforce", "step_reinforce"])
def test_the_expected_gradient_is_that_of_the_expected_return(estimator) -> None:
    """Without comparison and discount: over all episodes of a game of two turns, of two tokens and one."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1 + 2 + 4, 2, dtype=torch.float64, generator=generator).requires_grad_()
    first, second = torch.randn(4, generator=generator).tolist(), torch.randn(8, generator=generator).tolist()
    logprobs = logits.log_softmax(-1)
    expected_return, loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for a, b, c in itertools.product(range(2), repeat=3):
        rewards = [first[2 * a + b], second[4 * a + 2 * b + c]]
        taken = torch.stack([logprobs[0, a], logprobs[1 + a, b], logprobs[3 + 2 * a + b, c]])
        probability = taken.sum().exp()
        expected_return = expected_return + probability * sum(rewards)
        episode = Episode(0, "game", sum(rewards), rewards, [2, 1], ["", ""])
        (advantages,), _, _ = agent_advantages(settings(estimator, step_gamma=1.0), [episode])
        loss = loss - probability.detach() * (advantages * taken).sum()
    (wanted,) = torch.autograd.grad(expected_return, logits, retain_graph=True)
    (got,) = torch.autograd.grad(loss, logits)
    assert wanted.abs().max() > 0.05
    assert (got + wanted).abs().max() < 1e-6


def test_nothing_to_learn_from() -> None:
    for estimator in AgentAdvantageSettings.ESTIMATORS:
        values = [] if estimator == "gae" else None
        rows, _, metrics = agent_advantages(settings(estimator), [], values=values)
        assert rows == [] and metrics["ungraded_fraction"] == 0.0


def test_what_is_refused() -> None:
    for wrong in (
        {"estimator": "ppo"},
        {"estimator": "gigpo", "grouping": "traj_id"},
        {"estimator": "gigpo", "step_gamma": 1.5},
        {"estimator": "reinforce", "norm_mean_type": "running"},
        {"estimator": "grpo", "norm_mean_type": "group"},
        {"estimator": "rloo", "norm_std_type": "batch"},
    ):
        with pytest.raises(ValueError):
            AgentAdvantageSettings(**wrong)
    with pytest.raises(ValueError, match="unknown estimator"):
        AdvantageSettings(estimator="gigpo")
    with pytest.raises(ValueError, match=r"turns of \[2, 0\] tokens"):
        dataclasses.replace(A, lengths=[2, 0])
    with pytest.raises(ValueError, match="2 turns, 1 rewards"):
        dataclasses.replace(A, rewards=[1.0])
    with pytest.raises(ValueError, match="not finite"):
        run(settings("gigpo"), [dataclasses.replace(A, rewards=[0.0, math.nan])])
    with pytest.raises(ValueError, match="gae needs values"):
        run(settings("gae"))
    with pytest.raises(ValueError, match="penalties of shapes"):
        run(settings("reinforce"), penalties=[torch.zeros(2), torch.zeros(3)])
