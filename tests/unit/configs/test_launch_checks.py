"""What a launch refuses, what it only mentions, and that no setting is silently ignored."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml
from config_samples import AGENTIC, MIXED, PURE, REWARD, RL, changed

import roll_opd
from roll_opd import launcher
from roll_opd.configs import (
    AgenticConfig,
    RLVRConfig,
    WorkerConfig,
    build_config,
    launch_blockers,
    launch_warnings,
    load_config,
    role_checks,
)
from roll_opd.configs import launch_checks as checks
from roll_opd.configs.backends import SETTINGS
from roll_opd.configs.builder import field_types

OPD = "onpolicy_distill"
REPO = Path(__file__).resolve().parents[3]
MODEL = "student_train.model_args"
HF = {"strategy_name": "hf_infer"}
SINGLE = PURE["teacher"]
CRITIC = {"infer_batch_size": 8}
# A role as another system runs it.
FOREIGN = {
    "worker_cls": "my.Worker",
    "model_args": {"lora_target": "all-linear"},
    "num_gpus_per_worker": 2,
    "strategy_args": {"strategy_name": "vllm", "strategy_config": {"max_model_len": 8}},
    "logits_in_fp32": True,
}


def reward(**settings):
    return {"rewards": {"math": {**REWARD, **settings}}}


@pytest.mark.parametrize(
    ("changes", "field", "advice"),
    [
        ({f"{MODEL}.dtype": "fp16"}, f"{MODEL}.dtype", "use bf16 or fp32"),
        ({f"{MODEL}.additional_target": "lm_head"}, f"{MODEL}.additional_target", "set lora_target too"),
        ({"student_train.worker_cls": "my.Worker"}, "student_train.worker_cls", "use null"),
        ({"teacher.num_gpus_per_worker": 2}, "teacher.num_gpus_per_worker", "use 1"),
        ({"mask_type": "all"}, "mask_type", "use loss"),
        ({"validation": {"data_args": {"domain_interleave_probs": {"a": 1.0}}}},
         "validation.data_args.domain_interleave_probs", "remove it"),
        (reward(device_mapping=[0]), "rewards.math.device_mapping", "world_size CPU processes"),
        (reward(format_pattern="x"), "rewards.math.format_pattern", "use null"),
        (reward(reward_type="soft"), "rewards.math.reward_type", "use null"),
        (reward(response_length_penalty_coef=0.1), "rewards.math.response_length_penalty_coef", "use 0.0"),
        (reward(code_url="http://x"), "rewards.math.code_url", "use null"),
        (reward(use_local=False), "rewards.math.use_local", "use true"),
        (reward(judge_prompt="x"), "rewards.math.judge_prompt", "use null"),
        (reward(judge_model_type="api"), "rewards.math.judge_model_type", "use null"),
        (reward(judge_model_name="x"), "rewards.math.judge_model_name", "use null"),
        (reward(judge_api_url="x"), "rewards.math.judge_api_url", "use null"),
        (reward(judge_api_key="hidden"), "rewards.math.judge_api_key", "use null"),
    ],
)  # fmt: skip
def test_refused_with_the_nearest_value(changes, field, advice):
    blockers = launch_blockers(build_config(changed(PURE, changes), OPD))
    assert [blocker.field for blocker in blockers] == [field]
    assert advice in blockers[0].problem
    assert "hidden" not in str(blockers[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"student_train.model_args.dtype": "fp32", "teacher.model_args.dtype": "fp16"},
        {"teacher.strategy_args": {**HF, "strategy_config": None}},
        reward(reward_args={"num_processes": 2}),
        {"importance_sampling": "seq"},
        {"train_infer_correction": {"is_weight": {"enabled": True}, "filters": [{"enabled": True}]}},
        {"validation": {"data_args": {"dataset_type": "csv"}}},
        {"teacher": {"math": SINGLE, "code": {**SINGLE, "tag_included": ["code"]}}},
        {"teacher": {**SINGLE, "teacher_args": {"context_template": "{{ prompt }}"}}},
        {"opd_args": {"objective": "direct"}},
        {"opd_args": {"objective": "direct", "support": "full", "divergence": "jsd"}},
        {"opd_args": {"objective": "direct", "support": "union_topk", "top_k": 8}},
        {
            "opd_args": {
                "coef_schedule": "cosine",
                "trust_region": 2.0,
                "entropy_keep": 0.5,
                "position_weight": "linear",
            }
        },
        {"opd_args": {"base_model": "m", "extrapolation": 1.5}},
        {"max_len_mask": True},
    ],
)
def test_not_refused(changes):
    assert launch_blockers(build_config(changed(PURE, changes), OPD)) == []


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (MIXED, {}),
        (MIXED, {"opd_args": {"apply_to": "reward", "uncovered": "reward_only"}, "adv_estimator": "grpo"}),
        (MIXED, {"difficulty_mask": True, "error_max_len_clip": True, "error_max_len_threshold": 9}),
        (RL, {}),
        (RL, {"reference": {"infer_batch_size": 8}, "use_kl_loss": True, "kl_loss_coef": 0.1}),
        (RL, {"critic": CRITIC, "adv_estimator": "gae", "value_clip": 0.2, "critic_warmup": 3}),
        (MIXED, {"critic": CRITIC, "adv_estimator": "gae"}),
        # Of a critic that is not started nothing is asked.
        (RL, {"critic": {"model_args": {"chat_template": "x"}}}),
        # Nor of a reference that nothing is compared with.
        (RL, {"reference": FOREIGN}),
        (RL, {"rewards": {"math": {**REWARD, "query_filter_config": {"type": "std_filter"}}}}),
    ],
)
def test_what_trains_on_rewards_is_not_refused(base, changes):
    assert launch_blockers(build_config(changed(base, changes), "rlvr")) == []


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"critic": {"strategy_args": {"strategy_name": "megatron_train"}}, "adv_estimator": "gae"},
         ["critic.strategy_args.strategy_name"]),
        ({"critic": {"model_args": {"chat_template": "x"}}, "adv_estimator": "gae"},
         ["critic.model_args.chat_template"]),
        ({"reference": FOREIGN, "use_kl_loss": True, "kl_loss_coef": 0.1},
         ["reference.worker_cls", "reference.model_args.lora_target",
          "reference.strategy_args.strategy_config.max_model_len"]),
        ({"rewards": {"math": {**REWARD, "response_filter_config": {"type": "mean_filter"}}}},
         ["rewards.math.response_filter_config"]),
        ({"use_policy_loss_type": "PG"}, ["use_policy_loss_type"]),
        ({"use_reward_scaling": True, "add_len_reward": True}, ["use_reward_scaling", "add_len_reward"]),
    ],
)  # fmt: skip
def test_what_rewards_cannot_do_yet_is_refused(changes, fields):
    assert [b.field for b in launch_blockers(build_config(changed(RL, changes), "rlvr"))] == fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"critic": CRITIC}, "critic: no effect, because adv_estimator reinforce asks for no values"),
        ({"value_clip": 0.2, "critic_warmup": 3}, "critic_warmup, value_clip: no effect"),
        ({"critic": CRITIC, "adv_estimator": "gae", "critic_warmup": 7}, "the student is never trained"),
        ({"critic": CRITIC, "adv_estimator": "gae", "critic_warmup": 6, "value_clip": 0.2}, None),
    ],
)
def test_a_critic_without_a_use_is_mentioned(changes, words):
    loaded = build_config(changed(RL, {"max_steps": 7, **changes}), "rlvr")
    warnings = launch_warnings(loaded)
    assert len(warnings) == (words is not None)
    assert not warnings or words in warnings[0]


def test_a_reference_without_a_use_is_mentioned_once():
    loaded = build_config(changed(RL, {"reference": FOREIGN}), "rlvr")
    (warning,) = loaded.warnings
    assert warning.startswith("settings without effect here: reference (not started")
    assert launch_warnings(loaded) == []
    used = build_config(changed(RL, {"reference": FOREIGN, "add_token_level_kl": True}), "rlvr")
    assert used.warnings == [] and "reference.logits_in_fp32" in launch_warnings(used)[0]


TWO_ENVIRONMENTS = {"train_env_manager.tags": ["Lake", "Pond"]}
NATIVE = "roll.pipeline.agentic.env_manager.agent_native_env_manager.AgentNativeStepEnvManager"


@pytest.mark.parametrize(
    ("changes", "fields", "advice"),
    [
        ({"custom_envs.Lake.env_manager_cls": NATIVE}, ["custom_envs.Lake.env_manager_cls"], "use null"),
        # Of an environment that nothing plays nothing is asked.
        ({"custom_envs.Pond.env_manager_cls": NATIVE}, [], ""),
        ({**TWO_ENVIRONMENTS, "custom_envs.Pond.env_manager_cls": NATIVE}, ["custom_envs.Pond.env_manager_cls"], ""),
        ({"custom_envs.Lake.agent_runner_cls": "a.Runner"}, ["custom_envs.Lake.agent_runner_cls"], "use null"),
        ({"train_env_manager.llm_proxy": {"proxy_type": "openai"}}, ["train_env_manager.llm_proxy"], "remove it"),
        # Nor of workers that have no environment.
        ({"val_env_manager.llm_proxy": {"proxy_type": "openai"}}, [], ""),
        ({"train_env_manager.group_size_redundancy": 1}, ["train_env_manager.group_size_redundancy"], "use 0"),
        ({"train_env_manager.group_filter_cls": "a.Filter"}, ["train_env_manager.group_filter_cls"], "use null"),
        ({"train_env_manager.group_filter_cls": "roll.pipeline.agentic.agentic_pipeline.GroupFilter"}, [], ""),
        ({"val_env_manager": {"tags": ["Lake"], "generating_args": {"min_p": 0.1}}},
         ["val_env_manager.generating_args.min_p"], "use 0.0"),
        ({"reward": {"llm_proxy": {"proxy_type": "openai"}}}, ["reward"], "use null"),
        ({"use_token_reward": True}, ["use_token_reward"], "use false"),
        ({"adv_estimator": "grpo", "train_env_manager.group_size": 1}, ["train_env_manager.group_size"], "at least 2"),
        ({"custom_envs.Lake.tool_wrapper": {"tool_configs": [{"tool_id": "python_code"}]}}, [], ""),
        ({"ratio_type": "segment", "adv_estimator": "gigpo"}, [], ""),
    ],
)  # fmt: skip
def test_what_environments_cannot_do_yet_is_refused(changes, fields, advice):
    blockers = launch_blockers(build_config(changed(AGENTIC, changes), "agentic"))
    assert [blocker.field for blocker in blockers] == fields
    assert all(advice in blocker.problem for blocker in blockers)


def test_what_environments_do_not_read_is_mentioned():
    unread = {"train_env_manager.model_args": {"dtype": "fp32"}, "train_env_manager.world_size": 3}
    unread |= {"env_monitor": {"hung_timeout": 60}}
    (line,) = launch_warnings(build_config(changed(AGENTIC, unread), "agentic"))
    assert set(line.partition(": ")[2].split(", ")) == set(unread)
    assert launch_warnings(build_config(AGENTIC, "agentic")) == []


def test_every_setting_of_env_managers_is_accounted_for():
    """Of a role's settings they read few; the others are refused or mentioned."""
    read = {"name", "generating_args", "system_envs"}
    of_roles = set(field_types(WorkerConfig)) - read - {*checks.NOT_YET_ENV_MANAGER, *checks.UNREAD_ENV_MANAGER}
    assert of_roles == set()


