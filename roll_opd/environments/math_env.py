r"""Mathematical questions with one answer, in ``\boxed{}``.

With ``max_steps: 1`` an episode is one turn. With more, an answer ends it, and a turn without one is asked for it
again; a tool (:mod:`roll_opd.environments.tools`) gives the turns before the answer a purpose.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from roll_opd.errors import DataError, LaunchError
from roll_opd.rewards import math_rule_reward_worker as math_rule
from roll_opd.rewards.process_pool import Outcome, ProcessPool

P = ParamSpec("P")
R = TypeVar("R")

# The last line of GSM8K's solutions.
_GSM8K_ANSWER = re.compile(r"^[ \t]*####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class MathEnv:
    r"""One row of a file or data set is one episode: its question, then the student's turns until one has an answer.

    The answer of a turn is its last ``\boxed{}``, or without any box what stands behind ``####`` on the last such line,
    as in GSM8K. It is compared as the reward ``math_rule`` does it. What needs algebra is compared in a process that
    can be killed; an answer that takes it longer than 5 seconds, or kills it, is wrong (metric ``grading_failed``).

    Reward 1.0 for a right answer, which like a wrong one ends the episode. A turn without an answer gets 0.0 and
    ``action_is_valid: False``; it ends the episode if it is the last of ``max_steps``. ``info`` of a reset has the
    row's answer as ``ground_truth``, which a teacher's context may name.

    Args:
        dataset_name: a local file, a folder, or a data set on the Hugging Face hub.
        file_name: a local file (JSON lines, Parquet, CSV, Arrow); either this or ``dataset_name``.
        split: of a data set on the hub; ``train`` where there is none. A file has no splits.
        question_key: column of the question.
        answer_key: column of the answer: plain, in ``\boxed{}``, or a solution that ends with ``#### answer``.
        mode: ``train``: a seed stands for a row by its hash. ``val``: row ``seed`` modulo their number, so consecutive
            seeds take the rows in order.
        max_steps: turns of an episode, calls of tools not counted.
        seed: goes into the hash of ``train``.

    Raises:
        ValueError: a setting that cannot be.
        DataError: the data cannot be read, or a row lacks question or answer.
    """

    def __init__(
        self,
        dataset_name: str | None = None,
        file_name: str | None = None,
        split: str | None = None,
        question_key: str = "problem",
        answer_key: str = "answer",
        mode: Literal["train", "val"] = "train",
        max_steps: int = 1,
        seed: int = 0,
    ) -> None:
        if bool(dataset_name) == bool(file_name):
            raise ValueError("the math environment needs either dataset_name or file_name")
        if file_name and split:
            raise ValueError(f"split {split!r}: a data file has no splits; remove it")
        if mode not in ("train", "val"):
            raise ValueError(f"mode must be 'train' or 'val', got {mode!r}")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be an integer of at least 1, got {max_steps!r}")
        self._rows = _load_rows(str(dataset_name or file_name), bool(file_name), split, question_key, answer_key)
        self._mode = mode
        self._max_steps = max_steps
        self._seed = seed
        self._unseeded = itertools.count()
        self._ground_truth = ""
        self._turns = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Ask the question that the seed stands for; without a seed, those of 0, 1, 2, ..."""
        question, self._ground_truth = self._rows[self._row_of(next(self._unseeded) if seed is None else seed)]
        self._turns = 0
        return question, {"env_instruction": "", "ground_truth": self._ground_truth}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Grade the answer in the action; see the class.

        Raises:
            LaunchError: no process that grades can be started.
        """
        self._turns += 1
        answer = find_answer(action)
        if answer is None:
            last = self._turns >= self._max_steps
            observation = "" if last else "There is no answer in your message. Give your final answer in \\boxed{}."
            return observation, 0.0, last, False, _info(action_is_valid=False, success=False)
        correct = math_rule.compare_cheaply(answer, self._ground_truth)
        if correct is not None:
            return "", float(correct), True, False, _info(action_is_valid=True, success=correct, content=answer)
        outcome = _shared_grader().grade(rf"\boxed{{{answer}}}", self._ground_truth)
        correct = outcome.error is None and bool(outcome.value["correct"])
        info = _info(action_is_valid=True, success=correct, content=answer)
        info["metrics"]["grading_failed"] = outcome.error is not None
        return "", float(correct), True, False, info

    def close(self) -> None:
        """Nothing to let go of: the grading process belongs to all environments of this process, and ends with it."""

    def _row_of(self, seed: int) -> int:
        if self._mode == "val":
            return seed % len(self._rows)
        digest = hashlib.blake2b(f"{self._seed}/{seed}".encode("ascii"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % len(self._rows)


def find_answer(text: str) -> str | None:
    r"""The last ``\boxed{}`` of a text, or without any box the last ``#### answer``; None where there is neither."""
    boxed = math_rule.extract_boxed(text)
    if boxed is not None or "\\boxed" in text:  # a box that is empty or never closed is no answer
        return boxed
    lines = _GSM8K_ANSWER.findall(text)
    return lines[-1] if lines else None


