"""What goes into a reward, what comes out, and the base class of the workers between.

No Ray here: whoever places a worker wraps the class with ``ray.remote`` as an async actor. All three data types are
plain and picklable.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from roll_opd.errors import ConfigError, RollOPDError

logger = logging.getLogger(__name__)

NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True)
class RewardItem:
    """One finished response to be graded."""

    id: str
    """The trajectory's stable id; errors and results carry it."""
    response: str
    """What the student wrote, decoded, without the prompt."""
    ground_truth: str | None
    """The row's reference answer; ``None`` where the row has none."""
    prompt: str = ""
    tag: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    """The whole data row, for rewards that need more than an answer (test cases, rubrics): the fields that
    data/README.md lists, None where the row does not give them, and its other columns under their names."""


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one item."""

    id: str
    reward: float
    """0.0 whenever ``error`` is set."""
    correct: bool | None = None
    """``None`` when there is no verdict: the reward has no notion of right and wrong, or grading failed."""
    error: str | None = None
    """Why there is no verdict, in one line; ``None`` when grading worked, whatever the verdict."""
    seconds: float = 0.0
    """Time spent on this item alone: waiting for a free grader and starting one are not in it."""


class RewardWorker(ABC):
    """Grades items. A subclass implements :meth:`grade_one`, and :meth:`close` if it holds anything.

    Args:
        name: key of this reward under ``rewards:`` in the config; used in messages.
        settings: the reward's own settings, plain values. A subclass reads each through :meth:`setting`.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.settings = dict(settings)

    async def grade(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Grade the items side by side; results come in the order of ``items``.

        A bad item never raises: it gets reward 0.0, ``correct=None`` and an ``error``. So does one whose reward is not
        a finite number. Numbers and truth values of other libraries become Python's.

        Raises:
            RollOPDError: the fault is not of an item but of the installation, for example a grader that cannot start.
                Rewarding every answer with 0.0 would then be worse than stopping.
        """
        results = await asyncio.gather(*(self._grade_or_error(item) for item in items), return_exceptions=True)
        graded: list[RewardResult] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            graded.append(result)
        return graded

    @abstractmethod
    async def grade_one(self, item: RewardItem) -> RewardResult:
        """Grade one item. What it raises becomes the item's ``error``; a :class:`RollOPDError` stops the batch."""

    def close(self) -> None:  # noqa: B027  optional: most rewards hold nothing
        """Release what the worker holds; safe to call twice. Grading afterwards is an error."""

    def setting(self, key: str, default: NumberT, minimum: float | None = None) -> NumberT:
        """One numeric setting, of the type of its default.

        Raises:
            ConfigError: the value is not a finite number of that type, or is below ``minimum``.
        """
        value = self.settings.get(key, default)
        wanted = int if isinstance(default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "an integer" if isinstance(default, int) else "a number"
            raise ConfigError(f"rewards.{self.name}.{key}", f"must be {kind}, got {value!r}")
        if minimum is not None and not minimum <= value < float("inf"):
            raise ConfigError(f"rewards.{self.name}.{key}", f"must be at least {minimum:g} and finite, got {value!r}")
        return type(default)(value)

    def reject_unknown_settings(self, known: Sequence[str]) -> None:
        """Raise :class:`ConfigError` for a key outside ``known``, naming the nearest known one."""
        for key in self.settings:
            if key not in known and key != "timeout":  # every reward is given its `reward_timeout`
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}"
                raise ConfigError(f"rewards.{self.name}.{key}", f"unknown setting of {type(self).__name__}; {hint}")

    async def _grade_or_error(self, item: RewardItem) -> RewardResult:
        started = time.monotonic()
        try:
            result = _in_plain_values(await self.grade_one(item))
            if result.error is None and not math.isfinite(result.reward):
                # One NaN among a group's rewards would make NaN of the advantages of the whole group.
                result = RewardResult(item.id, 0.0, error="reward is not finite", seconds=result.seconds)
        except RollOPDError:
            raise
        except Exception as error:
            # Policy: drop and count. A reward is anybody's code over anything a model may write, so the faults cannot
            # be listed by type. The item loses its reward, the caller counts the errors, the traceback is in the log.
            logger.warning("reward %s: item %s cannot be graded", self.name, item.id, exc_info=True)
            message = f"{type(error).__name__}: {error}"
            return RewardResult(item.id, 0.0, error=message, seconds=time.monotonic() - started)
        if result.error is not None:
            logger.warning("reward %s: item %s: %s", self.name, item.id, result.error)
        return result


def _in_plain_values(result: RewardResult) -> RewardResult:
    """Turn what a NumPy or torch function returned into plain values, which every file of samples can hold."""
    if result.error is not None:
        return result
    correct = None if result.correct is None else bool(result.correct)
    return replace(result, reward=float(result.reward), correct=correct)
