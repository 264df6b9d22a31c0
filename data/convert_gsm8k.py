"""Converts a file of GSM8K, as its authors publish it, to rows that roll_opd reads.

    python data/convert_gsm8k.py train.jsonl gsm8k_train.jsonl [--tag math_rule] [--limit N] [--id_prefix gsm8k]

Each line of the input holds ``question`` and ``answer``; the number after ``####`` in the answer becomes the ground
truth. A line of another form is an error that names it, and then no output is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("convert_gsm8k")

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class MalformedLineError(Exception):
    """A line that is not a question and an answer; the message begins with ``file:line``."""


def convert_line(text: str, line: int, *, tag: str = "math_rule", id_prefix: str = "gsm8k") -> dict[str, Any]:
    """Converts one line of GSM8K.

    Args:
        text: the line.
        line: its number from 1, which goes into the id.
        tag: the row's tag.
        id_prefix: what the id begins with; tells files apart that are used together.

    Raises:
        ValueError: the line is not an object with a question and an answer that ends in ``#### <number>``.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for name in ("question", "answer"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise ValueError(f"{name!r} must be text")
    _, mark, answer = values["answer"].rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError("'answer' must end in '#### <number>'")
    return {
        "id": f"{id_prefix}-{line}",
        "source": "gsm8k",
        "messages": [{"role": "user", "content": f"{values['question'].strip()}\n{INSTRUCTION}"}],
        "ground_truth": answer,
        "tag": tag,
    }


def convert_file(path: Path, **options: str) -> Iterator[dict[str, Any]]:
    """Converts the lines of a file one by one, blank lines apart; ``options`` are those of :func:`convert_line`.

    Raises:
        MalformedLineError: at the first line that cannot be converted.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield convert_line(raw.decode("utf-8"), line, **options)
            except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
                raise MalformedLineError(f"{path}:{line}: {error}") from error


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines; the file appears under its name only when it is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert GSM8K (question/answer) to the rows that roll_opd reads.")
    parser.add_argument("input", type=Path, help="a file of GSM8K: JSON lines with question and answer")
    parser.add_argument("output", type=Path, help="the file to write; replaced if it is there")
    parser.add_argument("--tag", default="math_rule", help="tag of every row (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="convert the first LIMIT rows only")
    parser.add_argument("--id_prefix", default="gsm8k", help="ids are <prefix>-<line> (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")

    rows: list[dict[str, Any]] = []
    try:
        if args.output.exists() and args.output.samefile(args.input):
            parser.error("OUTPUT is the same file as INPUT")
        for row in convert_file(args.input, tag=args.tag, id_prefix=args.id_prefix):
            rows.append(row)
            if len(rows) == args.limit:
                break
        if not rows:
            raise MalformedLineError(f"{args.input}: the file holds no rows")
        write_rows(args.output, rows)
    except (MalformedLineError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info("%d rows read from %s, %d rows written to %s", len(rows), args.input, len(rows), args.output)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(main())
