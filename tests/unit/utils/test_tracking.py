import json
import logging
import math
import os
import random
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roll_opd.errors import ConfigError, DataError
from roll_opd.utils.files import read_jsonl, truncate_jsonl
from roll_opd.utils.tracking import build_tracker


def build(run_dir, track_with=(), resume_step=None, config=None, **tracker_kwargs):
    return build_tracker(list(track_with), run_dir, "exp", config or {}, tracker_kwargs, resume_step)


def metrics_of(step):
    generator = random.Random(step)
    return {"b/x": generator.gauss(0, 1), "a/y": generator.random() * 1e-9, "c/n": step}


def test_metrics_jsonl_keeps_every_bit_of_a_float_and_sorts_its_keys(tmp_path):
    tracker = build(tmp_path)
    for step in range(5):
        tracker.log(step, metrics_of(step))
    tracker.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [{"step": step, **metrics_of(step)} for step in range(5)]
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert list(json.loads(first)) == ["a/y", "b/x", "c/n", "step"]


def test_a_resumed_run_leaves_the_same_bytes_as_an_uninterrupted_one(tmp_path):
    whole = build(tmp_path / "whole")
    for step in range(10):
        whole.log(step, metrics_of(step))
    whole.close()

    stopped = build(tmp_path / "resumed")
    for step in range(7):  # its checkpoint is of step 4: rows 5 and 6 are computed again
        stopped.log(step, {"b/x": 0.0} if step >= 5 else metrics_of(step))
    stopped.close()
    path = tmp_path / "resumed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])  # and it died while writing
    resumed = build(tmp_path / "resumed", resume_step=5)
    for step in range(5, 10):
        resumed.log(step, metrics_of(step))
    resumed.close()
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path / "resumed")) == ["metrics.jsonl"]


def test_resume_without_an_earlier_file_starts_one(tmp_path):
    tracker = build(tmp_path, resume_step=3)
    tracker.log(3, {"x": 1})
    tracker.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "x": 1.0}]


def test_a_new_run_in_an_old_folder_sets_the_old_metrics_aside(tmp_path, caplog):
    for value in (1.0, 2.0):
        tracker = build(tmp_path)
        tracker.log(0, {"x": value})
        tracker.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "x": 2.0}]
    (old,) = tmp_path.glob("metrics-*.jsonl")
    assert read_jsonl(old) == [{"step": 0, "x": 1.0}]
    assert old.name in caplog.text


def test_nan_and_infinity_become_null_with_a_warning_that_names_them(tmp_path, caplog):
    tracker = build(tmp_path)
    tracker.log(3, {"loss": math.nan, "norm": math.inf, "fine": 1.5})
    tracker.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "fine": 1.5, "loss": None, "norm": None}]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "step 3" in record.getMessage() and "loss=nan, norm=inf" in record.getMessage()
    assert "fine" not in record.getMessage()


def test_one_step_logged_in_parts_is_one_row(tmp_path):
    tracker = build(tmp_path)
    tracker.log(0, {"x": 1.0})
    tracker.log(1, {"val": 0.25, "x": 123456.789})
    tracker.log(1, {"x": 2.0})
    tracker.log(2, {"x": 3.0})
    tracker.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 0, "x": 1.0},
        {"step": 1, "val": 0.25, "x": 2.0},
        {"step": 2, "x": 3.0},
    ]


def test_steps_do_not_go_back_and_no_metric_is_called_step(tmp_path):
    tracker = build(tmp_path)
    tracker.log(4, {"x": 1.0})
    with pytest.raises(ValueError, match="step 3"):
        tracker.log(3, {"x": 1.0})
    with pytest.raises(ValueError, match="'step'"):
        tracker.log(5, {"step": 1.0})
    tracker.close()


def test_a_damaged_line_in_the_middle_is_reported_with_its_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        truncate_jsonl(path, 1)


