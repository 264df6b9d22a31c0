"""YAML files of ROLL: every key of its classes is known, every example file loads, and a typo is still a typo.

Files of ROLL are not part of this repository. Point ``ROLL_CHECKOUT`` at a checkout of it to plan all of them.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_samples import AGENTIC, PURE, RL, changed

from roll_opd import configs
from roll_opd.configs import (
    agentic_config,
    backends,
    build_config,
    environment_config,
    launch_blockers,
    load_config,
    pipeline_config,
    render_plan_text,
    worker_config,
)
from roll_opd.configs.builder import did_you_mean, field_types, one_edit_apart
from roll_opd.configs.roll_compat import ROLL_KEYS, ignored_keys, roll_keys
from roll_opd.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent / "roll_yaml"))
import samples
import scope
import typos

REPO = Path(__file__).resolve().parents[3]
OPD = "onpolicy_distill"
LAUNCHERS = (OPD, "rlvr", "agentic", "mixed")
CHECKOUT = os.environ.get("ROLL_CHECKOUT")
needs_roll = pytest.mark.skipif(not CHECKOUT, reason="ROLL_CHECKOUT does not point at a checkout of alibaba/ROLL")
NUM_TYPOS = 20


def our_class(name: str) -> type:
    modules = (configs, agentic_config, environment_config, pipeline_config, worker_config, backends)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def launched(launcher: str) -> str:
    return "rlvr" if launcher == "mixed" else launcher


# The table


@pytest.mark.parametrize("name", ROLL_KEYS)
def test_the_table_agrees_with_the_class(name: str) -> None:
    """What is the same or fixed is a field; what is ignored or planned is none, or it would be read after all."""
    fields = {*field_types(our_class(name))} | {"student_train", "student_infer", "teacher"}
    for key, known in roll_keys(our_class(name)).items():
        assert (key in fields) == (known.status in ("same", "fixed")), key
        assert known.note or known.status == "same", key


def test_the_page_is_up_to_date() -> None:
    maker = [sys.executable, str(REPO / "docs" / "make_roll_compatibility.py"), "--check"]
    assert subprocess.run(maker, timeout=60).returncode == 0, "run: python docs/make_roll_compatibility.py"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_key_of_roll_loads(launcher: str, tmp_path: Path) -> None:
    raw = samples.config(launcher)
    (tmp_path / "every_key.yaml").write_text(yaml.safe_dump(raw))
    loaded = load_config(launched(launcher), str(tmp_path), "every_key")
    assert render_plan_text(loaded)
    told = " ".join(loaded.warnings)
    cls = type(loaded.config)
    for key, known in roll_keys(cls).items():
        if known.status in ("ignored", "planned"):
            assert key in told, key
    # In a role as well.
    for key, known in roll_keys(configs.WorkerConfig).items():
        if known.status in ("ignored", "planned"):
            assert f"actor_infer.{key}" in told or f"student_infer.{key}" in told, key
    for backend in (backends.MegatronSettings, backends.VLLMSettings):
        for key in ignored_keys(backend):
            assert f"strategy_config.{key}" in told, key


@needs_roll
def test_the_table_holds_every_field_of_roll(capsys) -> None:
    """Read from ROLL's classes without importing them."""
    assert CHECKOUT is not None
    ours = {
        "ScheduleConfig": [configs.RLVRConfig, configs.AgenticConfig],
        "BaseConfig": [configs.BaseConfig],
        "PPOConfig": [configs.RLVRConfig, configs.AgenticConfig],
        "RLVRConfig": [configs.RLVRConfig],
        "AgenticConfig": [configs.AgenticConfig],
        "TrainInferCorrectionConfig": [pipeline_config.TrainInferCorrectionArguments],
        "TrainInferISWeightConfig": [pipeline_config.TrainInferWeightArguments],
        "TrainInferFilterConfig": [pipeline_config.TrainInferFilterArguments],
        "WorkerConfig": [configs.WorkerConfig, configs.ValidationConfig],
        "StrategyArguments": [configs.StrategyArguments],
        "SequencePackingConfig": [configs.SequencePackingArguments],
        "DataArguments": [configs.DataArguments],
        "LoraArguments": [configs.ModelArguments],
        "ModelArguments": [configs.ModelArguments],
        "GeneratingArguments": [configs.GeneratingArguments],
        "TrainingArguments": [configs.TrainingArguments],
        "RewardFilterConfig": [worker_config.RewardFilterArguments],
        "LLMProxyConfig": [agentic_config.LLMProxyArguments],
        "EnvManagerConfig": [agentic_config.EnvManagerConfig],
        "RewardNormalizationConfig": [agentic_config.RewardNormalizationArguments],
        "EnvMonitorConfig": [agentic_config.EnvMonitorArguments],
    }
    # The blocks behind one ignored key, and what nothing there reads.
    inner = {
        "RolloutMockConfig": ("BaseConfig", "rollout_mock"),
        "RouterArguments": ("BaseConfig", "router_args"),
        "TransferBackendArguments": ("BaseConfig", "transfer_backend"),
        "RouterReplayConfig": ("WorkerConfig", "router_replay"),
    }
    pages = [*Path(CHECKOUT, "roll/configs").glob("*_args.py"), Path(CHECKOUT, "roll/configs/base_config.py")]
    pages += [Path(CHECKOUT, "roll/configs/worker_config.py"), Path(CHECKOUT, "roll/pipeline/rlvr/rlvr_config.py")]
    pages += [Path(CHECKOUT, "roll/pipeline/agentic/agentic_config.py")]
    count = 0
    for page in pages:
        for node in ast.parse(page.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            names = {field.target.id for field in node.body
                     if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}  # fmt: skip
            if node.name == "DatasetFilterConfig":
                # `dataset_filter` is a plain mapping here.
                continue
            if node.name in inner:
                cls, key = inner[node.name]
                assert names == set(ROLL_KEYS[cls][key].inner), node.name
            else:
                targets = ours.get(node.name, [agentic_config.EnvRewardConfig if "agentic" in str(page)
                                               else configs.RewardConfig])  # fmt: skip
                for target in targets:
                    assert names <= set(roll_keys(target)), (node.name, names - set(roll_keys(target)))
            count += len(names)
    with capsys.disabled():
        sys.stdout.write(f"\nfields of ROLL's classes, all known: {count}\n")
    assert count > 250


# What is special about some files


def test_both_spellings_of_the_positive_loss() -> None:
    for key in ("postive_loss_coef", "positive_loss_coef"):
        assert build_config(changed(RL, {key: 0.5}), "rlvr").config.postive_loss_coef == 0.5
    with pytest.raises(ConfigError, match=r"positive_loss_coef: is another spelling of 'postive_loss_coef'"):
        build_config(changed(RL, {"postive_loss_coef": 1, "positive_loss_coef": 1}), "rlvr")
    with pytest.raises(ConfigError, match=r"^positive_loss_coef: must be >= 0"):
        build_config(changed(RL, {"positive_loss_coef": -1}), "rlvr")


def test_a_placeholder_stands_for_no_number() -> None:
    loaded = build_config(changed(RL, {"use_topr_neg_loss_coef": "x_2"}), "rlvr")
    assert loaded.config.use_topr_neg_loss_coef == 0
    assert "use_topr_neg_loss_coef" in " ".join(loaded.warnings)
    with pytest.raises(ConfigError, match="expected a number, got 'x_two'"):
        build_config(changed(RL, {"use_topr_neg_loss_coef": "x_two"}), "rlvr")


def test_rollouts_without_training_are_planned() -> None:
    raw = {key: value for key, value in AGENTIC.items() if key != "actor_train"}
    loaded = build_config(raw, "agentic")
    assert "actor_train: is missing" in loaded.warnings[0] and "actor_train" in render_plan_text(loaded)
    with pytest.raises(ConfigError, match="actor_train: missing role"):
        build_config(raw, "rlvr")


def test_a_critic_that_roll_takes_for_granted_is_planned() -> None:
    loaded = build_config(changed(RL, {"adv_estimator": "gae", "reward_pretrain": "some/critic"}), "rlvr")
    assert loaded.config.critic is not None
    assert loaded.config.critic.model_args.model_name_or_path == "some/critic"
    assert "critic: is missing" in loaded.warnings[0]
    with pytest.raises(ConfigError, match="gae needs a critic"):
        build_config(changed(RL, {"adv_estimator": "gae"}), "rlvr")


def test_a_tracker_inside_rolls_makers_network_is_left_out() -> None:
    loaded = build_config(changed(PURE, {"track_with": ["ml_tracker", "stdout"]}), OPD)
    assert loaded.config.track_with == ["stdout"] and "ml_tracker" in loaded.warnings[0]
    assert build_config(changed(PURE, {"track_with": "ml_tracker"}), OPD).config.track_with == ["tensorboard"]


@pytest.mark.parametrize("key", ["sft_train", "chosen_key", "student", "reward_system_config"])
def test_other_pipelines_are_named(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({key: {}, "actor_train": {}}, "rlvr")
    assert caught.value.field == key and "which roll_opd does not have" in caught.value.problem


def test_blocks_without_effect_have_checked_keys() -> None:
    assert build_config(changed(PURE, {"router_args": {"router_name": "SglangRouter"}}), OPD)
    with pytest.raises(ConfigError, match=r"router_args.ruoter_name: unknown key; did you mean 'router_name'"):
        build_config(changed(PURE, {"router_args": {"ruoter_name": "SglangRouter"}}), OPD)


def test_settings_that_are_handed_on_may_be_new_but_not_misspelled() -> None:
    assert build_config(changed(PURE, {"tracker_kwargs": {"an_option_of_tomorrow": 1}}), OPD)
    with pytest.raises(ConfigError) as caught:
        build_config(changed(PURE, {"tracker_kwargs": {"log_dri": "x"}}), OPD)
    assert caught.value.field == "tracker_kwargs.log_dri"
    assert "did you mean 'log_dir'" in caught.value.problem


def test_a_misspelled_variable_is_found_where_it_stands(tmp_path: Path) -> None:
    raw = changed(PURE, {"run_folder": "somewhere", "output_dir": "${run_folder}/x"})
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(raw))
    assert load_config(OPD, str(tmp_path), "good").config.output_dir == "somewhere/x"
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changed(raw, {"output_dir": "${run_foldr}/x"})))
    with pytest.raises(ConfigError, match=r"^run_folder: unknown key; did you mean 'run_foldr'\? output_dir needs it"):
        load_config(OPD, str(tmp_path), "bad")


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ("seed", "sed", True),
        ("seed", "seeds", True),
        ("seed", "seee", True),
        ("seed", "sede", True),
        ("seed", "esed", True),
        ("seed", "seed", False),
        ("seed", "deed", True),
        ("seed", "sde", False),
        ("seed", "desed", False),
        ("seed", "eeds", False),
        ("ab", "ba", True),
        ("", "a", True),
        ("", "ab", False),
    ],
)
def test_one_edit_apart(first: str, second: str, apart: bool) -> None:
    assert one_edit_apart(first, second) is apart and one_edit_apart(second, first) is apart


