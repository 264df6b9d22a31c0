"""Metrics of each step, to TensorBoard and other services, and always to ``metrics.jsonl``.

No torch: TensorBoard events are written with the ``tensorboard`` package itself. Services that are not in use are never
imported.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from roll_opd.errors import ConfigError
from roll_opd.utils.files import read_jsonl, set_aside, to_json, truncate_jsonl
from roll_opd.utils.logging import get_logger

logger = get_logger(__name__)

DEFAULT_PROJECT = "roll_opd"


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step, in any units their names state."""

    def close(self) -> None:
        """Write out what is buffered. No ``log`` after this."""


class JsonlTracker:
    """``metrics.jsonl``: one JSON object per step, ``step`` beside the metrics, keys sorted, floats exactly.

    A second ``log`` of the same step adds to its row. A file left by an earlier run is continued below ``resume_step``;
    without one it is kept under another name.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._row: dict[str, float | int] = {}
        if resume_step is None:
            set_aside(path)
        elif truncate_jsonl(path, resume_step):
            logger.info("%s: rows from step %d on are dropped, the run repeats them", path, resume_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (rows := read_jsonl(path)):
            self._row = {"step": rows[-1]["step"]}
        # Not append mode, which could not rewrite the row of the step now running.
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._row_start = self._file.seek(0, os.SEEK_END)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the row at once, so that a crash costs nothing. NaN and infinities become null, with a warning."""
        if "step" in metrics:
            raise ValueError("a metric cannot be called 'step'")
        values = {name: float(value) for name, value in metrics.items()}
        broken = [f"{name}={value}" for name, value in sorted(values.items()) if not math.isfinite(value)]
        if broken:
            logger.warning("step %d: not finite, null in metrics.jsonl: %s", step, ", ".join(broken))
        last = self._row.get("step", -1)
        if step < last:
            raise ValueError(f"metrics of step {step} come after those of step {last}")
        if step == last and len(self._row) > 1:
            values = {**self._row, **values}
        else:
            self._row_start = self._file.seek(0, os.SEEK_END)
        self._row = {**values, "step": step}
        self._file.seek(self._row_start)
        self._file.write((to_json(self._row) + "\n").encode("utf-8", "backslashreplace"))
        self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """One scalar for each metric, flushed every step."""

    def __init__(self, log_dir: Path) -> None:
        module = _require("tensorboard.summary.writer.event_file_writer", "tensorboard", "tensorboard")
        self._event = _require("tensorboard.compat.proto.event_pb2", "tensorboard", "tensorboard").Event
        self._summary = _require("tensorboard.compat.proto.summary_pb2", "tensorboard", "tensorboard").Summary
        log_dir.mkdir(parents=True, exist_ok=True)
        self.log_dir = log_dir
        self._writer = module.EventFileWriter(str(log_dir))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event; TensorBoard keeps values as 32-bit floats and marks NaN itself."""
        values = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in sorted(metrics.items())]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class StdoutTracker:
    """One log line a step with every metric. Kept under ROLL's name; like all logging it goes to standard error."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics, sorted by name, with six significant digits."""
        line = " ".join(f"{name}={float(value):.6g}" for name, value in sorted(metrics.items()))
        logger.info("step %d %s", step, line)

    def close(self) -> None:
        """Nothing is buffered."""


class ServiceTracker:
    """wandb, swanlab and trackio: packages with one interface, ``init``, ``log(metrics, step)`` and ``finish``."""

    def __init__(self, package: ModuleType, login: Mapping[str, Any], init: Mapping[str, Any]) -> None:
        self._package = package
        if login:
            package.login(**login)
        package.init(**init)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one step."""
        self._package.log({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Wait for uploads and end the run there."""
        self._package.finish()


