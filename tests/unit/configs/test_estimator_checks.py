"""What an agentic run is told about estimators, normalisations and turn weights that contradict each other."""

from __future__ import annotations

import pytest
from config_samples import AGENTIC, MIXED, PURE, changed

from roll_opd.configs import build_config
from roll_opd.configs.estimator_checks import WITHIN_THE_DRAW, normalisation_of
from roll_opd.errors import ConfigError

DRAW = {"grouping": "traj_group_id"}


def load(changes):
    return build_config(changed(AGENTIC, changes), "agentic")


@pytest.mark.parametrize(
    ("estimator", "spec", "wanted"),
    [
        ("reinforce", {}, ("batch", None, None)),
        ("reinforce", {"method": "mean"}, ("batch", "batch", None)),
        ("reinforce", {"method": "mean_std"}, ("batch", "batch", "batch")),
        ("reinforce", DRAW | {"method": "asym_clip"}, WITHIN_THE_DRAW),
        ("reinforce", {"grouping": "tags", "method": "mean"}, ("tags", "group", None)),
        # What ROLL's files write: explicit types win, part by part.
        ("step_reinforce", DRAW | {"method": "mean", "norm_std_type": "batch"}, ("traj_group_id", "group", "batch")),
        ("step_reinforce", DRAW | {"norm_mean_type": "batch", "norm_std_type": "group"},
         ("traj_group_id", "batch", "group")),
        ("grpo", {}, WITHIN_THE_DRAW),
        ("grpo", DRAW | {"method": "mean_std"}, WITHIN_THE_DRAW),
        ("grpo", DRAW | {"norm_mean_type": "group", "norm_std_type": "group"}, WITHIN_THE_DRAW),
        ("gigpo", {}, WITHIN_THE_DRAW),
        ("gigpo", DRAW | {"method": "mean"}, ("traj_group_id", "group", None)),
        ("rloo", {}, ("batch", None, None)),
    ],
)  # fmt: skip
def test_reward_normalization_is_resolved(estimator, spec, wanted) -> None:
    built = load({"adv_estimator": estimator, "reward_normalization": spec})
    assert normalisation_of(built.config) == wanted
    assert not any("reward_normalization" in line for line in built.warnings)


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"adv_estimator": "grpo", "reward_normalization": {"method": "mean_std"}}, "reward_normalization",
         "adv_estimator: reinforce"),
        ({"adv_estimator": "grpo", "reward_normalization": DRAW | {"method": "mean"}}, "reward_normalization",
         "std over nothing"),
        ({"adv_estimator": "gigpo", "reward_normalization": {"method": "mean"}}, "reward_normalization",
         "grouping: traj_group_id"),
        ({"adv_estimator": "gigpo", "reward_normalization": DRAW | {"norm_std_type": "group"}}, "reward_normalization",
         "mean over nothing"),
        ({"adv_estimator": "rloo", "reward_normalization": {"method": "mean"}}, "reward_normalization", "by itself"),
        ({"reward_normalization": {"grouping": "tag", "method": "mean"}}, "reward_normalization.grouping",
         "did you mean 'tags'"),
        ({"norm_mean_type": "group"}, "norm_mean_type", "reward_normalization.norm_mean_type"),
        ({"norm_std_type": "running"}, "norm_std_type", "reward_normalization.norm_std_type"),
        ({"ratio_type": "segment", "importance_sampling": "seq"}, "ratio_type", "keep one"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(changes, field, says) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        load(changes)
    assert raised.value.field == field


@pytest.mark.parametrize("estimator", ["grpo", "gigpo"])
def test_identity_does_not_switch_a_comparison_off(estimator) -> None:
    """ROLL's files write it where they mean no comparison, and there it means none."""
    spec = {"grouping": "tags", "method": "identity"}
    warnings = load({"adv_estimator": estimator, "reward_normalization": spec}).warnings
    (line,) = [line for line in warnings if line.startswith("reward_normalization.method")]
    assert "'identity' does not switch off" in line and "reinforce" in line


@pytest.mark.parametrize(
    ("estimator", "spec", "compares"),
    [
        ("grpo", {}, True),
        ("rloo", {}, True),
        ("gigpo", {}, True),
        ("reinforce", DRAW | {"method": "mean"}, True),
        ("reinforce", {"method": "mean"}, False),
        ("step_reinforce", DRAW | {"method": "mean"}, False),  # turns of one episode are compared
    ],
)
def test_one_episode_a_draw_has_nobody_to_be_compared_with(estimator, spec, compares) -> None:
    changes = {"adv_estimator": estimator, "reward_normalization": spec, "train_env_manager.group_size": 1}
    changes |= {"train_env_manager.num_env_groups": 4}
    warnings = [line for line in load(changes).warnings if "train_env_manager.group_size: 1, but" in line]
    assert len(warnings) == compares


def test_turn_weights_are_for_episodes() -> None:
    weighted = {"opd_args": {"turn_weight": "linear", "turn_scale": 4.0}}
    for raw, pipeline in ((PURE, "onpolicy_distill"), (MIXED, "rlvr")):
        with pytest.raises(ConfigError, match="a response has one") as raised:
            build_config(changed(raw, weighted), pipeline)
        assert raised.value.field == "opd_args.turn_weight"
    mixed = {"use_opd": True, "teacher": PURE["teacher"]}
    built = load(mixed | weighted)
    assert (built.config.opd_args.turn_weight, built.config.opd_args.turn_scale) == ("linear", 4.0)
    (line,) = [x for x in load(mixed | {"opd_args": {"turn_scale": 4.0}}).warnings if "turn_scale" in x]
    assert line == "opd_args.turn_scale: has no effect with turn_weight none"


@pytest.mark.parametrize(("estimator", "reach"), [("reinforce", "episode"), ("gigpo", "turn")])
def test_how_far_a_teachers_term_is_summed_is_said(estimator, reach) -> None:
    mixed = {"use_opd": True, "teacher": MIXED["teacher"], "opd_args": {"apply_to": "reward"}}
    (line,) = [line for line in load(mixed | {"adv_estimator": estimator}).warnings if "grows with length" in line]
    assert f"over the rest of the {reach} (gamma 1)" in line
