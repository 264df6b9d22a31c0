"""What a person sees of a run: a live display on a terminal, one line a step elsewhere, a table at the end.

Everything here goes to standard error.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from roll_opd.utils.logging import get_logger

logger = get_logger(__name__)

_ETA_WINDOW = 20
"""Steps whose median duration predicts the time left: the first ones, with their warm-up, are soon forgotten."""


@dataclass(frozen=True)
class Column:
    """One figure of the display."""

    label: str
    """What the person reads, on the display and in the lines."""
    key: str
    """The metric's name; a step without it shows nothing here."""
    format: str
    """A format specification for the value."""


DEFAULT_COLUMNS: tuple[Column, ...] = (
    Column("reward", "reward/mean", ".3f"),
    Column("reverse KL", "opd/reverse_kl", ".4f"),
    Column("teacher logprob", "opd/teacher_logprob", ".3f"),
    Column("student logprob", "opd/student_logprob", ".3f"),
    Column("success", "episode/success_rate", ".1%"),
    Column("accuracy", "val/accuracy", ".1%"),
    Column("held-out reverse KL", "val/reverse_kl", ".4f"),
    Column("response length", "rollout/response_length", ".1f"),
    Column("grad norm", "train/grad_norm", ".3f"),
    Column("tokens/s", "time/tokens_per_second", ",.0f"),
)
"""Logprobs and reverse KL in nats per token, response length in tokens."""


