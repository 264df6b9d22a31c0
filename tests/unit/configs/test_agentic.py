"""Environments: what follows from other settings, and what is refused when the file is loaded."""

from __future__ import annotations

import json

import pytest
from config_samples import AGENTIC, LAKE, PURE, RL, changed

from roll_opd.configs import AgenticConfig, build_config, resume_checks
from roll_opd.configs.environment_config import DEFAULT_STEP_TEMPLATE
from roll_opd.errors import ConfigError

OPD = "onpolicy_distill"
MANAGERS = "roll.pipeline.agentic.env_manager"
TRAJ, STEP = f"{MANAGERS}.traj_env_manager.TrajEnvManager", f"{MANAGERS}.step_env_manager.StepEnvManager"
NATIVE = f"{MANAGERS}.agent_native_env_manager.AgentNativeStepEnvManager"
SHORT, LONG = {"max_new_tokens": 4}, {"max_new_tokens": 6, "temperature": 0.7}
DELETE_INFER = {"actor_infer": {"infer_batch_size": 2}}


def load(**changes):
    return build_config(changed(AGENTIC, changes), "agentic")


def config(**changes) -> AgenticConfig:
    return load(**changes).config


# ---- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manager", "given", "mode"),
    [
        (None, None, "trajectory"),
        (None, "step", "step"),
        (TRAJ, None, "trajectory"),
        (STEP, None, "step"),
        (STEP, "step", "step"),
        # Of a manager that is planned only nobody knows.
        (NATIVE, None, None),
        (NATIVE, "step", None),
    ],
)
def test_the_mode_of_an_episode(manager, given, mode):
    lake = {"env_type": "frozen_lake", "env_manager_cls": manager, "episode_mode": given}
    env = config(**{"custom_envs.Lake": lake}).custom_envs["Lake"]
    assert env.episode_mode == mode
    assert env.agent_template == (DEFAULT_STEP_TEMPLATE if mode == "step" else "{observation}")


def test_a_turn_and_its_limits():
    envs = config(**{"custom_envs.Pond.max_tokens_per_step": 3}).custom_envs
    assert (envs["Lake"].max_tokens_per_step, envs["Pond"].max_tokens_per_step) == (8, 3)
    # Without any limit a turn may fill what is left of the episode.
    free = config(**DELETE_INFER)
    assert (free.response_length, free.custom_envs["Lake"].max_tokens_per_step) == (64, 64)


def test_counts():
    env = {"num_env_groups": 3, "group_size": 2, "tags": ["Lake", "Pond"], "max_env_num_per_worker": 4}
    small = config(train_env_manager=env, rollout_batch_size=6, num_return_sequences_in_group=7)
    train = small.train_env_manager
    assert (train.num_envs, train.num_processes, train.num_groups_partition) == (6, 2, [2, 1])
    assert (small.group_size, small.groups_per_step, small.samples_per_step) == (2, 3, 6)
    assert small.actor_infer.generating_args.num_return_sequences == 1
    one = config().train_env_manager
    assert (one.num_processes, config().val_env_manager.num_groups_partition) == (1, None)
    rl = build_config({**RL, "num_return_sequences_in_group": 3}, "rlvr").config
    assert (rl.group_size, rl.groups_per_step, rl.samples_per_step) == (3, 4, 12)


