"""Reads data files that are text: JSON lines and CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from roll_opd.datasets.row import BadRowError, Lines, kind_of, parse_json
from roll_opd.errors import DataError

_MAX_FIELD = 2**30
"""Characters of a CSV field; Python's own limit, 131,072, is shorter than some prompts."""


def read_json_lines(path: Path) -> Lines:
    """Yields the lines of a JSON lines file in UTF-8."""
    try:
        with path.open("rb") as file:
            # Bytes, not text: one line that is not UTF-8 is then one bad row, and only \n ends a line (text mode and
            # str.splitlines would also break at characters that JSON allows inside a string).
            for line, raw in enumerate(file, start=1):
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
                if not raw.strip():
                    yield line, None
                    continue
                try:
                    yield line, _parse_object(raw)
                except BadRowError as problem:
                    yield line, problem
    except OSError as error:
        raise DataError(f"{path}: cannot read the data file: {error.strerror or error}") from error


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    if text.lstrip().startswith("["):
        raise BadRowError("a row must be a JSON object, not a list; write one object a line, not one array")
    value = parse_json(text.strip(), "not valid JSON")
    if not isinstance(value, dict):
        raise BadRowError(f"a row must be a JSON object, not {kind_of(value)}")
    return value


def read_csv(path: Path) -> Lines:
    """Yields the rows of a CSV file in UTF-8 with a header; a row's number is the line that it begins on.

    Commas separate, double quotes enclose. All values are text, and an empty field is "not given".
    """
    csv.field_size_limit(_MAX_FIELD)
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that they make one bad row and not an unreadable file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _csv_header(path, reader)
            while True:
                line = reader.line_num + 1
                try:
                    fields = next(reader)
                    yield line, _csv_row(fields, header) if fields else None
                except StopIteration:
                    return
                except csv.Error as problem:
                    yield line, BadRowError(f"not valid CSV: {problem}")
                except BadRowError as problem:
                    yield line, problem
    except OSError as error:
        raise DataError(f"{path}: cannot read the data file: {error.strerror or error}") from error


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not valid CSV: {error}") from error
    if not header:
        raise DataError(f"{path}: the file holds no rows; its first line must name the columns")
    if not all(header):
        raise DataError(f"{path}:1: column {header.index('') + 1} of the header has no name")
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}:1: the header names the column {twice[0]!r} twice")
    return header


def _csv_row(fields: list[str], header: list[str]) -> dict[str, Any]:
    if len(fields) != len(header):
        raise BadRowError(f"{len(fields)} fields, where the header names {len(header)} columns")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError("not UTF-8 text") from None
    return {name: value or None for name, value in zip(header, fields, strict=True)}
