"""Files, folders, Hydra composition, overrides, plans, and the round trip through JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_samples import AGENTIC, LAKE, MIXED, PURE, REWARD, RL, changed

from roll_opd.configs import (
    build_config,
    config_for_checkpoint_json,
    config_from_dict,
    config_to_dict,
    config_to_json,
    config_without_secrets,
    launch_blockers,
    load_config,
    plan_as_dict,
    render_plan_text,
)
from roll_opd.errors import ConfigError

REPO = Path(__file__).resolve().parents[3]
EXAMPLES = REPO / "examples"
OPD = "onpolicy_distill"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw = changed(
        PURE, {"hydra": {"run": {"dir": "."}, "output_subdir": None}, "seed": 42, "exp_name": "sample-${seed}"}
    )
    (tmp_path / "pure.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def test_path_absolute_relative_and_beside_the_launcher(folder, monkeypatch, tmp_path_factory):
    assert load_config(OPD, str(folder), "pure", [], None).config.exp_name == "sample-42"
    monkeypatch.chdir(folder.parent)
    assert load_config(OPD, folder.name, "pure.yaml", [], None).config.exp_name == "sample-42"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_config(OPD, folder.name, "pure", [], folder.parent).config.exp_name == "sample-42"
    (folder.parent / "examples").mkdir(exist_ok=True)
    assert load_config(OPD, folder.name, "pure", [], folder.parent / "examples").config.exp_name == "sample-42"


def test_missing_folder_and_file_list_what_was_tried(folder):
    with pytest.raises(ConfigError, match=r"--config_path: no such folder.*nowhere.*launcher_here/nowhere"):
        load_config(OPD, "nowhere", "pure", [], Path("/launcher_here"))
    with pytest.raises(ConfigError, match=r"--config_name: no impure.yaml .* configs there: pure"):
        load_config(OPD, str(folder), "impure", [], None)
    with pytest.raises(ConfigError, match="is a file"):
        load_config(OPD, str(folder / "pure.yaml"), "pure", [], None)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("max_steps=3", lambda c: c.max_steps == 3),
        ("rollout_batch_size=8", lambda c: c.rollout_batch_size == 8),
        ("student_train.training_args.learning_rate=5e-7", lambda c: c.actor_train.training_args.learning_rate == 5e-7),
        ("student_train.training_args.warmup_steps=2", lambda c: c.actor_train.training_args.warmup_steps == 2),
        ("teacher.opd_kl_coef=0.5", lambda c: c.teacher_coef("default") == 0.5),
        ("+max_steps=3", lambda c: c.max_steps == 3),
        ("++max_steps=3", lambda c: c.max_steps == 3),
        ("~rollout_batch_size", lambda c: c.rollout_batch_size == 128),
        ("teacher.device_mapping=range(2) + [6]", lambda c: c.teachers["default"].device_mapping == [0, 1, 6]),
        ("teacher.device_mapping=list(range(0,2))", lambda c: c.teachers["default"].device_mapping == [0, 1]),
        ("teacher.device_mapping=[0,1]", lambda c: c.teachers["default"].device_mapping == [0, 1]),
        ("teacher.device_mapping=2", lambda c: c.teachers["default"].device_mapping == [2]),
        ("track_with=[tensorboard,stdout]", lambda c: c.track_with == ["tensorboard", "stdout"]),
        ("output_dir=/tmp/a=b (c)", lambda c: c.output_dir == "/tmp/a=b (c)"),
        ("output_dir=/tmp/x,y", lambda c: c.output_dir == "/tmp/x,y"),
        ("output_dir=/tmp/a b", lambda c: c.output_dir == "/tmp/a b"),
        ("output_dir=/tmp/a b, c (d)", lambda c: c.output_dir == "/tmp/a b, c (d)"),
        ("+output_dir=/tmp/x,y", lambda c: c.output_dir == "/tmp/x,y"),
        ("++output_dir=/tmp/x,y", lambda c: c.output_dir == "/tmp/x,y"),
        ("output_dir=/tmp/it's, so", lambda c: c.output_dir == "/tmp/it's, so"),
        ("output_dir='/tmp/x,y'", lambda c: c.output_dir == "/tmp/x,y"),
        ("output_dir=C:\\a,b\\", lambda c: c.output_dir == "C:\\a,b\\"),
        ("output_dir=/tmp/äö,#1", lambda c: c.output_dir == "/tmp/äö,#1"),
        ("output_dir=/tmp/${seed}", lambda c: c.output_dir == "/tmp/42"),
        ("output_dir=/tmp/${seed},${exp_name}", lambda c: c.output_dir == "/tmp/42,sample-42"),
        ("teacher.device_mapping=0,1", lambda c: c.teachers["default"].device_mapping == [0, 1]),
        ("system_envs={A: 1,B: x y}", lambda c: c.system_envs == {"A": 1, "B": "x y"}),
        (
            "student_train.data_args.file_name=[a.jsonl,b c.jsonl]",
            lambda c: c.actor_train.data_args.file_name == ["a.jsonl", "b c.jsonl"],
        ),
        ("exp_name='7'", lambda c: c.exp_name == "7"),
        ("opd_args.log_ratio_clip=null", lambda c: c.opd_args.log_ratio_clip is None),
    ],
)
def test_overrides_work_whether_or_not_the_key_is_there(folder, override, read):
    assert read(load_config(OPD, str(folder), "pure", [override], None).config)


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("max_stepz=3", "max_stepz", "did you mean 'max_steps'"),
        ("teacher.model_args.dtyp=bf16", "teacher.model_args.dtyp", "'dtype'"),
        ("max_steps", "max_steps", "write key=value"),
        ("--plann", "--plann", "write key=value"),
        ("~not_there", "pure.yaml", "not_there"),
    ],
)
def test_bad_overrides(folder, override, field, words):
    with pytest.raises(ConfigError) as caught:
        load_config(OPD, str(folder), "pure", [override], None)
    assert caught.value.field == field
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("output_dir: ${nowhere}/x\n", "output_dir", "nowhere"),
        ("a: [1\n", "broken.yaml", "cannot be composed"),
        ("seed: 1\nseed: 2\n", "broken.yaml", "duplicate key seed"),
        ("teacher:\n  math: {world_size: 1}\n  math: {world_size: 2}\n", "broken.yaml", "duplicate key math"),
        ("teacher:\n  math: {world_size: 1, world_size: 2}\n", "broken.yaml", "duplicate key world_size"),
        ("rewards: {a: {}, a: {}}\n", "broken.yaml", "duplicate key a"),
        ("seed: ???\n", "broken.yaml", "seed"),
        ("defaults: [missing]\n", "broken.yaml", "missing"),
        ("", "student_train", "missing role"),
        ("- 1\n- 2\n", "broken.yaml", "cannot be composed"),
        ("just text\n", "broken.yaml", "a mapping of settings"),
    ],
)
def test_broken_files(tmp_path, text, field, words):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(OPD, str(tmp_path), "broken", [], None)
    assert caught.value.field == field
    assert words in caught.value.problem


def test_a_key_that_is_not_in_the_environment_is_mentioned_and_resolved_once_it_is(folder, monkeypatch):
    """A plan needs no key of a service; a run does."""
    reward = "{worker_cls: m.Reward, judge_api_key: '${oc.env:ROLL_OPD_NOT_SET}'}"
    override = [f"rewards.judge={reward}"]
    (warning,) = load_config(OPD, str(folder), "pure", override, None).warnings
    assert warning.startswith("rewards.judge.judge_api_key: ") and "ROLL_OPD_NOT_SET is not set" in warning
    blocked = launch_blockers(load_config(OPD, str(folder), "pure", override, None))
    assert "rewards.judge.judge_api_key" in {error.field for error in blocked}
    monkeypatch.setenv("ROLL_OPD_NOT_SET", "hidden")
    loaded = load_config(OPD, str(folder), "pure", override, None)
    assert (loaded.warnings, loaded.config.rewards["judge"].judge_api_key) == ([], "hidden")


def test_binary_file_is_a_config_error(tmp_path):
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(OPD, str(tmp_path), "broken", [], None)


def test_defaults_group_override_and_variables(folder):
    (folder / "size").mkdir()
    (folder / "size" / "small.yaml").write_text("rollout_batch_size: 4\n")
    (folder / "size" / "large.yaml").write_text("rollout_batch_size: 16\nspare_variable: 1\n")
    raw = changed(PURE, {"my_lr": 0.5, "student_train.training_args.learning_rate": "${my_lr}"})
    del raw["rollout_batch_size"]
    text = "defaults:\n  - size@_here_: small\n  - _self_\n" + yaml.safe_dump(raw)
    (folder / "composed.yaml").write_text(text)
    small = load_config(OPD, str(folder), "composed", [], None)
    assert small.config.rollout_batch_size == 4
    assert small.config.actor_train.training_args.learning_rate == 0.5
    assert small.warnings == []
    large = load_config(OPD, str(folder), "composed", ["size@_global_=large"], None)
    assert large.config.rollout_batch_size == 16
    assert "spare_variable" in large.warnings[0]


@pytest.mark.parametrize("name", ["onpolicy_distill_config", "multi_teacher_onpolicy_distill_config"])
def test_shipped_example_loads_without_warnings(name):
    loaded = load_config(OPD, "qwen3-8B-onpolicy-distill-megatron", name, [], EXAMPLES)
    assert loaded.warnings == []
    assert render_plan_text(loaded)


def test_plan_json_shape():
    teachers = {
        "math": {"model_args": {"model_name_or_path": "big"}, "tag_included": ["m"], "opd_kl_coef": 0.5},
        "code": {"model_args": {"model_name_or_path": "small"}, "device_mapping": "[0,1]"},
    }
    rewards = {"r": {"worker_cls": "roll.pipeline.rlvr.rewards.x.Y", "tag_included": ["m"]}}
    single = plan_as_dict(build_config(changed(PURE, {"rewards": rewards}), OPD))
    assert single == {
        "pipeline": "rlvr",
        "mode": "pure_opd",
        "roles": {
            "actor_train": {"yaml_name": "student_train", "model": "models/student", "strategy": "fsdp2_train",
                            "devices": [], "world_size": 1},
            "actor_infer": {"yaml_name": "student_infer", "model": "models/student", "strategy": "hf_infer",
                            "devices": [], "world_size": 1},
            "reference": {"yaml_name": "teacher", "model": "models/teacher", "strategy": "hf_infer",
                          "devices": [], "world_size": 1},
        },
        "teachers": {"default": {"model": "models/teacher", "strategy": "hf_infer", "devices": [], "tags": [],
                                 "opd_kl_coef": 1.0}},
        "rewards": {"r": {"worker_cls": "roll_opd.rewards.x.Y", "tags": ["m"], "world_size": 1}},
        "environments": {},
        "memory": {"student_train": None, "student_infer": None, "teacher": None},
        "sharing": [{"devices": [], "roles": ["student_train", "student_infer", "teacher"]}],
        "warnings": [],
    }  # fmt: skip
    several = plan_as_dict(build_config(changed(PURE, {"teacher": teachers}), OPD))
    assert several["teachers"]["math"]["tags"] == ["m"]
    assert several["teachers"]["math"]["opd_kl_coef"] == 0.5
    assert several["roles"]["reference"]["model"] == "big, small"
    assert several["roles"]["reference"]["devices"] == [0, 1]
    assert json.loads(json.dumps(several)) == several


TOOL = {"tool_configs": [{"tool_id": "python_code", "tool_args": {"timeout": 5}}], "wrapper_args": {"max_tool_uses": 2}}
WITH_TOOLS = {**AGENTIC, "custom_envs": {"Lake": {**LAKE, "tool_wrapper": TOOL, "env_config": {"size": 4}}}}


def test_the_plan_of_environments():
    several = {"num_env_groups": 3, "group_size": 2, "tags": ["Lake", "Pond"], "max_env_num_per_worker": 4}
    step = {**LAKE, "episode_mode": "step", "agent_template": "{current_observation}", "max_tokens_per_step": 5}
    changes = {"train_env_manager": several, "val_env_manager": {"num_env_groups": 1, "tags": "Lake"}}
    loaded = build_config(changed(AGENTIC, {**changes, "custom_envs.Pond": step}), "agentic")
    assert plan_as_dict(loaded)["environments"] == {
        "Lake": {"env_type": "frozen_lake", "mode": "trajectory", "max_steps": 10, "max_tokens_per_step": 8,
                 "groups": {"train": 2, "validation": 1}},
        "Pond": {"env_type": "frozen_lake", "mode": "step", "max_steps": 10, "max_tokens_per_step": 5,
                 "groups": {"train": 1, "validation": 0}},
    }  # fmt: skip
    text = render_plan_text(loaded)
    assert "train: 3 groups x 2 = 6 at a time in 2 processes; a step plays 2 groups, 4 episodes" in text
    assert "validation: 1 groups x 1 = 1 at a time in 1 process\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["Pond", "frozen_lake", "step", "10", "5", "1", "x", "2", "-"] in rows


@pytest.mark.parametrize(
    ("base", "launcher"), [(PURE, OPD), (RL, "rlvr"), (MIXED, "rlvr"), (AGENTIC, "agentic"), (WITH_TOOLS, "agentic")]
)
def test_round_trip(base, launcher):
    config = build_config(changed(base, {"resume_from_checkpoint": "/a/b", "system_envs": {"A": 1}}), launcher).config
    assert config_from_dict(json.loads(config_to_json(config))) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_checkpoint_json_has_no_secrets():
    secrets = {
        "rewards": {"judge": {**REWARD, "judge_api_key": "hidden-1", "reward_args": {"a": [{"token": "hidden-2"}]}}},
        "tracker_kwargs": {"wandb": {"api_key": "hidden-3", "project": "p"}},
        "system_envs": {"HF_TOKEN": "hidden-4", "OMP_NUM_THREADS": 1},
        "teacher.system_envs": {"MY_PASSWORD": 5},
    }  # fmt: skip
    config = build_config(changed(PURE, secrets), OPD).config
    text = config_for_checkpoint_json(config)
    assert "hidden" not in text
    masked = json.loads(text)
    assert masked == config_without_secrets(config)
    assert masked["rewards"]["judge"]["judge_api_key"] == "***"
    assert masked["tracker_kwargs"] == {"wandb": {"api_key": "***", "project": "p"}}
    assert masked["system_envs"] == {"HF_TOKEN": "***", "OMP_NUM_THREADS": 1}
    assert masked["teachers"]["default"]["system_envs"] == {"MY_PASSWORD": "***"}
    # The exact text is for round trips, and the config itself is untouched.
    assert config_from_dict(json.loads(config_to_json(config))) == config
    assert config.rewards["judge"].judge_api_key == "hidden-1"


def test_checkpoint_json_without_secrets_is_exact():
    config = build_config(PURE, OPD).config
    assert config_for_checkpoint_json(config) == config_to_json(config)


@pytest.mark.parametrize("name", ["onpolicy_distill_config", "multi_teacher_onpolicy_distill_config"])
def test_round_trip_of_shipped_examples(name):
    config = load_config(OPD, "qwen3-8B-onpolicy-distill-megatron", name, [], EXAMPLES).config
    assert config_from_dict(json.loads(config_to_json(config))) == config


def test_round_trip_notices_a_difference():
    config = build_config(PURE, OPD).config
    values = config_to_dict(config)
    values["teachers"]["default"]["opd_kl_coef"] = 0.5
    assert config_from_dict(values) != config


def test_planning_imports_no_torch_ray_or_transformers():
    code = (
        "import sys\n"
        "from roll_opd.configs import load_config, plan_as_dict, render_plan_text, launch_blockers, launch_warnings\n"
        "loaded = load_config('onpolicy_distill', sys.argv[1], 'onpolicy_distill_config', [], None)\n"
        "plan_as_dict(loaded), render_plan_text(loaded), launch_blockers(loaded), launch_warnings(loaded)\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'vllm', 'datasets'} & set(sys.modules)\n"
        "ours = {name for name in sys.modules if name.startswith('roll_opd.')}\n"
        "other = {name for name in ours if not name.startswith('roll_opd.configs')} - {'roll_opd.errors'}\n"
        "assert not heavy and not other, (heavy, other)\n"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "qwen3-8B-onpolicy-distill-megatron")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
