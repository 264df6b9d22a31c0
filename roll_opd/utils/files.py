"""Writing files that a crash cannot leave half done, and JSON lines that a resumed run continues."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_opd.errors import DataError

logger = logging.getLogger(__name__)


def atomic_write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write ``text`` as UTF-8 so that ``path`` holds either its old content or all of the new.

    Creates the folder. The temporary file lies beside the target, because a rename is atomic only within a file system.
    Lone surrogates, which a byte-level tokenizer can produce, are written as ``\\udcXX``.

    Args:
        path: the file.
        text: all of it.
        durable: holds also where the machine itself crashes; waiting for the disk takes milliseconds, and much longer
            on a shared file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer; mkstemp alone would also make the file private to its user (mode 0600).
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    tmp = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        tmp.chmod(0o644)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON with sorted keys: floats as their exact ``repr``, NaN and infinities as null, paths as strings."""
    return json.dumps(_jsonable(value), sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):  # first: most values are, and whether one is a Mapping takes long to tell
        # float() also takes a numpy.float64, a subclass of float whose repr is not a number.
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON lines file. Raises :class:`DataError` naming file and row for a line that is not JSON."""
    return [_parse(path, number, line) for number, line in enumerate(_lines(path), start=1)]


def truncate_jsonl(path: Path, resume_step: int) -> int:
    """Drop the rows whose ``step`` is ``resume_step`` or later, and a last line that a crash cut short.

    The rows kept are copied as they are, so a resumed run's file can be compared with an uninterrupted one's byte by
    byte. Rewrites atomically, and only when something goes. Returns how many lines were dropped.
    """
    if not path.exists():
        return 0
    lines = _lines(path)
    # A crash cuts the last line only: it lacks its newline. An unreadable line elsewhere is a damaged file.
    whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
    kept = [line for number, line in enumerate(whole, start=1) if _parse(path, number, line)["step"] < resume_step]
    if len(kept) != len(lines):
        atomic_write_text(path, "".join(kept))
    return len(lines) - len(kept)


def _lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return list(file)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not a JSON object ({error.msg})") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{path}:{number}: a row needs an integer 'step'")
    return row


def set_aside(path: Path) -> None:
    """Rename a file that an earlier run left, by the time it was last written."""
    if not path.exists() or path.stat().st_size == 0:
        return
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    old = path.with_name(f"{path.stem}-{stamp}{path.suffix}")
    path.replace(old)
    logger.warning("%s is from an earlier run; it is now %s", path, old.name)
