"""The main job, and the controls that tell learning from luck."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]
MODELS = REPO / "examples" / "quickstart" / "models"


def check_learned(summary: dict) -> None:
    assert summary["accuracy_last"] - summary["accuracy_first"] >= 0.30, summary
    assert summary["teacher_accuracy"] - summary["accuracy_last"] <= 0.05, summary
    assert summary["reverse_kl_last"] <= 0.5 * summary["reverse_kl_first"], summary


def test_quickstart_learns(run, tmp_path: Path) -> None:
    finished = run(tmp_path / "run", seed=1)
    check_learned(finished.summary)
    for name in ("summary.json", "metrics.jsonl", "samples/samples.html", "logs/driver.log", "logs/actor_train-0.log"):
        assert (finished.folder / name).stat().st_size > 0, name
    assert list((finished.folder / "tensorboard").rglob("events.out.tfevents.*"))
    steps = finished.metrics
    assert [m["step"] for m in steps] == list(range(finished.summary["steps"] + 1))
    # Rollout and training see the same weights in the same precision: only rounding may differ.
    assert max(m["mismatch/abs_logprob_diff_max"] for m in steps[:-1]) <= 1e-3
    assert all(m["staleness/max"] == 0 for m in steps[:-1])


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_quickstart_learns_with_other_seeds(run, tmp_path: Path, seed: int) -> None:
    check_learned(run(tmp_path / "run", seed=seed).summary)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"student_infer.strategy_args.strategy_name": "vllm"},
        {
            "student_train.strategy_args.strategy_name": "megatron_train",
            "+student_train.strategy_args.strategy_config.tensor_model_parallel_size": 2,
            "student_train.world_size": 2,
        },
    ],
    ids=["vllm", "megatron"],
)
def test_quickstart_learns_with_other_engines(run, tmp_path: Path, settings: dict) -> None:
    """The overrides of `make quickstart-vllm` and `make quickstart-megatron`."""
    check_learned(run(tmp_path / "run", seed=1, **settings).summary)


def test_teacher_equal_to_student_gives_no_signal(run, tmp_path: Path) -> None:
    """SGD at learning rate 1 turns any gradient into a visible weight change."""
    from safetensors.torch import load_file

    common = {
        "max_steps": 1,
        "eval_steps": 0,
        "max_grad_norm": 1.0e9,
        "student_train.training_args.optimizer": "sgd",
        "student_train.training_args.lr_scheduler_type": "constant",
        "student_train.training_args.warmup_steps": 0,
        "student_train.training_args.learning_rate": 1.0,
        "student_train.training_args.per_device_train_batch_size": 256,
    }
    real = run(tmp_path / "real", **common | {"student_train.training_args.learning_rate": 1e-6}).metrics[0]
    control = {"teacher.model_args.model_name_or_path": str(MODELS / "student"), "preflight": "off"}
    same = run(tmp_path / "same", **common, **control)
    step = same.metrics[0]
    assert step["opd/advantage_absmax"] <= 1e-4
    assert step["train/grad_norm"] <= 1e-3 * real["train/grad_norm"]
    before = load_file(MODELS / "student" / "model.safetensors")
    after = load_file(Path(same.summary["checkpoint"]) / "model.safetensors")
    assert max((before[k].float() - after[k].float()).abs().max().item() for k in before) <= 1e-5


@pytest.mark.long
def test_shuffled_teacher_does_not_help(run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shuffled = tmp_path / "shuffled"
    shutil.copytree(MODELS / "teacher", shuffled)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: w.flatten()[torch.randperm(w.numel(), generator=generator)].reshape(w.shape).contiguous()
        for name, w in load_file(shuffled / "model.safetensors").items()
    }
    save_file(weights, shuffled / "model.safetensors", metadata={"format": "pt"})
    summary = run(
        tmp_path / "run",
        max_steps=15,
        eval_steps=15,
        **{"teacher.model_args.model_name_or_path": str(shuffled), "validation.teacher_accuracy": False},
    ).summary
    assert summary["accuracy_last"] - summary["accuracy_first"] <= 0.03, summary
