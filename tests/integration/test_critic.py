"""A run with a critic: it learns, the student waits for it, and a stopped run goes on exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.integration

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
STUDENT = str(QUICKSTART / "models" / "student")
WARMUP = 3
MODEL = {"model_name_or_path": STUDENT, "dtype": "fp32", "disable_gradient_checkpointing": True}
CRITIC = {
    "model_args": MODEL,
    "training_args": {
        "learning_rate": 3.0e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
    },
    "infer_batch_size": 64,
}
RUN: dict[str, Any] = {
    "exp_name": "critic",
    "seed": 7,
    "max_steps": WARMUP + 1,
    "save_steps": WARMUP - 1,
    "eval_steps": 0,
    "rollout_batch_size": 16,
    "num_return_sequences_in_group": 4,
    "prompt_length": 64,
    "response_length": 16,
    "adv_estimator": "gae",
    "gamma": 1.0,
    "lambd": 1.0,
    "critic_warmup": WARMUP,
    "actor_train": {
        "model_args": MODEL,
        "training_args": {"learning_rate": 1.0e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 32},
        "data_args": {"file_name": str(QUICKSTART / "data" / "train.jsonl"), "messages": "messages"},
        "infer_batch_size": 64,
    },
    "actor_infer": {"model_args": MODEL, "infer_batch_size": 64},
    "critic": CRITIC,
    "rewards": {"math_rule": {
        "worker_cls": "roll_opd.rewards.math_rule_reward_worker.MathRuleRewardWorker", "tag_included": ["sort_digits"],
    }},
}  # fmt: skip


def loaded_config(folder: Path, launcher: str = "rlvr", **changes: Any) -> Any:
    from roll_opd.configs import load_config

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | {"output_dir": str(folder)} | changes))
    return load_config(launcher, str(folder), "run", [], None)


def run(folder: Path, **changes: Any) -> tuple[list[dict[str, float]], Path]:
    """Return the metrics of the steps, and the final checkpoint."""
    from roll_opd.configs import launch_blockers, launch_warnings
    from roll_opd.pipeline.launch import run_pipeline

    loaded = loaded_config(folder, **changes)
    assert (launch_blockers(loaded), launch_warnings(loaded)) == ([], [])
    summary = json.loads(run_pipeline(loaded).read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] < RUN["max_steps"]], Path(summary["checkpoint"])


def read_dcp(folder: Path) -> dict[str, Any]:
    """All tensors of a distributed checkpoint, by name."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", state)
    return flat


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], Path, Path]:
    """One run to its end: metrics, final checkpoint, its folder."""
    folder = tmp_path_factory.mktemp("critic") / "whole"
    return *run(folder), folder


def test_the_critic_learns_the_reward(whole) -> None:
    """With gamma = lambda = 1 each return is the reward of 0 or 1, and a new critic says 0."""
    steps, _, _ = whole
    first, last = steps[0], steps[-1]
    assert first["critic/value_mean"] == 0.0 and first["critic/explained_variance"] == 0.0
    # Of n tokens a share p has return 1: the critic that says 0 has a loss of p / 2 in its first optimizer step, and
    # one that says p everywhere p (1 - p) / 2.
    accuracy = float(np.mean([step["reward/mean"] for step in steps]))
    assert last["critic/loss"] < 0.7 * first["critic/loss"]
    assert abs(last["critic/value_mean"] - accuracy) < 0.5 * accuracy
    for step in steps:
        assert step["critic/lr"] == pytest.approx(3.0e-3)
        assert step["critic/grad_norm"] > 0 and step["critic/clip_fraction"] == 0
        assert step["time/values"] > 0


def test_the_student_waits_for_the_critic(whole) -> None:
    from safetensors.torch import load_file

    steps, final, folder = whole
    assert ["train/loss" in step for step in steps] == [False] * WARMUP + [True]
    before = load_file(QUICKSTART / "models" / "student" / "model.safetensors")
    saved = read_dcp(folder / "checkpoints" / f"checkpoint-{WARMUP - 1}" / "actor_train")
    names = {name: f"/model/lm.{name}" for name in before}
    assert len(before) > 10 and all((before[name].float() == saved[key]).all() for name, key in names.items())
    after = load_file(final / "model.safetensors")
    assert any((before[name].float() != after[name]).any() for name in before)


def test_the_final_critic_is_a_model_again(whole) -> None:
    import torch
    from transformers import AutoTokenizer

    from roll_opd.configs import ModelArguments
    from roll_opd.distributed.strategy.value_model import load_value_model

    _, final, _ = whole
    assert len(AutoTokenizer.from_pretrained(final / "critic-hf").get_vocab()) == 305
    args = ModelArguments(str(final / "critic-hf"), dtype="fp32")
    model = load_value_model(args, role="critic", vocab_size=305, device=torch.device("cpu"))
    saved = read_dcp(final / "critic")
    assert model.value_head.weight.abs().max() > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"/model/{name}"]), name