@pytest.mark.parametrize(
    ("infer", "train", "val", "trained", "validated", "words"),
    [
        (SHORT, None, None, 4, 4, []),
        (None, SHORT, None, 4, 4, []),
        (None, None, SHORT, 64, 4, []),
        (SHORT, LONG, None, 4, 4, ["train_env_manager.generating_args: no effect"]),
        (SHORT, SHORT, SHORT, 4, 4, []),
        (SHORT, None, LONG, 4, 6, ["val_env_manager.generating_args: decides in validation"]),
        (None, SHORT, LONG, 4, 6, []),
    ],
)
def test_who_says_how_to_sample(infer, train, val, trained, validated, words):
    given = {"actor_infer": infer, "train_env_manager": train, "val_env_manager": val}
    loaded = load(**{"actor_infer": {"infer_batch_size": 2}},
                  **{f"{path}.generating_args": args for path, args in given.items() if args})  # fmt: skip
    found = loaded.config
    assert found.actor_infer.generating_args == found.train_env_manager.generating_args
    assert found.actor_infer.generating_args.max_new_tokens == trained
    assert found.val_env_manager.generating_args.max_new_tokens == validated
    assert found.val_env_manager.generating_args.num_return_sequences == 1
    assert len(loaded.warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, loaded.warnings, strict=True))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"custom_envs.Lake.env_type": ""}, "custom_envs.Lake.env_type", "missing"),
        ({"custom_envs.Lake.max_stepz": 3}, "custom_envs.Lake.max_stepz", "did you mean 'max_steps'"),
        ({"custom_envs.Lake.tool_wrapper": {"tool_config": []}}, "custom_envs.Lake.tool_wrapper.tool_config",
         "did you mean 'tool_configs'"),
        ({"train_env_manager.tags": []}, "train_env_manager.tags", "empty"),
        ({"train_env_manager.tags": ["lake"]}, "train_env_manager.tags", "did you mean 'Lake'"),
        ({"train_env_manager.tags": "Sokoban"}, "train_env_manager.tags", "those are Lake, Pond"),
        ({"val_env_manager.tags": ["Lakes"]}, "val_env_manager.tags", "did you mean 'Lake'"),
        ({"train_env_manager.tags": ["Lake", "Lake"]}, "train_env_manager.tags", "comes twice"),
        ({"train_env_manager.num_groups_partition": [1, 1]}, "train_env_manager.num_groups_partition",
         "2 numbers for 1 tags"),
        ({"train_env_manager.num_groups_partition": [3]}, "train_env_manager.num_groups_partition",
         "3 = 3 groups, but num_env_groups is 2"),
        ({"train_env_manager.tags": ["Lake", "Pond"], "train_env_manager.num_groups_partition": [2, 0]},
         "train_env_manager.num_groups_partition", "0 groups of 'Pond'"),
        ({"val_env_manager": {"num_env_groups": 1, "tags": ["Lake", "Pond"]}}, "val_env_manager.num_env_groups",
         "1 groups for 2 tags"),
        ({"train_env_manager.group_size": 3}, "rollout_batch_size", "do not divide into groups of 3"),
        ({"train_env_manager.group_size": 5}, "rollout_batch_size", "use 5, or another group_size"),
        ({"rollout_batch_size": 12, "train_env_manager.max_traj_per_env": 2}, "train_env_manager.max_traj_per_env",
         "use 3 or -1"),
        ({"custom_envs.Lake.agent_template": "{obs}"}, "custom_envs.Lake.agent_template",
         "unknown field {obs}; in trajectory mode a template may name observation, turn_idx"),
        ({"custom_envs.Lake.agent_template": "{observaton}"}, "custom_envs.Lake.agent_template",
         "did you mean 'observation'"),
        ({"custom_envs.Lake.agent_template": "{observation} {"}, "custom_envs.Lake.agent_template", "written twice"),
        ({"custom_envs.Lake.agent_template": "{observation} {}"}, "custom_envs.Lake.agent_template", "field {}"),
        ({"custom_envs.Lake.agent_template": '{observation} {"a": 1}'}, "custom_envs.Lake.agent_template",
         "written twice: {{ and }}"),
        # No way into an object's attributes.
        ({"custom_envs.Lake.agent_template": "{observation.__class__}"}, "custom_envs.Lake.agent_template", "unknown"),
        ({"custom_envs.Lake.agent_template": "{observation:>{width}}"}, "custom_envs.Lake.agent_template", "{width}"),
        ({"custom_envs.Lake.agent_template": "{observation:d}"}, "custom_envs.Lake.agent_template", "format code"),
        ({"custom_envs.Lake.agent_template": "Turn {turn_idx}"}, "custom_envs.Lake.agent_template",
         "lacks {observation}"),
        ({"custom_envs.Lake.env_manager_cls": STEP}, "custom_envs.Lake.agent_template", "unknown field {observation}"),
        ({"custom_envs.Lake.episode_mode": "step", "custom_envs.Lake.agent_template": "{history}"},
         "custom_envs.Lake.agent_template", "lacks {current_observation}"),
        ({"custom_envs.Lake.env_manager_cls": TRAJ, "custom_envs.Lake.episode_mode": "step"},
         "custom_envs.Lake.episode_mode", "contradicts env_manager_cls"),
        ({"custom_envs.Lake.max_tokens_per_step": 65}, "custom_envs.Lake.max_tokens_per_step",
         "does not fit sequence_length = 64"),
        ({"custom_envs.Lake.on_context_full": "stopp"}, "custom_envs.Lake.on_context_full", "did you mean 'stop'"),
        ({"custom_envs.Lake.step_timeout": 0}, "custom_envs.Lake.step_timeout", "must be > 0"),
    ],
)  # fmt: skip
def test_refused_at_load(changes, field, words):
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert caught.value.field == field and words in caught.value.problem, caught.value


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_envs.Lake.agent_template": "{{}} {observation!s:>3} {turn_idx:03d}"},
        # Of an environment that nothing plays, or that is only planned, less is asked.
        {"custom_envs.Pond.agent_template": "placeholder"},
        {"custom_envs.Lake.agent_template": "placeholder", "custom_envs.Lake.env_manager_cls": NATIVE},
        {"rollout_batch_size": 12, "train_env_manager.max_traj_per_env": 3},
        {"custom_envs.Lake.on_context_full": "some.module.shorten"},
    ],
)
def test_not_refused_at_load(changes):
    assert load(**changes).warnings == []


