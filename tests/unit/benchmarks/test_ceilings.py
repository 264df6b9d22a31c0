"""What is said about a measurement; the measurements themselves need a quiet machine."""

from __future__ import annotations

import pytest

from benchmarks.ceilings.measure import row, seconds, short, table


def test_a_fraction_is_a_share_of_the_ceiling_whichever_way_is_better() -> None:
    rate = row("copy", "large", "GB/s", [3.0, 1.0, 2.0], 8.0, rate=True)
    time = row("step", "small", "ms", [30.0, 10.0, 20.0], 5.0)
    assert (rate.median, rate.low, rate.high, rate.fraction) == (2.0, 1.0, 3.0, 0.25)
    assert time.fraction == 0.25
    assert row("copy", "large", "GB/s", [1.0]).fraction is None


def test_a_table_has_a_line_for_each_row() -> None:
    lines = table([row("step", "small", "ms", [30.0, 10.0, 20.0], 5.0, note="slow")]).splitlines()
    assert lines[2:] == ["| step | small | 20.0 ms | 10.0 to 30.0 | 5.00 ms | 25% | slow |"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_three_digits(value: float, text: str) -> None:
    assert short(value) == text


def test_the_first_call_does_not_count() -> None:
    calls: list[int] = []
    assert len(seconds(lambda: calls.append(1), repeats=3, at_least=0.0)) == 3
    assert len(calls) == 4
