"""The training signal of episodes: what reaches which token, however an episode was cut into segments."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest

from roll_opd.configs.agentic_config import AgenticConfig, RewardNormalizationArguments
from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import (
    TrainInferCorrectionArguments,
    TrainInferFilterArguments,
    TrainInferWeightArguments,
)
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.pipeline.formula import formula
from roll_opd.pipeline.signal import Signal
from roll_opd.pipeline.student import loss_of
from roll_opd.trajectory import REFERENCE, TeacherScores, Trajectory, TrajectoryId, Turn

RUBBISH = float("nan")
OPD = {field.name for field in dataclasses.fields(OPDArguments)}


def config(mode: str = "mixed_opd", **settings: Any) -> AgenticConfig:
    """What a load makes of these settings; those of ``opd_args`` and ``reward_normalization`` are given directly."""
    norm = {k: settings.pop(k) for k in ("grouping", "method") if k in settings}
    chosen: dict[str, Any] = {"adv_estimator": "reinforce", "max_steps": 10, "step_reward_gamma": 0.5}
    chosen |= {k: v for k, v in settings.items() if k not in OPD}
    if mode == "pure_opd":
        chosen |= {"adv_estimator": "reinforce", "gamma": 0.0}
    return AgenticConfig(
        pipeline="agentic",
        is_pure_opd=mode == "pure_opd",
        use_opd=mode == "mixed_opd",
        opd_kl_coef=1.0,
        teachers={} if mode == "rl" else {"default": TeacherConfig()},
        opd_args=OPDArguments(**{k: v for k, v in settings.items() if k in OPD}),
        reward_normalization=RewardNormalizationArguments(**norm),
        **chosen,
    )


@dataclasses.dataclass(frozen=True)
class Played:
    """A turn of an episode: rewards and states as the environment gave them, arrays over the turn's sampled tokens."""

    reward: float
    state: str
    d: tuple[float, ...]
    values: tuple[float, ...] = ()


def segments(
    draw: int, sample: int, turns: list[Played], cuts: tuple[int, ...] = (), **fields: Any
) -> list[Trajectory]:
    """The trajectories of an episode that is cut before the turns ``cuts``.

    A segment begins with two tokens of prompt and shows one of observation before each turn; ``d`` is student minus
    teacher. Rubbish is wherever nothing was sampled.
    """
    out = []
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(turns)), strict=True)):
        columns: dict[str, list[float]] = {"old": [RUBBISH] * 2, "teacher": [RUBBISH] * 2, "values": [RUBBISH] * 2}
        made = []
        for index in range(start, end):
            turn = turns[index]
            for column in columns.values():
                column.append(RUBBISH)
            begin = len(columns["old"])
            columns["old"] += [-0.5] * len(turn.d)
            columns["teacher"] += [-0.5 - d for d in turn.d]
            columns["values"] += turn.values or (0.0,) * len(turn.d)
            made.append(Turn(index, begin, begin + len(turn.d), "seen", turn.reward, turn.state))
        arrays = {name: np.array(column, dtype=np.float32) for name, column in columns.items()}
        mask = ~np.isnan(arrays["old"])
        known = {"old_logprobs": arrays["old"], "entropies": -arrays["teacher"], "turns": tuple(made)}
        known |= {"teacher_scores": {name: TeacherScores(arrays["teacher"]) for name in ("default", REFERENCE)}}
        out.append(
            Trajectory(
                id=TrajectoryId(draw, sample, number),
                tag="lake",
                tokens=np.arange(len(mask), dtype=np.int32),
                response_mask=mask,
                infer_logprobs=arrays["old"] - 0.1 * arrays["teacher"],
                weight_version=np.where(mask, 0, -1).astype(np.int32),
                reward=sum(turn.reward for turn in turns),
                **(known | ({"values": arrays["values"]} if turns[0].values else {}) | fields),
            )
        )
    return out


# Two episodes of one draw, as in the estimators' tests: tokens 2 + 1 and 1 + 2, scores 1 and 0.
A = [Played(0.0, "s", (1.0, 2.0)), Played(1.0, "u", (-1.0,))]
B = [Played(0.0, "s", (0.0,)), Played(0.0, "v", (3.0, 0.5))]
HALF = 0.5 / (math.sqrt(0.5) + 1e-6)


def pushed(spec: AgenticConfig, trajectories: list[Trajectory]) -> dict[tuple[int, int], list[float]]:
    """Advantages of each episode's sampled tokens, in order; nothing may be anywhere else."""
    out: dict[tuple[int, int], list[float]] = {}
    for t in sorted(Signal(spec)(trajectories, 2)[0], key=lambda t: t.id):
        assert (t.advantages[~t.response_mask] == 0).all()
        out.setdefault(t.id[:2], []).extend(t.sampled(t.advantages).tolist())
    return out