class RunTracker:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    @property
    def tensorboard_dir(self) -> Path | None:
        """The folder of this launch's TensorBoard events, if there are any."""
        return next((tracker.log_dir for tracker in self._trackers if isinstance(tracker, TensorBoardTracker)), None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step everywhere. Steps never go back; a step may be logged in parts."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Close all of them, also when one fails to."""
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def build_tracker(
    track_with: Sequence[str],
    run_dir: Path,
    exp_name: str,
    config: Mapping[str, Any],
    tracker_kwargs: Mapping[str, Any],
    resume_step: int | None = None,
) -> RunTracker:
    """Open the trackers that a config names, and ``run_dir/metrics.jsonl``.

    Args:
        track_with: any of ``tensorboard``, ``stdout``, ``wandb``, ``swanlab``, ``trackio``; may be empty.
        run_dir: the run's folder.
        exp_name: the run's name in the services.
        config: the resolved config without its secrets; sent to the services.
        tracker_kwargs: options of the one tracker, as in ROLL, or ``{tracker: options}`` when there are several.
            ``tensorboard`` knows ``log_dir`` (default ``run_dir/tensorboard``; a folder named by the time is made in
            it, since two runs in one folder draw one zigzag curve); the services take ``project``, ``api_key`` and
            whatever their ``init`` takes.
        resume_step: the first step that will be logged, when a run is resumed; None starts a new ``metrics.jsonl``.

    Raises:
        ConfigError: an unknown tracker, an option that nobody takes, or a package that is not installed.
    """
    names = [track_with] if isinstance(track_with, str) else list(dict.fromkeys(track_with))
    for name in names:
        if name not in _BUILDERS:
            raise ConfigError("track_with", _unknown(name))
    options = _options_by_tracker(names, tracker_kwargs)
    opened: list[Tracker] = []
    with ExitStack() as cleanup:  # a tracker that cannot start closes those before it
        for name in names:
            opened.append(_BUILDERS[name](name, run_dir, exp_name, config, options[name]))
            cleanup.callback(opened[-1].close)
        opened.append(JsonlTracker(run_dir / "metrics.jsonl", resume_step))
        cleanup.pop_all()
    return RunTracker(opened)


def _build_tensorboard(
    name: str, run_dir: Path, exp_name: str, config: Mapping[str, Any], options: dict[str, Any]
) -> Tracker:
    log_dir = Path(options.pop("log_dir", None) or run_dir / "tensorboard").expanduser()
    _refuse_rest(name, options)
    return TensorBoardTracker(log_dir / time.strftime("%Y%m%d-%H%M%S"))


def _build_stdout(
    name: str, run_dir: Path, exp_name: str, config: Mapping[str, Any], options: dict[str, Any]
) -> Tracker:
    _refuse_rest(name, options)
    return StdoutTracker()


def _build_service(
    name: str, run_dir: Path, exp_name: str, config: Mapping[str, Any], options: dict[str, Any]
) -> Tracker:
    package = _require(name, name, name)
    init: dict[str, Any] = {"project": DEFAULT_PROJECT, "config": dict(config)}
    api_key = options.pop("api_key", None)
    if name == "wandb":
        # ROLL calls the folder log_dir for every tracker; wandb's own word is dir.
        init |= {"name": exp_name, "dir": str(options.pop("log_dir", None) or run_dir)}
        login = {"key": api_key} if api_key else {}
    elif name == "swanlab":
        init |= {"experiment_name": exp_name, "logdir": str(options.pop("log_dir", None) or run_dir / "swanlab")}
        login = {"api_key": api_key} if api_key else {}
    else:
        init |= {"name": exp_name}
        login = {}
        if api_key:
            raise ConfigError("tracker_kwargs.api_key", "trackio has no login; remove the key")
    return ServiceTracker(package, login, init | options)


_Builder = Callable[[str, Path, str, Mapping[str, Any], dict[str, Any]], Tracker]
_BUILDERS: dict[str, _Builder] = {
    "tensorboard": _build_tensorboard,
    "stdout": _build_stdout,
    "wandb": _build_service,
    "swanlab": _build_service,
    "trackio": _build_service,
}
TRACKERS: tuple[str, ...] = tuple(_BUILDERS)
"""The values that ``track_with`` may have."""


def _options_by_tracker(names: Sequence[str], tracker_kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split ``tracker_kwargs``: a key that is a tracker's name holds that tracker's options, others are for the one."""
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    takers = [name for name in names if name != "stdout"]
    for key, value in tracker_kwargs.items():
        if key in _BUILDERS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"tracker_kwargs.{key}", f"must be the options of {key}, as a mapping")
            options.setdefault(key, {}).update(value)  # options of a tracker that is off do no harm
        elif len(takers) == 1:
            options[takers[0]][key] = value
        elif takers:
            raise ConfigError(f"tracker_kwargs.{key}", f"put it under the tracker it is for: {', '.join(takers)}")
    return options


def _unknown(name: str) -> str:
    guess = difflib.get_close_matches(name, TRACKERS, n=1)
    return f"unknown tracker '{name}'{f', did you mean {guess[0]!r}' if guess else ''}; one of {', '.join(TRACKERS)}"


def _refuse_rest(name: str, options: Mapping[str, Any]) -> None:
    if options:
        raise ConfigError(f"tracker_kwargs.{min(options)}", f"{name} does not take this option; remove it")


def _require(module: str, tracker: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise  # the package is there, and something it needs is not: its own message says more
        raise ConfigError("track_with", f"'{tracker}' is not installed: pip install {package}") from error
