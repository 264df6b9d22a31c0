"""The training signal against numbers worked out by hand: who pushes a token, how hard, and what scales what."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from roll_opd.algorithms.divergences import DIVERGENCES
from roll_opd.algorithms.loss import LossInputs
from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import (
    RLVRConfig,
    TrainInferCorrectionArguments,
    TrainInferFilterArguments,
    TrainInferWeightArguments,
)
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.errors import TrainingError
from roll_opd.pipeline.signal import Signal
from roll_opd.pipeline.student import loss_of
from roll_opd.trajectory import BASE_MODEL, REFERENCE, TeacherScores, Trajectory

# d = student - teacher = 2, -1/2, 0 on the three sampled tokens of most trajectories here.
STUDENT = [-1.0, -2.0, -0.5]
TEACHER = [-3.0, -1.5, -0.5]
RUBBISH = float("nan")


@pytest.fixture
def make(fakes):
    """A trajectory of two prompt tokens and the sampled ones, with rubbish wherever nothing was sampled."""

    def make(draw=0, sample=0, old=STUDENT, scores=None, **fields) -> Trajectory:
        def spread(values):
            return np.concatenate([[RUBBISH, RUBBISH], values]).astype(np.float32)

        scores = {"default": TEACHER} if scores is None else scores
        for name in ("infer_logprobs", "entropies", "values"):
            if name in fields:
                fields[name] = spread(fields[name])
        return fakes.trajectory(
            draw,
            response=len(old),
            sample=sample,
            old_logprobs=spread(old),
            teacher_scores={name: TeacherScores(spread(values)) for name, values in scores.items()},
            **fields,
        )

    return make


def pure(coef=2.0, *, teachers=None, **settings) -> RLVRConfig:
    """What a load makes of pure distillation, with the fields that matter here; OPD's own may be given directly."""
    args, settings = split(settings)
    forced = {"adv_estimator": "reinforce", "gamma": 0.0, "max_steps": 10}
    teachers = teachers or {"default": TeacherConfig()}
    return RLVRConfig(is_pure_opd=True, opd_kl_coef=coef, teachers=teachers, opd_args=args, **(forced | settings))


def mixed(coef=2.0, *, teachers=None, **settings) -> RLVRConfig:
    args, settings = split(settings)
    chosen = {"adv_estimator": "reinforce", "max_steps": 10}
    teachers = teachers or {"default": TeacherConfig()}
    return RLVRConfig(use_opd=True, opd_kl_coef=coef, teachers=teachers, opd_args=args, **(chosen | settings))


def rl(**settings) -> RLVRConfig:
    return RLVRConfig(**({"adv_estimator": "reinforce", "max_steps": 10} | settings))


def split(settings):
    names = {field.name for field in dataclasses.fields(OPDArguments)}
    args = OPDArguments(**{k: v for k, v in settings.items() if k in names})
    return args, {k: v for k, v in settings.items() if k not in names}


def on_tokens(trajectories, name="advantages") -> list[list[float]]:
    """``name`` on the sampled tokens, after a look at all the others: nothing may be there."""
    out = []
    for t in trajectories:
        values = getattr(t, name)
        assert values.shape == t.tokens.shape and values.dtype == np.float32
        assert (values[~t.response_mask] == 0).all()
        out.append(t.sampled(values).tolist())
    return out


def close(got, expected) -> None:
    assert len(got) == len(expected)
    for row, wanted in zip(got, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


# ---- the teacher alone -------------------------------------------------------------------------------------------


def test_pure_distillation_is_minus_c_d(make) -> None:
    out, metrics = Signal(pure(coef=2.0))([make()], 0)
    close(on_tokens(out), [[-4.0, 1.0, 0.0]])
    assert on_tokens(out, "policy_weights") == [[1.0, 1.0, 1.0]]
    assert out[0].returns is None and out[0].divergence_weights == {}
    assert metrics == {"opd/coef_factor": 1.0}


@pytest.mark.parametrize(("coef", "own", "expected"), [(None, None, -2.0), (3.0, None, -6.0), (3.0, 0.5, -1.0)])
def test_the_coefficient_is_the_teachers_own_else_the_runs_else_one(make, coef, own, expected) -> None:
    config = pure(coef, teachers={"default": TeacherConfig(opd_kl_coef=own)})
    close(on_tokens(Signal(config)([make(old=[-1.0], scores={"default": [-3.0]})], 0)[0]), [[expected]])


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # r = exp(-d) with d = log 2 and -log 2, so r = 1/2 and 2; the teacher likes the second token better.
        ("reverse_kl", [-math.log(2), math.log(2)]),  # log r
        ("forward_kl", [-0.5, 1.0]),  # r - 1
        ("jsd", [0.75 * math.log(0.875), 0.75 * math.log(1.25)]),  # (1 - beta) log(beta r + 1 - beta), beta = 1/4
    ],
)
def test_the_divergences_score(make, divergence, expected) -> None:
    d = math.log(2)
    t = make(old=[-1.0, -1.0], scores={"default": [-1.0 - d, -1.0 + d]})
    out, _ = Signal(pure(1.0, divergence=divergence, jsd_beta=0.25))([t], 0)
    close(on_tokens(out), [expected])