def batch(cuts: tuple[int, ...] = ()) -> list[Trajectory]:
    return segments(0, 0, A, cuts) + segments(0, 1, B)


@pytest.mark.parametrize("cuts", [(), (1,)])
@pytest.mark.parametrize(
    ("settings", "a", "b"),
    [
        ({"adv_estimator": "grpo"}, [HALF] * 3, [-HALF] * 3),
        ({"adv_estimator": "grpo", "grouping": "traj_group_id", "method": "mean_std"}, [HALF] * 3, [-HALF] * 3),
        ({"adv_estimator": "reinforce", "grouping": "traj_group_id", "method": "mean_std"}, [HALF] * 3, [-HALF] * 3),
        ({"adv_estimator": "reinforce", "grouping": "tags", "method": "mean"}, [0.5] * 3, [-0.5] * 3),
        ({"adv_estimator": "rloo"}, [1.0] * 3, [-1.0] * 3),
        ({"adv_estimator": "agentic_reinforce", "gamma": 0.5}, [0.5, 0.5, 1.0], [0.0] * 3),
        ({"adv_estimator": "step_reinforce", "method": "mean"}, [0.125, 0.125, 0.625], [-0.375] * 3),
        ({"adv_estimator": "gigpo", "grouping": "traj_group_id", "method": "mean", "step_reward_weight": 2.0},
         [1.0, 1.0, 0.5], [-1.0, -0.5, -0.5]),
        ({"adv_estimator": "gigpo", "episode_reward_weight": 3.0}, [4 * HALF, 4 * HALF, 3 * HALF],
         [-4 * HALF, -3 * HALF, -3 * HALF]),
    ],
)  # fmt: skip
def test_what_the_config_says_reaches_the_tokens(settings, a, b, cuts) -> None:
    """The episode's score, and the returns of turns, on every token of theirs, in one segment or two."""
    got = pushed(config("rl", **settings), batch(cuts))
    assert got[0, 0] == pytest.approx(a, abs=1e-5) and got[0, 1] == pytest.approx(b, abs=1e-5)
    # The teacher's term joins at full strength, token by token.
    mixed = pushed(config(**settings), batch(cuts))
    assert mixed[0, 0] == pytest.approx([x - d for x, d in zip(a, (1.0, 2.0, -1.0), strict=True)], abs=1e-5)


def test_the_teachers_term_in_the_reward_is_summed_where_the_reward_is() -> None:
    def a(estimator: str, **settings: Any) -> list[float]:
        return pushed(config(adv_estimator=estimator, apply_to="reward", **settings), batch())[0, 0]

    # Token rewards -1, -2 | 1 + 1. The rest of the episode; of the turn; half of the next turn's first token.
    assert a("reinforce") == pytest.approx([-1.0, 0.0, 2.0])
    assert a("step_reinforce") == pytest.approx([-3.0 + 0.5, -2.0 + 0.5, 2.0])
    assert a("agentic_reinforce", gamma=0.5) == pytest.approx([-2.0, -1.0, 2.0])


def test_the_values_of_the_next_segment_follow_those_of_the_last() -> None:
    turns = [Played(2.0, "s", (0.0, 0.0), (0.5, 1.0)), Played(1.0, "u", (0.0,), (0.25,))]
    for cuts in ((), (1,)):
        out, _ = Signal(config("rl", adv_estimator="gae", lambd=0.0))(segments(0, 0, turns, cuts), 0)
        advantages = np.concatenate([t.sampled(t.advantages) for t in out])
        returns = np.concatenate([t.sampled(t.returns) for t in out])
        assert advantages.tolist() == pytest.approx([0.5, 1.25, 0.75])
        assert returns.tolist() == pytest.approx([1.0, 2.25, 1.0])


def test_what_is_reported() -> None:
    _, metrics = Signal(config("rl", adv_estimator="gigpo"))(batch((1,)), 0)
    assert metrics["rl/reward_mean"] == 0.5 and metrics["rl/reward_std"] == pytest.approx(math.sqrt(0.5))
    assert metrics["rl/state_group_size_mean"] == pytest.approx(4 / 3)
    assert metrics["rl/state_compared_fraction"] == 0.5
    assert metrics["rl/step_return_mean"] == pytest.approx(1.5 / 4)


