"""Checkpoints are complete or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from roll_opd.distributed.checkpoint import STATE_FILE, CheckpointFolder, read_state
from roll_opd.errors import ConfigError, LaunchError


def write(folder: Path) -> None:
    (folder / "actor_train").mkdir()
    (folder / "actor_train" / "weights").write_bytes(b"w" * 100)


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        folder.save(step, {"step": step, "next_draw": 0, "signal": {}, "report": {}}, write)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_save_and_find(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path / "a" / "b", keep=0)
    assert folder.complete() == [] and folder.find(False) is None and folder.find("") is None
    save(folder, 2, 10, 9)
    assert [step for step, _ in folder.complete()] == [2, 9, 10], "by number, not by name"
    newest = folder.find(True)
    assert newest == folder.root / "checkpoint-10"
    assert read_state(newest) == {"step": 10, "next_draw": 0, "signal": {}, "report": {}}
    assert (newest / "actor_train" / "weights").read_bytes() == b"w" * 100


@pytest.mark.parametrize("error", [RuntimeError("rank 1 died"), OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [True, False])
def test_a_write_that_raises_leaves_no_complete_checkpoint(tmp_path, error, before) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)

    def fail(target: Path) -> None:
        if not before:
            write(target)
        raise error

    with pytest.raises(LaunchError if isinstance(error, OSError) else type(error)) as caught:
        folder.save(2, {"step": 2}, fail)
    if isinstance(error, OSError):
        assert "checkpoint_config.output_dir" in str(caught.value) and "No space left" in str(caught.value)
    assert folder.find(True) == tmp_path / "checkpoint-1"
    assert [step for step, _ in folder.complete()] == [1]
    # and the next attempt at the same step succeeds, over the leftovers
    (tmp_path / "checkpoint-2.tmp").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-2.tmp" / "rubbish").touch()
    save(folder, 2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert names(tmp_path / "checkpoint-2") == ["actor_train", STATE_FILE]


def test_the_state_is_written_last(tmp_path) -> None:
    seen: list[bool] = []
    folder = CheckpointFolder(tmp_path, keep=0)
    folder.save(1, {}, lambda target: seen.append((target / STATE_FILE).exists()))
    assert seen == [False]


def test_what_is_incomplete_is_not_found(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    save(folder, 1)
    for name in ("checkpoint-5.tmp", "checkpoint-6", "checkpoint-x", "other", "checkpoint-7.tmp.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5.tmp" / STATE_FILE).write_text('{"step": 5}')  # died before the rename
    (tmp_path / "checkpoint-8").touch()
    assert folder.find(True) == tmp_path / "checkpoint-1"


def test_keep(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1, 2, 9, 10)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    one = CheckpointFolder(tmp_path / "one", keep=1)
    save(one, 1, 2)
    assert names(one.root) == ["checkpoint-2"]


def test_an_old_checkpoint_that_cannot_be_removed_whole_is_none_any_more(tmp_path, monkeypatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    real = shutil.rmtree

    def busy(path, ignore_errors=False) -> None:
        if ".removed" in str(path) and not ignore_errors:
            raise OSError("Directory not empty")
        if not ignore_errors:
            real(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(folder, 2)
    assert names(tmp_path) == ["checkpoint-1.removed.tmp", "checkpoint-2"]
    save(folder, 3)
    assert "checkpoint-3" in names(tmp_path) and "checkpoint-2" not in names(tmp_path)
    monkeypatch.undo()
    save(folder, 4)
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_run_resumed_from_an_older_checkpoint_keeps_what_it_writes(tmp_path) -> None:
    root = tmp_path / "checkpoints"
    save(CheckpointFolder(root, keep=0), 2, 4, 6)
    folder = CheckpointFolder(root, keep=1)
    resumed = folder.find(str(root / "checkpoint-2"))
    assert resumed == root / "checkpoint-2"
    folder.set_aside(resumed)
    path = folder.save(3, {"step": 3}, write)
    assert path.is_dir() and folder.find(True) == path
    (moved,) = (p for p in tmp_path.iterdir() if p != root)
    assert names(moved) == ["checkpoint-4", "checkpoint-6"]


def test_leftovers_of_an_interrupted_write_are_removed_by_the_next_save(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    (tmp_path / "checkpoint-4.tmp").mkdir()
    save(folder, 5)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_step_that_is_reached_again_is_replaced(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    save(folder, 2)
    folder.save(2, {"step": 2, "next_draw": 0, "signal": {}, "report": {"again": True}}, write)
    assert read_state(tmp_path / "checkpoint-2")["report"]["again"] is True


def test_resume_by_path(tmp_path) -> None:
    elsewhere = CheckpointFolder(tmp_path / "elsewhere", keep=0)
    save(elsewhere, 3, 20)
    folder = CheckpointFolder(tmp_path / "mine", keep=0)
    assert folder.find(str(elsewhere.root / "checkpoint-3")) == elsewhere.root / "checkpoint-3"
    assert folder.find(str(elsewhere.root)) == elsewhere.root / "checkpoint-20"


def test_resume_errors_name_the_field_and_the_path(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path / "none", keep=0)
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: no complete checkpoint in .*none"):
        folder.find(True)
    (tmp_path / "checkpoint-1").mkdir()
    for path in (tmp_path / "checkpoint-1", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: .*is not a complete checkpoint"):
            folder.find(str(path))
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: .*lacks 'step'"):
        read_state(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text('{"step":')
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: .*cannot be read"):
        read_state(tmp_path / "checkpoint-1")


def test_set_aside(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.set_aside(None)  # nothing there
    assert names(tmp_path) == []
    save(folder, 1)
    folder.set_aside(None)
    (moved,) = (p for p in tmp_path.iterdir() if p != folder.root)
    assert moved.name.startswith("checkpoints.2") and names(moved) == ["checkpoint-1"]
    save(folder, 7)
    assert names(folder.root) == ["checkpoint-7"] and names(moved) == ["checkpoint-1"]


def test_set_aside_twice_in_one_second(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20261120-120000")
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    for _ in range(2):
        save(folder, 1)
        folder.set_aside(None)
    assert len(names(tmp_path)) == 3


def test_a_disk_that_refuses(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"checkpoint_config\.output_dir: cannot write"):
        save(CheckpointFolder(tmp_path / "file", keep=1), 1)


def test_the_state_is_json(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(4, {"step": 4, "next_draw": 0, "signal": {}, "report": {"a": [1, 2.5, None]}}, write)
    assert json.loads((tmp_path / "checkpoint-4" / STATE_FILE).read_text())["report"] == {"a": [1, 2.5, None]}
