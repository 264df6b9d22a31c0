"""The examples' shell scripts: what they start, and with which Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/*.sh"))


def said(script: Path, *arguments: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV", "CONFIG")}
    done = subprocess.run(
        ["bash", str(script), *arguments], env=clean | environment, capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_each_script_starts_a_launcher_with_a_config_that_is_there(script: Path) -> None:
    launcher, _, folder, _, name, *rest = said(script, "max_steps=3", PYTHON="echo")
    assert (EXAMPLES.parent / launcher).is_file()
    assert (Path(folder) / f"{name}.yaml").is_file() and Path(folder) == script.parent
    assert rest == ["max_steps=3"]


def test_which_python(tmp_path: Path) -> None:
    """The one that is named, else the active environment's, else ``.venv``'s."""
    (tmp_path / "examples" / "mine").mkdir(parents=True)
    shutil.copy(EXAMPLES / "run.sh", tmp_path / "examples")
    for name in (".venv", "active"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho {name}\n")
        python.chmod(0o755)
    script, arguments = tmp_path / "examples" / "run.sh", ("rlvr", "folder", "config")
    assert said(script, *arguments) == [".venv"]
    assert said(script, *arguments, VIRTUAL_ENV=str(tmp_path / "active")) == ["active"]
    assert said(script, *arguments, VIRTUAL_ENV=str(tmp_path / "active"), PYTHON="echo")[0].endswith("pipeline.py")