@pytest.mark.parametrize("with_log_dir", [False, True])
def test_tensorboard_reads_what_was_logged(tmp_path, with_log_dir):
    kwargs = {"log_dir": str(tmp_path / "elsewhere")} if with_log_dir else {}
    tracker = build(tmp_path / "run", ["tensorboard", "stdout"], **kwargs)
    tracker.log(0, {"opd/reverse_kl": 0.5, "time/step": 2.0})
    tracker.log(7, {"opd/reverse_kl": 0.25, "bad": math.nan})
    assert tracker.tensorboard_dir.parent == tmp_path / ("elsewhere" if with_log_dir else "run/tensorboard")
    # Read before close: a run that is killed has lost nothing.
    events = EventAccumulator(str(tracker.tensorboard_dir)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("opd/reverse_kl")] == [(0, 0.5), (7, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("time/step")] == [(0, 2.0)]
    assert math.isnan(events.Scalars("bad")[0].value)
    tracker.close()


def test_stdout_tracker_logs_a_line_and_leaves_standard_output_alone(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    tracker = build(tmp_path, ["stdout"])
    tracker.log(2, {"b": 0.125, "a": 1})
    tracker.close()
    assert "step 2 a=1 b=0.125" in caplog.messages
    assert capsys.readouterr().out == ""


def test_unknown_tracker_suggests_the_near_one(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'") as caught:
        build(tmp_path, ["tensorbord"])
    assert caught.value.field == "track_with"


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_missing_package_names_the_command_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}") as caught:
        build(tmp_path, [name])
    assert caught.value.field == "track_with"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "log_dir_option", "name_option"),
    [("wandb", "dir", "name"), ("swanlab", "logdir", "experiment_name"), ("trackio", None, "name")],
)
def test_services_get_their_options(tmp_path, monkeypatch, name, log_dir_option, name_option):
    calls = []
    service = types.SimpleNamespace(
        login=lambda **kwargs: calls.append(("login", kwargs)),
        init=lambda **kwargs: calls.append(("init", kwargs)),
        log=lambda metrics, step: calls.append(("log", step, metrics)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, service)
    config = {"seed": 1}
    options = {"project": "mine"} | ({} if name == "trackio" else {"api_key": "k"})
    tracker = build(tmp_path, ["stdout", name], config=config, **options)
    tracker.log(1, {"x": 2})
    tracker.close()
    (init,) = [call[1] for call in calls if call[0] == "init"]
    assert init["project"] == "mine" and init[name_option] == "exp"
    assert (log_dir_option is None) or str(tmp_path) in init[log_dir_option]
    assert init["config"] == config
    assert calls[-2:] == [("log", 1, {"x": 2.0}), ("finish",)]
    assert name == "trackio" or calls[0] == ("login", {"key" if name == "wandb" else "api_key": "k"})


def test_options_of_several_trackers_lie_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: None, finish=lambda: None))
    with pytest.raises(ConfigError, match="tensorboard, wandb") as caught:
        build(tmp_path, ["tensorboard", "wandb"], log_dir="x")
    assert caught.value.field == "tracker_kwargs.log_dir"
    tracker = build(tmp_path, ["tensorboard", "wandb"], tensorboard={"log_dir": str(tmp_path / "tb")})
    tracker.close()
    assert tracker.tensorboard_dir.parent == tmp_path / "tb"


def test_an_option_that_tensorboard_does_not_take_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, ["tensorboard"], project="x")
    assert caught.value.field == "tracker_kwargs.project"


def test_close_reaches_every_tracker_when_one_fails(tmp_path, monkeypatch):
    def finish():
        raise RuntimeError("service gone")

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **_: None, finish=finish))
    tracker = build(tmp_path, ["trackio", "tensorboard"])
    with pytest.raises(RuntimeError, match="service gone"):
        tracker.close()
    with pytest.raises(ValueError, match="closed file"):
        tracker._trackers[-1].log(0, {"x": 1.0})
