"""What a user gets for a mistake: one line that names it, exit code 1, nothing left running, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]
MODELS = REPO / "examples" / "quickstart" / "models"


def bad_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    return path


def other_vocabulary(folder: Path) -> Path:
    path = folder / "teacher"
    shutil.copytree(MODELS / "teacher", path)
    text = (path / "tokenizer.json").read_text()
    vocab = json.loads(text)["model"]["vocab"]
    a, b = (token for token, number in vocab.items() if number in (60, 61))
    swapped = json.loads(text)
    swapped["model"]["vocab"][a], swapped["model"]["vocab"][b] = vocab[b], vocab[a]
    (path / "tokenizer.json").write_text(json.dumps(swapped))
    return path


def file_in_the_way(folder: Path) -> Path:
    path = folder / "taken"
    path.write_text("")
    return path / "run"


# Each: settings made from a temporary folder, and what the one line must contain.
CASES = {
    "unknown key": (lambda f: ["rollout_batchsize=8"], ["rollout_batchsize", "rollout_batch_size"]),
    "wrong type": (lambda f: ["max_steps=many"], ["max_steps", "many"]),
    "bad enum": (lambda f: ["loss_agg_mode=token_mean"], ["loss_agg_mode", "token-mean"]),
    "missing role": (lambda f: ["~student_infer"], ["student_infer"]),
    "no such model": (
        lambda f: ["teacher.model_args.model_name_or_path=/no/such/model"],
        ["teacher.model_args.model_name_or_path", "/no/such/model"],
    ),
    "empty data": (
        lambda f: [f"student_train.data_args.file_name={(f / 'empty.jsonl').touch() or f / 'empty.jsonl'}"],
        ["empty.jsonl", "empty"],
    ),
    "malformed row": (lambda f: [f"student_train.data_args.file_name={bad_rows(f)}"], ["rows.jsonl:2"]),
    "other vocabulary": (
        lambda f: [f"teacher.model_args.model_name_or_path={other_vocabulary(f)}"],
        ["vocabular", "first difference", "60"],
    ),
    "world size 0": (lambda f: ["teacher.world_size=0"], ["teacher.world_size"]),
    "too many GPUs": (lambda f: ["student_train.device_mapping=[0,1]"], ["student_train.device_mapping"]),
    "unwritable folder": (lambda f: [f"output_dir={file_in_the_way(f)}"], ["output_dir"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(launch, tmp_path: Path, case: str) -> None:
    settings, expected = CASES[case]
    arguments = settings(tmp_path)
    folder = tmp_path / "run"
    if not any(a.startswith("output_dir=") for a in arguments):
        arguments = [*arguments, f"output_dir={folder}"]
    launched = launch(*arguments)
    assert launched.finish(120) == 1, launched.log.read_text()
    log = launched.log.read_text()
    errors = [line for line in log.splitlines() if " ERROR " in line]
    assert len(errors) == 1, log
    for part in expected:
        assert part in errors[0], errors[0]
    assert "Traceback" not in log
    assert launched.left_behind() == []
    assert not list(folder.glob("checkpoints/*"))


def test_port_in_use(launch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = launch(
            f"output_dir={tmp_path / 'run'}", "ray_args.include_dashboard=true", f"ray_args.dashboard_port={port}"
        )
        assert launched.finish(120) == 1
    log = launched.log.read_text()
    assert "ray_args.dashboard_port" in log and str(port) in log and "Traceback" not in log
    assert launched.left_behind() == []


def test_damaged_weights_fail_in_the_worker_with_one_line(launch, tmp_path: Path) -> None:
    """Found only once a worker loads it: the error must cross Ray as itself."""
    damaged = tmp_path / "teacher"
    shutil.copytree(MODELS / "teacher", damaged)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 64)
    launched = launch(f"output_dir={tmp_path / 'run'}", f"teacher.model_args.model_name_or_path={damaged}")
    assert launched.finish(180) == 1
    log = launched.log.read_text()
    assert "teacher.model_args.model_name_or_path" in log and str(damaged) in log and "Traceback" not in log, log
    assert launched.left_behind() == []


def test_everything_listens_on_loopback_only(launch, tmp_path: Path) -> None:
    launched = training(launch, tmp_path / "run", "student_train.world_size=2")
    launched.watch()
    listening = {
        (connection.laddr.ip, " ".join(process.cmdline())[:40])
        for process in launched.seen.values()
        if process.is_running()
        for connection in process.net_connections(kind="tcp")
        if connection.status == "LISTEN"
    }
    launched.process.send_signal(signal.SIGTERM)
    launched.finish(60)
    assert len(listening) > 3
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, sorted(listening)


RAYS_OWN_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's helpers notice a raylet that was killed only after a minute or two."""


def training(launch, folder: Path, *settings: str):
    """Start a run and wait until it has finished its first step."""
    launched = launch(
        f"output_dir={folder}", "rollout_batch_size=8", "validation.max_prompts=8", "max_steps=1000", *settings
    )
    metrics = folder / "metrics.jsonl"
    launched.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, 180)
    return launched


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_survives(launch, tmp_path: Path, number: signal.Signals) -> None:
    launched = training(launch, tmp_path / "run")
    if number == signal.SIGINT:
        os.killpg(launched.process.pid, number)  # as a terminal does: Ctrl-C reaches every process of the group
    else:
        launched.process.send_signal(number)
    code = launched.finish(60)
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    left = launched.left_behind(10)
    if number == signal.SIGINT:
        assert left == []
        assert "Traceback" not in launched.log.read_text()
    else:
        assert [name for name in left if not name.startswith(RAYS_OWN_AGENTS)] == []


@pytest.mark.parametrize("role", ["TrainWorker", "InferWorker"])
def test_a_killed_worker_ends_the_run(launch, tmp_path: Path, role: str) -> None:
    launched = training(launch, tmp_path / "run")
    victims = [p for p in launched.seen.values() if p.is_running() and role in " ".join(p.cmdline())]
    assert victims
    for victim in victims:
        victim.kill()
    assert launched.finish(90) == 1
    log = launched.log.read_text()
    assert "process died" in [line for line in log.splitlines() if " ERROR " in line][-1], log[-3000:]
    assert "Traceback" not in log
    assert launched.left_behind() == []
