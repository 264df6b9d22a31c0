"""One log format for every process, on standard error and in a file.

Standard output is for results (``--plan json``, the path of the summary) and never gets a log line.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

_DATE_FORMAT = "%H:%M:%S"

_NOISY = (
    "absl",
    "asyncio",
    "datasets",
    "filelock",
    "fsspec",
    "h5py",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "markdown_it",
    "matplotlib",
    "math_verify",
    "numba",
    "PIL",
    "ray",
    "sympy",
    "tensorboard",
    "torch",
    "transformers",
    "urllib3",
    "vllm",
)
"""Libraries whose INFO lines are not about the run; their warnings stay."""


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is *now*: the live progress display replaces it to print lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr


class _LogFileHandler(logging.FileHandler):
    """A type of our own, so that configuring twice replaces our file and leaves other people's handlers alone."""


def configure_logging(level: str = "INFO", log_file: Path | None = None, process: str = "driver") -> None:
    """Send every log line of this process to standard error and, if given, to ``log_file`` (appended).

    The format is ``HH:MM:SS LEVEL process logger: message``, in local time. Calling it again replaces what the last
    call set up.

    Args:
        level: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``. Noisy libraries stay at ``WARNING`` or above.
        log_file: usually ``log_file_path(logging_dir, process)``; its folder is created.
        process: who speaks, for example ``driver`` or ``actor_train-0``.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [_StderrHandler()]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    for old in [handler for handler in root.handlers if isinstance(handler, (_StderrHandler, _LogFileHandler))]:
        root.removeHandler(old)
        old.close()
    literal_process = process.replace("%", "%%")
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s {literal_process} %(name)s: %(message)s", _DATE_FORMAT)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass ``__name__``. Needs no configuration to have been done."""
    return logging.getLogger(name)


def log_file_path(logging_dir: Path, process: str) -> Path:
    """``logging_dir/<process>.log``, with what a file name cannot hold replaced by ``_``."""
    return logging_dir / (re.sub(r"[^\w.-]+", "_", process) + ".log")
