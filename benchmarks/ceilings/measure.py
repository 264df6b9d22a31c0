"""How a measurement is taken and told: warm-up, repeats, the median and its range, beside what would be possible."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Group = Callable[[], Iterable["Row"]]
"""A group of measurements; yields rows as they come."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: what of a step it is.
        case: shapes and settings.
        unit: of ``median``, ``low``, ``high`` and ``ceiling``.
        median: over the repeats.
        low: the smallest repeat.
        high: the largest one.
        ceiling: what the machine, or a target, would allow; None: nothing to hold against.
        rate: whether more is better (GB/s) and not less (ms).
        note: what else is worth knowing.
        details: further figures, for the JSON alone.
    """

    part: str
    case: str
    unit: str
    median: float
    low: float
    high: float
    ceiling: float | None = None
    rate: bool = False
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def fraction(self) -> float | None:
        """How much of the ceiling is reached: 1 is all of it."""
        if not self.ceiling or not self.median:
            return None
        return self.median / self.ceiling if self.rate else self.ceiling / self.median


def row(
    part: str,
    case: str,
    unit: str,
    values: Sequence[float],
    ceiling: float | None = None,
    *,
    rate: bool = False,
    note: str = "",
    details: Mapping[str, float] | None = None,
) -> Row:
    """Sum up repeats."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return Row(part, case, unit, middle, low, high, ceiling, rate, note, dict(details or {}))


def seconds(work: Callable[[], object], repeats: int = 5, at_least: float = 0.02) -> list[float]:
    """Seconds of one call of ``work``, once for each repeat, after a warm-up.

    Args:
        work: what is measured.
        repeats: how many figures are wanted.
        at_least: a repeat consists of as many calls as take this many seconds, so that the clock does not matter.
    """
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    if first < at_least:
        began = time.perf_counter()
        work()
        first = time.perf_counter() - began
    calls = max(1, int(at_least / max(first, 1e-7)))
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        out.append((time.perf_counter() - began) / calls)
    return out


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| part | case | measured | min to max | ceiling | fraction | note |", "|---|---|---:|---:|---:|---:|---|"]
    for r in rows:
        ceiling = "" if r.ceiling is None else f"{short(r.ceiling)} {r.unit}"
        fraction = "" if r.fraction is None else f"{r.fraction:.0%}"
        spread = f"{short(r.low)} to {short(r.high)}"
        lines.append(
            f"| {r.part} | {r.case} | {short(r.median)} {r.unit} | {spread} | {ceiling} | {fraction} | {r.note} |"
        )
    return "\n".join(lines) + "\n"


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3
    return f"{value:,.{max(0, digits)}f}"
