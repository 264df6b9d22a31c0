"""Settings that change nothing are named in one line, with the reason, and nothing else is."""

from __future__ import annotations

import pytest
from config_samples import AGENTIC, MIXED, PURE, REWARD, RL, changed

from roll_opd.configs import AgenticConfig, RLVRConfig, build_config
from roll_opd.configs.builder import field_types
from roll_opd.configs.idle_settings import RULES, idle_settings
from roll_opd.errors import ConfigError

OPD = "onpolicy_distill"
BASES = {"pure": (PURE, OPD), "mixed": (MIXED, "rlvr"), "rl": (RL, "rlvr")}
GROUP = {"num_return_sequences_in_group": 4}
REFERENCE = {"reference": {"infer_batch_size": 1}}
KL_REWARD = {**REFERENCE, "add_token_level_kl": True}
KL_LOSS = {**REFERENCE, "use_kl_loss": True, "kl_loss_coef": 0.1}
GAE = {"adv_estimator": "gae", "critic": {"infer_batch_size": 8}}
DIRECT = {"opd_args": {"objective": "direct"}}
FILTER = {"rewards": {"math": {**REWARD, "query_filter_config": {"type": "std_filter"}}}}
DUAL = {"use_pg_clip_range": True, "dual_clip_loss": True}
CORRECTION = {"train_infer_correction": {"is_weight": {"enabled": True}}}
FILTERS = {"train_infer_correction": {"filters": [{"enabled": True}]}}


def loaded(mode, changes):
    base, launcher = BASES[mode]
    return build_config(changed(base, changes), launcher)


def idle(mode, changes):
    base, launcher = BASES[mode]
    raw = changed(base, changes)
    return list(idle_settings(build_config(raw, launcher).config, raw))


@pytest.mark.parametrize("mode", BASES)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"pg_clip_low": 0.1, "pg_clip_high": 0.3}, ["pg_clip_low", "pg_clip_high"]),
        ({"pg_clip_low": 0.1, "use_pg_clip_range": True}, []),
        # A value that is the default was written all the same.
        ({"pg_clip_low": 0.2}, ["pg_clip_low"]),
        ({"pg_clip": 0.1, "use_pg_clip_range": True}, ["pg_clip"]),
        # The dual clip's bound is made of pg_clip.
        ({"pg_clip": 0.1, **DUAL}, []),
        ({"kl_loss_type": "k2"}, ["kl_loss_type"]),
        ({"lambd": 0.9}, ["lambd"]),
        # Off is off.
        ({"kl_loss_coef": 0, "init_kl_coef": 0, "use_kl_loss": False, "difficulty_mask": False, "reward_clip": None},
         []),
        ({"difficulty_low_threshold": 0.1, "error_max_len_threshold": 9},
         ["difficulty_low_threshold", "error_max_len_threshold"]),
        ({"max_additional_running_prompts": 4}, ["max_additional_running_prompts"]),
    ],
)  # fmt: skip
def test_in_every_mode(mode, changes, expected):
    assert idle(mode, changes) == expected