VAL = "val_env_manager.generating_args.max_new_tokens"
HELD_OUT = {"num_env_groups": 2, "tags": ["Lake"]}


@pytest.mark.parametrize(
    ("val", "changes", "words"),
    [
        # What was left open follows training's turns.
        (9, {}, ["9 is more than a turn of training has, and 8 is the bound; set custom_envs.Lake.max_tokens"]),
        (8, {}, []),
        (9, {"custom_envs.Lake.max_tokens_per_step": 8}, []),
        (33, {"response_length": 32, "custom_envs.Lake.max_tokens_per_step": 8},
         ["33 is more than response_length; 32 is the bound"]),
        (32, {"response_length": 32, "custom_envs.Lake.max_tokens_per_step": 8}, []),
    ],
)  # fmt: skip
def test_longer_turns_in_validation_than_there_may_be(val, changes, words):
    given = {"val_env_manager": {**HELD_OUT, "generating_args": {"max_new_tokens": val}}}
    told = [warning for warning in load(**given, **changes).warnings if warning.startswith(VAL)]
    assert len(told) == len(words)
    assert all(word in warning for word, warning in zip(words, told, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_env_manager.num_env_groups": 5}, "train_env_manager.num_env_groups: 5 groups at the same time, of "
         "which a step of 4 episodes uses 2; 3 are idle"),
        ({"custom_envs.Lake.max_tokens_per_step": 9}, "custom_envs.Lake.max_tokens_per_step: 9 is more than "
         "actor_infer.generating_args.max_new_tokens, and 8 is the bound"),
        ({"val_env_manager": {"num_env_groups": 2, "tags": ["Lake"]}, "val_batch_size": 3},
         "val_batch_size: no effect: validation plays val_env_manager.num_env_groups x group_size = 2 episodes"),
        ({"batch_adjust_mode": "delete"}, "batch_adjust_mode: no effect"),
        ({"actor_train.data_args.file_name": "a.jsonl"}, "actor_train.data_args.file_name: no effect"),
        ({"custom_envs.Lake": {**LAKE, "episode_mode": "step", "agent_template": "{current_observation}",
                               "on_rewrite": "keep"}}, "custom_envs.Lake.on_rewrite: no effect in step mode"),
        ({"custom_envs.Pond.next_step_template": "x"}, "settings of ROLL without effect here"),
    ],
)  # fmt: skip
def test_mentioned_at_load(changes, words):
    (warning,) = load(**changes).warnings
    assert warning.startswith(words)


