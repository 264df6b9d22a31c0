"""The quickstart's task: put 4 to 8 digits in ascending order.

A row looks like this (one JSON object a line)::

    {"id": "sort_digits-train-00000", "source": "roll_opd/quickstart", "difficulty": 4,
     "messages": [{"role": "user", "content": "Sort these digits: 5 3 9 1"}],
     "ground_truth": "1359", "tag": "sort_digits"}

and the right answer is ``\\boxed{1359}``. Zero is left out: a maths verifier compares numbers, and would take
``0359`` and ``359`` for the same answer.

Run as a script it writes ``train.jsonl`` and ``validation.jsonl``, which share no prompt. Only the standard library
is used, so that the data can be made again anywhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("roll_opd.examples.quickstart.task")

TAG = "sort_digits"
SOURCE = "roll_opd/quickstart"
PROMPT_HEAD = "Sort these digits:"
DIGITS = "123456789"
MIN_LENGTH = 4
MAX_LENGTH = 8
TRAIN_ROWS = 2000
VALIDATION_ROWS = 256
DATA_SEED = 20261101

Row = dict[str, Any]


def draw_digits(rng: random.Random) -> str:
    """Draw one problem: 4 to 8 digits (each length equally likely), repetitions allowed."""
    length = rng.randint(MIN_LENGTH, MAX_LENGTH)
    return "".join(rng.choice(DIGITS) for _ in range(length))


def question(digits: Iterable[str]) -> str:
    """Return the user's message for a problem."""
    return f"{PROMPT_HEAD} {' '.join(digits)}"


def answer(digits: Iterable[str]) -> str:
    """Return the ground truth: the digits in ascending order, without spaces."""
    return "".join(sorted(digits))


def response(digits: Iterable[str], descending: bool = False) -> str:
    r"""Return the assistant's right reply, e.g. ``\boxed{1359}``, or the one that is sorted the wrong way round."""
    ordered = answer(digits)
    return f"\\boxed{{{ordered[::-1] if descending else ordered}}}"


def make_row(digits: str, split: str, index: int) -> Row:
    """Build one data row. ``difficulty`` is the number of digits."""
    return {
        "id": f"{TAG}-{split}-{index:05d}",
        "source": SOURCE,
        "difficulty": len(digits),
        "messages": [{"role": "user", "content": question(digits)}],
        "ground_truth": answer(digits),
        "tag": TAG,
    }


def digits_of_row(row: Row) -> str:
    """Read a row's problem back from its user message."""
    content: str = row["messages"][0]["content"]
    return content.removeprefix(PROMPT_HEAD).replace(" ", "")


def make_splits(
    train_rows: int = TRAIN_ROWS, validation_rows: int = VALIDATION_ROWS, seed: int = DATA_SEED
) -> tuple[list[Row], list[Row]]:
    """Make the two splits: no problem occurs twice, neither within a split nor across the two."""
    rng = random.Random(seed)
    # A dict keeps the order in which problems were drawn; drawing validation first keeps it fixed when train grows.
    seen: dict[str, None] = {}
    while len(seen) < train_rows + validation_rows:
        seen.setdefault(draw_digits(rng))
    problems = list(seen)
    validation = [make_row(p, "validation", i) for i, p in enumerate(problems[:validation_rows])]
    train = [make_row(p, "train", i) for i, p in enumerate(problems[validation_rows:])]
    return train, validation


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits into ``--output_dir``."""
    parser = argparse.ArgumentParser(description="Make the quickstart's data.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "data")
    parser.add_argument("--seed", type=int, default=DATA_SEED)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    train, validation = make_splits(seed=args.seed)
    for name, rows in (("train", train), ("validation", validation)):
        path = args.output_dir / f"{name}.jsonl"
        write_rows(path, rows)
        logger.info("%s: %d rows", path, len(rows))


if __name__ == "__main__":
    main()
