r"""Mathematical answers in ``\boxed{}``, compared by math-verify with the row's ground truth.

What counts is math-verify's view of equality: ``0.5`` is ``\frac{1}{2}``, ``1,000`` is ``1000``, floats are rounded
to 6 places, ``50\%`` is both ``0.5`` and ``50``, sets have no order and tuples do. Both sides are read in the same way.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from roll_opd.rewards.base import RewardItem, RewardResult, RewardWorker
from roll_opd.rewards.process_pool import ProcessPool

_BOXED = re.compile(r"\\f?boxed\s*\{")
# Up to 15 digits: far inside what both ways of comparing treat exactly.
_PLAIN_INTEGER = re.compile(r"-?[0-9]{1,15}")
_WARM_UP = {"response": r"\boxed{\frac{1}{2}}", "ground_truth": "0.5"}


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` of ``text``, trimmed; braces may nest.

    Returns:
        ``None`` without a box, with an empty one, and when the last one is never closed (a response that was cut while
        it answered): an earlier box is then an intermediate result. Time is linear in the length.
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    position = starts[-1]
    while position < len(text):
        char = text[position]
        if char == "\\":  # an escaped brace is a character of a set, not a delimiter
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[starts[-1] : position].strip() or None
        position += 1
    return None


def reference_answer(ground_truth: str) -> str:
    r"""The answer inside a ground truth, which may be raw (``72``, ``\frac{1}{2}``), in ``$...$`` or in a box.

    Raises:
        ValueError: nothing is left.
    """
    answer = extract_boxed(ground_truth) or ground_truth.strip().strip("$").strip()
    if not answer:
        raise ValueError("the ground truth is empty")
    return answer


def compare_cheaply(answer: str, reference: str) -> bool | None:
    """The verdict where it needs no algebra, else ``None``: equal strings are right, plain integers are compared.

    It agrees with :func:`grade_math` on integers, and on equal strings that math-verify can read; equal strings that it
    cannot read are right here. Safe on any input, so it may run in the caller's own process.
    """
    if answer == reference:
        return True
    if _PLAIN_INTEGER.fullmatch(answer) and _PLAIN_INTEGER.fullmatch(reference):
        return int(answer) == int(reference)
    return None


def grade_math(response: str, ground_truth: str) -> dict[str, Any]:
    r"""Grade one response with math-verify. Only for a process that can be killed: a short answer can take for ever.

    Args:
        response: the student's text; its last ``\boxed{}`` is the answer.
        ground_truth: see :func:`reference_answer`.

    Returns:
        ``{"reward": 1.0 or 0.0, "correct": bool, "answer": content of the box or None}``.

    Raises:
        ValueError: the ground truth is empty, or math-verify reads nothing in it.
    """
    # Here, not above: it takes 1.5 s and 60 MB, and the worker's own process never needs it.
    from math_verify import verify

    # It warns in every process that its own deadlines are off, which are signals that a busy interpreter does not
    # handle in time. The pool's are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reference = _parse(reference_answer(ground_truth))
    if not reference:
        raise ValueError(f"the ground truth {ground_truth!r} is not a mathematical answer")
    answer = extract_boxed(response)
    correct = answer is not None and verify(reference, _parse(answer), timeout_seconds=None)
    return {"reward": float(correct), "correct": correct, "answer": answer}


def _parse(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    number = re.fullmatch(r"(.*?)\s*\\?%", answer, flags=re.DOTALL)
    if number:
        # math-verify 0.9 cannot read a percent sign inside a box; after a formula it knows what to make of it.
        text = f"${number[1].strip('$')}$%"
    else:
        text = rf"\boxed{{{answer}}}"
    config = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parsed: list[Any] = parse(text, config, parsing_timeout=None)
    return parsed


class MathRuleRewardWorker(RewardWorker):
    r"""1.0 for a right answer in the last ``\boxed{}``, else 0.0.

    No box is a wrong answer, not an error. Errors are a row without a usable ground truth, an answer that takes longer
    than ``timeout``, and one that kills its grader.

    Fast path: an answer that equals the reference as a string, and plain integers, are settled in this process
    (:func:`compare_cheaply`), which saves a round trip for most of what arithmetic data sets ask. All else goes to a
    child process.

    Settings:
        num_processes: child processes, default 1. They start with the first item that needs one.
        timeout: seconds for one item in a child, default 5.
        memory_mb: address space of a child in MiB, default 2048.
        start_timeout: seconds for a child to import math-verify, default 60.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        super().__init__(name, settings)
        self.reject_unknown_settings(("num_processes", "timeout", "memory_mb", "start_timeout"))
        self._pool = ProcessPool(
            f"{__name__}.{grade_math.__name__}",
            num_processes=self.setting("num_processes", 1, minimum=1),
            timeout=self.setting("timeout", 5.0, minimum=0.1),
            memory_mb=self.setting("memory_mb", 2048, minimum=256),
            start_timeout=self.setting("start_timeout", 60.0, minimum=1.0),
            warm_up=_WARM_UP,
        )

    async def grade_one(self, item: RewardItem) -> RewardResult:
        """Grade one item; see the class."""
        started = time.monotonic()
        if not isinstance(item.ground_truth, str) or not item.ground_truth.strip():
            # Names the row as the data has it: the item's id is the trajectory's.
            row = item.row.get("id", item.id)
            return RewardResult(item.id, 0.0, error=f"row {row!r} has no ground_truth, which this reward needs")
        answer = extract_boxed(item.response)
        verdict = False if answer is None else compare_cheaply(answer, reference_answer(item.ground_truth))
        if answer is None or verdict is not None:
            seconds = time.monotonic() - started
            return RewardResult(item.id, float(bool(verdict)), correct=bool(verdict), seconds=seconds)

        # Only the box travels: a response may be long, and the rest of it is not looked at.
        outcome = await self._pool.call(response=rf"\boxed{{{answer}}}", ground_truth=item.ground_truth)
        if outcome.error is not None:
            return RewardResult(item.id, 0.0, error=outcome.error, seconds=outcome.seconds)
        return RewardResult(item.id, outcome.value["reward"], correct=outcome.value["correct"], seconds=outcome.seconds)

    def close(self) -> None:
        """Kill the child processes."""
        self._pool.close()
