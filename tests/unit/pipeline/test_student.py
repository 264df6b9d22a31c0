"""What a step asks the trainer for, and what it takes from the update instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.configs.worker_config import StrategyArguments, TeacherConfig, WorkerConfig
from roll_opd.distributed.layout import Layout
from roll_opd.distributed.strategy.base import ScoreResult, TokenScores
from roll_opd.pipeline.student import Student
from roll_opd.trajectory import DetailsRef, TeacherScores, Trajectory, TrajectoryId

MASK = np.array([False, True, True])
METRICS = dict.fromkeys(
    ["loss", "grad_norm", "lr", "sum/entropy", "sum/ratio", "max/ratio", "sum/clipped", "sum/old_minus_new"], 1.0
) | {"sum/tokens": 2.0}


def numbers(first: float, second: float) -> np.ndarray:
    return np.array([0.0, first, second], dtype=np.float32)


class Trainer:
    """A cluster of one rank; ``asked`` are the methods called. What an update says is of its own number."""

    layout = Layout.data_parallel(1)

    def __init__(self, broken: float = -1.0) -> None:
        self.asked: list[str] = []
        self.broken = broken

    def call_all(self, method: str, *_: Any) -> list[Any]:
        return [None]

    def call_each(self, method: str, calls: list[Any]) -> list[Any]:
        return [[] for _ in calls]

    def call_shares(self, method: str, shares: list[Any]) -> list[Any]:
        self.asked.append(method)
        if method == "score":
            return [[ScoreResult(r.id, r.checksum, numbers(-0.5, -0.25), numbers(3, 4)) for r in shares[0][0]]]
        rows, _, tell = shares[0]
        update = -float(self.asked.count("train_step"))
        told = [i.trajectory.id for row in rows for i in row] if tell else []
        teachers = {"default": numbers(update - 10, self.broken)}
        return [(METRICS, [TokenScores(t, numbers(update, -7), numbers(1, 2), teachers) for t in told])]


def student(trainer: Trainer, samples: int) -> Student:
    worker = WorkerConfig(strategy_args=StrategyArguments(strategy_name="fsdp2_train"))
    training = dataclasses.replace(
        worker.training_args, per_device_train_batch_size=samples, gradient_accumulation_steps=1
    )
    config = RLVRConfig(
        is_pure_opd=True,
        teachers={"default": TeacherConfig()},
        actor_train=dataclasses.replace(worker, training_args=training),
        opd_args=OPDArguments(objective="direct", divergence="reverse_kl", support="full"),
        rollout_batch_size=2,
        num_return_sequences_in_group=1,
    )
    return Student(config, trainer, lambda trajectories: list(trajectories))  # type: ignore[arg-type]


def trajectories() -> list[Trajectory]:
    return [
        Trajectory(
            id=TrajectoryId(draw, 0),
            tag="",
            tokens=np.array([5, 6, 7], dtype=np.int32),
            response_mask=MASK,
            infer_logprobs=numbers(-9, -9),
            weight_version=np.zeros(3, dtype=np.int32),
            advantages=numbers(0, 0),
            divergence_weights={"default": numbers(1, 1)},
            teacher_scores={"default": TeacherScores(None, DetailsRef(None, draw))},
        )
        for draw in range(2)
    ]


def test_one_update_tells_everything() -> None:
    trainer = Trainer()
    one = student(trainer, samples=2)
    trained, _ = one.train(one.with_old_logprobs(trajectories()))
    assert trainer.asked == ["train_step"]
    for t in trained:
        assert t.old_logprobs is not None and t.entropies is not None
        assert (t.old_logprobs.tolist(), t.entropies.tolist()) == ([0, -1, -7], [0, 1, 2])
        assert t.said_by("default").tolist() == [0, -11, -1]


def test_two_updates_tell_what_the_teachers_said_and_no_old_logprobs() -> None:
    trainer = Trainer()
    two = student(trainer, samples=1)
    trained, _ = two.train(two.with_old_logprobs(trajectories()))
    assert trainer.asked == ["score", "train_step", "train_step"]
    assert [t.old_logprobs.tolist() for t in trained if t.old_logprobs is not None] == [[0, -0.5, -0.25]] * 2
    assert [t.said_by("default").tolist() for t in trained] == [[0, -11, -1], [0, -12, -1]]


def test_what_is_told_must_be_a_number() -> None:
    broken = student(Trainer(broken=float("nan")), samples=2)
    with pytest.raises(ValueError, match="logprobs of teacher default: not finite"):
        broken.train(trajectories())