def _info(*, action_is_valid: bool, success: bool, content: str = "") -> dict[str, Any]:
    return {
        "action_content": content,
        "metrics": {"action_is_valid": action_is_valid, "success": success},
        "metrics_agg_mode": {"action_is_valid": "mean", "success": "last"},
    }


def _one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` under a lock: before a cache is filled, threads that come together would all do the work."""
    lock = threading.Lock()

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return function(*args, **kwargs)

    return call


# --- rows ------------------------------------------------------------------------------------------------------------


@_one_at_a_time
@functools.lru_cache(maxsize=8)
def _load_rows(
    name: str, is_file: bool, split: str | None, question_key: str, answer_key: str
) -> tuple[tuple[str, str], ...]:
    """Question and answer of each row. Kept, because a process holds many environments of the same data."""
    path = Path(name).expanduser()
    rows: list[tuple[str, str]] = []
    for number, row in _read(name, path, is_file, split):
        values = []
        for key in (question_key, answer_key):
            value = row.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value.strip():
                columns = ", ".join(map(str, row)) or "none"
                raise DataError(
                    f"{name}:{number}: column {key!r} has no text (columns: {columns}); see question_key "
                    "and answer_key of the math environment"
                )
            values.append(value)
        solution = _GSM8K_ANSWER.findall(values[1])
        try:
            rows.append((values[0], math_rule.reference_answer(solution[-1] if solution else values[1])))
        except ValueError as error:
            raise DataError(f"{name}:{number}: {error}") from error
    if not rows:
        raise DataError(f"{name}: no rows")
    return tuple(rows)


def _read(name: str, path: Path, is_file: bool, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if is_file and not path.is_file():
        raise DataError(f"{name}: data file not found; tried {path.absolute()}")
    if path.is_file() and _FORMATS.get(path.suffix.lower()) == "json":
        yield from _read_json_lines(path)
        return
    import datasets  # slow to import, and JSON lines do not need it

    try:
        if path.is_file():
            if path.suffix.lower() not in _FORMATS:
                raise DataError(f"{name}: cannot tell the format; supported: {', '.join(_FORMATS)}")
            builder = _FORMATS[path.suffix.lower()]
            data = datasets.load_dataset(builder, data_files=str(path), split="train")
        else:
            data = datasets.load_dataset(str(path) if path.is_dir() else name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: `datasets` cannot load this data: {' '.join(str(error).split())}") from error
    yield from enumerate(data, start=1)


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a row must be a JSON object, one a line")
            yield number, row


# --- grading ---------------------------------------------------------------------------------------------------------


class _BlockingGrader:
    """The pool of killable processes, for callers that wait, from any thread.

    It has an event loop in a thread of its own, which lives as long as this process: a grader dies with the thread that
    started it, and starting one takes a second or two.
    """

    def __init__(self) -> None:
        self._pool = self._new_pool()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="math-grader", daemon=True).start()

    def grade(self, response: str, ground_truth: str) -> Outcome:
        """Compare; what goes wrong with the answer is in the outcome.

        Raises:
            LaunchError: no process can be started now; the next call tries again.
        """
        pool = self._pool
        call = pool.call(response=response, ground_truth=ground_truth)
        try:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result()
        except LaunchError:
            # A pool that could not start a process never tries again, but a busy machine becomes quiet.
            if self._pool is pool:
                self._pool = self._new_pool()
            raise

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            f"{math_rule.__name__}.{math_rule.grade_math.__name__}",
            warm_up={"response": r"\boxed{\frac{1}{2}}", "ground_truth": "0.5"},
        )


@_one_at_a_time
@functools.cache
def _shared_grader() -> _BlockingGrader:
    return _BlockingGrader()
