"""The command line: what a launcher takes for an override, a plan, or a mistake."""

from __future__ import annotations

import pytest

from roll_opd.launcher import parse_args

NAMES = ["--config_path", "p", "--config_name", "n"]


@pytest.mark.parametrize(
    ("arguments", "plan", "overrides"),
    [
        ([], None, []),
        (["max_steps=3"], None, ["max_steps=3"]),
        (["--plan"], "text", []),
        (["--plan", "max_steps=3"], "text", ["max_steps=3"]),
        (["max_steps=3", "--plan", "json", "seed=1"], "json", ["max_steps=3", "seed=1"]),
        (["--plan", "text"], "text", []),
    ],
)
def test_plan_and_overrides(arguments, plan, overrides) -> None:
    args = parse_args("d", [*NAMES, *arguments])
    assert (args.plan, args.overrides, args.config_path, args.config_name) == (plan, overrides, "p", "n")


def test_no_arguments_is_a_usage_error(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args("d", [])
    assert caught.value.code == 2 and "--config_path" in capsys.readouterr().err
