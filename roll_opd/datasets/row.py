"""One row of data, and the checks that it passes whatever file it comes from."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

ROLES = ("system", "user", "assistant", "tool")
"""The roles that a message may have."""


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
    """The file that the row was read from, as it was found; for a data set of a hub, ``name[split]``."""
    line: int
    """Line in that file, from 1, blank lines counted; without lines, the number of the row."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Columns of the file that have no field here, unchanged; those that are null are left out."""

    @property
    def where(self) -> str:
        """``file:line``, as error messages begin."""
        return f"{self.file}:{self.line}"

    @property
    def columns(self) -> dict[str, Any]:
        """Every column: those of :class:`Columns` under its names, None where not given, and the others as they are."""
        return {**self.extra, **{column.name: getattr(self, column.name) for column in dataclasses.fields(Columns)}}


class BadRowError(Exception):
    """A row that fails a check; the message is the problem without the place."""


# What a reader yields for each row: its number from 1, and its columns, its problem, or None for a blank line.
Lines = Iterator[tuple[int, dict[str, Any] | BadRowError | None]]


def check_row(values: Mapping[str, Any], columns: Columns, *, index: int, file: str, stem: str, line: int) -> Row:
    """Turns the columns of one line into a row.

    Args:
        values: the columns by their name in the file; None is "not given".
        columns: what the columns are called.
        index: position among the accepted rows.
        file: what the row was read from, as error messages name it.
        stem: begins the id of a row that has none.
        line: number of the row, from 1.

    Raises:
        BadRowError: the first check that fails.
    """
    messages, prompt = _check_input(values, columns)
    known = set(dataclasses.asdict(columns).values())
    return Row(
        index=index,
        id=_check_id(values, columns.id) or f"{stem}:{line}",
        tag=_check_text(values, columns.tag) or "",
        messages=messages,
        prompt=prompt,
        ground_truth=_check_ground_truth(values, columns.ground_truth),
        source=_check_text(values, columns.source),
        difficulty=values.get(columns.difficulty),
        test_cases=values.get(columns.test_cases),
        hint=values.get(columns.hint),
        file=file,
        line=line,
        extra={name: value for name, value in values.items() if name not in known and value is not None},
    )


def _check_input(values: Mapping[str, Any], columns: Columns) -> tuple[tuple[dict[str, Any], ...] | None, str | None]:
    """Returns the messages and the prompt, of which at least one is given."""
    given, prompt = values.get(columns.messages), values.get(columns.prompt)
    if given is not None and given != "":  # files with every column in every row write empty text for "none"
        # A prompt beside messages is not used, so its form does not matter.
        return _check_messages(given, columns.messages), prompt if isinstance(prompt, str) else None
    if prompt is None:
        raise BadRowError(f"neither {columns.messages!r} nor {columns.prompt!r} is given")
    if isinstance(prompt, list):
        raise BadRowError(f"{columns.prompt!r} must be text; a list of messages belongs in {columns.messages!r}")
    if not isinstance(prompt, str):
        raise BadRowError(f"{columns.prompt!r} must be text, not {kind_of(prompt)}")
    if not prompt.strip():
        raise BadRowError(f"{columns.prompt!r} is empty")
    _check_unicode(prompt, columns.prompt)
    return None, prompt


def _check_messages(given: Any, column: str) -> tuple[dict[str, Any], ...]:
    if isinstance(given, str):
        given = parse_json(given, f"{column!r} is text but not valid JSON")
    if not isinstance(given, list):
        raise BadRowError(f"{column!r} must be a list of messages or such a list as JSON text, not {kind_of(given)}")
    if not given:
        raise BadRowError(f"{column!r} is an empty list")
    for number, message in enumerate(given, start=1):
        name = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            raise BadRowError(f"{name} must be an object with role and content, not {kind_of(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRowError(f"{name} has the role {reprlib.repr(role)}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRowError(f"{name} must have text as content, not {kind_of(content)}")
        _check_unicode(content, name)
    last = given[-1]
    if last["role"] == "assistant":
        raise BadRowError(f"the last of {column!r} is the assistant's; there is nothing left for the student to say")
    if last["role"] == "user" and not last["content"].strip():
        raise BadRowError(f"the last of {column!r}, the user's, is empty")
    # A table has the same keys in every message and writes null where one is not given; templates ask for the key.
    return tuple({key: value for key, value in message.items() if value is not None} for message in given)


def _check_id(values: Mapping[str, Any], column: str) -> str:
    """The id as text, or empty where none is given."""
    value = values.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRowError(f"{column!r} must be text or a whole number, not {kind_of(value)}")
    return _check_unicode(str(value), column)


def _check_text(values: Mapping[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} must be text, not {kind_of(value)}")
    return _check_unicode(value, column)


def _check_ground_truth(values: Mapping[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, bool):
        # "True", "true", "yes"? Graders compare text, so the file has to say which.
        raise BadRowError(f"{column!r} is true or false; write the answer as text")
    if not isinstance(value, (str, int, float, list, dict)):
        raise BadRowError(f"{column!r} must be text, a number, a list or an object, not {kind_of(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(f"{column!r} is {value}, which is no answer; leave it empty where there is none")
    if not isinstance(value, (list, dict)):
        return _check_unicode(str(value), column)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # bytes or NaN inside, which JSON lines cannot hold and tables can
        raise BadRowError(f"{column!r} cannot be written as JSON: {error}") from None
    return _check_unicode(text, column)


def _check_unicode(text: str, name: str) -> str:
    """Refuses half of a surrogate pair, which JSON can spell (``\\ud800``) but no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{name} holds an unpaired surrogate at character {error.start + 1}") from None
    return text


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (str, "text"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (bytes, "binary data"),
        (type(None), "null"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")


def parse_json(text: str, problem: str) -> Any:
    """Parses strict JSON: ``NaN`` and ``Infinity``, which Python would take, are refused."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{problem}: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a constant refused above, or an integer of thousands of digits
        raise BadRowError(f"{problem}: {error}") from None
    except RecursionError:
        raise BadRowError(f"{problem}: nested too deeply") from None