def test_rewards_of_episodes_only_monitor_in_pure_distillation() -> None:
    got = pushed(config("pure_opd"), batch((1,)))
    assert got == {(0, 0): pytest.approx([-1.0, -2.0, 1.0]), (0, 1): pytest.approx([0.0, -3.0, -0.5])}


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("linear", [1.0, 0.5, 0.0]), ("exponential", [1.0, math.exp(-0.5), math.exp(-1.0)]), ("prefix", [1.0, 1.0, 0.0])],
)
@pytest.mark.parametrize("cuts", [(), (1,), (2,), (1, 2)])
def test_the_weight_of_the_turn_is_the_teachers_terms_alone(kind, weights, cuts) -> None:
    turns = [Played(0.0, "s", (1.0, 2.0)), Played(0.0, "t", (4.0,)), Played(10.0, "u", (1.0, -1.0))]
    term = [-weights[turn] * d for turn, played in enumerate(turns) for d in played.d]
    spec = {"turn_weight": kind, "turn_scale": 2.0}
    assert pushed(config("pure_opd", **spec), segments(0, 0, turns, cuts))[0, 0] == pytest.approx(term)
    mixed = pushed(config(**spec), segments(0, 0, turns, cuts))[0, 0]
    assert mixed == pytest.approx([10.0 + x for x in term], abs=1e-5)


def test_a_position_is_one_of_its_turn() -> None:
    spec = config("pure_opd", position_weight="prefix", position_scale=1.0)
    assert pushed(spec, batch())[0, 0] == pytest.approx([-1.0, 0.0, 1.0])


def test_a_response_without_turns_keeps_the_whole_teachers_term() -> None:
    (t,) = segments(0, 0, A[:1])
    weighted = config("pure_opd", turn_weight="linear", turn_scale=1.0)
    assert pushed(weighted, [dataclasses.replace(t, turns=())]) == {(0, 0): pytest.approx([-1.0, -2.0])}


