import io
import logging
import math
import sys

import pytest
from rich.console import Console

from roll_opd.utils.console import ProgressConsole, print_summary

METRICS = {
    "opd/reverse_kl": 0.12345,
    "opd/teacher_logprob": -0.5,
    "opd/student_logprob": -0.62345,
    "rollout/response_length": 34.04,
    "train/grad_norm": 0.8123,
    "time/tokens_per_second": 12345.6,
    "not/shown": 1.0,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def terminal(is_terminal, **kwargs):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=150, _environ={"TERM": "xterm"}, **kwargs)


@pytest.fixture
def info(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_without_a_terminal_a_step_is_one_line(info, capsys):
    clock = Clock()
    with ProgressConsole(12, start_step=2, console=terminal(False), clock=clock) as progress:
        progress.phase("generating")
        clock.now += 3
        progress.step(2, METRICS)
    assert info.messages == [
        "step 3/12: reverse KL 0.1235, teacher logprob -0.500, student logprob -0.623, response length 34.0, "
        "grad norm 0.812, tokens/s 12,346, 3.0 s, 0:00:27 left"
    ]
    assert capsys.readouterr().out == ""


def test_a_step_without_metrics_and_one_with_nan_still_show(info):
    with ProgressConsole(2, enabled=False, clock=Clock()) as progress:
        progress.step(0, {})
        progress.step(1, {"opd/reverse_kl": math.nan})
    assert info.messages == ["step 1/2: 0.0 s, 0:00:00 left", "step 2/2: reverse KL nan, 0.0 s, 0:00:00 left"]


def test_validation_is_a_line_and_its_time_is_not_the_steps(info):
    clock = Clock()
    with ProgressConsole(10, enabled=False, clock=clock) as progress:
        clock.now += 50
        progress.validation(0, {"val/accuracy": 0.3125, "val/reverse_kl": 0.4, "val/samples": 256})
        clock.now += 2
        progress.step(0, {})
    assert info.messages == [
        "validation at step 0: accuracy 31.2%, held-out reverse KL 0.4000, val/samples 256",
        "step 1/10: 2.0 s, 0:00:18 left",
    ]


def test_time_left_forgets_a_slow_first_step():
    clock = Clock()
    progress = ProgressConsole(10, enabled=False, clock=clock)
    assert math.isnan(progress.seconds_left())
    for step, seconds in enumerate((60, 2, 2, 2)):
        clock.now += seconds
        progress.step(step, {})
    assert progress.seconds_left() == 6 * 2


def test_on_a_terminal_the_display_shows_progress_phase_and_figures(info):
    clock = Clock()
    console = terminal(True)
    with ProgressConsole(4, console=console, clock=clock) as progress:
        progress.validation(0, {"val/accuracy": 0.5})
        clock.now += 10
        progress.step(0, METRICS)
        progress.phase("scoring")
        clock.now += 5
        progress._live.refresh()
    shown = Console(file=io.StringIO(), width=150)
    shown.print(progress._render())
    text = shown.file.getvalue()
    for part in (
        "step 1/4",
        "0:00:30 left",
        "reverse KL 0.1235",
        "accuracy 50.0%",
        "tokens/s 12,346",
        "scoring 0:00:05",
    ):
        assert part in text
    assert "scoring" in console.file.getvalue()
    assert [message for message in info.messages if message.startswith("step")] == []


def test_redirected_standard_output_is_left_alone_by_the_display(capsys):
    console = terminal(True)
    with ProgressConsole(4, console=console):
        sys.stdout.write("result\n")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in console.file.getvalue()


def test_an_exception_takes_the_display_down():
    with pytest.raises(KeyboardInterrupt), ProgressConsole(4, console=terminal(True)) as progress:
        raise KeyboardInterrupt
    assert progress._live is None
    progress.close()


def test_a_dumb_terminal_gets_lines(info):
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with ProgressConsole(1, console=console, clock=Clock()) as progress:
        progress.step(0, {})
    assert info.messages == ["step 1/1: 0.0 s, 0:00:00 left"]


def summary_text(summary):
    console = Console(file=io.StringIO(), width=80)
    print_summary(summary, console)
    return console.file.getvalue()


def test_summary_table_says_before_and_after():
    text = summary_text(
        {
            "accuracy_first": 0.25,
            "accuracy_last": 0.875,
            "teacher_accuracy": 0.9,
            "reverse_kl_first": 0.8,
            "reverse_kl_last": 0.2,
            "steps": 60,
            "seconds": {"total": 200.0, "generate": 100.0, "train": 50.0},
            "tokens_per_second": 4321.4,
            "tensorboard": "/a" * 100,
            "samples": "[bold]/samples.html",
        }
    )
    for part in ("25.0%", "87.5%", "+62.5 points", "90.0%", "0.8000", "0.2000", "-75%", "60 steps", "4,321 tokens/s"):
        assert part in text
    assert "0:03:20 (generate 50%, train 25%)" in text
    assert "/a" * 100 + "\n" in text  # a path on one line, whatever the width
    assert "[bold]/samples.html" in text


def test_summary_table_leaves_out_what_is_not_known():
    text = summary_text({"reverse_kl_first": 0.0, "reverse_kl_last": 0.1, "accuracy_first": None, "seconds": 5})
    assert "accuracy" not in text and "steps" not in text and "checkpoint" not in text
    assert "0.0000" in text and "0:00:05" in text
    assert summary_text({}).strip() == ""
