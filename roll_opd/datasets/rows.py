"""Reads the rows of data files and checks each one.

Every row that comes out can be turned into a prompt; every row that cannot is counted and named as ``file:line``.
The numbers of a :class:`ReadReport` add up, so that no row is ever lost in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from roll_opd.datasets.row import BadRowError, Columns, Row, check_row
from roll_opd.datasets.sources import DatasetType, find_source
from roll_opd.errors import DataError

__all__ = ["Columns", "MAX_EXAMPLES", "ReadReport", "Row", "read_rows"]

MAX_EXAMPLES = 5
"""How many bad rows a report quotes; the rest are only counted."""


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What became of the rows of the files: ``read == kept + bad``; blank lines are not rows. The caller logs it."""

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

    @property
    def is_complete(self) -> bool:
        """Whether every row was kept; the report of a set that is not complete is worth a warning."""
        return self.bad == 0

    def __str__(self) -> str:
        text = (
            f"{self.read} rows read from {len(self.files)} file(s): {self.kept} kept, {self.bad} bad "
            f"({self.blank} blank lines)"
        )
        return f"{text}; skipped, for example: {'; '.join(self.examples)}" if self.bad else text


def read_rows(
    files: Sequence[str | Path],
    *,
    columns: Columns | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dataset_dir: str | Path | None = None,
    dataset_type: DatasetType = "json",
    split: str | None = None,
    subset: str | None = None,
) -> tuple[list[Row], ReadReport]:
    """Reads and checks all rows of ``files``, in the order given.

    Args:
        files: names of data files or data sets; :func:`~roll_opd.datasets.sources.find_source` says what a name can be
            and where it is looked for.
        columns: what the columns are called in these files; by default as the fields of :class:`Row`.
        on_bad_row: ``error`` stops, after reading everything, with the first bad row and the count of the others;
            ``skip`` leaves bad rows out, counts them and quotes some in the report.
        dataset_dir: a folder in which relative names are looked for too.
        dataset_type: the format; ``json``, the default, leaves it to each file's ending.
        split: of a data set that ``datasets`` loads; None is ``train``.
        subset: configuration of a hub's data set.

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
    # All are found, and every ending is checked, before a long file is read.
    sources = [find_source(name, dataset_dir, dataset_type=dataset_type, split=split, subset=subset) for name in files]

    rows: list[Row] = []
    examples: list[str] = []
    num_read = num_blank = num_bad = 0
    for source in sources:
        first_line_of: dict[str, int] = {}
        num_before = num_read
        for line, values in source.read():
            if values is None:
                num_blank += 1
                continue
            num_read += 1
            try:
                if isinstance(values, BadRowError):
                    raise values
                row = check_row(values, columns, index=len(rows), file=source.name, stem=source.stem, line=line)
                if row.id in first_line_of:
                    raise BadRowError(
                        f"id {row.id!r} is already used on line {first_line_of[row.id]}; ids are unique in a file"
                    )
            except BadRowError as problem:
                num_bad += 1
                if len(examples) < MAX_EXAMPLES:
                    examples.append(f"{source.name}:{line}: {problem}")
                continue
            first_line_of[row.id] = line
            rows.append(row)
        if num_read == num_before:
            raise DataError(f"{source.name}: the file holds no rows")

    report = ReadReport(
        files=tuple(source.name for source in sources),
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
    return rows, report


def _raise_bad_rows(report: ReadReport) -> NoReturn:
    """Raises one line that begins with the first bad row and ends with the way out."""
    message = report.examples[0]
    if report.bad > 1:
        message += f" [{report.bad} bad rows of {report.read}; also {'; '.join(report.examples[1:])}"
        message += "; ...]" if report.bad > len(report.examples) else "]"
    raise DataError(f"{message} (correct the data, or set data_args.on_bad_row: skip to leave bad rows out)")
