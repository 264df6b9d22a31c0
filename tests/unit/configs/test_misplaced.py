"""A setting where nothing reads it is named at launch, by role and field; one that is read, or left alone, is not."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from config_samples import AGENTIC, PURE, REWARD, RL, changed

from roll_opd.configs import (
    DataArguments,
    GeneratingArguments,
    SequencePackingArguments,
    TrainingArguments,
    WorkerConfig,
    build_config,
    launch_blockers,
    launch_warnings,
    plan_as_dict,
)
from roll_opd.configs.builder import field_types
from roll_opd.configs.misplaced import UNREAD_REWARD

OPD = "onpolicy_distill"
# Every role that holds a model, in a run that starts it.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "student_train": (PURE, OPD),
    "student_infer": (PURE, OPD),
    "teacher": (PURE, OPD),
    "actor_train": (RL, "rlvr"),
    "actor_infer": (RL, "rlvr"),
    "reference": (changed(RL, {"reference": {"infer_batch_size": 8}, "use_kl_loss": True, "kl_loss_coef": 1}), "rlvr"),
    "critic": (changed(RL, {"critic": {"infer_batch_size": 8}, "adv_estimator": "gae"}), "rlvr"),
}
BLOCKS: dict[str, type] = {
    "generating_args": GeneratingArguments,
    "data_args": DataArguments,
    "training_args": TrainingArguments,
    "sequence_packing_args": SequencePackingArguments,
}
# The roles that read a block; of the last one none does, without the switch.
READERS = {
    "generating_args": ("student_infer", "actor_infer"),
    "data_args": ("student_train", "actor_train"),
    "training_args": ("student_train", "actor_train", "critic"),
    "sequence_packing_args": (),
}
OTHERS: dict[str, Any] = {"domain_interleave_probs": {"a": 1.0}}
PREFIX = "settings without effect where they stand: "


def another(cls: type, name: str) -> Any:
    """A value that is not the default."""
    if name in OTHERS:
        return OTHERS[name]
    default, hint = getattr(cls(), name), field_types(cls)[name]
    options = [option for part in (hint, *typing.get_args(hint)) for option in typing.get_args(part)]
    words = [word for word in options if isinstance(word, str) and word != default]
    if isinstance(default, bool):
        return not default
    if words or isinstance(default, str):
        return [*words, "x"][0]
    if isinstance(default, (int, float)):
        return default + 1 if isinstance(default, int) else default / 2 or 0.5
    kinds = {int: 7, str: "x", bool: True}
    return next((kinds[kind] for kind in typing.get_args(hint) if kind in kinds), ["x"])


def told(base: dict[str, Any], launcher: str, changes: dict[str, Any]) -> dict[str, str]:
    """The settings that the launch's line names, and why."""
    lines = [line for line in launch_warnings(build_config(changed(base, changes), launcher)) if PREFIX in line]
    assert len(lines) < 2
    entries = lines[0].removeprefix(PREFIX).removesuffix(")").split("), ") if lines else []
    return dict(entry.split(" (", 1) for entry in entries)


# All but one that has a single value, and one of which a load says that it has no effect anywhere.
FIELDS = [(block, field.name) for block, cls in BLOCKS.items() for field in dataclasses.fields(cls)
          if field.name not in ("num_beams", "template")]  # fmt: skip


@pytest.mark.parametrize(("role", "block", "name"), [(r, b, f) for r in RUNS for b, f in FIELDS if r not in READERS[b]])
def test_a_block_of_another_role_is_named(role: str, block: str, name: str) -> None:
    base, launcher = RUNS[role]
    path = f"{role}.{block}.{name}"
    assert list(told(base, launcher, {path: another(BLOCKS[block], name)})) == [path]
    # What says the default asks for nothing.
    assert told(base, launcher, {path: getattr(BLOCKS[block](), name)}) == {}


@pytest.mark.parametrize("role", RUNS)
def test_a_template_is_named_at_load(role: str) -> None:
    base, launcher = RUNS[role]
    named = {f"{role}.data_args.template": "qwen2_5"}
    (warning,) = build_config(changed(base, named), launcher).warnings
    assert warning.startswith("the tokenizer's own chat template") and warning.endswith(f": {role}.data_args.template")
    assert told(base, launcher, named) == {}


@pytest.mark.parametrize("role", RUNS)
def test_what_a_role_reads_is_not_named(role: str) -> None:
    base, launcher = RUNS[role]
    changes = {f"{role}.{block}.{name}": another(BLOCKS[block], name)
               for block, name in FIELDS if role in READERS[block]}  # fmt: skip
    # Refused of samples that are trained on.
    changes.pop(f"{role}.generating_args.do_sample", None)
    changes |= {f"{role}.use_sequence_packing": True, f"{role}.sequence_packing_args.algorithm": "load_balance"}
    assert told(base, launcher, changes) == {}


TEACHER_ARGS, LORA = "teacher.teacher_args", "student_train.model_args"