def test_all_words_that_are_one_edit_away_are_named() -> None:
    words = ["adam_beta1", "adam_beta2", "adam_epsilon"]
    assert did_you_mean("adam_beta", words) == "; did you mean 'adam_beta1' or 'adam_beta2'?"
    assert did_you_mean("adam_epsilo", words) == "; did you mean 'adam_epsilon'?"
    assert did_you_mean("learning_rate", words) == ""


# Fragments


FRAGMENTS = sorted((REPO / "examples" / "config").glob("*.yaml"))


def test_the_fragments_have_rolls_names() -> None:
    """Those that text files of ROLL include."""
    wanted = {"envs", "step_envs", "traj_envs"} | {f"traj_envs_gem_{k}" for k in ("code", "games", "math", "qa", "rg")}
    assert wanted <= {path.stem for path in FRAGMENTS}


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_every_environment_of_a_fragment_resolves(fragment: Path, tmp_path: Path) -> None:
    """From the folder of a run beside the fragments, with a variable set anew."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(fragment.parent, tmp_path / "config")
    groups = {key: value for key, value in yaml.safe_load(fragment.read_text()).items() if isinstance(value, dict)}
    raw = {
        "defaults": [f"../config/{fragment.stem}@_here_"],
        "pretrain": "some/model",
        "adv_estimator": "reinforce",
        "sequence_length": 128,
        "max_tokens_per_step": 77,
        "actor_train": {"infer_batch_size": 1},
        "actor_infer": {"infer_batch_size": 1},
        "custom_envs": {name: f"${{{group}.{name}}}" for group, envs in groups.items() for name in envs},
    }
    # Played, because of the others less is asked; `envs` has none.
    raw["train_env_manager"] = {"tags": list(raw["custom_envs"]) or ["Lake"]}  # type: ignore[call-overload]
    raw["custom_envs"] = raw["custom_envs"] or {"Lake": {"env_type": "frozen_lake"}}
    (run / "agent.yaml").write_text(yaml.safe_dump(raw))
    loaded = load_config("agentic", str(run), "agent")
    assert isinstance(loaded.config, configs.AgenticConfig)
    assert set(loaded.config.custom_envs) == set(raw["custom_envs"])  # type: ignore[call-overload]
    mode = "step" if fragment.stem == "step_envs" else "trajectory"
    for name, env in loaded.config.custom_envs.items() if groups else ():
        assert env.max_tokens_per_step == 77 and env.env_type and env.env_config, name
        assert env.episode_mode == mode and "$" not in str(env), name
    assert launch_blockers(loaded) == []


# Launchers


@pytest.mark.parametrize("launcher", ["rlvr", "agentic"])
def test_launchers_plan_from_another_folder(launcher: str, tmp_path: Path) -> None:
    """And refuse what this version does not run, with one line each and exit code 1."""
    raw = samples.config(launcher)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, str(REPO / "examples" / f"start_{launcher}_pipeline.py")]
    command += ["--config_path", str(tmp_path), "--config_name", "run"]
    planned = subprocess.run([*command, "--plan"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith(f"pipeline: {launcher}")
    launched = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert launched.returncode == 1 and "Traceback" not in launched.stderr and not launched.stdout
    assert "actor_train.model_args.lora_target: megatron_train" in launched.stderr


# Typos, here and in ROLL's files


def refused_typos(files: list[tuple[Path, str]], folder: Path, seed: int) -> None:
    """Misspell random keys of random files, and see each refused with the right word."""
    random_ = random.Random(seed)
    for _ in range(NUM_TYPOS):
        source, launcher = random_.choice(files)
        raw = yaml.safe_load(source.read_text(encoding="utf-8"))
        path, known = random_.choice(list(typos.checked_keys(raw, launcher)))
        typo = typos.misspell(str(path[-1]), known | set(raw), random_)
        if typo is None:
            continue
        (folder / "typo.yaml").write_text(yaml.safe_dump(typos.renamed(raw, path, typo), sort_keys=False))
        what = f"{source.parent.name}/{source.name}: {'.'.join(map(str, path))} as {typo}"
        with pytest.raises(ConfigError) as caught:
            load_config(launcher, str(folder), "typo")
            pytest.fail(f"loaded: {what}")
        assert "did you mean" in caught.value.problem and repr(path[-1]) in caught.value.problem, what
        assert typo in caught.value.field, what


@pytest.mark.parametrize("seed", [0, 1])
def test_typos_in_our_examples(seed: int, tmp_path: Path) -> None:
    files = [(path, OPD) for path in sorted((REPO / "examples").glob("*/*.yaml")) if path.parent.name != "config"]
    files = [(path, launcher) for path, launcher in files if "student_train" in path.read_text(encoding="utf-8")]
    assert files
    refused_typos(files, tmp_path, seed)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_typos_in_every_key_of_roll(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "every_key.yaml"
    source.write_text(yaml.safe_dump(samples.config(launcher)))
    refused_typos([(source, launched(launcher))], tmp_path, seed=0)


@pytest.fixture(scope="module")
def roll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ROLL's example files that may be written to."""
    assert CHECKOUT is not None
    target = tmp_path_factory.mktemp("roll")
    shutil.copytree(Path(CHECKOUT, "examples"), target / "examples", ignore=shutil.ignore_patterns("*.png", "*.jpg"))
    return target


