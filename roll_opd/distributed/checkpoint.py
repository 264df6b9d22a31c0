"""Checkpoint folders: complete or absent, never half.

A checkpoint is written to ``checkpoint-<step>.tmp`` and renamed once everything is on disk. What is left of an
interrupted write is ignored by resume and removed by the next save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roll_opd.errors import ConfigError, LaunchError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "state.json"
CONFIG_FILE = "run_config.json"


class CheckpointFolder:
    """The folder that holds a run's checkpoints.

    Args:
        root: ``checkpoint_config.output_dir``, or ``checkpoints`` in the run's folder.
        keep: newest complete checkpoints to keep; 0 keeps all.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def complete(self) -> list[tuple[int, Path]]:
        """Return ``(step, folder)`` of every complete checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        found = [(int(m.group(1)), p) for p in self.root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
        return sorted((step, path) for step, path in found if (path / STATE_FILE).is_file())

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write one checkpoint.

        Args:
            step: its number.
            state: JSON-able state of the driver; written last.
            write: writes everything else into the folder it is given.

        Raises:
            LaunchError: the disk refuses.
        """
        final = self.root / f"checkpoint-{step}"
        temporary = self.root / f"checkpoint-{step}.tmp"
        try:
            for leftover in self.root.glob("checkpoint-*.tmp"):
                # A removed checkpoint whose files are still in use on a network disk is in nobody's way.
                shutil.rmtree(leftover, ignore_errors=leftover.name.endswith(".removed.tmp"))
            temporary.mkdir(parents=True)
            write(temporary)
            (temporary / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))
            _sync_to_disk(temporary, deep=True)
            replaced = self.root / f"checkpoint-{step}.replaced.tmp"
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            _sync_to_disk(self.root, deep=False)
        except OSError as error:
            raise LaunchError(f"checkpoint_config.output_dir: cannot write {temporary}: {error}") from error
        logger.info("checkpoint %s", final)
        for _, old in self.complete()[: -self.keep] if self.keep else []:
            self._remove(old)
        return final

    def _remove(self, old: Path) -> None:
        """Remove a checkpoint; what of it cannot be removed is none any more, and is left to the next save."""
        removed = old.with_name(f"{old.name}.removed.tmp")
        try:
            old.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", old, error)

    def find(self, wanted: bool | str) -> Path | None:
        """Return the checkpoint to resume from.

        Args:
            wanted: ``resume_from_checkpoint``: True finds the newest complete one, a path names one (or a folder of
                them).

        Raises:
            ConfigError: there is none, or the named one is not complete.
        """
        if not wanted:
            return None
        if wanted is True:
            found = self.complete()
            if not found:
                raise ConfigError("resume_from_checkpoint", f"no complete checkpoint in {self.root}")
            return found[-1][1]
        path = Path(wanted)
        if path.name.endswith(".tmp"):
            raise ConfigError("resume_from_checkpoint", f"{path} is what an interrupted save left; name a complete one")
        if (path / STATE_FILE).is_file():
            return path
        inside = CheckpointFolder(path, 0).complete()
        if inside:
            return inside[-1][1]
        raise ConfigError("resume_from_checkpoint", f"{path} is not a complete checkpoint (no {STATE_FILE} in it)")

    def set_aside(self, resumed_from: Path | None) -> None:
        """Move what an earlier run left out of the way, so that this run neither mixes with it nor destroys it.

        Args:
            resumed_from: keep this checkpoint and the older ones; None keeps none.
        """
        mine = [step for step, path in self.complete() if resumed_from and path.samefile(resumed_from)]
        others = [path for step, path in self.complete() if not mine or step > mine[0]]
        if not others:
            return
        name = f"{self.root.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            aside = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self.root.parent))
            for path in others:
                path.rename(aside / path.name)
        except OSError as error:
            raise LaunchError(f"checkpoint_config.output_dir: cannot move old checkpoints away: {error}") from error
        logger.warning("%d checkpoint(s) of an earlier run were moved to %s", len(others), aside)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the driver's state of a complete checkpoint."""
    state = read_json(checkpoint / STATE_FILE)
    try:
        return {
            "step": int(state["step"]),
            "next_draw": int(state["next_draw"]),
            "signal": dict(state["signal"]),
            "report": dict(state["report"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError("resume_from_checkpoint", f"{checkpoint / STATE_FILE} cannot be read: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        ConfigError: it is not there, or not one.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("resume_from_checkpoint", f"{path} cannot be read: {error}") from error


def _sync_to_disk(folder: Path, deep: bool) -> None:
    """Flush a folder (and all below it): a rename must not become durable before what it names."""
    for path in [*(folder.rglob("*") if deep else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
