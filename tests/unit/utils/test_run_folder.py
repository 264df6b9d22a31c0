import errno
import json
import math
import os
from pathlib import Path

import pytest

from roll_opd.errors import LaunchError
from roll_opd.utils import files
from roll_opd.utils.run_folder import prepare_run_folder, write_summary


def test_everything_lies_in_the_output_folder_unless_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare_run_folder("out/run")
    root = tmp_path / "out" / "run"
    assert folder.root == root
    for path in (folder.logs, folder.tensorboard, folder.samples, folder.checkpoints):
        assert path.is_dir() and path.parent == root
        assert list(path.iterdir()) == []  # the probe is gone
    assert folder.summary == root / "summary.json"
    assert folder.metrics == root / "metrics.jsonl"
    assert prepare_run_folder(root) == folder  # a resumed run finds the same


def test_logs_and_checkpoints_may_lie_elsewhere(tmp_path):
    folder = prepare_run_folder(tmp_path / "run", logging_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "ckpt")
    assert (folder.logs, folder.checkpoints) == (tmp_path / "logs", tmp_path / "ckpt")
    assert not (tmp_path / "run" / "logs").exists()
    assert folder.renders is None
    assert prepare_run_folder(tmp_path / "run", render_dir=tmp_path / "a" / "b").renders == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "run" / "deep"):
        with pytest.raises(LaunchError) as caught:
            prepare_run_folder(target)
        assert str(caught.value).startswith("output_dir: ")
        assert f"{tmp_path / 'file'} is a file" in str(caught.value)


def test_the_setting_at_fault_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"^checkpoint_config\.output_dir: "):
        prepare_run_folder(tmp_path / "run", checkpoint_dir=tmp_path / "file")
    with pytest.raises(LaunchError, match=r"^logging_dir: "):
        prepare_run_folder(tmp_path / "run", logging_dir=tmp_path / "file")
    with pytest.raises(LaunchError, match=r"^render_save_dir: "):
        prepare_run_folder(tmp_path / "run", render_dir=tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")
def test_a_file_system_that_takes_no_folders():
    with pytest.raises(LaunchError, match=r"^output_dir: cannot write in /proc/roll_opd: "):
        prepare_run_folder("/proc/roll_opd")


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "read-only file system"), (errno.ENOSPC, "no space left on device")]
)
def test_an_existing_folder_that_cannot_be_written(tmp_path, monkeypatch, number, words):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("roll_opd.utils.run_folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(LaunchError, match=f"^output_dir: .*{words}"):
        prepare_run_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where permission bits forbid it")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LaunchError, match="permission denied"):
        prepare_run_folder(tmp_path)


def test_summary_is_sorted_strict_json(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_summary(path, {"steps": 3, "seconds": {"b": 1.5, "a": math.nan}, "checkpoint": Path("/x"), "accuracy": 0.1})
    text = path.read_text()
    assert list(json.loads(text)) == ["accuracy", "checkpoint", "seconds", "steps"]
    assert json.loads(text)["seconds"] == {"a": None, "b": 1.5}
    assert json.loads(text)["checkpoint"] == "/x"
    assert text.endswith("}\n")


def test_a_crash_while_writing_leaves_the_old_summary_and_no_scrap(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 1})

    def crash(descriptor):
        raise OSError(errno.EIO, "disk gone")

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(OSError, match="disk gone"):
        write_summary(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]