class ProgressConsole:
    """Progress of a run, as a context manager.

    Steps count from 0, and ``step(n, …)`` says that step ``n`` is done. On a terminal log lines appear above the
    display. Elsewhere (a CI log, a file) every step is one log line and phases are not shown.

    Args:
        total_steps: steps of the whole run, the ones before a resume included.
        start_step: the first step of this launch.
        enabled: True for the live display, False for lines, None to decide by whether standard error is a terminal.
        columns: which metrics to show.
        console: for tests; standard error if None.
        clock: for tests; seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool | None = None,
        columns: Sequence[Column] = DEFAULT_COLUMNS,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._live_wanted = self._console.is_terminal and not self._console.is_dumb_terminal
        if enabled is not None:
            self._live_wanted = enabled
        self._total = total_steps
        self._done = start_step
        self._columns = tuple(columns)
        self._clock = clock
        self._values: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=_ETA_WINDOW)
        self._last_time = clock()
        self._phase = "starting"
        self._phase_start = self._last_time
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> ProgressConsole:
        self._last_time = self._phase_start = self._clock()
        if self._live_wanted:
            # Output that the user redirected to a file stays there; only what shares the terminal goes above.
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Say what is running now, for example ``generating``."""
        logger.debug("phase: %s", name)
        self._phase, self._phase_start = name, self._clock()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say that ``step`` is done, and its metrics."""
        now = self._clock()
        self._durations.append(now - self._last_time)
        self._last_time = now
        self._done = step + 1
        self._values |= {column.key: float(metrics[column.key]) for column in self._columns if column.key in metrics}
        # On a terminal the figures are in the display; in the log they are below INFO, not lost.
        figures = self._figures(metrics)
        left = f"{self._durations[-1]:.1f} s, {_duration(self.seconds_left())} left"
        level = logging.DEBUG if self._live else logging.INFO
        logger.log(level, "step %d/%d: %s", self._done, self._total, ", ".join([*figures, left]))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say what a validation before ``step`` found; its time does not count as the step's."""
        self._last_time = self._clock()
        self._values |= {column.key: float(metrics[column.key]) for column in self._columns if column.key in metrics}
        known = {column.key for column in self._columns}
        # What an environment measures besides is for the trackers: there may be dozens.
        others = [
            f"{name} {float(value):.4g}"
            for name, value in sorted(metrics.items())
            if name not in known and not name.startswith("val/env/")
        ]
        logger.info("validation at step %d: %s", step, ", ".join([*self._figures(metrics), *others]))

    def steps_begin(self) -> None:
        """Say that start-up is over; it does not count as the first step's time."""
        self._last_time = self._clock()

    def seconds_left(self) -> float:
        """Predicted seconds until the last step is done; NaN before the first step of this launch is."""
        if not self._durations:
            return math.nan
        return statistics.median(self._durations) * max(0, self._total - self._done)

    def close(self) -> None:
        """Take the display away. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _figures(self, metrics: Mapping[str, float]) -> list[str]:
        return [
            f"{column.label} {float(metrics[column.key]):{column.format}}"
            for column in self._columns
            if column.key in metrics
        ]

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            Text(f"step {self._done}/{self._total}", style="bold"),
            ProgressBar(total=max(1, self._total), completed=self._done),
            Text(f"{_duration(self.seconds_left())} left"),
        )
        figures = Text("  ")
        for column in self._columns:
            if column.key in self._values:
                figures.append(f"{column.label} ", style="dim")
                figures.append(f"{self._values[column.key]:{column.format}}   ", style="bold")
        now = Table.grid(padding=(0, 1))
        running = _duration(self._clock() - self._phase_start)
        now.add_row(self._spinner, Text(f"{self._phase} {running}", style="cyan"))
        return Group(head, *([figures] if self._values else []), now)


def render_summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """The end of a run as a table; rows whose figures the summary lacks are left out.

    Reads ``accuracy_first``, ``accuracy_last``, ``teacher_accuracy`` (fractions), ``reverse_kl_first``,
    ``reverse_kl_last`` (nats per token), ``steps``, ``seconds`` (a number, or seconds by phase with an optional
    ``total``), ``tokens_per_second``, and the paths ``checkpoint``, ``tensorboard`` and ``samples``. Print it with
    ``crop=False``: paths stay on one line, so that they can be copied.
    """
    table = Table(title="Run summary", title_justify="left", title_style="bold", show_header=True, header_style="dim")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    first, last = summary.get("accuracy_first"), summary.get("accuracy_last")
    if first is not None or last is not None:
        change = "" if first is None or last is None else f"{(last - first) * 100:+.1f} points"
        table.add_row("accuracy", _format(first, ".1%"), _format(last, ".1%"), change)
    if summary.get("teacher_accuracy") is not None:
        table.add_row("teacher's accuracy", "", _format(summary["teacher_accuracy"], ".1%"), "")
    first, last = summary.get("reverse_kl_first"), summary.get("reverse_kl_last")
    if first is not None or last is not None:
        change = "" if first is None or last is None or first == 0 else f"{(last - first) / abs(first):+.0%}"
        table.add_row("reverse KL, nats/token", _format(first, ".4f"), _format(last, ".4f"), change)

    facts: list[str] = []
    if summary.get("steps") is not None:
        facts.append(f"{summary['steps']} steps")
    if summary.get("seconds") is not None:
        facts.append(_seconds_by_phase(summary["seconds"]))
    if summary.get("tokens_per_second") is not None:
        facts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    lines = [Text(", ".join(facts))] if facts else []
    for label, key in (("checkpoint", "checkpoint"), ("TensorBoard", "tensorboard"), ("samples", "samples")):
        if summary.get(key):
            lines.append(Text(f"{label + ':':<13}{summary[key]}", no_wrap=True, overflow="ignore"))
    return Group(*([table] if table.row_count else []), *lines)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print :func:`render_summary_table` to standard error."""
    (console or Console(stderr=True)).print(render_summary_table(summary), crop=False)


def _format(value: float | None, specification: str) -> str:
    return "" if value is None else format(value, specification)


def _seconds_by_phase(seconds: float | Mapping[str, float]) -> str:
    if not isinstance(seconds, Mapping):
        return _duration(seconds)
    phases = {name: value for name, value in seconds.items() if name != "total"}
    total = seconds.get("total", sum(phases.values()))
    shares = sorted(phases.items(), key=lambda item: -item[1])
    by_phase = ", ".join(f"{name} {value / total:.0%}" for name, value in shares if total > 0)
    return f"{_duration(total)} ({by_phase})" if by_phase else _duration(total)


def _duration(seconds: float) -> str:
    return "-:--:--" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