UNREAD = {
    "val_batch_size": 4,
    "student_infer.use_sequence_packing": True,
    "student_infer.max_tokens_per_microbatch_in_infer": 512,
    "student_infer.model_args.lora_target": "all-linear",
    "student_infer.model_args.freeze_module_prefix": "model.embed_tokens",
    "student_train.data_args.preprocessing_num_workers": 8,
    "teacher.max_tokens_per_microbatch_in_train": 512,
    "validation.data_args.preprocessing_num_workers": 8,
}


@pytest.mark.parametrize("field", UNREAD)
def test_what_is_not_read_is_mentioned(field):
    loaded = build_config(changed(PURE, {field: UNREAD[field]}), OPD)
    assert launch_blockers(loaded) == []
    warning = "settings for speed or memory that this version does not read: "
    assert launch_warnings(loaded) == [warning + field]


def test_all_unread_settings_make_one_line():
    (line,) = launch_warnings(build_config(changed(PURE, UNREAD), OPD))
    assert set(line.partition(": ")[2].split(", ")) == set(UNREAD)
    assert launch_warnings(build_config(PURE, OPD)) == []


def test_the_quickstart_has_neither_blockers_nor_warnings():
    loaded = load_config(OPD, str(REPO / "examples" / "quickstart"), "onpolicy_distill", [], None)
    assert (loaded.warnings, launch_blockers(loaded), launch_warnings(loaded)) == ([], [], [])