def test_rewards_are_not_looked_at_in_pure_distillation(make) -> None:
    signal = Signal(pure())
    assert not signal.uses_rewards
    graded, _ = signal([make(0, reward=1.0), make(1, reward=-5.0)], 0)
    ungraded, _ = signal([make(0), make(1)], 0)
    assert on_tokens(graded) == on_tokens(ungraded)


def test_teachers_are_summed_each_with_its_coefficient(make) -> None:
    teachers = {"a": TeacherConfig(opd_kl_coef=0.5), "b": TeacherConfig(), "c": TeacherConfig(tag_included=["x"])}
    scores = {"a": TEACHER, "b": [-2.0, -2.0, -2.5]}  # d of b: 1, 0, 2
    out, _ = Signal(pure(3.0, teachers=teachers))([make(scores=scores), make(1, scores={"b": scores["b"]})], 0)
    # -(0.5 * 2 + 3 * 1), -(0.5 * -0.5 + 0), -(0 + 3 * 2); and b alone where a does not cover the sample
    close(on_tokens(out), [[-4.0, 0.25, -6.0], [-3.0, 0.0, -6.0]])


def test_the_mean_divides_by_the_teachers_that_cover_the_sample(make) -> None:
    teachers = {name: TeacherConfig() for name in ("a", "b", "c")}
    both = {"a": TEACHER, "b": [-2.0, -2.0, -2.5]}
    batch = [make(scores=both), make(1, scores={"c": TEACHER})]
    out, _ = Signal(pure(2.0, teachers=teachers, teacher_weighting="mean"))(batch, 0)
    # (-2 * 2 - 2 * 1) / 2, ...: of three teachers two cover the first sample, and one the second
    close(on_tokens(out), [[-3.0, 0.5, -2.0], [-4.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("constant", 0, 1.0),
        ("constant", 9, 1.0),
        ("linear", 0, 1.0),
        ("linear", 5, 0.6),
        ("linear", 10, 0.2),
        ("cosine", 0, 1.0),
        ("cosine", 5, 0.6),  # half-way, whatever the curve: 0.2 + 0.8 * (1 + cos(pi / 2)) / 2
        ("cosine", 10, 0.2),
        ("linear", 12, 0.2),
    ],
)
def test_the_schedule_of_the_coefficient(make, schedule, step, factor) -> None:
    config = pure(2.0, coef_schedule=schedule, coef_end=0.2)
    assert config.max_steps == 10
    out, metrics = Signal(config)([make()], step)
    close(on_tokens(out), [[-4.0 * factor, factor, 0.0]])
    assert metrics["opd/coef_factor"] == pytest.approx(factor)


def test_the_clip_bounds_the_push_and_the_trust_region_removes_it(make) -> None:
    clipped, _ = Signal(pure(2.0, log_ratio_clip=1.5))([make()], 0)
    close(on_tokens(clipped), [[-3.0, 1.0, 0.0]])
    gated, metrics = Signal(pure(2.0, trust_region=1.5))([make()], 0)
    close(on_tokens(gated), [[0.0, 1.0, 0.0]])
    assert metrics["opd/trust_region_kept"] == pytest.approx(2 / 3)
    # The gate looks at the log-ratio itself, not at what a clip leaves of it.
    both, _ = Signal(pure(2.0, trust_region=1.8, log_ratio_clip=1.5))([make()], 0)
    close(on_tokens(both), [[0.0, 1.0, 0.0]])


def test_the_trust_region_is_each_teachers_own(make) -> None:
    teachers = {"a": TeacherConfig(), "b": TeacherConfig()}
    batch = [make(scores={"a": TEACHER, "b": [-1.5, -4.0, -1.0]})]  # d of b: 0.5, 2, 0.5
    out, metrics = Signal(pure(2.0, teachers=teachers, trust_region=1.0))(batch, 0)
    close(on_tokens(out), [[-1.0, 1.0, -1.0]])
    assert metrics["opd/trust_region_kept"] == pytest.approx(4 / 6)


def test_the_entropy_gate_keeps_a_share_of_the_batchs_tokens(make) -> None:
    """Not of each sequence: the first has the two tokens of highest entropy and the second one of the next three."""
    scores = {"default": [-3.0, -1.5, -1.5]}  # d = 2, -1/2, 1
    batch = [make(i, scores=scores, entropies=e) for i, e in enumerate([[5.0, 4.0, 0.1], [0.2, 3.0, 0.3]])]
    out, _ = Signal(pure(2.0, entropy_keep=0.5))(batch, 0)
    close(on_tokens(out), [[-4.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "scale", "weights"),
    [
        ("none", 4.0, [1.0, 1.0, 1.0]),
        ("linear", 4.0, [1.0, 0.75, 0.5]),
        ("exponential", 2.0, [1.0, math.exp(-0.5), math.exp(-1.0)]),
        ("prefix", 2.0, [1.0, 1.0, 0.0]),
    ],
)
def test_the_weight_of_the_position_is_the_teachers_terms_alone(make, kind, scale, weights) -> None:
    d = [2.0, -0.5, 1.0]
    t = make(scores={"default": [-3.0, -1.5, -1.5]}, reward=10.0)
    settings = {"position_weight": kind, "position_scale": scale}
    term = [-2.0 * w * x for w, x in zip(weights, d, strict=True)]
    close(on_tokens(Signal(pure(2.0, **settings))([t], 0)[0]), [term])
    # reinforce at discount 1: the reward of 10 is every token's, whatever its position
    close(on_tokens(Signal(mixed(2.0, **settings))([t], 0)[0]), [[10.0 + x for x in term]])


def test_extrapolation_goes_beyond_the_teacher(make) -> None:
    # d = (student - teacher) + (1 - lambda) (teacher - base) = 2 - (-3 + 2), -0.5 - (-1.5 + 1), 0 - (-0.5 + 2)
    scores = {"default": TEACHER, BASE_MODEL: [-2.0, -1.0, -2.0]}
    out, _ = Signal(pure(2.0, base_model="m", extrapolation=2.0))([make(scores=scores)], 0)
    close(on_tokens(out), [[-6.0, 0.0, 3.0]])


def test_a_base_model_is_no_teacher(make) -> None:
    """Its scores alone push nothing."""
    out, _ = Signal(mixed(2.0, base_model="m", extrapolation=2.0))([make(scores={BASE_MODEL: TEACHER}, reward=1.0)], 0)
    close(on_tokens(out), [[1.0, 1.0, 1.0]])


def test_the_bound_on_the_advantage_comes_last(make) -> None:
    out, metrics = Signal(pure(2.0, advantage_clip=2.5))([make()], 0)
    close(on_tokens(out), [[-2.5, 1.0, 0.0]])
    assert metrics["opd/advantage_clip_fraction"] == pytest.approx(1 / 3)
    # The sum of both terms is bounded, not each: 3 - 4, 3 + 1, 3 + 0.
    out, metrics = Signal(mixed(2.0, advantage_clip=2.5))([make(reward=3.0)], 0)
    close(on_tokens(out), [[-1.0, 2.5, 2.5]])
    assert metrics["opd/advantage_clip_fraction"] == pytest.approx(2 / 3)


# ---- rewards and teachers ----------------------------------------------------------------------------------------

HALF = 0.5 / (math.sqrt(0.5) + 1e-6)
"""What grpo makes of rewards 1 and 0: 0.5 over their unbiased standard deviation."""


def test_grpo_plus_the_teacher(make) -> None:
    """The teacher's term joins the finished advantage as it is."""
    batch = [make(0, 0, reward=1.0), make(0, 1, scores={"default": [-1.0, -2.0, -1.5]}, reward=0.0)]
    signal = Signal(mixed(2.0, adv_estimator="grpo"))
    assert signal.uses_rewards
    out, metrics = signal(batch, 0)
    close(on_tokens(out), [[HALF - 4.0, HALF + 1.0, HALF], [-HALF, -HALF, -HALF - 2.0]])
    assert metrics["rl/reward_mean"] == 0.5 and metrics["rl/ungraded_fraction"] == 0.0


def test_a_prompts_samples_are_compared_with_each_other(make) -> None:
    """Wherever they stand in the batch: rewards 1 and 0 of one prompt, 3 and 1 of another (1 over sqrt(2))."""
    batch = [make(0, 0, reward=1.0), make(1, 0, reward=3.0), make(0, 1, reward=0.0), make(1, 1, reward=1.0)]
    one = 1.0 / (math.sqrt(2.0) + 1e-6)
    out, _ = Signal(mixed(0.0, adv_estimator="grpo"))(batch, 0)
    close(on_tokens(out), [[HALF] * 3, [one] * 3, [-HALF] * 3, [-one] * 3])
    out, _ = Signal(mixed(0.0, adv_estimator="rloo"))(batch, 0)
    close(on_tokens(out), [[1.0] * 3, [2.0] * 3, [-1.0] * 3, [-2.0] * 3])


def test_the_teachers_term_joins_the_reward_of_its_token(make) -> None:
    """At discount 1 a token gets its own term, all later ones, and its score; the statistics see the reward alone."""
    batch = [make(0, 0, reward=1.0), make(0, 1, scores={"default": [-1.0, -2.0, -1.5]}, reward=0.0)]
    out, _ = Signal(mixed(2.0, adv_estimator="grpo", apply_to="reward"))(batch, 0)
    close(on_tokens(out), [[HALF - 3.0, HALF + 1.0, HALF], [-HALF - 2.0] * 3])
    out, _ = Signal(mixed(2.0, adv_estimator="reinforce", apply_to="reward", gamma=0.5))(batch, 0)
    # rewards -4, 1, 0 + 1: R = 1, 1 + 1/2, -4 + 3/4; and 0, 0, -2
    close(on_tokens(out), [[-3.25, 1.5, 1.0], [-0.5, -1.0, -2.0]])


def test_the_stabilisers_reach_the_teachers_term_in_the_reward_too(make) -> None:
    batch = [make(reward=1.0)]
    out, _ = Signal(mixed(2.0, apply_to="reward", gamma=0.0, trust_region=1.0, coef_schedule="linear"))(batch, 5)
    close(on_tokens(out), [[0.0, 0.5, 1.0]])


def test_whitening_rescales_the_reward_and_not_the_teacher(make) -> None:
    batch = [make(0, reward=1.0), make(1, reward=0.0)]
    out, metrics = Signal(mixed(2.0, whiten_advantages=True))(batch, 0)
    # Six tokens, three at 1 and three at 0: unbiased variance 0.3, so 0.5 / sqrt(0.3) on either side.
    half = 0.5 / math.sqrt(0.3)
    close(on_tokens(out), [[half - 4.0, half + 1.0, half], [-half - 4.0, -half + 1.0, -half]])
    assert metrics["rl/penalty_scale"] == pytest.approx(1 / math.sqrt(0.3), rel=1e-6)


def test_whitening_rescales_what_the_teacher_put_into_the_reward(make) -> None:
    batch = [make(0, reward=0.0), make(1, reward=0.0)]
    out, _ = Signal(mixed(2.0, whiten_advantages=True, apply_to="reward", gamma=0.0))(batch, 0)
    # -4, 1, 0 twice: mean -1, squares 9, 4, 1 twice, unbiased variance 28 / 5
    scale = 1 / math.sqrt(5.6)
    close(on_tokens(out), [[-3 * scale, 2 * scale, scale]] * 2)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++", "reinforce"])
def test_the_size_of_rewards_does_not_change_the_teachers_term(make, estimator) -> None:
    def term(size: float) -> list[list[float]]:
        batch = [make(0, i, reward=size * i) for i in range(3)] + [make(1, 0, reward=0.0)]
        with_teacher, _ = Signal(mixed(2.0, adv_estimator=estimator))(batch, 0)
        without, _ = Signal(mixed(0.0, adv_estimator=estimator))(batch, 0)
        return [np.subtract(a, b).tolist() for a, b in zip(on_tokens(with_teacher), on_tokens(without), strict=True)]

    close(term(1.0), [[-4.0, 1.0, 0.0]] * 4)
    close(term(100.0), [pytest.approx([-4.0, 1.0, 0.0], abs=1e-4)] * 4)


def test_a_sample_without_a_teacher_is_pushed_by_its_reward_alone(make) -> None:
    batch = [make(0, 0, reward=1.0), make(0, 1, scores={}, reward=0.0)]
    out, _ = Signal(mixed(2.0, adv_estimator="grpo", uncovered="reward_only"))(batch, 0)
    close(on_tokens(out), [[HALF - 4.0, HALF + 1.0, HALF], [-HALF] * 3])
    out, _ = Signal(mixed(2.0, gamma=0.0, apply_to="reward", uncovered="reward_only"))(batch, 0)
    close(on_tokens(out), [[-4.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def test_an_ungraded_sample_is_in_no_statistic_and_keeps_its_teacher(make) -> None:
    batch = [make(0, 0, reward=1.0), make(0, 1, reward=0.0), make(0, 2)]
    out, metrics = Signal(mixed(2.0, adv_estimator="grpo"))(batch, 0)
    close(on_tokens(out), [[HALF - 4, HALF + 1, HALF], [-HALF - 4, -HALF + 1, -HALF], [-4.0, 1.0, 0.0]])
    assert metrics["rl/ungraded_fraction"] == pytest.approx(1 / 3)


def test_most_of_a_batch_ungraded_stops_the_run(make) -> None:
    signal = Signal(mixed())
    signal([make(0, reward=1.0), make(1)], 0)  # half is not most
    with pytest.raises(TrainingError, match=r"67% of the batch has no reward"):
        signal([make(0, reward=1.0), make(1), make(2)], 0)
    with pytest.raises(TrainingError):
        Signal(rl())([make(0, scores={})], 0)


def test_segments_of_an_episode_share_one_reward(make) -> None:
    """Statistics count the episode once: rewards 1 and 0, not 1, 1 and 0."""
    first = make(0, 0, reward=1.0)
    second = dataclasses.replace(first, id=first.id._replace(segment=1))
    out, _ = Signal(mixed(0.0, adv_estimator="grpo"))([first, second, make(0, 1, reward=0.0)], 0)
    close(on_tokens(out), [[HALF] * 3, [HALF] * 3, [-HALF] * 3])


def test_rewards_without_a_teacher(make) -> None:
    batch = [make(0, 0, scores={}, reward=1.0), make(0, 1, scores={}, reward=0.0)]
    out, metrics = Signal(rl(adv_estimator="grpo"))(batch, 0)
    close(on_tokens(out), [[HALF] * 3, [-HALF] * 3])
    assert not any(name.startswith("opd/") for name in metrics)


def test_returns_for_the_critic(make) -> None:
    """gae at lambda 1 and discount 1: the advantage is the return minus the value, the target the return."""
    t = make(reward=2.0, values=[0.5, 1.0, 3.0])
    out, _ = Signal(mixed(2.0, adv_estimator="gae", lambd=1.0))([t], 0)
    close(on_tokens(out), [[1.5 - 4.0, 1.0 + 1.0, -1.0]])
    close(on_tokens(out, "returns"), [[2.0, 2.0, 2.0]])


# ---- KL to a reference -------------------------------------------------------------------------------------------

REF = [-1.5, -1.0, -1.5]
"""student - reference: 0.5, -1, 1."""


@pytest.mark.parametrize(
    ("kind", "kl"),
    [
        ("kl", [0.5, -1.0, 1.0]),
        ("abs", [0.5, 1.0, 1.0]),
        ("mse", [0.125, 0.5, 0.5]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2.0, math.exp(-1.0)]),  # exp(-d) - 1 + d
    ],
)
def test_the_token_level_kl_is_subtracted_from_the_reward(make, kind, kl) -> None:
    config = rl(add_token_level_kl=True, init_kl_coef=0.2, kl_penalty=kind, gamma=0.0)
    out, metrics = Signal(config)([make(scores={REFERENCE: REF}, reward=1.0)], 0)
    close(on_tokens(out), [[-0.2 * kl[0], -0.2 * kl[1], 1.0 - 0.2 * kl[2]]])
    assert metrics["rl/kl_to_reference"] == pytest.approx(sum(kl) / 3, abs=1e-6)
    assert metrics["rl/kl_coef"] == 0.2


def adaptive(**settings) -> RLVRConfig:
    target = {"init_kl_coef": 0.2, "target_kl": 0.05, "kl_horizon": 20}
    return rl(add_token_level_kl=True, gamma=0.0, **target, **settings)


def test_the_coefficient_of_the_kl_adapts_and_survives_a_checkpoint(make) -> None:
    batch = [make(i, scores={REFERENCE: REF}, reward=0.0) for i in range(4)]
    # The mean KL is 1/6, far above the target: the error is cut to 0.2, and 4 samples are a fifth of the horizon.
    coefs = [0.2, 0.2 * 1.04, 0.2 * 1.04**2]
    signal = Signal(adaptive())
    for coef in coefs[:2]:
        out, metrics = signal(batch, 0)
        assert metrics["rl/kl_coef"] == pytest.approx(coef)
        close(on_tokens(out), [[-0.5 * coef, coef, -coef]] * 4)
    resumed = Signal(adaptive())
    resumed.load(signal.state())
    for s in (signal, resumed):
        assert s(batch, 0)[1]["rl/kl_coef"] == pytest.approx(coefs[2])
    assert Signal(rl()).state() == Signal(pure()).state()


def test_the_running_moments_survive_a_checkpoint(make) -> None:
    config = rl(norm_mean_type="running", norm_std_type="running")
    batches = [[make(i, scores={}, reward=float(r)) for i, r in enumerate(rs)] for rs in ([0, 1, 1], [4, 0, 2])]
    straight, resumed = Signal(config), Signal(config)
    straight(batches[0], 0)
    resumed.load(straight.state())
    out, _ = straight(batches[1], 1)
    # Rewards 0 1 1 4 0 2: mean 4/3, squares 16 + 1 + 1 + 64 + 16 + 4 over 9, unbiased variance 102/9/5
    std = math.sqrt(102 / 45)
    close(on_tokens(out), [[(r - 4 / 3) / std] * 3 for r in (4, 0, 2)])
    assert on_tokens(resumed(batches[1], 1)[0]) == on_tokens(out)


# ---- masks and corrections ---------------------------------------------------------------------------------------


def masked_batch(make) -> list[Trajectory]:
    """Prompt 1 is all right; the second sample was cut at the limit; the fifth is wrong, and the longest."""
    return [
        make(0, 0, reward=1.0),
        make(0, 1, reward=0.0, finish_reason="length"),
        make(1, 0, reward=1.0),
        make(1, 1, reward=1.0),
        make(2, 0, old=[-1.0] * 4, scores={"default": [-2.0] * 4}, reward=0.0),
        make(2, 1, reward=1.0),
    ]


MASKS = {
    "max_len": ({"max_len_mask": True}, [1]),
    "difficulty": ({"difficulty_mask": True}, [2, 3]),
    "error_max_len": ({"error_max_len_clip": True, "error_max_len_threshold": 4}, [4]),
    "all": ({"max_len_mask": True, "difficulty_mask": True, "error_max_len_clip": True, "error_max_len_threshold": 3},
            [1, 2, 3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_masks_take_trajectories_out_of_the_whole_loss(make, mask) -> None:
    settings, dropped = MASKS[mask]
    batch = masked_batch(make)
    for objective in ({}, {"objective": "direct", "support": "full"}):
        out, metrics = Signal(mixed(2.0, **objective, **settings))(batch, 0)
        assert [i for i, t in enumerate(out) if not t.trained] == dropped
        assert metrics["rl/masked_trajectories"] == pytest.approx(len(dropped) / 6)


def test_a_masked_samples_reward_counts_for_its_group(make) -> None:
    batch = masked_batch(make)[:2]
    out, _ = Signal(mixed(0.0, adv_estimator="grpo", max_len_mask=True))(batch, 0)
    close(on_tokens(out)[:1], [[HALF] * 3])


def test_rewards_that_only_monitor_mask_nothing(make) -> None:
    """In pure distillation the length alone may: whether a verdict has come in time must not change the update."""
    settings = MASKS["all"][0]
    out, _ = Signal(pure(2.0, **settings))(masked_batch(make), 0)
    assert [t.trained for t in out] == [True, False, True, True, True, True]


def correction(weight=None, filters=(), **settings) -> TrainInferCorrectionArguments:
    is_weight = TrainInferWeightArguments(enabled=weight is not None, weight_type=weight or "token", **settings)
    return TrainInferCorrectionArguments(is_weight, [TrainInferFilterArguments(enabled=True, **f) for f in filters])


LOG2 = math.log(2.0)


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        # old / infer is 2, 1, 1/2 in the first sequence and 1, 1.1, 1 in the second.
        (correction("token", upper_bound=1.5), [[1.5, 1.0, 0.5], [1.0, 1.1, 1.0]]),
        (correction("token", upper_bound=None), [[2.0, 1.0, 0.5], [1.0, 1.1, 1.0]]),
        (correction("sequence", upper_bound=None), [[1.0] * 3, [1.1] * 3]),
        (correction("geometric", upper_bound=None), [[1.0] * 3, [1.1 ** (1 / 3)] * 3]),
        (correction(filters=[{"ratio_low": 0.8, "ratio_high": 1.2}]), [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
        (correction(filters=[{"agg_type": "sequence", "ratio_low": 1.05}]), [[0.0] * 3, [1.0] * 3]),
        (correction("token", [{"ratio_high": 1.2, "ratio_low": 0.0}], upper_bound=None),
         [[0.0, 1.0, 0.5], [1.0, 1.1, 1.0]]),
        (correction(filters=[{"ratio_high": 1.2, "ratio_low": 0.0}, {"ratio_low": 1.05, "ratio_high": 9.0}]),
         [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    ],
)  # fmt: skip
def test_the_correction_is_a_weight_of_the_policy_loss(make, spec, weights) -> None:
    infer = [[-1.0 - LOG2, -2.0, -0.5 + LOG2], [-1.0, -2.0 - math.log(1.1), -0.5]]
    batch = [make(i, infer_logprobs=row) for i, row in enumerate(infer)]
    config = pure(2.0, train_infer_correction=spec)
    out, metrics = Signal(config)(batch, 0)
    close(on_tokens(out, "policy_weights"), weights)
    close(on_tokens(out), [[-4.0, 1.0, 0.0]] * 2)
    flat = [w for row in weights for w in row]
    assert metrics["mismatch/correction_dropped"] == pytest.approx(flat.count(0.0) / 6)


def test_a_correction_that_is_off_costs_nothing(make) -> None:
    off = TrainInferCorrectionArguments(filters=[TrainInferFilterArguments(enabled=False, ratio_high=0.1)])
    out, metrics = Signal(pure(train_infer_correction=off))([make(infer_logprobs=[-9.0] * 3)], 0)
    assert on_tokens(out, "policy_weights") == [[1.0] * 3]
    assert not any(name.startswith("mismatch/") for name in metrics)


@pytest.mark.parametrize("settings", [pure, mixed, rl], ids=["pure", "mixed", "rl"])
def test_the_engines_own_log_probabilities_need_no_correction(make, settings) -> None:
    """All ratios are 1, and neither a bound below 1 nor a filter without 1 may touch the loss."""
    spec = correction("token", [{"ratio_low": 1.1, "ratio_high": 9.0}], upper_bound=0.5)
    args = {"opd_args": OPDArguments(student_logprob_source="infer")} if settings is rl else None
    config = settings(train_infer_correction=spec, **(args or {"student_logprob_source": "infer"}))
    out, metrics = Signal(config)([make(reward=1.0, infer_logprobs=STUDENT)], 0)
    assert on_tokens(out, "policy_weights") == [[1.0] * 3]
    assert not any(name.startswith("mismatch/") for name in metrics)


def test_a_mask_leaves_the_correction_alone(make) -> None:
    batch = [make(0, infer_logprobs=STUDENT, finish_reason="length"), make(1, infer_logprobs=[-1.0 - LOG2, -2.0, -0.5])]
    spec = correction("token", upper_bound=1.5)
    out, _ = Signal(pure(train_infer_correction=spec, max_len_mask=True))(batch, 0)
    assert [t.trained for t in out] == [False, True]
    close(on_tokens(out, "policy_weights")[1:], [[1.5, 1.0, 1.0]])


# ---- objective: direct -------------------------------------------------------------------------------------------


def test_the_direct_objective_leaves_advantages_to_the_rewards(make) -> None:
    batch = [make(0, 0, reward=1.0), make(0, 1, reward=0.0)]
    for support in ("sampled", "full", "teacher_topk"):
        out, _ = Signal(pure(2.0, objective="direct", support=support))(batch, 0)
        close(on_tokens(out), [[0.0] * 3] * 2)
        out, _ = Signal(mixed(2.0, objective="direct", support=support, adv_estimator="grpo"))(batch, 0)
        close(on_tokens(out), [[HALF] * 3, [-HALF] * 3])
        assert [t.divergence_weights["default"].tolist() for t in out] == [[0.0, 0.0, 2.0, 2.0, 2.0]] * 2


def test_everything_that_weighs_the_teacher_weighs_its_divergence(make) -> None:
    teachers = {"a": TeacherConfig(opd_kl_coef=0.5), "b": TeacherConfig()}
    settings = {
        "objective": "direct",
        "support": "full",
        "teacher_weighting": "mean",
        "coef_schedule": "linear",
        "trust_region": 1.0,
        "position_weight": "linear",
        "position_scale": 4.0,
        "entropy_keep": 0.5,
    }
    batch = [
        make(0, scores={"a": TEACHER, "b": REF}, entropies=[9.0, 8.0, 0.0]),
        make(1, scores={"b": TEACHER}, entropies=[7.0, 0.0, 0.0]),
    ]
    out, _ = Signal(pure(3.0, teachers=teachers, **settings))(batch, 5)
    # Half the batch's tokens: both first ones and the second of the first sample. Positions weigh 1 and 3/4, the
    # schedule 1/2, the mean of two teachers 1/2. The trust region takes d = 2 out: a's first token, b's in sample 1.
    a, b = (out[0].divergence_weights[name][2:].tolist() for name in "ab")
    assert a == pytest.approx([0.0, 0.5 * 0.5 * 0.5 * 0.75, 0.0])
    assert b == pytest.approx([3.0 * 0.5 * 0.5, 3.0 * 0.5 * 0.5 * 0.75, 0.0])
    assert list(out[1].divergence_weights) == ["b"]
    assert out[1].divergence_weights["b"][2:].tolist() == [0.0, 0.0, 0.0]


def test_an_uncovered_sample_has_no_divergence(make) -> None:
    out, _ = Signal(mixed(objective="direct", uncovered="reward_only"))([make(scores={}, reward=1.0)], 0)
    assert out[0].divergence_weights == {}
    close(on_tokens(out), [[1.0] * 3])


# ---- whose gradient it is ---------------------------------------------------------------------------------------


def named_divergence(name, student, teacher, beta):
    """Of whole distributions, from the definition; arguments are log-probabilities ``[..., V]``."""
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()

    def kl(a, b):
        return (a.exp() * (a - b)).sum()

    if name == "jsd":
        return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    return kl(student, teacher) if name == "reverse_kl" else kl(teacher, student)


def expected_step(make, logits, teacher, config) -> torch.Tensor:
    """The gradient that signal and loss give on average: every token of the vocabulary, weighted by its probability."""
    student = logits.log_softmax(-1)
    t = make(old=student.detach().flatten().tolist(), scores={"default": teacher.flatten().tolist()})
    (t,), _ = Signal(config)([t], 0)
    old, advantages, policy_weights = (
        torch.tensor(t.sampled(a).astype(np.float64)) for a in (t.old_logprobs, t.advantages, t.policy_weights)
    )
    weights = {name: torch.tensor(t.sampled(w).astype(np.float64)) for name, w in t.divergence_weights.items()}
    x = LossInputs(
        logprobs=student.flatten(),
        entropy=torch.zeros_like(old),
        old_logprobs=old,
        advantages=advantages,
        policy_weights=policy_weights,
        segments=torch.zeros(len(old), dtype=torch.int64),
        num_segments=1,
        teacher_logprobs={name: teacher.flatten() for name in weights},
        divergence_weights=weights,
    )
    losses, _ = loss_of(config)(x)
    (gradient,) = torch.autograd.grad((student.detach().exp().flatten() * losses).sum(), logits)
    return gradient


CASES = [
    ("policy_gradient", "reverse_kl", 0.5),
    ("policy_gradient", "forward_kl", 0.5),
    ("policy_gradient", "jsd", 0.25),
    ("direct", "reverse_kl", 0.5),
    ("direct", "forward_kl", 0.5),
]


@pytest.mark.parametrize(("objective", "divergence", "beta"), CASES)
@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_the_expected_gradient_is_that_of_the_divergence(make, objective, divergence, beta, coef) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 7, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    teacher = torch.randn(3, 7, dtype=torch.float64, generator=generator).mul_(2).log_softmax(-1)
    value = coef * named_divergence(divergence, logits.log_softmax(-1), teacher, beta)
    (expected,) = torch.autograd.grad(value, logits)
    config = pure(coef, objective=objective, divergence=divergence, jsd_beta=beta)
    got = expected_step(make, logits, teacher, config)
    assert expected.abs().max() > 0.02
    # Trajectories are float32.
    assert (got - expected).abs().max() <= 2e-6


def test_descending_it_lowers_the_reverse_kl(make) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(-1)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    divergences = []
    for _ in range(200):
        divergences.append(float(named_divergence("reverse_kl", logits.log_softmax(-1), teacher, 0.5).detach()))
        logits = (logits - expected_step(make, logits, teacher, pure(1.0))).detach().requires_grad_()
    assert divergences[-1] < 1e-3 < divergences[0]


def test_a_teacher_equal_to_the_student_is_no_signal(make) -> None:
    t = make(scores={"default": STUDENT})
    for divergence in DIVERGENCES:
        out, _ = Signal(pure(3.0, divergence=divergence, jsd_beta=0.3))([t], 0)
        assert np.abs(out[0].advantages).max() <= 1e-6


# ---- invariances -------------------------------------------------------------------------------------------------


def big_batch(make) -> list[Trajectory]:
    rng = np.random.default_rng(4)
    batch = []
    for draw in range(4):
        for sample in range(3):
            n = int(rng.integers(1, 7))
            old = -rng.random(n) * 3
            batch.append(
                make(
                    draw,
                    sample,
                    old=old,
                    scores={name: -rng.random(n) * 3 for name in ("a", "b")[: 1 + draw % 2]},
                    infer_logprobs=old + 0.3 * rng.standard_normal(n),
                    entropies=rng.random(n),
                    reward=None if (draw, sample) == (2, 1) else float(rng.integers(0, 3)),
                    finish_reason="length" if n == 6 else "stop",
                )
            )
    return batch


INVARIANT = {
    "advantage": {"apply_to": "advantage", "whiten_advantages": True},
    "reward": {"apply_to": "reward", "whiten_rewards": True},
    "direct": {"objective": "direct", "support": "full"},
}


@pytest.mark.parametrize("kind", INVARIANT)
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++"])
def test_the_order_of_the_batch_changes_nothing_but_the_order(make, kind, estimator) -> None:
    teachers = {"a": TeacherConfig(opd_kl_coef=0.5), "b": TeacherConfig()}
    config = mixed(
        teachers=teachers,
        adv_estimator=estimator,
        teacher_weighting="mean",
        entropy_keep=0.6,
        trust_region=1.5,
        position_weight="exponential",
        position_scale=5.0,
        max_len_mask=True,
        difficulty_mask=True,
        difficulty_high_threshold=1.5,
        train_infer_correction=correction("sequence", [{"agg_type": "token"}]),
        **INVARIANT[kind],
    )
    batch = big_batch(make)
    straight, metrics = Signal(config)(batch, 3)
    assert 0 < metrics["rl/masked_trajectories"] < 1 and 0 < metrics["opd/trust_region_kept"] < 1
    assert len({round(float(v), 4) for t in straight for v in t.policy_weights}) > 4
    mixed_up = random.Random(1).sample(batch, len(batch))
    shuffled, shuffled_metrics = Signal(config)(mixed_up, 3)
    assert [t.id for t in shuffled] == [t.id for t in mixed_up] != [t.id for t in straight]
    by_id = {t.id: t for t in shuffled}
    for t in straight:
        other = by_id[t.id]
        for name in ("advantages", "policy_weights"):
            np.testing.assert_allclose(getattr(other, name), getattr(t, name), atol=1e-6, rtol=0)
        assert sorted(other.divergence_weights) == sorted(t.divergence_weights)
        for name, weights in t.divergence_weights.items():
            np.testing.assert_array_equal(other.divergence_weights[name], weights)
    assert shuffled_metrics == pytest.approx(metrics)


def test_the_input_is_left_alone(make) -> None:
    batch = [make(reward=1.0)]
    for array in (batch[0].old_logprobs, batch[0].infer_logprobs, batch[0].teacher_scores["default"].logprobs):
        array.setflags(write=False)  # as it comes from the object store
    Signal(mixed(train_infer_correction=correction("token")))(batch, 0)
    assert batch[0].advantages is None and batch[0].policy_weights is None


def test_left_over_distillation_settings_do_not_touch_plain_rl(make) -> None:
    """Without a teacher ``apply_to: reward`` has nothing to apply; the KL penalty must still be subtracted."""
    from roll_opd.configs import build_config

    config = build_config(
        {
            "pretrain": "m",
            "actor_train": {"data_args": {"file_name": "x.jsonl"}},
            "actor_infer": {"infer_batch_size": 4},
            "reference": {"infer_batch_size": 4},
            "rewards": {"r": {"worker_cls": "a.B"}},
            "adv_estimator": "reinforce",
            "add_token_level_kl": True,
            "init_kl_coef": 0.5,
            "opd_args": {"apply_to": "reward"},
        },
        "rlvr",
    ).config
    assert config.opd_args.apply_to == "advantage"
    batch = [make(0, scores={"reference": [-2.0, -2.0, -2.0]}, reward=1.0)]
    out, metrics = Signal(config)(batch, 0)
    assert metrics["rl/kl_to_reference"] != 0.0
    assert on_tokens(out)[0][0] != pytest.approx(1.0)


def test_an_adaptive_coefficient_needs_a_kl_to_adapt_to(make) -> None:
    """Pure distillation forces the coefficient to 0, from which a controller could not start."""
    Signal(pure(1.0, target_kl=0.1, init_kl_coef=0.0))([make(0)], 0)