# ---- who scores which environment ------------------------------------------------------------------------------------


def taught(*teachers, **changes):
    raw = {key: value for key, value in AGENTIC.items() if not key.startswith("actor_")}
    roles = {"student_train": {"infer_batch_size": 8}, "student_infer": {"generating_args": SHORT}}
    named = {f"t{i}": {**PURE["teacher"], "tag_included": tags} for i, tags in enumerate(teachers)}
    raw |= {"pure_opd_pipeline_type": "agentic", "teacher": named, **roles}
    return build_config(changed(raw, {"train_env_manager.tags": ["Lake", "Pond"], **changes}), OPD)


def test_teachers_and_tags():
    assert (
        taught(["Lake"], ["Pond"]).warnings == [] and taught([]).warnings == [] and taught(["Lake"], []).warnings == []
    )
    (warning,) = taught(["Lake", "Pound"], ["Pond"]).warnings
    assert warning.startswith("teacher.t0.tag_included: 'Pound' is no key of custom_envs")
    assert warning.endswith("did you mean 'Pond'?")
    (warning,) = taught(["Lake", "Pond"], **{"train_env_manager.tags": ["Lake"]}).warnings
    assert "'Pond' is not among the tags that are played" in warning
    with pytest.raises(ConfigError, match=r"train_env_manager.tags: no teacher scores Pond"):
        taught(["Lake"])
    (warning,) = taught(["Lake"], **{"opd_args.uncovered": "skip"}).warnings
    assert warning.startswith("opd_args.uncovered: no teacher scores Pond")
    with pytest.raises(ConfigError, match="no teacher scores Lake, Pond"):
        taught(["Other"], **{"opd_args.uncovered": "skip"})


# ---- resumes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "refused", "warned"),
    [
        ({"custom_envs.Lake.step_timeout": 5, "custom_envs.Lake.max_env_step_concurrent": 3}, [], []),
        ({"train_env_manager.max_env_num_per_worker": 1, "render_save_dir": "x"}, [], []),
        ({"custom_envs.Lake.env_config": {"size": 5}}, ["custom_envs.Lake.env_config.size"], []),
        ({"train_env_manager.group_size": 1}, ["train_env_manager.group_size"], []),
        ({"val_env_manager.num_env_groups": 3}, [], ["val_env_manager.num_env_groups"]),
    ],
)
def test_what_a_resume_may_change(changes, refused, warned):
    saved = json.loads(resume_checks.config_for_checkpoint_json(config()))
    assert resume_checks.resume_conflicts(saved, config(**changes)) == (refused, warned)


def test_dots_in_a_tag_are_no_path():
    def lake(**changes):
        played = {"custom_envs": {"Lake.v1": {**LAKE, **changes}}, "train_env_manager.tags": ["Lake.v1"]}
        return build_config(changed(AGENTIC, played), "agentic").config

    saved = json.loads(resume_checks.config_for_checkpoint_json(lake()))
    assert resume_checks.resume_conflicts(saved, lake(step_timeout=5)) == ([], [])
    assert resume_checks.resume_conflicts(saved, lake(max_tokens_per_step=4)) == (
        [],
        ["custom_envs.Lake.v1.max_tokens_per_step"],
    )
    assert resume_checks.changed_fields(saved, lake(max_steps=3)) == ["custom_envs.Lake.v1.max_steps"]


def test_a_resume_with_longer_turns_is_warned_about_as_other_sampling_is():
    saved = json.loads(resume_checks.config_for_checkpoint_json(config()))
    now = config(**{"actor_infer.generating_args.max_new_tokens": 9})
    refused, warned = resume_checks.resume_conflicts(saved, now)
    assert refused == [] and "custom_envs.Lake.max_tokens_per_step" in warned


@pytest.mark.parametrize("key", ["custom_envs", "train_env_manager", "val_env_manager"])
def test_environments_in_a_run_of_prompts_are_told_where_they_belong(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: belongs to the agentic pipeline: set pure_opd_pipeline_type"):
        build_config({**PURE, key: {}}, OPD)
