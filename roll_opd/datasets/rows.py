"""Reads the rows of data files and checks each one.

Every row that comes out can be turned into a prompt; every row that cannot is counted and named as ``file:line``.
The numbers of a :class:`ReadReport` add up, so that no row is ever lost in silence.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from roll_opd.errors import DataError

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
"""The roles that a message may have."""

MAX_EXAMPLES = 5
"""How many bad rows a report quotes; the rest are only counted."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The name of the column in the file for each field of a :class:`Row`."""

    id: str = "id"
    tag: str = "tag"
    prompt: str = "prompt"
    messages: str = "messages"
    ground_truth: str = "ground_truth"
    source: str = "source"
    difficulty: str = "difficulty"
    test_cases: str = "test_cases"
    hint: str = "hint"


@dataclasses.dataclass(frozen=True)
class Row:
    """One accepted row. At least one of ``messages`` and ``prompt`` is given; ``messages`` wins over ``prompt``."""

    index: int
    """Position among the accepted rows of all files, from 0."""
    id: str
    """The row's own id, or ``<file stem>:<line>``; unique within its file."""
    tag: str
    """Routes the row to rewards and teachers; empty when the file gives none."""
    messages: tuple[dict[str, Any], ...] | None
    """The conversation so far: role, content, and whatever else the file gave for each message."""
    prompt: str | None
    """Bare prompt text, where the file gives one."""
    ground_truth: str | None
    """The reference answer as text; lists and objects are JSON."""
    source: str | None
    """Where the row comes from, for people."""
    difficulty: Any
    """As in the file: a number or a label."""
    test_cases: Any
    """As in the file; the reward that uses it says what it expects."""
    hint: Any
    """As in the file."""
    file: str
    """The file that the row was read from, as it was found."""
    line: int
    """Line in that file, from 1, blank lines counted."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Columns of the file that have no field here, unchanged."""

    @property
    def where(self) -> str:
        """``file:line``, as error messages begin."""
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What became of the rows of the files: ``read == kept + bad``; blank lines are not rows."""

    files: tuple[str, ...]
    """The files as they were found, in the order given."""
    read: int
    """Lines that held something."""
    blank: int
    """Lines that held nothing but white space."""
    bad: int
    """Rows refused by a check."""
    kept: int
    """Rows returned."""
    examples: tuple[str, ...] = ()
    """The first bad rows, each as ``file:line: problem``, at most :data:`MAX_EXAMPLES`."""

    def __post_init__(self) -> None:
        assert self.read == self.kept + self.bad, f"row counts do not add up: {self}"

    def __str__(self) -> str:
        return (
            f"{self.read} rows read from {len(self.files)} file(s): {self.kept} kept, {self.bad} bad "
            f"({self.blank} blank lines)"
        )


class _BadRowError(Exception):
    """A row that fails a check; the message is the problem without the place."""


def read_rows(
    files: Sequence[str | Path],
    *,
    columns: Columns | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dataset_dir: str | Path | None = None,
) -> tuple[list[Row], ReadReport]:
    """Reads and checks all rows of ``files``, in the order given.

    Args:
        files: names of data files; see :func:`find_file` for where they are looked for. The ending names the format.
        columns: what the columns are called in these files; by default as the fields of :class:`Row`.
        on_bad_row: ``error`` stops, after reading everything, with the first bad row and the count of the others;
            ``skip`` leaves bad rows out, counts them and logs a warning.
        dataset_dir: a folder in which relative names are looked for too.

    Returns:
        The accepted rows, with ``index`` from 0, and the report of the counts.

    Raises:
        DataError: a file that is missing, unreadable, of an unsupported format or without any row; a bad row under
            ``error``; or no acceptable row in all the files.
        ValueError: ``on_bad_row`` is neither of its values.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
    if isinstance(files, (str, Path)):
        files = [files]  # a lone name would otherwise be read letter by letter
    if not files:
        raise DataError("no data files were named")
    columns = columns or Columns()
    paths = [find_file(name, dataset_dir) for name in files]
    readers = [_reader_for(path) for path in paths]  # every ending is checked before a long file is read

    rows: list[Row] = []
    examples: list[str] = []
    num_read = num_blank = num_bad = 0
    for path, reader in zip(paths, readers, strict=True):
        first_line_of: dict[str, int] = {}
        num_before = num_read
        for line, values in reader(path):
            if values is None:
                num_blank += 1
                continue
            num_read += 1
            try:
                if isinstance(values, _BadRowError):
                    raise values
                row = _check_row(values, columns, index=len(rows), path=path, line=line)
                if row.id in first_line_of:
                    raise _BadRowError(
                        f"id {row.id!r} is already used on line {first_line_of[row.id]}; ids are unique in a file"
                    )
            except _BadRowError as problem:
                num_bad += 1
                if len(examples) < MAX_EXAMPLES:
                    examples.append(f"{path}:{line}: {problem}")
                continue
            first_line_of[row.id] = line
            rows.append(row)
        if num_read == num_before:
            raise DataError(f"{path}: the file holds no rows")

    report = ReadReport(
        files=tuple(str(path) for path in paths),
        read=num_read,
        blank=num_blank,
        bad=num_bad,
        kept=len(rows),
        examples=tuple(examples),
    )
    if num_bad and on_bad_row == "error":
        _raise_bad_rows(report)
    if not rows:
        raise DataError(f"{examples[0]} (all {num_read} rows are bad, so there is nothing to train on)")
    if num_bad:
        logger.warning("%s; skipped, for example: %s", report, "; ".join(examples))
    else:
        logger.info("%s", report)
    return rows, report