@pytest.mark.parametrize(
    ("changes", "switch", "named"),
    [
        ({"student_train.max_tokens_per_microbatch_in_train": 99},
         {"student_train.use_dynamic_batching_in_train": True},
         {"student_train.max_tokens_per_microbatch_in_train": "use_dynamic_batching_in_train is off"}),
        ({"teacher.max_tokens_per_microbatch_in_infer": 99}, {"teacher.use_dynamic_batching_in_infer": True},
         {"teacher.max_tokens_per_microbatch_in_infer": "use_dynamic_batching_in_infer is off"}),
        ({"teacher.sequence_packing_args.max_packed_sequence_length_forward": 99},
         {"teacher.use_sequence_packing": True},
         {"teacher.sequence_packing_args.max_packed_sequence_length_forward": "use_sequence_packing is off"}),
        ({f"{LORA}.lora_rank": 32, f"{LORA}.lora_alpha": 64}, {f"{LORA}.lora_target": "all-linear"},
         {f"{LORA}.lora_rank": "lora_target is not set", f"{LORA}.lora_alpha": "lora_target is not set"}),
        ({f"{TEACHER_ARGS}.ema_decay": 0.9},
         {f"{TEACHER_ARGS}.self_teacher": "ema", f"{TEACHER_ARGS}.context_template": "x",
          "teacher.model_args": {"dtype": "fp32"}},
         {f"{TEACHER_ARGS}.ema_decay": "self_teacher is not ema"}),
        ({f"{TEACHER_ARGS}.context_length": 99}, {f"{TEACHER_ARGS}.context_template": "x"},
         {f"{TEACHER_ARGS}.context_length": "context_template is not set"}),
    ],
)  # fmt: skip
def test_what_waits_for_a_switch_is_named_where_it_is_off(changes, switch, named) -> None:
    assert told(PURE, OPD, changes) == named
    assert told(PURE, OPD, {**changes, **switch}) == {}


def test_the_shape_of_an_adapter_is_its_own() -> None:
    adapter = {f"{LORA}.adapter_name_or_path": "a", f"{LORA}.lora_target": "all-linear", f"{LORA}.lora_rank": 32}
    assert told(PURE, OPD, adapter) == {f"{LORA}.lora_rank": "the adapter of adapter_name_or_path has its own"}


def test_the_reasons_name_the_roles_of_the_yaml() -> None:
    changes = {"student_train.generating_args.temperature": 0.6, "teacher.data_args.file_name": ["a.jsonl"],
               "student_infer.training_args.learning_rate": 0.1}  # fmt: skip
    assert told(PURE, OPD, changes) == {
        "student_train.generating_args.temperature": "student_infer and validation say how to sample",
        "teacher.data_args.file_name": "prompts are student_train's and validation's",
        "student_infer.training_args.learning_rate": "student_train and a critic are trained, no other role",
    }


def test_what_the_first_line_has_is_not_said_twice() -> None:
    loaded = build_config(changed(PURE, {"teacher.max_tokens_per_microbatch_in_train": 9}), OPD)
    (line,) = launch_warnings(loaded)
    assert line.endswith("does not read: teacher.max_tokens_per_microbatch_in_train")


def test_a_role_that_is_not_started_has_a_line_of_its_own() -> None:
    idle = {"critic": {"generating_args": {"temperature": 0.5}}}
    assert told(RL, "rlvr", idle) == {}


# ---- rewards ---------------------------------------------------------------------------------------------------------

JUDGE = {
    **REWARD,
    "model_args": {"model_name_or_path": "m", "dtype": "fp32"},
    "strategy_args": {"strategy_name": "vllm"},
    "generating_args": {"temperature": 0.1, "top_p": 1.0},
    "data_args": {"template": "qwen2_5"},
    "infer_batch_size": 4,
    "training_args": None,
    "world_size": 2,
    "reward_timeout": 9,
    "tag_included": ["a"],
}


def test_what_a_reward_does_not_read_is_named() -> None:
    keys = ("model_args.model_name_or_path", "model_args.dtype", "generating_args.temperature", "strategy_args",
            "infer_batch_size")  # fmt: skip
    found = told(RL, "rlvr", {"rewards": {"judge": JUDGE}})
    assert found == {f"rewards.judge.{key}": "a reward holds no model" for key in keys}
    assert told(RL, "rlvr", {"rewards": {"math": REWARD}}) == {}


def test_every_setting_of_a_reward_is_accounted_for() -> None:
    read = {"name", "worker_cls", "world_size", "system_envs"}
    # With devices, which a launch refuses.
    refused = {"device_mapping", "num_gpus_per_worker"}
    assert set(field_types(WorkerConfig)) - read - refused == set(UNREAD_REWARD)


# ---- episodes --------------------------------------------------------------------------------------------------------


def test_environments_bring_the_prompts() -> None:
    data = {"actor_train.data_args": {"messages": "chat", "enable_thinking": True, "preprocessing_num_workers": 2}}
    assert told(AGENTIC, "agentic", data) == {"actor_train.data_args.messages": "environments bring the prompts"}
    sampling = {"actor_train.generating_args.top_p": 0.5}
    why = "actor_infer and val_env_manager say how to sample"
    assert told(AGENTIC, "agentic", sampling) == {"actor_train.generating_args.top_p": why}
    # Of the workers of environments both are read, the first one where the generator has none.
    for manager in ("train_env_manager", "val_env_manager"):
        assert told(AGENTIC, "agentic", {f"{manager}.generating_args.top_p": 0.5}) == {}


def test_samples_are_silent() -> None:
    for base, launcher in (*RUNS.values(), (AGENTIC, "agentic")):
        loaded = build_config(base, launcher)
        assert launch_warnings(loaded) == [] and launch_blockers(loaded) == []


def test_a_plan_tells_what_a_launch_would() -> None:
    loaded = build_config(changed(PURE, {"teacher.generating_args.temperature": 0.5}), OPD)
    (told,) = launch_warnings(loaded)
    assert told.startswith(f"{PREFIX}teacher.generating_args.temperature (")
    assert told in plan_as_dict(loaded)["warnings"]