# ---- every field -----------------------------------------------------------------------------------------------------

# Fields that only the config layer reads: it resolves, checks or forces them, and says so where they have no effect.
READ_AT_LOAD = {
    "is_pure_opd": "the run's mode",
    "use_opd": "the run's mode",
    "pure_opd_pipeline_type": "the run's pipeline",
    "pretrain": "fills the models of the student's roles",
    "reward_pretrain": "fills the critic's model",
    "opd_kl_coef": "read through teacher_coef",
    "sequence_length": "bounds prompt and response; fills the limits of packed rows",
    "num_nodes": "checks the mappings; the live cluster decides",
    "num_gpus_per_node": "checks the mappings; the live cluster decides",
    "num_beams": "must be 1",
    "strategy_config": "read through backend_settings",
    "num_return_sequences_in_group": "read through group_size",
    "num_env_groups": "read through num_envs",
    "max_traj_per_env": "checked against the batch; environments play as many episodes as it needs",
    "reward_normalization": "read through estimator_checks.normalisation_of",
    "batch_adjust_mode": "warned about where it would leave episodes out",
    "env_manager_cls": "chooses episode_mode",
    "method": "read through estimator_checks.normalisation_of",
    "detach": "old and sampling log-probabilities carry no gradient, so the weight has none with either value",
    # A warning at load says that they have no effect.
    "global_template": "warned about",
    "tag_to_template": "warned about",
    "template": "warned about",
    # Warned about in pure distillation, where rewards never filter, and refused in the other modes.
    "response_filter_config": "refused where rewards are trained on",
}
REFUSED = {
    *(checks.NOT_YET + role_checks.NOT_YET_MODEL + checks.NOT_YET_GENERATING + role_checks.NOT_YET_WORKER),
    *checks.NOT_YET_REWARD,
    *(checks.NOT_YET_AGENTIC + checks.NOT_YET_ENV_MANAGER + checks.NOT_YET_ENVIRONMENT),
}
MENTIONED = {
    *(
        checks.UNREAD_PIPELINE
        + checks.UNREAD_AGENTIC
        + role_checks.UNREAD_UNTRAINED
        + role_checks.UNREAD_UNSCORED
        + checks.UNREAD_DATA
    ),
    *(key.removeprefix("model_args.") for keys in role_checks.UNREAD_BY.values() for key in keys),
}
# What stands in blocks that are refused or mentioned as a whole.
WHOLE_BLOCKS = ("EnvRewardConfig", "LLMProxyArguments", "EnvMonitorArguments")