def _raise_bad_rows(report: ReadReport) -> NoReturn:
    """Raises one line that begins with the first bad row and ends with the way out."""
    message = report.examples[0]
    if report.bad > 1:
        message += f" [{report.bad} bad rows of {report.read}; also {'; '.join(report.examples[1:])}"
        message += "; ...]" if report.bad > len(report.examples) else "]"
    raise DataError(f"{message} (correct the data, or set data_args.on_bad_row: skip to leave bad rows out)")


def find_file(name: str | Path, dataset_dir: str | Path | None = None) -> Path:
    """Finds a data file by the name that a config gives it.

    Tried in this order: the name itself (absolute, or relative to the working directory); inside ``dataset_dir``;
    by its last part inside ``dataset_dir``. The last serves configs in ROLL's style, where ``dataset_dir: data``
    stands beside ``file_name: data/x.jsonl``.

    Raises:
        DataError: no such file, with all that was tried; or a folder where a file is needed.
    """
    path = Path(name).expanduser()
    candidates = [path]
    folder = None if dataset_dir is None else Path(dataset_dir).expanduser()
    if folder is not None and not path.is_absolute():
        candidates += [folder / path, folder / path.name]
    candidates = list(dict.fromkeys(candidates))
    for candidate in candidates:
        if candidate.is_file():
            if folder is not None and candidate == folder / path.name and path.parent.name not in ("", folder.name):
                # Same last name, other folder: most likely what is meant, but a person should see it.
                logger.warning("data file %s: read from %s, which has the same name", name, candidate)
            return candidate
    for candidate in candidates:
        if candidate.is_dir():
            raise DataError(f"{candidate}: this is a folder; name the data files in it")
    tried = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise DataError(f"{name}: data file not found; tried {tried}")


# --- formats ---------------------------------------------------------------------------------------------------------

# What a reader yields for each line: its number from 1, and its columns, its problem, or None for a blank line.
_Lines = Iterator[tuple[int, "dict[str, Any] | _BadRowError | None"]]


def _read_json_lines(path: Path) -> _Lines:
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
                except _BadRowError as problem:
                    yield line, problem
    except OSError as error:
        raise DataError(f"{path}: cannot read the data file: {error.strerror or error}") from error


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    if text.lstrip().startswith("["):
        raise _BadRowError("a row must be a JSON object, not a list; write one object a line, not one array")
    value = _parse_json(text.strip(), "not valid JSON")
    if not isinstance(value, dict):
        raise _BadRowError(f"a row must be a JSON object, not {_kind(value)}")
    return value


