"""Teachers, rewards and divergences in real runs: what each signal teaches, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO_TEACHERS = EXAMPLES / "two_teachers"
MIXED = EXAMPLES / "mixed_rewards"


def accuracy(finished, tag: str) -> tuple[float, float]:
    """First and last validation accuracy of a tag."""
    name = f"val/accuracy/tag/{tag}"
    values = [m[name] for m in finished.metrics if name in m]
    return values[0], values[-1]


def test_two_teachers_each_right_on_its_tag(run, tmp_path: Path) -> None:
    finished = run(tmp_path / "run", example=TWO_TEACHERS, max_steps=20, eval_steps=20)
    for tag in ("ascending", "descending"):
        first, last = accuracy(finished, tag)
        assert last - first >= 0.3, (tag, first, last)
        assert last >= 0.9, (tag, first, last)
    row = finished.metrics[0]
    assert {"opd/reverse_kl/teacher/up", "opd/reverse_kl/teacher/down"} <= set(row)


@pytest.mark.long
def test_two_teachers_with_swapped_routing(run, tmp_path: Path) -> None:
    """The same teachers, each asked about the other's tag, take away what the student could do."""
    settings = {"teacher.up.tag_included": ["descending"], "teacher.down.tag_included": ["ascending"]}
    finished = run(tmp_path / "run", example=TWO_TEACHERS, max_steps=15, eval_steps=15, **settings)
    for tag in ("ascending", "descending"):
        first, last = accuracy(finished, tag)
        assert last <= first - 0.3, (tag, first, last)


def test_a_self_teacher_that_sees_the_answer_teaches(run, tmp_path: Path) -> None:
    finished = run(tmp_path / "run", example=TWO_TEACHERS, config_name="self_teacher", max_steps=20, eval_steps=20)
    first, last = finished.summary["accuracy_first"], finished.summary["accuracy_last"]
    assert last - first >= 0.3, finished.summary


@pytest.mark.parametrize("kind", ["ema", pytest.param("live", marks=pytest.mark.long)])
def test_moving_self_teachers_follow_and_resume(run, tmp_path: Path, kind: str) -> None:
    """Stopped after two of four steps and resumed, a run with a teacher that moves ends where an unbroken one does."""
    settings = {
        "config_name": "self_teacher",
        "example": TWO_TEACHERS,
        "teacher.teacher_args.self_teacher": kind,
        "max_steps": 4,
        "eval_steps": 0,
        "save_steps": 1,
        "html_samples": 0,
    }
    if kind == "ema":
        settings["teacher.teacher_args.ema_decay"] = 0.5
    whole = run(tmp_path / "whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-1"
    resumed = run(tmp_path / "resumed", **settings, resume_from_checkpoint=str(checkpoint))

    def learned(finished) -> list:
        return [
            {k: v for k, v in row.items() if not k.startswith("time/")} for row in finished.metrics if row["step"] >= 2
        ]

    assert learned(whole) == learned(resumed)
    if kind == "live":
        return
    # The teacher has moved: its log-probabilities are not those of a frozen one.
    frozen = run(tmp_path / "frozen", **settings | {"teacher.teacher_args.self_teacher": "frozen"})
    assert frozen.metrics[3]["opd/teacher_logprob"] != whole.metrics[3]["opd/teacher_logprob"]
    assert frozen.metrics[0]["opd/teacher_logprob"] == whole.metrics[0]["opd/teacher_logprob"]


def test_a_divergence_over_the_vocabulary_teaches(run, tmp_path: Path) -> None:
    """Hidden states travel from teacher to trainer by reference; the exact reverse KL learns like the sampled one."""
    finished = run(tmp_path / "run", max_steps=15, eval_steps=15, **{
        "opd_args.objective": "direct", "opd_args.support": "full", "validation.teacher_accuracy": False,
    })  # fmt: skip
    assert finished.summary["accuracy_last"] - finished.summary["accuracy_first"] >= 0.3, finished.summary
    assert "full vocabulary" in finished.summary["formula"]
    assert finished.metrics[0]["train/divergence_loss"] > finished.metrics[14]["train/divergence_loss"]


@pytest.mark.long
def test_supports_that_need_the_students_ids_train_and_validate(run, tmp_path: Path) -> None:
    """Ids that the engine ranked first are asked for in training alone; validation must do without them."""
    finished = run(tmp_path / "run", max_steps=2, eval_steps=1, html_samples=0, **{
        "opd_args.objective": "direct", "opd_args.support": "union_topk", "opd_args.top_k": 8,
    })  # fmt: skip
    assert finished.summary["reverse_kl_last"] < finished.summary["reverse_kl_first"]
    assert finished.metrics[0]["train/divergence_loss"] > 0


def test_mixed_mode_reaches_what_either_signal_misses(run, tmp_path: Path) -> None:
    """The teacher is wrong on one tag and the rewards see both; with a small coefficient the rewards win there."""
    finished = run(tmp_path / "run", example=MIXED, config_name="mixed", launcher="rlvr", max_steps=3, eval_steps=0)
    row = finished.metrics[0]
    assert finished.summary["mode"] == "mixed_opd"
    assert row["reward/graded"] == 1.0
    assert {"opd/reverse_kl", "rl/reward_mean", "rl/advantage_std"} <= set(row)
    assert "A_t = grpo(reward" in finished.summary["formula"]


def test_dynamic_sampling_keeps_the_batch_full(run, tmp_path: Path) -> None:
    """Groups whose samples are all right or all wrong teach nothing; they are replaced, and the run can be resumed."""
    settings = {
        "example": MIXED,
        "config_name": "rlvr",
        "launcher": "rlvr",
        "max_steps": 3,
        "eval_steps": 0,
        "save_steps": 1,
        "html_samples": 0,
        "rewards.math_rule.query_filter_config.type": "std_filter",
        "rewards.math_rule.query_filter_config.filter_args.std_threshold": 0.0,
    }
    whole = run(tmp_path / "whole", **settings)
    assert sum(row["rollout/filtered_groups"] for row in whole.metrics) > 0
    counts = {row["rollout/num_trajectories"] for row in whole.metrics}
    assert counts == {whole.metrics[0]["rollout/num_trajectories"]}
    assert all(row["rl/reward_std"] > 0 for row in whole.metrics)
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-1"
    resumed = run(tmp_path / "resumed", **settings, resume_from_checkpoint=str(checkpoint))
    assert resumed.metrics[-1]["train/loss"] == whole.metrics[-1]["train/loss"]


def test_plain_rl_with_a_reference(run, tmp_path: Path) -> None:
    """KL to a frozen policy, as a token reward whose weight adapts and as a loss; at step 0 both are zero."""
    settings = {
        "example": MIXED,
        "config_name": "rlvr",
        "launcher": "rlvr",
        "max_steps": 3,
        "eval_steps": 0,
        "add_token_level_kl": True,
        "init_kl_coef": 0.05,
        "target_kl": 0.01,
        "kl_horizon": 1000,
        "use_kl_loss": True,
        "kl_loss_coef": 0.01,
        "ppo_epochs": 2,
        "reference.model_args.model_name_or_path": str(TWO_TEACHERS / "models" / "student"),
        "reference.model_args.dtype": "fp32",
    }
    finished = run(tmp_path / "run", **settings)
    first, *_, last = finished.metrics
    assert abs(first["rl/kl_to_reference"]) <= 1e-6
    assert first["rl/kl_coef"] == pytest.approx(0.05)
    assert last["rl/kl_coef"] != first["rl/kl_coef"]
    assert last["train/kl_loss"] > 0
    assert "opd/reverse_kl" not in last
