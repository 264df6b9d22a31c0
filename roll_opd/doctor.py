"""Preflight on demand: would this config run, and if not, what is to be changed.

    python -m roll_opd.doctor --config_path quickstart --config_name onpolicy_distill
    python -m roll_opd.doctor --config_path … --config_name … --static teacher.world_size=2

Takes a launcher's arguments. Reads the data, compares models and tokenizers, then loads the models, samples a few
responses and scores them, and ends without training. Nothing is written into the run's folders. docs/preflight.md lists
the findings. Exit code 1 on any error.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_opd.configs import launch_blockers, launch_warnings, load_config
from roll_opd.configs.composition import compose_config, find_config_dir
from roll_opd.configs.roles import LAUNCHERS, STUDENT_ROLES
from roll_opd.errors import RollOPDError
from roll_opd.launcher import add_config_arguments
from roll_opd.utils.logging import configure_logging

if TYPE_CHECKING:
    from roll_opd.pipeline.preflight.finding import Finding

EXAMPLES = Path(__file__).parents[1] / "examples"
"""Config paths may be relative to the launchers' folder."""
AREAS = ("config", "run folder", "models", "settings", "environments", "data", "samples")


def main(argv: Sequence[str] | None = None) -> int:
    """Examine a config; print the findings and return the exit code."""
    args = _parse_args(argv)
    # The findings say it all; below an error, log lines would only repeat them.
    configure_logging("ERROR")
    logging.captureWarnings(True)
    try:
        findings = examine(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    show(findings)
    return int(any(f.level == "error" for f in findings))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m roll_opd.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--launcher", choices=LAUNCHERS, help="the launcher that will run it; by default what the "
                        "roles in the YAML say")  # fmt: skip
    parser.add_argument("--static", action="store_true", help="stop before a model is loaded")
    return parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)


def examine(args: argparse.Namespace) -> list[Finding]:
    """Everything that can be found out about a config, in the order in which a launch would."""
    from roll_opd.pipeline.preflight.finding import Finding, failed

    launcher_dir = EXAMPLES if EXAMPLES.is_dir() else None
    try:
        directory = find_config_dir(args.config_path, launcher_dir)
        launcher = args.launcher or guess_launcher(compose_config(directory, args.config_name, args.overrides).values)
        loaded = load_config(launcher, args.config_path, args.config_name, args.overrides, launcher_dir)
    except RollOPDError as error:
        return [_in_area(failed(error), "config")]
    config = loaded.config
    findings = [Finding("ok", args.config_name, f"loads for the launcher {launcher}: {config.mode}, {config.pipeline}")]
    findings += [_warning(text) for text in (*loaded.warnings, *launch_warnings(loaded))]
    findings += [failed(blocker) for blocker in launch_blockers(loaded)]
    findings = [_in_area(f, "config") for f in findings]
    from roll_opd.pipeline.launch import examine_pipeline

    return examine_pipeline(loaded, args.static, findings)


def guess_launcher(values: Mapping[str, Any]) -> str:
    """The launcher that a config is written for, by its roles."""
    if any(values.get(role) for role in STUDENT_ROLES):
        return "onpolicy_distill"
    return "agentic" if values.get("train_env_manager") else "rlvr"


def _warning(text: str) -> Finding:
    """A line of the config's checks, with the field that most of them begin with."""
    from roll_opd.pipeline.preflight.finding import Finding, failed

    found = failed(RollOPDError(text))
    return Finding("warning", found.field, found.message)


def _in_area(finding: Finding, area: str) -> Finding:
    return replace(finding, area=area)


def show(findings: Sequence[Finding]) -> None:
    """Print the findings by area, and last how many errors and warnings they hold, to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "bold red"}
    console = Console(highlight=False)
    counts = {level: sum(f.level == level for f in findings) for level in colours}
    last = f"{_many(counts['error'], 'error')}, {_many(counts['warning'], 'warning')}"
    for area in _areas(findings):
        mine = [f for f in findings if f.area == area]
        if not console.is_terminal:
            sys.stdout.write(f"{area}\n" + "".join(f"  {_line(f)}\n" for f in mine))
            continue
        table = Table(title=area, title_justify="left", title_style="bold", show_header=False, box=None)
        for name in ("level", "field", "message"):
            table.add_column(name, overflow="fold")
        for finding in mine:
            table.add_row(Text(finding.level, colours[finding.level]), Text(finding.field), Text(finding.message))
        console.print(table)
    sys.stdout.write(last + "\n")


def _line(finding: Finding) -> str:
    field = f"{finding.field}: " if finding.field else ""
    return f"{finding.level:<8}{field}{' '.join(finding.message.split())}"


def _areas(findings: Iterable[Finding]) -> list[str]:
    return sorted({f.area for f in findings}, key=lambda area: (AREAS.index(area) if area in AREAS else 99, area))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


if __name__ == "__main__":
    sys.exit(main())
