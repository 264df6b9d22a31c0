"""Role mapping, fallbacks, what pure mode forces, warnings, and the launch's refusals."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from config_samples import AGENTIC, DELETE, MIXED, PURE, REWARD, RL, changed

import roll_opd.configs
from roll_opd.configs import AgenticConfig, RLVRConfig, build_config, launch_blockers, render_plan_text
from roll_opd.errors import ConfigError

OPD = "onpolicy_distill"
STRATEGY = "strategy_args.strategy_name"
SINGLE = {"model_args": {"model_name_or_path": "m"}}


def test_pure_mode_maps_the_three_roles():
    loaded = build_config(PURE, OPD)
    config = loaded.config
    assert isinstance(config, RLVRConfig)
    assert (config.mode, config.pipeline) == ("pure_opd", "rlvr")
    assert loaded.yaml_names == {
        "actor_train": "student_train",
        "actor_infer": "student_infer",
        "reference": "teacher",
        "teachers.default": "teacher",
    }
    assert config.actor_train.training_args.learning_rate == 1e-4
    assert config.actor_infer.generating_args.max_new_tokens == 32
    assert list(config.teachers) == ["default"]
    assert config.reference is None
    assert (config.actor_train.name, config.actor_infer.name) == ("student_train", "student_infer")
    assert config.teachers["default"].name == "teacher"
    strategies = [
        w.strategy_args.strategy_name for w in (config.actor_train, config.actor_infer, config.teachers["default"])
    ]
    assert strategies == ["fsdp2_train", "hf_infer", "hf_infer"]
    assert config.sequence_length == 96
    assert loaded.warnings == []


def test_mixed_mode_and_rl_keep_the_actors_names():
    mixed = build_config(MIXED, "rlvr")
    assert mixed.config.mode == "mixed_opd"
    roles = {role: mixed.yaml_names[role] for role in ("actor_train", "actor_infer", "reference")}
    assert roles == {"actor_train": "actor_train", "actor_infer": "actor_infer", "reference": "teacher"}
    plain = build_config(changed(RL, {"reference": {"infer_batch_size": 2}}), "rlvr")
    assert plain.config.mode == "rl"
    assert plain.config.reference.model_args.model_name_or_path == "models/student"
    assert plain.yaml_names["reference"] == "reference"


def test_pure_pipeline_type_chooses_the_config_class():
    played = {key: AGENTIC[key] for key in ("custom_envs", "train_env_manager")}
    raw = changed({**PURE, **played}, {"train_env_manager.max_env_num_per_worker": 3})
    loaded = build_config({**raw, "pure_opd_pipeline_type": "agentic"}, OPD)
    assert isinstance(loaded.config, AgenticConfig)
    assert loaded.config.pipeline == "agentic"
    assert loaded.config.train_env_manager.max_env_num_per_worker == 3


@pytest.mark.parametrize(
    ("teacher", "names"),
    [
        (SINGLE, ["default"]),
        ({**SINGLE, "tag_included": ["math"]}, ["default"]),
        # A key that ROLL knew and we ignore still marks a worker config.
        ({"max_concurrency": 1, **SINGLE}, ["default"]),
        ({"big": SINGLE}, ["big"]),
        ({"math": SINGLE, "code": SINGLE}, ["math", "code"]),
        # Close to the field "name", but its value is a worker config.
        ({"names": SINGLE}, ["names"]),
    ],
)
def test_single_teacher_or_several(teacher, names):
    assert list(build_config(changed(PURE, {"teacher": teacher}), OPD).config.teachers) == names


@pytest.mark.parametrize(
    ("teacher", "paths"),
    [
        (SINGLE, {"default": "teacher"}),
        ({"big": SINGLE}, {"big": "teacher.big"}),
        ({"default": SINGLE}, {"default": "teacher.default"}),
        ({"math": SINGLE, "code": SINGLE}, {"math": "teacher.math", "code": "teacher.code"}),
    ],
)
def test_teachers_are_named_as_in_the_yaml(teacher, paths):
    loaded = build_config(changed(PURE, {"teacher": teacher}), OPD)
    assert {name: loaded.teacher_yaml_name(name) for name in loaded.config.teachers} == paths
    assert all(path in render_plan_text(loaded) for path in paths.values())


def test_error_names_the_only_teacher_of_a_mapping():
    with pytest.raises(ConfigError) as caught:
        build_config(changed(PURE, {"teacher": {"default": {"infer_batch_size": 1}}}), OPD)
    assert caught.value.field == "teacher.default.model_args.model_name_or_path"


def test_row_limits_default_to_the_sequence_length():
    packed = {"use_sequence_packing": True}
    limits = {"max_packed_sequence_length_forward": 7}
    changes = {
        "student_train.use_sequence_packing": True,
        "teacher": {**SINGLE, **packed, "sequence_packing_args": limits},
    }
    config = build_config(changed(PURE, changes), OPD).config

    def given(worker):
        args = worker.sequence_packing_args
        return args.max_packed_sequence_length_forward, args.max_packed_sequence_length_train

    assert given(config.actor_train) == (96, 96)
    assert given(config.teachers["default"]) == (7, 96)
    # Off: the limits are not in force and stay as they are.
    assert given(config.actor_infer) == (None, None)
    both = changed(RL, {"reference": packed, "critic": packed, "adv_estimator": "gae", "sequence_length": 4096})
    config = build_config(both, "rlvr").config
    assert given(config.reference) == given(config.critic) == (4096, 4096)


def test_coefficient_own_then_top_level_then_one():
    teachers = {"a": {**SINGLE, "opd_kl_coef": 0.25}, "b": SINGLE}
    config = build_config(changed(PURE, {"teacher": teachers, "opd_kl_coef": 2}), OPD).config
    assert (config.teacher_coef("a"), config.teacher_coef("b")) == (0.25, 2.0)
    assert build_config(PURE, OPD).config.teacher_coef("default") == 1.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"opd_kl_coef": 0}, "opd_kl_coef"),
        ({"teacher.opd_kl_coef": 0}, "teacher.opd_kl_coef"),
        ({"teacher": {"a": {**SINGLE, "opd_kl_coef": 0}, "b": {**SINGLE, "opd_kl_coef": 0}}}, "teacher.a.opd_kl_coef"),
        ({"teacher": {"a": {**SINGLE, "opd_kl_coef": 0}, "b": SINGLE}, "opd_kl_coef": 0}, "opd_kl_coef"),
        # A schedule multiplies.
        ({"opd_kl_coef": 0, "opd_args": {"coef_schedule": "linear", "coef_end": 2.0}}, "opd_kl_coef"),
    ],
)
def test_teachers_without_weight_train_nothing(changes, field):
    with pytest.raises(ConfigError, match="nothing would train the student") as caught:
        build_config(changed(PURE, changes), OPD)
    assert caught.value.field == field
    (warning,) = (w for w in build_config(changed(MIXED, changes), "rlvr").warnings if "only monitor" in w)
    assert warning.startswith(f"{field}: 0")


def test_a_teacher_without_weight_beside_another_only_monitors():
    teachers = {"a": {**SINGLE, "opd_kl_coef": 0}, "b": SINGLE}
    for changes in ({"teacher": teachers}, {"opd_args": {"coef_schedule": "linear", "coef_end": 0.0}}):
        assert build_config(changed(PURE, changes), OPD).warnings == []


def test_each_role_falls_back_on_its_own():
    own = {"student_train.model_args.model_name_or_path": "models/own"}
    config = build_config(changed(PURE, own), OPD).config
    assert config.actor_train.model_args.model_name_or_path == "models/own"
    assert config.actor_infer.model_args.model_name_or_path == "models/student"
    assert config.teachers["default"].model_args.model_name_or_path == "models/teacher"
    config = build_config(changed(PURE, {**own, "pretrain": DELETE}), OPD).config
    assert config.actor_infer.model_args.model_name_or_path == "models/own"


FORCED = {
    "adv_estimator": "grpo",
    "gamma": 1.0,
    "critic": {"infer_batch_size": 1},
    "critic_warmup": 5,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "add_token_level_kl": True,
    "init_kl_coef": 0.1,
    "whiten_advantages": True,
    "whiten_rewards": True,
}


@pytest.mark.parametrize("name", FORCED)
def test_pure_mode_forces_and_says_so_once(name):
    loaded = build_config(changed(PURE, {name: FORCED[name]}), OPD)
    default = build_config(PURE, OPD).config
    assert getattr(loaded.config, name) == getattr(default, name) != FORCED[name]
    assert len(loaded.warnings) == 1
    assert loaded.warnings[0].startswith(f"{name}: pure distillation uses")


def test_values_that_agree_with_pure_mode_are_not_mentioned():
    agreeing = {"adv_estimator": "reinforce", "gamma": 0, "whiten_advantages": False}
    assert build_config(changed(PURE, agreeing), OPD).warnings == []


def test_lengths():
    by_total = build_config(changed(PURE, {"response_length": DELETE, "sequence_length": 100}), OPD).config
    assert (by_total.response_length, by_total.sequence_length) == (36, 100)
    sampled = changed(PURE, {"response_length": DELETE, "student_infer.generating_args.max_new_tokens": 20})
    assert build_config(sampled, OPD).config.response_length == 20
    assert build_config(changed(PURE, {"response_length": DELETE}), OPD).config.response_length == 1024


def test_validation_defaults():
    config = build_config(changed(PURE, {"validation": {"data_args": {"file_name": ["a.jsonl"]}}}), OPD).config
    assert config.validation.generating_args.max_new_tokens == 32
    assert config.validation.generating_args.num_return_sequences == 1
    assert (config.validation.seed, config.validation.teacher_accuracy, config.validation.max_prompts) == (
        1234,
        False,
        None,
    )


def test_world_size_follows_the_mapping():
    infer = {
        "device_mapping": "range(8)",
        "strategy_args": {"strategy_name": "vllm", "strategy_config": {"tensor_parallel_size": 2}},
    }
    loaded = build_config(changed(PURE, {"student_infer": infer, "student_train.world_size": 2}), OPD)
    assert (loaded.config.actor_infer.world_size, loaded.config.actor_infer.num_gpus_per_worker) == (4, 2)
    assert loaded.config.actor_train.world_size == 2
    assert loaded.config.teachers["default"].world_size == 1
    both = build_config(changed(PURE, {"teacher.device_mapping": [0, 1], "teacher.world_size": 3}), OPD)
    assert both.config.teachers["default"].world_size == 2
    assert "device_mapping gives 2" in both.warnings[0]


def test_roll_keys_without_effect_give_one_warning():
    changes = {"local_rank": -1, "student_train.model_args.model_type": None, "teacher.max_concurrency": 2}
    warnings = build_config(changed(PURE, changes), OPD).warnings
    assert len(warnings) == 1
    for path in ("local_rank", "student_train.model_args.model_type", "teacher.max_concurrency"):
        assert path in warnings[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student_train.training_args.gradient_accumulation_steps": 3}, "an optimizer step takes 12 samples"),
        ({"student_train.device_mapping": "range(16)", "rollout_batch_size": 64}, "device 15 lies outside"),
        ({"checkpoint_config": {"type": "file_system", "bucket": "x"}}, "checkpoint_config.bucket"),
        ({"is_pure_opd": False}, "is_pure_opd: false has no effect"),
        ({"opd_args": {"apply_to": "reward"}}, "the same in pure distillation"),
        ({"global_template": "qwen3"}, "the tokenizer's own chat template is used"),
        ({"rewards": {"r": {**REWARD, "query_filter_config": {"type": "mean_filter"}}}}, "rewards never filter"),
        ({"opd_args": {"top_k": 4}}, "opd_args.top_k: has no effect"),
        ({"student_infer.strategy_args": {"strategy_name": "sglang"}}, "sglang is planned only"),
        ({"student_infer.generating_args.max_new_tokens": 99}, "more than response_length"),
        (
            {"validation": {"generating_args": {"max_new_tokens": 33}}},
            "validation.generating_args.max_new_tokens: 33 is more than response_length; 32 is the bound",
        ),
        (
            {"opd_kl_coef": 2.0, "teacher": {"a": {**SINGLE, "opd_kl_coef": 0.5}, "b": {**SINGLE, "opd_kl_coef": 1.0}}},
            "opd_kl_coef: no effect, because every teacher has its own (teacher.a.opd_kl_coef, teacher.b.opd_kl_coef)",
        ),
        ({"student_train.data_args.domain_interleave_probs": {"a": 0.5, "b": 0.4}}, "add up to 0.9"),
        ({"student_infer.generating_args.num_return_sequences": 3}, "num_return_sequences_in_group (1) decides"),
    ],
)
def test_one_warning_each(changes, words):
    warnings = build_config(changed(PURE, changes), OPD).warnings
    assert len(warnings) == 1
    assert words in warnings[0]


def test_roll_class_paths_become_ours():
    config = build_config(changed(PURE, {"rewards": {"math_rule": REWARD}}), OPD).config
    expected = "roll_opd.rewards.math_rule_reward_worker.MathRuleRewardWorker"
    assert config.rewards["math_rule"].worker_cls == expected


@pytest.mark.parametrize(
    ("base", "launcher", "changes", "field"),
    [
        (PURE, OPD, {f"student_infer.{STRATEGY}": "sglang"}, f"student_infer.{STRATEGY}"),
        (PURE, OPD, {"async_generation_ratio": 1}, "async_generation_ratio"),
        (PURE, OPD, {"student_train.model_args.moe_aux_loss_coef": 0.1},
         "student_train.model_args.moe_aux_loss_coef"),
        (PURE, OPD, {"length_loss_weight": True}, "length_loss_weight"),
        (PURE, OPD, {"student_infer.generating_args.min_p": 0.1}, "student_infer.generating_args.min_p"),
        (PURE, OPD, {"teacher": {"a": SINGLE, "b": {**SINGLE, "model_args": {"model_name_or_path": "m",
                                                                             "lora_target": "all-linear"}}}},
         "teacher.b.model_args.lora_target"),
        (MIXED, "rlvr", {"rollout_dump_dir": "x"}, "rollout_dump_dir"),
        (RL, "rlvr", {f"actor_infer.{STRATEGY}": "sglang"}, f"actor_infer.{STRATEGY}"),
        (AGENTIC, "agentic", {"async_generation_ratio": 1}, "async_generation_ratio"),
    ],
)  # fmt: skip
def test_what_plans_but_does_not_run_is_refused_at_launch(base, launcher, changes, field):
    blockers = launch_blockers(build_config(changed(base, changes), launcher))
    assert [blocker.field for blocker in blockers] == [field]
    assert "not run by this version" in blockers[0].problem


@pytest.mark.parametrize(("base", "launcher"), [(PURE, OPD), (MIXED, "rlvr"), (RL, "rlvr"), (AGENTIC, "agentic")])
def test_the_samples_can_be_launched(base, launcher):
    assert launch_blockers(build_config(base, launcher)) == []


def test_configs_cannot_be_changed():
    config = build_config(PURE, OPD).config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_steps = 1


def test_the_input_is_left_alone():
    raw = changed(PURE, {"whiten_advantages": True})
    before = changed(raw, {})
    build_config(raw, OPD)
    assert raw == before


def test_every_field_has_its_docstring():
    missing = []
    for path in Path(roll_opd.configs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(item) for item in node.decorator_list):
                if path.name in ("field_spec.py", "memory.py") or node.name in ("Estimator",):
                    continue
                for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    if isinstance(item, ast.AnnAssign) and not documented:
                        missing.append(f"{path.name}: {node.name}.{ast.unparse(item.target)}")
    assert missing == []
