"""The doctor as a user calls it, and the probe within a launch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]
MODELS = REPO / "examples" / "quickstart" / "models"


def doctor(*arguments: str) -> tuple[int, list[str]]:
    """Run it on the quickstart; return exit code and standard output. No process may outlive it."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "roll_opd.doctor", "--config_path", "quickstart", "--config_name"]
    done = subprocess.run(
        [*command, "onpolicy_distill", *arguments],
        capture_output=True, text=True, cwd=REPO, env={**os.environ, "ROLL_OPD_TEST": mark}, timeout=240, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    deadline = time.monotonic() + 10
    while left := left_behind(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return done.returncode, done.stdout.splitlines()


def left_behind(mark: str) -> list[list[str]]:
    """Command lines of the processes that inherited a variable of this value."""
    known = [p.info for p in psutil.process_iter(["environ", "cmdline", "status"])]
    mine = [info for info in known if (info["environ"] or {}).get("ROLL_OPD_TEST") == mark]
    return [info["cmdline"] for info in mine if info["status"] != psutil.STATUS_ZOMBIE]


def test_the_quickstart_is_well(tmp_path: Path) -> None:
    code, lines = doctor(f"output_dir={tmp_path / 'run'}")
    assert (code, lines[-1]) == (0, "0 errors, 0 warnings"), lines
    headings = [line for line in lines if not line.startswith(" ")][:-1]
    assert headings == ["config", "run folder", "models", "settings", "data", "samples"]
    assert any("noise_floor" in line and "log-ratio" in line for line in lines), lines
    assert any("scored the same tokens twice" in line for line in lines), lines
    assert not (tmp_path / "run").exists()


def test_every_mistake_in_one_go(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    code, lines = doctor(
        f"output_dir={tmp_path / 'run'}",
        "teacher.model_args.model_name_or_path=/no/such/model",
        f"student_train.data_args.file_name={tmp_path / 'rows.jsonl'}",
        "rewards.math_rule.worker_cls=roll_opd.rewards.none.None",
        "opd_args.top_k=5",  # a warning: without effect
    )
    errors = [line.split() for line in lines if line.startswith("  error")]
    assert [words[1] for words in errors] == [
        "teacher.model_args.model_name_or_path:",
        "rewards.math_rule.worker_cls:",
        "student_train.data_args.file_name:",
    ]
    assert (code, lines[-1]) == (1, "3 errors, 1 warning"), lines
    assert lines[-2].split()[0] == "skipped" and "not loaded, after errors" in lines[-2]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["max_steps=many"], "max_steps"),
    (["~student_infer"], "student_infer"),
    (["teacher.strategy_args.strategy_name=remote", "--static"], "teacher.strategy_args"),
    (["--launcher", "rlvr"], "student_train"),
])  # fmt: skip
def test_a_config_that_does_not_load_or_run(arguments: list[str], expected: str) -> None:
    code, lines = doctor(*arguments)
    errors = [line for line in lines if line.startswith("  error")]
    assert code == 1 and errors and expected in errors[0], lines


def test_damaged_weights_are_a_finding(tmp_path: Path) -> None:
    damaged = tmp_path / "teacher"
    shutil.copytree(MODELS / "teacher", damaged)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 64)
    code, lines = doctor(f"output_dir={tmp_path / 'run'}", f"teacher.model_args.model_name_or_path={damaged}")
    errors = [line for line in lines if line.startswith("  error")]
    assert code == 1 and len(errors) == 1 and str(damaged) in errors[0], lines
    logs = Path(lines[-2].split()[-1])
    assert (logs / "teacher-default-0.log").exists()
    shutil.rmtree(logs.parent)


def test_a_launch_notices_that_teacher_and_student_agree(launch, tmp_path: Path) -> None:
    """The same weights in another file: only scores tell."""
    from safetensors.torch import load_file, save_file

    copied = tmp_path / "copied"
    shutil.copytree(MODELS / "student", copied)
    weights = {name: tensor.float() for name, tensor in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "run"
    launched = launch(f"output_dir={folder}", f"teacher.model_args.model_name_or_path={copied}", "max_steps=2")
    assert launched.finish(180) == 1
    errors = [line for line in launched.log.read_text().splitlines() if " ERROR " in line]
    assert len(errors) == 1 and "the teacher equals the student" in errors[0], errors
    assert launched.left_behind() == []
    assert (folder / "metrics.jsonl").read_text() == ""


@pytest.mark.long
def test_the_probe_changes_nothing(run, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "eval_steps": 0, "html_samples": 0, "validation.teacher_accuracy": False}
    on = run(tmp_path / "on", **settings)
    off = run(tmp_path / "off", **settings, preflight="off")

    def learned(finished) -> list[str]:
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in finished.metrics]
        return [json.dumps(row, sort_keys=True) for row in rows]

    assert len(learned(on)) == 2 and learned(on) == learned(off)
    floor = on.summary["probe/noise_floor"]
    assert 0 < floor["mean"] <= floor["max"] <= 1e-3 and 4 <= floor["tokens"] <= 4 * 16
    assert "probe/noise_floor" not in off.summary
    assert on.summary["seconds"]["preflight"] <= 2.0, on.summary["seconds"]
    assert "preflight" not in off.summary["seconds"]
