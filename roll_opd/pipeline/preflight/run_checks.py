"""Checks of what a launch finds out by itself when it opens its folders: for the doctor, which opens none of them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from roll_opd.configs import LoadedConfig, resume_conflicts
from roll_opd.distributed.checkpoint import CONFIG_FILE, CheckpointFolder, read_json, read_state
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding

PACKAGES = ("tensorboard", "wandb", "swanlab", "trackio")
"""Trackers that are packages of their own."""


def folders(facts: Facts) -> Iterator[Finding]:
    """The run's folders exist, or can be made."""
    config = facts.config
    wanted = {
        "output_dir": config.output_dir,
        "logging_dir": config.logging_dir,
        "checkpoint_config.output_dir": config.checkpoint_config.output_dir,
    }
    for field, name in wanted.items():
        if name is None:
            continue
        folder = Path(os.path.abspath(Path(name).expanduser()))
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            yield Finding("error", field, f"{nearest} is a file, not a folder; remove it or choose another folder")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            yield Finding("error", field, f"cannot write in {nearest}; choose a folder that this user can write")
        else:
            yield Finding("ok", field, str(folder))


def resume(facts: Facts) -> Iterator[Finding]:
    """The checkpoint to go on from is there, and this run may go on from it."""
    config = facts.config
    if not config.resume_from_checkpoint:
        return
    root = config.checkpoint_config.output_dir or str(Path(config.output_dir) / "checkpoints")
    found = CheckpointFolder(Path(os.path.abspath(Path(root).expanduser())), 0).find(config.resume_from_checkpoint)
    if found is not None:
        yield from resume_findings(found, facts.loaded)


def resume_findings(checkpoint: Path, loaded: LoadedConfig) -> Iterator[Finding]:
    """Compare this run's settings with those of the run that made ``checkpoint``.

    Raises:
        ConfigError: a file of the checkpoint cannot be read.
    """
    read_state(checkpoint)
    refused, noted = resume_conflicts(read_json(checkpoint / CONFIG_FILE), loaded.config, loaded.yaml_names)
    for path in noted:
        yield Finding("warning", path, f"differs from the run that made {checkpoint}")
    if refused:
        problem = f"{checkpoint} was made with other values of {', '.join(refused)}, which would mix two runs"
        fix = "restore them, or start a new run from the model that a finished run leaves"
        yield Finding("error", "resume_from_checkpoint", f"{problem}; {fix}")
    else:
        yield Finding("ok", "resume_from_checkpoint", f"goes on from {checkpoint}")


def trackers(facts: Facts) -> Iterator[Finding]:
    """The packages of the trackers are installed."""
    for name in facts.config.track_with:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            yield Finding("error", "track_with", f"the package {name} is not installed; install it, or remove {name}")
        else:
            yield Finding("ok", "track_with", name)


RUN_CHECKS: tuple[Check[Facts], ...] = tuple(Check("run folder", find) for find in (folders, resume, trackers))
