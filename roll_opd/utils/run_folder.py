"""The folder a run leaves behind: made and tried out before anything starts, so that hours of work have a place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_opd.errors import LaunchError
from roll_opd.utils.files import atomic_write_text, to_json


@dataclass(frozen=True)
class RunFolder:
    """Where each thing a run leaves is. All paths are absolute: workers have other working directories."""

    root: Path
    """``output_dir``."""
    logs: Path
    """One ``<process>.log`` for each process."""
    tensorboard: Path
    """One folder of events, named by its start time, for each launch."""
    samples: Path
    """Sample trajectories: ``samples.jsonl`` and the HTML pages."""
    checkpoints: Path
    """One folder for each checkpoint."""
    renders: Path | None = None
    """``render_save_dir``: the episodes of every step whose samples are kept, as text."""

    @property
    def summary(self) -> Path:
        """The result of the run, written once at its end."""
        return self.root / "summary.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.root / "metrics.jsonl"

    @property
    def samples_jsonl(self) -> Path:
        """Sample trajectories for programs, one JSON object each."""
        return self.samples / "samples.jsonl"

    @property
    def samples_page(self) -> Path:
        """Sample trajectories for people, as one HTML file."""
        return self.samples / "samples.html"


def prepare_run_folder(
    output_dir: Path | str,
    logging_dir: Path | str | None = None,
    checkpoint_dir: Path | str | None = None,
    render_dir: Path | str | None = None,
) -> RunFolder:
    """Create the folders of a run and check that files can be written in them.

    Args:
        output_dir: the run's folder; may exist already, as it does for a resumed run.
        logging_dir: where log files go, ``output_dir/logs`` if None.
        checkpoint_dir: the setting ``checkpoint_config.output_dir``; ``output_dir/checkpoints`` if None.
        render_dir: the setting ``render_save_dir``; none if None.

    Raises:
        LaunchError: a folder cannot be made or written; the message names the setting, the folder and the reason.
    """
    root = _absolute(output_dir)
    folder = RunFolder(
        root=root,
        logs=_absolute(logging_dir) if logging_dir else root / "logs",
        tensorboard=root / "tensorboard",
        samples=root / "samples",
        checkpoints=_absolute(checkpoint_dir) if checkpoint_dir else root / "checkpoints",
        renders=_absolute(render_dir) if render_dir else None,
    )
    _make_writable("output_dir", folder.root)
    _make_writable("logging_dir" if logging_dir else "output_dir", folder.logs)
    _make_writable("output_dir", folder.tensorboard)
    _make_writable("output_dir", folder.samples)
    _make_writable("checkpoint_config.output_dir" if checkpoint_dir else "output_dir", folder.checkpoints)
    if folder.renders is not None:
        _make_writable("render_save_dir", folder.renders)
    return folder


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` atomically, keys sorted, NaN and infinities as null."""
    atomic_write_text(path, to_json(summary, indent=2) + "\n")


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _make_writable(setting: str, folder: Path) -> None:
    """Create ``folder`` and write a file in it: permission bits say nothing to root or about a read-only mount."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"roll_opd")
            probe.flush()  # a full disk shows here, not at the open
    except OSError as error:
        raise LaunchError(f"{setting}: cannot write in {folder}: {_reason(folder, error)}") from error


def _reason(folder: Path, error: OSError) -> str:
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        return f"{in_the_way} is a file, not a folder; remove it or choose another folder"
    return f"{(error.strerror or str(error)).lower()}; choose a folder that this user can write"