@needs_roll
@pytest.mark.parametrize("fragments", ["theirs", "ours"])
def test_every_file_of_roll_in_scope_plans(roll: Path, fragments: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    shutil.copytree(roll, tmp_path / "roll")
    if fragments == "ours":
        shutil.rmtree(tmp_path / "roll" / "examples" / "config")
        shutil.copytree(REPO / "examples" / "config", tmp_path / "roll" / "examples" / "config")
    files = scope.examples(tmp_path / "roll")
    failed, planned, others = [], 0, 0
    for file in files:
        name = file.path.relative_to(tmp_path / "roll" / "examples")
        try:
            text = render_plan_text(load_config(file.launcher, str(file.path.parent), file.path.stem))
        except ConfigError as error:
            assert "\n" not in str(error), name
            if file.in_scope:
                failed.append(f"{name}: {error}")
            continue
        assert text
        planned += file.in_scope
        others += not file.in_scope
    in_scope = sum(file.in_scope for file in files)
    with capsys.disabled():
        counts = f"{len(files)} files, {planned} of {in_scope} in scope plan, and {others} of the others"
        sys.stdout.write(f"\nROLL's YAML with {fragments} fragments: {counts}\n")
    assert not failed
    assert planned == in_scope >= 79


@needs_roll
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_typos_in_files_of_roll(roll: Path, seed: int) -> None:
    folder = roll / "examples" / "typos"
    folder.mkdir(exist_ok=True)
    files = [(file.path, file.launcher) for file in scope.examples(roll) if file.in_scope]
    refused_typos([(path, launcher) for path, launcher in files if path.parent != folder], folder, seed)