@pytest.mark.parametrize(
    ("mode", "changes", "expected"),
    [
        # rl
        ("rl", {"kl_loss_coef": 0.1}, ["kl_loss_coef"]),
        ("rl", {"use_kl_loss": True, "kl_loss_type": "k2"}, ["use_kl_loss", "kl_loss_type"]),
        ("rl", {**KL_LOSS, "kl_loss_type": "k2"}, []),
        ("rl", {"init_kl_coef": 0.1, "target_kl": 1.0, "kl_horizon": 9, "kl_penalty": "k3"},
         ["init_kl_coef", "target_kl", "kl_horizon", "kl_penalty"]),
        ("rl", {**KL_REWARD, "init_kl_coef": 0.1, "target_kl": 1.0, "kl_horizon": 9, "kl_penalty": "k3"}, []),
        ("rl", {**KL_REWARD, "kl_horizon": 9}, ["kl_horizon"]),
        ("rl", REFERENCE, ["reference"]),
        ("rl", {**GAE, "lambd": 0.9}, []),
        ("rl", {**GROUP, "adv_estimator": "grpo", "norm_mean_type": "batch", "norm_std_type": "group"},
         ["norm_mean_type", "norm_std_type"]),
        ("rl", {**GROUP, "adv_estimator": "rloo", "norm_mean_type": "batch", "norm_std_type": "group"},
         ["norm_mean_type"]),
        ("rl", {**GROUP, "norm_mean_type": "batch", "norm_std_type": "group"}, []),
        ("rl", {**GROUP, "difficulty_mask": True, "difficulty_low_threshold": 0.1}, []),
        ("rl", {"difficulty_mask": True, "difficulty_high_threshold": 0.9},
         ["difficulty_mask", "difficulty_high_threshold"]),
        ("rl", {"response_length": 8, "error_max_len_clip": True, "error_max_len_threshold": 8}, []),
        ("rl", {"response_length": 8, "error_max_len_clip": True, "error_max_len_threshold": 9},
         ["error_max_len_clip"]),
        ("rl", {**GROUP, **FILTER, "is_use_additional_prompts": True, "max_additional_running_prompts": 4}, []),
        ("rl", {**GROUP, **FILTER, "max_additional_running_prompts": 4}, ["max_additional_running_prompts"]),
        ("rl", {"is_use_additional_prompts": True}, ["is_use_additional_prompts"]),
        ("rl", FILTER, ["rewards.math.query_filter_config"]),
        # mixed
        ("mixed", {"init_kl_coef": 0.1, "target_kl": 1.0, "kl_horizon": 9},
         ["init_kl_coef", "target_kl", "kl_horizon"]),
        ("mixed", {"use_kl_loss": True}, ["use_kl_loss"]),
        # Beside a teacher it is another name of the objective.
        ("mixed", {"kl_penalty": "kl"}, []),
        ("pure", {"kl_penalty": "mse", **DIRECT}, []),
        ("mixed", {**GROUP, "adv_estimator": "grpo", "norm_mean_type": "batch"}, ["norm_mean_type"]),
        ("mixed", {"reward_clip": 1, "norm_mean_type": "running"}, []),
        ("mixed", {**DIRECT, "pg_clip": 0.1, "advantage_clip": 1.0, "importance_sampling": "seq"}, []),
        ("mixed", FILTER, ["rewards.math.query_filter_config"]),
        # pure
        ("pure", {"reward_clip": 1, "norm_mean_type": "batch", "norm_std_type": "group"},
         ["reward_clip", "norm_mean_type", "norm_std_type"]),
        ("pure", {**GROUP, "difficulty_mask": True, "difficulty_low_threshold": 0.1, "error_max_len_clip": True,
                  "error_max_len_threshold": 9, "is_use_additional_prompts": True, "kl_horizon": 9},
         ["difficulty_mask", "difficulty_low_threshold", "error_max_len_clip", "error_max_len_threshold",
          "is_use_additional_prompts", "kl_horizon"]),
        ("pure", {"pg_clip": 0.1, "advantage_clip": 1.0, "dual_clip_loss": True, "importance_sampling": "seq"}, []),
        ("pure", {**DIRECT, "pg_clip": 0.1, "advantage_clip": 1.0, **DUAL, "pg_clip_low": 0.1, "pg_clip_high": 0.1,
                  "importance_sampling": "seq"},
         ["pg_clip", "advantage_clip", "use_pg_clip_range", "dual_clip_loss", "pg_clip_low", "pg_clip_high",
          "importance_sampling"]),
        ("pure", {**DIRECT, "max_len_mask": True, "entropy_loss_coef": 0.1, "max_grad_norm": 2.0}, []),
        # What pure distillation forces has a line of its own.
        ("pure", {"use_kl_loss": True, "kl_loss_coef": 0.1, "init_kl_coef": 0.1, "target_kl": 1.0}, []),
        # So has a filter there.
        ("pure", FILTER, []),
    ],
)  # fmt: skip
def test_in_one_mode(mode, changes, expected):
    assert idle(mode, changes) == expected


def test_one_line_in_the_order_of_the_yaml_with_reasons():
    changes = {"lambd": 0.9, "pg_clip_high": 0.3, "init_kl_coef": 0.1}
    assert loaded("rl", changes).warnings == [
        "settings without effect here: lambd (only adv_estimator gae has one), "
        "pg_clip_high (use_pg_clip_range is off), init_kl_coef (add_token_level_kl is off)"
    ]
    (line,) = loaded("rl", dict(reversed(changes.items()))).warnings
    assert line.index("init_kl_coef") < line.index("pg_clip_high") < line.index("lambd")


