"""Small helpers that put a field's range or parser beside its declaration.

The builder reads them from ``dataclasses.Field.metadata``, so that a rule about one field is written once, where the
field is, and every error carries the field's full path without any code at the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

RANGE = "roll_opd.range"
PARSE = "roll_opd.parse"
# Torch and NumPy take seeds as signed 64-bit numbers.
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number; ``None`` means unbounded on that side."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    lt: float | None = None

    def problem(self, value: float) -> str | None:
        """Return what is wrong with ``value`` as a phrase, or None when it is inside the range."""
        bounds = [
            (">", self.gt, self.gt is None or value > self.gt),
            (">=", self.ge, self.ge is None or value >= self.ge),
        ]
        bounds += [
            ("<=", self.le, self.le is None or value <= self.le),
            ("<", self.lt, self.lt is None or value < self.lt),
        ]
        if all(holds for _, _, holds in bounds):
            return None
        wanted = " and ".join(f"{sign} {_number(bound)}" for sign, bound, _ in bounds if bound is not None)
        return f"must be {wanted}, got {value!r}"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def ranged(
    default: Any, *, gt: float | None = None, ge: float | None = None, le: float | None = None, lt: float | None = None
) -> Any:
    """Declare a numeric field with its default and its bounds."""
    return dataclasses.field(default=default, metadata={RANGE: Range(gt, ge, le, lt)})


def parse_with(parser: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Field metadata: the raw value passes through ``parser(value, path)`` before its type is checked."""
    return {PARSE: parser}


def as_list(value: Any, path: str) -> Any:
    """Wrap a lone string into a list: YAML users write one name where several are possible."""
    return [value] if isinstance(value, str) else value