def config_classes(cls=RLVRConfig):
    """``cls`` and every dataclass below it."""
    found = {cls}
    for hint in field_types(cls).values():
        todo = [hint]
        while todo:
            hint = todo.pop()
            todo += typing.get_args(hint)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
                found |= config_classes(hint)
    return found


def all_fields():
    classes = config_classes() | config_classes(AgenticConfig) | {*SETTINGS.values()}
    assert len(classes) > 15
    return sorted({(cls.__name__, name) for cls in classes for name in field_types(cls)})


def test_no_setting_is_silently_ignored():
    """Each field is read outside the configs, or refused, mentioned at launch, or explained above."""
    package = Path(roll_opd.__file__).parent
    files = [path for path in package.rglob("*.py") if package / "configs" not in path.parents]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # A method's call is no setting: tensors have a detach(), too.
    read = set(re.findall(r"\.([a-z_0-9]+)\b(?!\()", source))
    accounted = read | REFUSED | MENTIONED | READ_AT_LOAD.keys()
    ignored = [f"{cls}.{name}" for cls, name in all_fields() if name not in accounted and cls not in WHOLE_BLOCKS]
    assert ignored == [], (
        "read it, or refuse it in launch_checks.py or role_checks.py, or name it in a list there or here"
    )


def test_the_lists_name_fields():
    known = {name for _, name in all_fields()}
    assert (REFUSED | MENTIONED | READ_AT_LOAD.keys()) - known == set()


def test_what_is_mentioned_as_unread_is_not_refused():
    assert not REFUSED & MENTIONED


def test_the_launcher_logs_the_warnings_before_it_runs(tmp_path, monkeypatch, caplog):
    seen = []
    stub = types.ModuleType("roll_opd.pipeline.launch")
    stub.run_pipeline = lambda loaded: seen.append(len(caplog.messages)) or tmp_path / "summary.json"
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(launcher, "configure_logging", lambda: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(PURE, {"val_batch_size": 4})))
    arguments = ["--config_path", str(tmp_path), "--config_name", "run"]
    assert launcher.main(OPD, str(tmp_path / "start.py"), "", arguments) == 0
    assert seen == [1]
    assert caplog.messages[0].endswith("does not read: val_batch_size")
    assert launcher.main(OPD, str(tmp_path / "start.py"), "", [*arguments, "student_train.model_args.dtype=fp16"]) == 1
    assert len(seen) == 1
