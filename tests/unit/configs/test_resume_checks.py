"""Which changes between a checkpoint's config and the resuming one are refused, warned about, or free."""

from __future__ import annotations

import json

import pytest
from config_samples import DELETE, PURE, REWARD, RL, changed

from roll_opd.configs import (
    AgenticConfig,
    RLVRConfig,
    build_config,
    changed_fields,
    config_for_checkpoint_json,
    resume_conflicts,
)
from roll_opd.configs.builder import field_types
from roll_opd.configs.resume_checks import FREE, WARNED
from roll_opd.errors import ConfigError

OPD = "onpolicy_distill"
BASE = changed(
    PURE,
    {
        "rewards": {"math": REWARD},
        "validation": {"data_args": {"file_name": "v.jsonl"}},
        "student_train.training_args.gradient_accumulation_steps": 2,
    },
)


def saved(raw=BASE):
    return json.loads(config_for_checkpoint_json(build_config(raw, OPD).config))


def conflicts(changes, base=BASE):
    loaded = build_config(changed(base, changes), OPD)
    return resume_conflicts(saved(base), loaded.config, loaded.yaml_names)


def test_nothing_changed():
    config = build_config(BASE, OPD).config
    assert changed_fields(saved(), config) == []
    assert resume_conflicts(saved(), config) == ([], [])


TRAIN = "student_train.training_args"
REFUSED = [
    {"seed": 7},
    {"rollout_batch_size": 8},
    {"num_return_sequences_in_group": 2},
    {"prompt_length": 65},
    {"ppo_epochs": 2},
    {"loss_agg_mode": "token-mean"},
    {f"{TRAIN}.learning_rate": 1e-3},
    {f"{TRAIN}.gradient_accumulation_steps": 1},
    {"student_train.data_args.file_name": ["other.jsonl"]},
    {"student_train.data_args.shuffle": False},
    {"student_train.model_args.dtype": "fp32"},
    {"student_train.strategy_args.strategy_name": "megatron_train"},
    {"opd_args.log_ratio_clip": 5.0},
    {"opd_kl_coef": 0.5},
    {"pg_clip": 0.1},
    {"advantage_clip": 1.0},
    {"max_grad_norm": 2.0},
    {"entropy_loss_coef": 0.1},
    {"async_generation_ratio": 1.0},
    {"max_len_mask": True},
]
WARNED_CHANGES = [
    {"teacher.infer_batch_size": 2},
    {"teacher.model_args.model_name_or_path": "models/other"},
    {"teacher.opd_kl_coef": 0.5},
    {"rewards.math.reward_timeout": 9.0},
    {"rewards.math.reward_args.num_processes": 2},
    {"validation": DELETE},
    {"validation.seed": 5},
    {"student_infer.generating_args.temperature": 0.9},
    {"student_train.data_args.dataset_dir": "/data"},
    {"student_train.infer_batch_size": 2},
    {"student_train.sequence_packing_args.max_packed_sequence_length_train": 9},
    {"student_train.model_args.disable_gradient_checkpointing": True},
    # Two ranks with the same batch settings: an optimizer step takes twice the samples.
    {"student_train.world_size": 2},
]  # fmt: skip
FREE_CHANGES = [
    {"save_steps": 9}, {"eval_steps": 9}, {"logging_steps": 9}, {"max_ckpt_to_keep": 9},
    {"output_dir": "x"}, {"logging_dir": "x"}, {"checkpoint_config": {"output_dir": "x"}}, {"exp_name": "x"},
    {"track_with": "stdout"}, {"tracker_kwargs": {"a": 1}}, {"html_samples": 1}, {"resume_from_checkpoint": True},
    {"rollout_dump_dir": "x"}, {"ray_args": {"num_cpus": 4}}, {"num_nodes": 2}, {"num_gpus_per_node": 4},
    {"rpc_timeout": 9.0}, {"model_update_buffer_size_mb": 9}, {"system_envs": {"A": 1}}, {"val_batch_size": 9},
    {"student_infer.world_size": 2}, {"student_infer.device_mapping": [0]}, {"teacher.world_size": 2},
    {"teacher.system_envs": {"A": 1}}, {"student_train.cpu_threads": 2}, {"student_train.backend_timeout": 9.0},
    {"rewards.math.world_size": 2}, {"student_train.device_mapping": [0]},
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED)
def test_refused(changes):
    # Echoes of a length or a count in other roles may be warned about beside it.
    assert conflicts(changes)[0] == [*changes]


