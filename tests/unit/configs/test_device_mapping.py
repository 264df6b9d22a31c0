from __future__ import annotations

import pytest

from roll_opd.configs.device_mapping import format_devices, parse_device_mapping
from roll_opd.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        (None, None),
        ("list(range(0,8))", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("range(0,8,2)", [0, 2, 4, 6]),
        ("range(3)", [0, 1, 2]),
        ("range(3,0,-1)", [3, 2, 1]),
        ("[0,1,2]", [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("5", [5]),
        (5, [5]),
        ([3, 1], [3, 1]),
        (range(2), [0, 1]),
        ("list(range(0,4)) + list(range(8,12))", [0, 1, 2, 3, 8, 9, 10, 11]),
        (" [0] + list(range(2, 4)) + [7] ", [0, 2, 3, 7]),
    ],
)
def test_spellings(value, devices):
    assert parse_device_mapping(value, "x.device_mapping") == devices


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "names no device"),
        ([], "names no device"),
        ("range(0)", "names no device"),
        ("[0,0]", "more than once"),
        ("list(range(0,4)) + [3]", "device 3 appears more than once"),
        ("[-1]", "start at 0"),
        ([-1], "start at 0"),
        ([0.5], "whole numbers"),
        ([True], "whole numbers"),
        (["0"], "whole numbers"),
        ("all", "cannot read"),
        ("range(0,8", "cannot read"),
        ("range(0,8,0)", "step"),
        ("range(0, 10**9)", "cannot read"),
        ("range(0, 1000000000)", "more than the 65536"),
        ("range(0, 99999999999999999999)", "more than the 65536"),
        ("range(99999999999999999999, 0, -1)", "more than the 65536"),
        (range(10**20), "more than the 65536"),
        ("__import__('os').system('true')", "cannot read"),
        ("[x for x in range(3)]", "cannot read"),
        ("list(open('/etc/passwd'))", "cannot read"),
        ("(" * 500, "cannot read"),
        ({"a": 1}, "expected a list"),
        (1.0, "expected a list"),
        (True, "expected a list"),
    ],
)
def test_refused(value, words):
    with pytest.raises(ConfigError) as caught:
        parse_device_mapping(value, "teacher.device_mapping")
    assert caught.value.field == "teacher.device_mapping"
    assert words in caught.value.problem


def test_short_text():
    assert format_devices([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"