def random_episodes(seed: int) -> dict[tuple[int, int], list[Played]]:
    rng = random.Random(seed)
    episodes = {}
    for draw in range(3):
        for sample in range(3):
            episodes[draw, sample] = [
                Played(
                    rng.choice([0.0, 1.0, -0.5]),
                    rng.choice("st"),
                    tuple(rng.uniform(-2, 2) for _ in range(size)),
                    tuple(rng.uniform(-1, 1) for _ in range(size)),
                )
                for size in [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
            ]
    return episodes


WAYS = {
    "advantage": {"apply_to": "advantage", "whiten_advantages": True},
    "reward": {"apply_to": "reward", "whiten_rewards": True},
    "kl": {"mode": "rl", "add_token_level_kl": True, "init_kl_coef": 0.3, "target_kl": 0.1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "estimator",
    ["reinforce", "reinforce++", "grpo", "rloo", "gae", "agentic_reinforce", "step_reinforce", "gigpo"],
)
def test_neither_the_cuts_nor_the_order_change_a_tokens_push(way, estimator) -> None:
    settings = {"gamma": 0.9, "entropy_keep": 0.8, "position_weight": "linear", "turn_weight": "exponential"}
    settings |= {"position_scale": 3.0, "turn_scale": 2.0, "reward_clip": 0.8, **WAYS[way]}
    if estimator not in ("grpo", "rloo", "gigpo"):
        settings |= {"grouping": "tags", "method": "mean_std"}
    spec = config(adv_estimator=estimator, **settings)
    if way == "kl":
        spec = dataclasses.replace(spec, opd_args=OPDArguments())

    def all_of(cut: Any, order: random.Random) -> list[Trajectory]:
        made = [t for key, turns in episodes.items() for t in segments(*key, turns, cut(turns))]
        made = [t if estimator == "gae" else dataclasses.replace(t, values=None) for t in made]
        return order.sample(made, len(made))

    episodes, rng = random_episodes(1), random.Random(7)
    whole = all_of(lambda turns: (), random.Random(0))
    wanted, metrics = pushed(spec, whole), Signal(spec)(whole, 2)[1]
    assert len({round(x, 4) for row in wanted.values() for x in row}) > 3
    for cut in (
        lambda turns: tuple(range(1, len(turns))),
        lambda turns: tuple(i for i in range(1, len(turns)) if rng.random() < 0.5),
    ):
        parts = all_of(cut, rng)
        assert len(parts) > len(whole)
        got = pushed(spec, parts)
        assert got.keys() == wanted.keys()
        for key, row in wanted.items():
            assert got[key] == pytest.approx(row, abs=1e-5), key
        assert Signal(spec)(parts, 2)[1] == pytest.approx(metrics, abs=1e-6)


def test_the_correction_over_segments_is_over_turns() -> None:
    """old - infer is a tenth of the teacher's log-probability: -0.5 - d."""
    spec = TrainInferCorrectionArguments(
        TrainInferWeightArguments(enabled=True, weight_type="segment", upper_bound=None),
        [TrainInferFilterArguments(enabled=True, agg_type="segment", ratio_low=0.82, ratio_high=9.0)],
    )
    out, _ = Signal(config("pure_opd", train_infer_correction=spec))(batch(), 0)
    # Means over turns: -(0.15 + 0.25) / 2, 0.05; -0.05, -(0.35 + 0.1) / 2. The first and the last are below 0.82.
    first, second, third, last = (math.exp(x) for x in (-0.2, 0.05, -0.05, -0.225))
    assert first < 0.82 and last < 0.82
    assert out[0].sampled(out[0].policy_weights).tolist() == pytest.approx([0.0, 0.0, second])
    assert out[1].sampled(out[1].policy_weights).tolist() == pytest.approx([third, 0.0, 0.0])


def test_an_episode_that_is_not_whole_or_not_covered_is_a_bug() -> None:
    first, second = segments(0, 0, A, (1,))
    with pytest.raises(AssertionError, match="not whole"):
        Signal(config())([second], 0)
    with pytest.raises(AssertionError, match="differ in their reward"):
        Signal(config())([first, dataclasses.replace(second, reward=9.0)], 0)
    with pytest.raises(AssertionError, match="do not cover"):
        Signal(config())([dataclasses.replace(t, turns=t.turns[:1]) for t in segments(0, 0, A)], 0)
    (turn,) = first.turns
    moved = dataclasses.replace(first, turns=(dataclasses.replace(turn, start=turn.start - 1, end=turn.end - 1),))
    with pytest.raises(AssertionError, match="off its mask"):
        Signal(config())([moved, second], 0)


def test_the_ratio_of_a_turn_is_asked_of_the_loss() -> None:
    assert loss_of(config()).policy.ratio == "token"
    assert loss_of(config(importance_sampling="seq")).policy.ratio == "seq"
    assert loss_of(config(ratio_type="segment")).policy.ratio == "turn"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"adv_estimator": "grpo"},
         "grpo(episode score centred over traj_group_id scaled over traj_group_id; discount 1)"),
        ({"adv_estimator": "reinforce", "method": "mean"}, "reinforce(episode score centred over batch; discount 1)"),
        ({"adv_estimator": "agentic_reinforce", "gamma": 0.9},
         "agentic_reinforce(rewards of turns; discount 0.9 by turn)"),
        ({"adv_estimator": "step_reinforce"},
         "step_reinforce(returns of turns at discount 0.5; discount 1 within the turn)"),
        ({"adv_estimator": "gigpo", "grouping": "traj_group_id", "method": "mean"},
         "gigpo(1 * episode score centred over traj_group_id + 1 * returns of turns at discount 0.5 centred over "
         "turns of its state; discount 1 within the turn)"),
        ({"adv_estimator": "step_reinforce", "apply_to": "reward"},
         "step_reinforce(returns of turns at discount 0.5 + 1 * (logprob_default - logprob_student); "
         "discount 1 within the turn)"),
        ({"turn_weight": "linear", "turn_scale": 4.0}, "linear turn weight over 4 turns"),
        # Some estimators see the episode's score alone, others the rewards of its turns.
        ({"reward_clip": 5.0, "whiten_rewards": True},
         "reinforce(episode score clipped to +-5; discount 1, token rewards whitened)"),
        ({"adv_estimator": "gae", "reward_clip": 5.0, "method": "mean", "lambd": 0.9, "whiten_advantages": True},
         "gae(rewards of turns clipped to +-5 centred over batch; discount 1, lambda 0.9, whitened)"),
        ({"adv_estimator": "step_reinforce", "reward_clip": 5.0},
         "step_reinforce(returns of turns at discount 0.5 of rewards clipped to +-5; discount 1 within the turn)"),
        ({"adv_estimator": "gigpo", "grouping": "traj_group_id", "method": "mean", "reward_clip": 5.0},
         "gigpo(1 * episode score of rewards clipped to +-5 centred over traj_group_id + 1 * returns of turns at "
         "discount 0.5 of rewards clipped to +-5 centred over turns of its state; discount 1 within the turn)"),
        ({"adv_estimator": "agentic_reinforce", "apply_to": "reward", "whiten_advantages": True},
         "agentic_reinforce(rewards of turns + 1 * (logprob_default - logprob_student); discount 1 by turn, whitened)"),
    ],
)  # fmt: skip
def test_the_formula(settings, line) -> None:
    assert line in formula(config(**settings))