def _parse_json(text: str, problem: str) -> Any:
    """Parses strict JSON: ``NaN`` and ``Infinity``, which Python would take, are refused."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _BadRowError(f"{problem}: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a constant refused above, or an integer of thousands of digits
        raise _BadRowError(f"{problem}: {error}") from None
    except RecursionError:
        raise _BadRowError(f"{problem}: nested too deeply") from None


# One entry a format. Parquet and `datasets` sources join here: a reader that yields (row number, columns).
_READERS: dict[str, Callable[[Path], _Lines]] = {".jsonl": _read_json_lines, ".json": _read_json_lines}


def _reader_for(path: Path) -> Callable[[Path], _Lines]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; supported: {', '.join(_READERS)}")
    return reader


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_row(values: Mapping[str, Any], columns: Columns, *, index: int, path: Path, line: int) -> Row:
    """Turns the columns of one line into a row.

    Raises:
        _BadRowError: the first check that fails.
    """
    messages, prompt = _check_input(values, columns)
    known = set(dataclasses.asdict(columns).values())
    return Row(
        index=index,
        id=_check_id(values, columns.id) or f"{path.stem}:{line}",
        tag=_check_text(values, columns.tag) or "",
        messages=messages,
        prompt=prompt,
        ground_truth=_check_ground_truth(values, columns.ground_truth),
        source=_check_text(values, columns.source),
        difficulty=values.get(columns.difficulty),
        test_cases=values.get(columns.test_cases),
        hint=values.get(columns.hint),
        file=str(path),
        line=line,
        extra={name: value for name, value in values.items() if name not in known},
    )


def _check_input(values: Mapping[str, Any], columns: Columns) -> tuple[tuple[dict[str, Any], ...] | None, str | None]:
    """Returns the messages and the prompt, of which at least one is given."""
    given, prompt = values.get(columns.messages), values.get(columns.prompt)
    if given is not None and given != "":  # files with every column in every row write empty text for "none"
        # A prompt beside messages is not used, so its form does not matter.
        return _check_messages(given, columns.messages), prompt if isinstance(prompt, str) else None
    if prompt is None:
        raise _BadRowError(f"neither {columns.messages!r} nor {columns.prompt!r} is given")
    if isinstance(prompt, list):
        raise _BadRowError(f"{columns.prompt!r} must be text; a list of messages belongs in {columns.messages!r}")
    if not isinstance(prompt, str):
        raise _BadRowError(f"{columns.prompt!r} must be text, not {_kind(prompt)}")
    if not prompt.strip():
        raise _BadRowError(f"{columns.prompt!r} is empty")
    _check_unicode(prompt, columns.prompt)
    return None, prompt


def _check_messages(given: Any, column: str) -> tuple[dict[str, Any], ...]:
    if isinstance(given, str):
        given = _parse_json(given, f"{column!r} is text but not valid JSON")
    if not isinstance(given, list):
        raise _BadRowError(f"{column!r} must be a list of messages or such a list as JSON text, not {_kind(given)}")
    if not given:
        raise _BadRowError(f"{column!r} is an empty list")
    for number, message in enumerate(given, start=1):
        name = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            raise _BadRowError(f"{name} must be an object with role and content, not {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _BadRowError(f"{name} has the role {reprlib.repr(role)}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _BadRowError(f"{name} must have text as content, not {_kind(content)}")
        _check_unicode(content, name)
    last = given[-1]
    if last["role"] == "assistant":
        raise _BadRowError(f"the last of {column!r} is the assistant's; there is nothing left for the student to say")
    if last["role"] == "user" and not last["content"].strip():
        raise _BadRowError(f"the last of {column!r}, the user's, is empty")
    return tuple(given)


def _check_id(values: Mapping[str, Any], column: str) -> str:
    """The id as text, or empty where none is given."""
    value = values.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _BadRowError(f"{column!r} must be text or a whole number, not {_kind(value)}")
    return _check_unicode(str(value), column)


def _check_text(values: Mapping[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _BadRowError(f"{column!r} must be text, not {_kind(value)}")
    return _check_unicode(value, column)


def _check_ground_truth(values: Mapping[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, bool):
        # "True", "true", "yes"? Graders compare text, so the file has to say which.
        raise _BadRowError(f"{column!r} is true or false; write the answer as text")
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
    return _check_unicode(text, column)


def _check_unicode(text: str, name: str) -> str:
    """Refuses half of a surrogate pair, which JSON can spell (``\\ud800``) but no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{name} holds an unpaired surrogate at character {error.start + 1}") from None
    return text


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), (str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")
