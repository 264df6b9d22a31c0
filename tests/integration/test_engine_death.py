"""An engine that is killed costs its step some time and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def engine_core(others: set[int]) -> psutil.Process:
    """The engine's process, wherever it is among our descendants, but none of ``others``: some test's vLLM server."""
    for child in psutil.Process().children(recursive=True):
        if child.pid in others:
            continue
        try:
            if "EngineCore" in child.name() or any("EngineCore" in part for part in child.cmdline()[:1]):
                return child
        except psutil.NoSuchProcess:
            continue
    raise AssertionError("no engine is running")


def test_killed_while_sampling_and_while_taking_weights(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from roll_opd.distributed import weight_sync
    from roll_opd.distributed.strategy.base import GenerateResult
    from roll_opd.pipeline.generation import Generation
    from roll_opd.pipeline.student import Student

    others = {child.pid for child in psutil.Process().children(recursive=True)}
    killed: dict[str, float] = {}
    noticed: list[float] = []
    trained: list[list[Any]] = []

    def kill(when: str) -> None:
        if when not in killed:
            killed[when] = time.monotonic()
            os.kill(engine_core(others).pid, signal.SIGKILL)

    def once_a_response_is_there(self: Generation, worker: Any, requests: Any, finished: Callable, left: Any) -> Any:
        def and_kill(result: GenerateResult) -> None:
            finished(result)
            if result.id.stream == "train" and int(result.weight_version.min()) == 1:
                kill("sampling")

        return generate_once(self, worker, requests, and_kill, left)

    def before_the_weights(self: Any, method: str, *args: Any) -> Any:
        if method == "load_weights" and "sampling" in killed and len(trained) == 2:
            kill("update")
        return call(self, method, *args)

    def restart(self: Any, workers: Any) -> None:
        noticed.append(time.monotonic())
        begin_again(self, workers)

    def train(self: Student, trajectories: list[Any]) -> dict[str, float]:
        trained.append([t.id for t in trajectories])
        return train_batch(self, trajectories)

    generate_once, call = Generation._ask_once, weight_sync._Alive.call
    begin_again, train_batch = weight_sync.WeightSync._restart, Student.train
    monkeypatch.setattr(Generation, "_ask_once", once_a_response_is_there)
    monkeypatch.setattr(weight_sync._Alive, "call", before_the_weights)
    monkeypatch.setattr(weight_sync.WeightSync, "_restart", restart)
    monkeypatch.setattr(Student, "train", train)

    finished = run(
        tmp_path / "run",
        max_steps=3,
        eval_steps=0,
        preflight="static",
        rollout_batch_size=16,
        **{
            "student_infer.strategy_args.strategy_name": "vllm",
            "+student_infer.strategy_args.strategy_config.enforce_eager": True,
            "validation.teacher_accuracy": False,
        },
    )
    assert sorted(killed) == ["sampling", "update"] and len(noticed) == 2
    for moment, seen in zip(sorted(killed.values()), noticed, strict=True):
        assert seen - moment <= 5.0
    # Three whole steps, each trajectory in one of them and once, sampled with the weights that it says.
    assert [len(ids) for ids in trained] == [64] * 3
    assert len({name for ids in trained for name in ids}) == 3 * 64
    steps = finished.metrics
    assert [m["staleness/max"] for m in steps[:3]] == [0] * 3
    assert max(m["mismatch/abs_logprob_diff_max"] for m in steps[:3]) <= 1e-3


def test_killed_while_episodes_are_in_their_environments(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn is a call of its own: those that come while the engine is replaced wait for it."""
    from roll_opd.distributed.weight_sync import WeightSync
    from roll_opd.environments.base import Outcome
    from roll_opd.pipeline.agentic.env_pool import Session

    others = {child.pid for child in psutil.Process().children(recursive=True)}
    missed: list[float] = []
    came: list[int] = []
    steps = 0

    async def slow(self: Session, action: str) -> Outcome:
        """Of the first 64 steps every other one ends while there is no engine, four of them a second."""
        nonlocal steps
        steps += 1
        number, outcome = steps, await step(self, action)
        if number == 64:
            os.kill(engine_core(others).pid, signal.SIGKILL)
        elif number < 64 and number % 2:
            while not missed:
                await asyncio.sleep(0.1)
            await asyncio.sleep(number / 8)
            came.append(len(missed))
        return outcome

    def replace(self: WeightSync, worker: Any) -> None:
        missed.append(time.monotonic())
        revive(self, worker)
        missed.append(time.monotonic())

    step, revive = Session.step, WeightSync.revive
    monkeypatch.setattr(Session, "step", slow)
    monkeypatch.setattr(WeightSync, "revive", replace)
    finished = run(
        tmp_path / "run",
        example=Path(__file__).parents[2] / "examples" / "quickstart_agentic",
        max_steps=1,
        eval_steps=0,
        preflight="static",
        **{
            "student_infer.strategy_args.strategy_name": "vllm",
            "+student_infer.strategy_args.strategy_config.enforce_eager": True,
        },
    )
    (metrics,) = finished.metrics
    assert len(missed) == 2 and came.count(1) >= 8
    assert metrics["episode/num_episodes"] == 128 and metrics["rollout/failed_groups"] == 0
    assert metrics["mismatch/abs_logprob_diff_max"] <= 1e-3
