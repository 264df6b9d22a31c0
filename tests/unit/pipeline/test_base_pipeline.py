"""What the loop does before its first step, with nothing started."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from roll_opd.configs import config_for_checkpoint_json, load_config
from roll_opd.distributed.checkpoint import CONFIG_FILE
from roll_opd.errors import ConfigError
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.trajectory_stream import Batch, TrajectoryStream

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


class StartedError(Exception):
    """The run has come to where it would start processes."""


class Idle(BasePipeline):
    """Has nothing to check, and goes no further than the start."""

    def prepare(self) -> None:
        pass

    def build_stream(self, clusters: Any) -> TrajectoryStream:
        raise AssertionError

    def task_of(self, draw: int) -> Any:
        raise AssertionError

    def validate(self) -> None:
        raise AssertionError

    def probe_batch(self) -> Batch:
        raise AssertionError

    def _start(self, stack: contextlib.ExitStack, resume_from: Path | None) -> None:
        raise StartedError


def pipeline(folder: Path, *overrides: str) -> Idle:
    own = [f"output_dir={folder / 'run'}", "track_with=stdout", *overrides]
    return Idle(load_config("onpolicy_distill", str(QUICKSTART), "onpolicy_distill", own))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder of a run that has left the checkpoints of steps 10, 20 and 30."""
    made = pipeline(tmp_path)
    report = {"summary": {}, "seconds": {}, "tokens": 0.0}

    def write(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(config_for_checkpoint_json(made.config))

    for step in (10, 20, 30):
        state = {"step": step, "next_draw": 32 * step, "signal": made.signal.state(), "report": report}
        made.checkpoints.save(step, state, write)
    return made.checkpoints.root


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_refused_resume_moves_nothing(tmp_path: Path, checkpoints: Path) -> None:
    older = f"resume_from_checkpoint={checkpoints / 'checkpoint-10'}"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: .*checkpoint-10 .*learning_rate.* mix two runs"):
        pipeline(tmp_path, older, "student_train.training_args.learning_rate=0.5").check()
    assert sorted(tmp_path.rglob("*")) == before
    # The newest is still there for whoever takes the change back.
    again = pipeline(tmp_path, "resume_from_checkpoint=true")
    again.check()
    assert again._resume_from == checkpoints / "checkpoint-30"


def test_a_checkpoint_that_cannot_be_read_moves_nothing(tmp_path: Path, checkpoints: Path) -> None:
    older = pipeline(tmp_path, f"resume_from_checkpoint={checkpoints / 'checkpoint-10'}")
    older.check()
    # Spoilt between the check and the run.
    (checkpoints / "checkpoint-10" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="lacks 'step'"):
        older.run()
    assert names(checkpoints) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_an_accepted_resume_moves_the_newer_ones_when_it_runs(
    tmp_path: Path, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accepted = pipeline(
        tmp_path, f"resume_from_checkpoint={checkpoints / 'checkpoint-10'}", "teacher.infer_batch_size=2"
    )
    before = sorted(tmp_path.rglob("*"))
    accepted.check()
    assert sorted(tmp_path.rglob("*")) == before
    assert "teacher.infer_batch_size: differs from the run that made" in caplog.text
    with pytest.raises(StartedError):
        accepted.run()
    assert (accepted.step, accepted.next_draw) == (11, 320)
    assert names(checkpoints) == ["checkpoint-10"]
    (aside,) = (path for path in checkpoints.parent.iterdir() if path.name.startswith("checkpoints."))
    assert names(aside) == ["checkpoint-20", "checkpoint-30"]
