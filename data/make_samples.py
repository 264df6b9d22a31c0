"""Makes the sample files of this folder, always the same bytes.

    python data/make_samples.py [--gsm8k path/to/gsm8k/train.jsonl] [--output_dir data]

The files of our own writing need nothing. ``gsm8k_sample.jsonl`` is made when ``--gsm8k`` names the original file of
the training split; the licence that must stand beside that file is copied as ``LICENSE.gsm8k``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from convert_gsm8k import INSTRUCTION, MalformedLineError, convert_file, write_rows

logger = logging.getLogger("make_samples")

NUM_GSM8K_ROWS = 50


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _messages_list() -> list[dict[str, Any]]:
    """Conversations as lists: one turn, a system message, several turns, the result of a tool."""
    conversations: list[tuple[list[dict[str, str]], Any]] = [
        ([_user(f"What is 17 + 26? {INSTRUCTION}")], "43"),
        ([_system("You are a careful calculator."), _user(f"What is 9 times 12? {INSTRUCTION}")], 108),
        (
            [
                _user("A shelf holds 8 books. How many books do 5 shelves hold?"),
                _assistant("5 shelves hold 5 · 8 = \\boxed{40} books."),
                _user(f"And how many are left when 13 are lent out? {INSTRUCTION}"),
            ],
            "27",
        ),
        (
            [
                _system("A calculator's results reach you as tool messages."),
                _user(f"What is 1234 · 5678, rounded to the nearest thousand? {INSTRUCTION}"),
                _assistant("calculator: 1234 * 5678"),
                {"role": "tool", "content": "7006652"},
            ],
            7007000,
        ),
        ([_user("Sort these numbers in ascending order: 7 2 9 4. Put the answer within \\boxed{}.")], [2, 4, 7, 9]),
        ([_user(f"Combien font trois quarts, écrits en nombre décimal ? {INSTRUCTION}")], 0.75),
    ]
    return [
        {
            "id": f"messages-list-{number}",
            "source": "roll_opd",
            "difficulty": 1,
            "messages": messages,
            "ground_truth": truth,
            "tag": "math_rule",
        }
        for number, (messages, truth) in enumerate(conversations, start=1)
    ]


def _messages_string() -> list[dict[str, Any]]:
    """The same as JSON text, as files write it whose columns have one type each (ROLL's do)."""
    conversations = [
        ([_user(f"How many sides do 6 triangles have together? {INSTRUCTION}")], "18"),
        ([_system("Answer briefly."), _user(f"What is 100 - 37? {INSTRUCTION}")], "63"),
        ([_user(f"A train leaves at 10:40 and arrives at 12:05. How many minutes is that? {INSTRUCTION}")], "85"),
        ([_user(f'How many letters has the word "distillation"? {INSTRUCTION}')], "12"),
    ]
    return [
        {
            "id": str(number),
            "source": "roll_opd",
            "difficulty": "easy",
            "prompt": "",
            "messages": json.dumps(messages, ensure_ascii=False),
            "ground_truth": truth,
            "test_cases": "",
            "tag": "math_rule",
        }
        for number, (messages, truth) in enumerate(conversations)
    ]


def _prompts() -> list[dict[str, Any]]:
    """Bare prompts: with everything, without an answer, without anything else, with a column of the user's own."""
    return [
        {
            "id": "prompt-1",
            "prompt": f"What is 12 + 30? {INSTRUCTION}",
            "ground_truth": "42",
            "hint": "Add the tens first.",
            "tag": "math_rule",
        },
        {"id": "prompt-2", "prompt": "Explain in two sentences why the sky is blue.", "tag": "general"},
        {"prompt": "Name three prime numbers above 50."},
        {"id": 4, "prompt": "Write a limerick about a patient teacher.", "tag": "general", "language": "en"},
    ]


def _code() -> list[dict[str, Any]]:
    """Programs to write, with the runs that check them."""
    tasks: list[tuple[str, list[tuple[str, str]]]] = [
        ("reads two whole numbers from one line and prints their sum", [("1 2\n", "3\n"), ("-5 5\n", "0\n")]),
        ("reads a line of text and prints it reversed", [("abc\n", "cba\n"), ("level\n", "level\n")]),
        ("reads a whole number n and prints 'even' or 'odd'", [("4\n", "even\n"), ("7\n", "odd\n"), ("0\n", "even\n")]),
    ]
    return [
        {
            "id": f"code-{number}",
            "source": "roll_opd",
            "difficulty": 1,
            "prompt": f"Write a Python program that {task}. Give the program in one ```python block.",
            "test_cases": [{"input": given, "output": wanted} for given, wanted in runs],
            "tag": "code_sandbox",
        }
        for number, (task, runs) in enumerate(tasks, start=1)
    ]


OWN_FILES = {
    "messages_list_sample.jsonl": _messages_list,
    "messages_string_sample.jsonl": _messages_string,
    "prompt_sample.jsonl": _prompts,
    "code_sample.jsonl": _code,
}


def gsm8k_sample(path: Path) -> list[dict[str, Any]]:
    """Rows spread evenly over the file, in its order.

    Raises:
        MalformedLineError: a line that is not GSM8K's.
        OSError: the file cannot be read.
    """
    rows = list(convert_file(path))
    return rows[:: max(1, len(rows) // NUM_GSM8K_ROWS)][:NUM_GSM8K_ROWS]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the sample files of data/.")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl, with its LICENSE in the same folder")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="default: this script's folder")
    args = parser.parse_args(argv)

    made: dict[str, list[dict[str, Any]]] = {name: make() for name, make in OWN_FILES.items()}
    try:
        if args.gsm8k is None:
            logger.info("gsm8k_sample.jsonl is left as it is: no --gsm8k")
        else:
            made["gsm8k_sample.jsonl"] = gsm8k_sample(args.gsm8k)
            # The contents alone: the original may be read-only, and its copy should not be.
            shutil.copyfile(args.gsm8k.parent / "LICENSE", args.output_dir / "LICENSE.gsm8k")
        for name, rows in made.items():
            write_rows(args.output_dir / name, rows)
            logger.info("%s: %d rows", args.output_dir / name, len(rows))
    except (MalformedLineError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(main())