def test_a_resumed_run_equals_the_whole_one(whole, tmp_path: Path) -> None:
    steps, final, folder = whole
    checkpoint = folder / "checkpoints" / f"checkpoint-{WARMUP - 1}"
    again, resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(checkpoint))

    def without_times(row: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in row.items() if not key.startswith("time/")}

    assert [without_times(row) for row in again] == [without_times(row) for row in steps[WARMUP:]]
    for role in ("actor_train", "critic"):
        a, b = read_dcp(final / role), read_dcp(resumed / role)
        assert a.keys() == b.keys() and any("exp_avg_sq" in key for key in a)
        assert all((a[key] == b[key]).all() for key in a)


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Any]]:
    """Real clusters of a critic on one Ray, which ends with this file."""
    from roll_opd.configs import RayArguments
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement
    from roll_opd.distributed.runtime import ray_session
    from roll_opd.pipeline.workers import CriticWorker

    folder = tmp_path_factory.mktemp("ranks")
    with ray_session(RayArguments()):

        def start(ranks: int) -> Any:
            sgd = CRITIC["training_args"] | {
                "optimizer": "sgd",
                "learning_rate": 0.01,
                "per_device_train_batch_size": 3,
            }
            config = loaded_config(
                folder, critic=CRITIC | {"world_size": ranks, "training_args": sgd, "infer_batch_size": 3}
            ).config
            placement = Placement({"critic": config.critic}, {})
            made = Cluster("critic", config.critic, CriticWorker, placement=placement, threads=1,
                           log_dir=str(folder), seed=0, system_envs={})  # fmt: skip
            made.connect_ranks()
            made.call_all("setup", "critic", config.critic, config.critic.model_args, 0.0, 10)
            return made, config

        yield start


def test_ranks_change_neither_values_nor_update(critics) -> None:
    """13 sequences: one of two ranks runs out of rows before the other. Two optimizer steps, then all values."""
    from roll_opd.pipeline.critic import Critic
    from roll_opd.trajectory import Trajectory, TrajectoryId

    random = np.random.default_rng(0)
    items = []
    for i in range(13):
        length = int(random.integers(6, 60))
        mask = np.arange(length) >= int(random.integers(1, 5))
        empty = np.zeros(length, np.float32)
        versions = np.where(mask, 0, -1).astype(np.int32)
        tokens = random.integers(0, 300, length).astype(np.int32)
        returns = random.normal(1, 1, length).astype(np.float32)
        items.append(Trajectory(TrajectoryId(i, 0), "", tokens, mask, empty, versions, returns=returns, reward=1.0))
    results = []
    for ranks in (1, 2):
        cluster, config = critics(ranks)
        # The batch is one optimizer step for both.
        worker = config.critic
        steps = dataclasses.replace(worker.training_args, gradient_accumulation_steps=5)
        critic = Critic(dataclasses.replace(config, critic=dataclasses.replace(worker, training_args=steps)), cluster)
        metrics = [critic.train(critic.with_values(items)) for _ in range(2)]
        results.append((metrics, critic.with_values(items)))
        cluster.stop()
    (one, values), (two, others) = results
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert one[1]["critic/loss"] < one[0]["critic/loss"]
    for a, b in zip(values, others, strict=True):
        assert np.abs(a.values[a.response_mask]).max() > 1e-3
        np.testing.assert_allclose(a.values, b.values, atol=1e-4)


# ---- when it is started ----------------------------------------------------------------------------------------------


def test_a_critic_without_use_is_not_started(tmp_path: Path) -> None:
    from roll_opd.configs import launch_blockers, launch_warnings, plan_as_dict
    from roll_opd.configs.launch_checks import starts_critic

    assert starts_critic(loaded_config(tmp_path / "gae").config)
    # It may name a backend that does not run: it is the user's file of another system.
    foreign = CRITIC | {"strategy_args": {"strategy_name": "megatron_train"}}
    assert launch_blockers(loaded_config(tmp_path / "foreign", critic=foreign)) != []
    loaded = loaded_config(tmp_path / "grpo", adv_estimator="grpo", critic=foreign)
    assert not starts_critic(loaded.config) and launch_blockers(loaded) == []
    (warning,) = launch_warnings(loaded)
    assert warning.startswith("critic, critic_warmup: no effect, because adv_estimator grpo")
    assert "critic" not in plan_as_dict(loaded)["roles"]
    assert "critic" in plan_as_dict(loaded_config(tmp_path / "gae"))["roles"]


def test_pure_distillation_has_no_critic(tmp_path: Path) -> None:
    from roll_opd.configs.launch_checks import starts_critic

    roles = {"student_train": RUN["actor_train"], "student_infer": RUN["actor_infer"]}
    teacher = {"model_args": MODEL | {"model_name_or_path": str(QUICKSTART / "models" / "teacher")}}
    changes = roles | {"actor_train": None, "actor_infer": None, "teacher": teacher, "is_pure_opd": True}
    loaded = loaded_config(tmp_path, "onpolicy_distill", **changes)
    assert loaded.config.critic is None and not starts_critic(loaded.config)
    assert any(warning.startswith("critic: pure distillation uses None") for warning in loaded.warnings)


def test_a_student_that_is_never_trained_is_warned_about(tmp_path: Path) -> None:
    from roll_opd.configs import launch_warnings

    (warning,) = launch_warnings(loaded_config(tmp_path, critic_warmup=4))
    assert "the student is never trained" in warning