@pytest.mark.parametrize("changes", WARNED_CHANGES)
def test_warned(changes):
    refused, warned = conflicts(changes)
    assert refused == []
    assert set(warned) == set(changes)


@pytest.mark.parametrize("changes", FREE_CHANGES)
def test_free(changes):
    assert conflicts(changes) == ([], [])
    assert changed_fields(saved(), build_config(changed(BASE, changes), OPD).config) != []


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        ({f"{TRAIN}.lr_scheduler_type": "constant"}, True),
        ({f"{TRAIN}.lr_scheduler_type": "constant_with_warmup", f"{TRAIN}.warmup_steps": 5}, True),
        ({f"{TRAIN}.lr_scheduler_type": "constant_with_warmup", f"{TRAIN}.warmup_ratio": 0.1}, False),
        # warmup_steps wins.
        ({f"{TRAIN}.lr_scheduler_type": "constant_with_warmup", f"{TRAIN}.warmup_ratio": 0.1,
          f"{TRAIN}.warmup_steps": 5}, True),
        ({f"{TRAIN}.lr_scheduler_type": "linear"}, False),
        ({f"{TRAIN}.lr_scheduler_type": "cosine"}, False),
        ({f"{TRAIN}.lr_scheduler_type": "constant", "opd_args.coef_schedule": "cosine"}, False),
        ({f"{TRAIN}.lr_scheduler_type": "constant", "opd_args.coef_schedule": "constant"}, True),
        ({}, False),
    ],
)  # fmt: skip
def test_a_longer_run_is_free_where_no_schedule_is_stretched_to_it(settings, free):
    base = changed(BASE, settings)
    assert conflicts({"max_steps": 9}, base) == ([], [] if free else ["max_steps"])


@pytest.mark.parametrize(("estimator", "warned"), [("gae", ["max_steps"]), ("reinforce", [])])
def test_the_schedule_of_a_critic_counts_where_it_is_started(estimator, warned):
    constant = {"actor_train.training_args.lr_scheduler_type": "constant"}
    base = changed(RL, {**constant, "critic": {"infer_batch_size": 1}, "adv_estimator": estimator})
    before = json.loads(config_for_checkpoint_json(build_config(base, "rlvr").config))
    loaded = build_config(changed(base, {"max_steps": 9}), "rlvr")
    assert resume_conflicts(before, loaded.config, loaded.yaml_names) == ([], warned)


def test_a_longer_response_is_refused_with_what_follows_from_it():
    refused, warned = conflicts({"response_length": 40})
    assert refused == ["response_length"]
    assert "sequence_length" in warned


def test_paths_are_canonical_without_the_yaml_names():
    config = build_config(changed(BASE, {f"{TRAIN}.learning_rate": 1.0, "teacher.max_retries": 3}), OPD).config
    assert resume_conflicts(saved(), config) == (
        ["actor_train.training_args.learning_rate"],
        ["teachers.default.max_retries"],
    )


def test_teachers_that_come_and_go():
    named = changed(BASE, {"teacher": {"a": PURE["teacher"]}})
    assert conflicts({"teacher": {"b": PURE["teacher"]}}, named) == ([], ["teacher.a", "teacher.b"])


def test_masked_values_equal_anything():
    keyed = changed(BASE, {"rewards.math.judge_api_key": "one", "teacher.system_envs": {"HF_TOKEN": "a"}})
    for value in ("two", None):
        config = build_config(changed(keyed, {"rewards.math.judge_api_key": value}), OPD).config
        assert changed_fields(saved(keyed), config) == []


def test_settings_that_the_checkpoint_does_not_know_yet_have_their_default():
    old = saved()
    del old["rewards"]["math"]["reward_args"], old["html_samples"]
    old["gone_since"] = 1
    assert changed_fields(old, build_config(BASE, OPD).config) == []
    config = build_config(changed(BASE, {"html_samples": 3}), OPD).config
    assert changed_fields(old, config) == ["html_samples"]


def test_keys_that_json_turns_into_text_are_no_change():
    raw = changed(BASE, {"tracker_kwargs": {"by_rank": {0: "a"}}})
    assert changed_fields(saved(raw), build_config(raw, OPD).config) == []


@pytest.mark.parametrize("broken", [{}, {"pipeline": "x"}, {"pipeline": "rlvr", "actor_train": 3}])
def test_not_a_config(broken):
    with pytest.raises(ConfigError):
        changed_fields(broken, build_config(BASE, OPD).config)


def test_the_lists_name_fields():
    known = {*field_types(RLVRConfig), *field_types(AgenticConfig)}
    assert (FREE | WARNED) - known == set()
    assert not FREE & WARNED