def test_what_is_forced_is_said_once():
    warnings = loaded("pure", {"kl_loss_coef": 0.1, "target_kl": 1.0, "lambd": 0.9}).warnings
    assert [w.partition(":")[0] for w in warnings] == ["kl_loss_coef", "target_kl", "settings without effect here"]
    assert "kl_loss_coef" not in warnings[2] and "target_kl" not in warnings[2]


def test_fields_of_another_pipeline_are_not_asked_for():
    (line,) = build_config({**AGENTIC, "lambd": 0.9}, "agentic").warnings
    assert line.startswith("settings without effect here: lambd (")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rewards": {"math": REWARD}, "validation": {"seed": 1}, "num_return_sequences_in_group": 4},
         ["rewards", "validation", "num_return_sequences_in_group"]),
        ({"episode_reward_weight": 0.5, "step_reward_gamma": 0.9}, ["episode_reward_weight", "step_reward_gamma"]),
        ({"adv_estimator": "step_reinforce", "step_reward_weight": 0.5, "step_reward_gamma": 0.9},
         ["step_reward_weight"]),
    ],
)  # fmt: skip
def test_what_episodes_have_no_use_for(changes, named):
    built = build_config({**AGENTIC, **changes}, "agentic")
    assert list(idle_settings(built.config, changes)) == named
    assert (built.config.rewards, built.config.validation) == ({}, None)
    assert built.config.num_return_sequences_in_group == 1


def test_rewards_of_environments_only_monitor_in_pure_distillation():
    roles = {"student_train": PURE["student_train"], "student_infer": PURE["student_infer"], "teacher": PURE["teacher"]}
    raw = {k: v for k, v in AGENTIC.items() if not k.startswith("actor_")} | roles
    raw |= {"pure_opd_pipeline_type": "agentic", "reward_normalization": {"method": "mean"}, "step_reward_gamma": 0.5}
    built = build_config(raw, OPD)
    assert set(idle_settings(built.config, raw)) == {"reward_normalization", "step_reward_gamma"}


def test_the_rules_name_fields():
    named = {key for rule in RULES for key in rule.fields.split()}
    assert named - {*field_types(RLVRConfig), *field_types(AgenticConfig)} == set()


# The correction of the train/infer mismatch


@pytest.mark.parametrize("correction", [CORRECTION, FILTERS])
def test_a_correction_of_nothing_is_refused(correction):
    with pytest.raises(ConfigError, match="objective: policy_gradient, or switch it off") as caught:
        loaded("pure", {**DIRECT, **correction})
    assert caught.value.field == "train_infer_correction"
    (warning,) = loaded("mixed", {**DIRECT, **correction}).warnings
    assert warning.startswith("train_infer_correction: weighs the reward's part alone")
    for mode in BASES:
        assert loaded(mode, correction).warnings == []


@pytest.mark.parametrize("mode", BASES)
@pytest.mark.parametrize("correction", [CORRECTION, FILTERS])
def test_a_correction_of_the_engines_own_log_probabilities_is_mentioned(mode, correction):
    infer = {"opd_args": {"student_logprob_source": "infer"}}
    (warning,) = loaded(mode, {**infer, **correction}).warnings
    assert warning.startswith("settings without effect here: train_infer_correction (with opd_args.student_logprob")
    off = {"train_infer_correction": {"is_weight": {"enabled": False}}}
    assert loaded(mode, {**infer, **off}).warnings == []


def test_a_correction_that_is_off_is_not_refused():
    off = {"train_infer_correction": {"is_weight": {"enabled": False}, "filters": [{"enabled": False}]}}
    assert loaded("pure", {**DIRECT, **off}).warnings == []


# Settings of distillation without a teacher


def test_settings_of_distillation_without_a_teacher():
    changes = {"opd_args": {"student_logprob_source": "infer", "top_k": 4, "jsd_beta": None}, "opd_kl_coef": 0.5}
    assert loaded("rl", changes).warnings == [
        "opd_args.top_k, opd_kl_coef: no effect, because no teacher is configured"
    ]
    source = {"opd_args": {"student_logprob_source": "infer"}}
    assert loaded("rl", source).warnings == []
    with pytest.raises(ConfigError, match="those of a different distribution"):
        loaded("rl", {**source, "actor_infer.generating_args.temperature": 0.5})
