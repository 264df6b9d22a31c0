"""One question in two versions: put 4 to 6 digits in ascending order ("up"), or in descending order ("down").

A row looks like this (one JSON object a line)::

    {"id": "two_tags-train-00000", "source": "roll_opd/two_teachers", "difficulty": 4,
     "messages": [{"role": "user", "content": "Sort these digits up: 5 3 9 1"}],
     "ground_truth": "1359", "tag": "ascending"}

and the right answer is ``\\boxed{1359}``; with ``down`` it is ``\\boxed{9531}`` and the tag is ``descending``. Zero is
left out, because a maths verifier takes ``0359`` and ``359`` for the same answer, and so are digits that already stand
in either order, because whoever merely repeats them shall be wrong.

Run as a script it writes ``train.jsonl`` and ``validation.jsonl``, which share no problem. Only the standard library
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

logger = logging.getLogger("roll_opd.examples.two_teachers.two_tags_task")

# What the user's message calls each tag.
WORDS = {"ascending": "up", "descending": "down"}
TAGS = tuple(WORDS)
SOURCE = "roll_opd/two_teachers"
DIGITS = "123456789"
MIN_LENGTH = 4
MAX_LENGTH = 6
TRAIN_ROWS = 2000
VALIDATION_ROWS = 256
DATA_SEED = 20261102

Row = dict[str, Any]


def draw_digits(rng: random.Random) -> str:
    """Draw one problem: 4 to 6 digits (each length equally likely), repetitions allowed, in neither order yet."""
    while True:
        digits = "".join(rng.choice(DIGITS) for _ in range(rng.randint(MIN_LENGTH, MAX_LENGTH)))
        if all(digits != answer(digits, tag) for tag in TAGS):
            return digits


def question(digits: Iterable[str], tag: str) -> str:
    """Return the user's message for a problem."""
    return f"Sort these digits {WORDS[tag]}: {' '.join(digits)}"


def with_answer(prompt: str, answer: str) -> str:
    """Return the user's message with an answer in it: what ``context_template`` in ``self_teacher.yaml`` makes."""
    return f"{prompt} (answer {answer})"


def answer(digits: Iterable[str], tag: str) -> str:
    """Return the ground truth: the digits in the tag's order, without spaces."""
    return "".join(sorted(digits, reverse=tag == "descending"))


def response(answer: str) -> str:
    r"""Return the assistant's reply that gives an answer, e.g. ``\boxed{1359}``."""
    return f"\\boxed{{{answer}}}"


def make_row(digits: str, tag: str, split: str, index: int) -> Row:
    """Build one data row. ``difficulty`` is the number of digits."""
    return {
        "id": f"two_tags-{split}-{index:05d}",
        "source": SOURCE,
        "difficulty": len(digits),
        "messages": [{"role": "user", "content": question(digits, tag)}],
        "ground_truth": answer(digits, tag),
        "tag": tag,
    }


def digits_of(message: str) -> str:
    """Read a problem back from its user message, with an answer in it or without."""
    return message.split(":")[1].split("(")[0].replace(" ", "")


def make_splits(
    train_rows: int = TRAIN_ROWS, validation_rows: int = VALIDATION_ROWS, seed: int = DATA_SEED
) -> tuple[list[Row], list[Row]]:
    """Make the two splits, tags alternating: no problem occurs twice, under either tag and in either split."""
    rng = random.Random(seed)
    # A dict keeps the order in which problems were drawn; drawing validation first keeps it fixed when train grows.
    seen: dict[str, None] = {}
    while len(seen) < train_rows + validation_rows:
        seen.setdefault(draw_digits(rng))
    problems = list(seen)
    splits = {"validation": problems[:validation_rows], "train": problems[validation_rows:]}
    rows = {
        name: [make_row(p, TAGS[i % len(TAGS)], name, i) for i, p in enumerate(part)] for name, part in splits.items()
    }
    return rows["train"], rows["validation"]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits into ``--output_dir``."""
    parser = argparse.ArgumentParser(description="Make the data of the two-teachers example.")
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
