"""What every launcher script does: read the command line, load the config, plan or run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from roll_opd.configs import launch_blockers, launch_warnings, load_config, plan_as_dict, render_plan_text
from roll_opd.errors import RollOPDError
from roll_opd.utils.logging import configure_logging

logger = logging.getLogger(__name__)


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a launcher's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--plan", nargs="?", const="text", choices=("text", "json"),
                        help="print what would run (roles, models, strategies, devices, memory) and exit")  # fmt: skip
    return parser.parse_intermixed_args(_explicit_plan(sys.argv[1:] if argv is None else argv))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a config: its folder, its file, and the settings that replace those in it."""
    parser.add_argument("--config_path", required=True, help="folder of the YAML: absolute, or relative to the working "
                        "directory or to the launcher")  # fmt: skip
    parser.add_argument("--config_name", required=True, help="name of the YAML, with or without its ending")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the YAML")


def _explicit_plan(argv: list[str]) -> list[str]:
    """Keep a bare ``--plan`` from taking the override behind it for its value."""
    out = []
    for i, argument in enumerate(argv):
        bare = argument == "--plan" and argv[i + 1 : i + 2] not in (["text"], ["json"])
        out.append("--plan=text" if bare else argument)
    return out


def main(launcher: str, launcher_file: str, description: str, argv: list[str] | None = None) -> int:
    """Plan or run; return the exit code.

    Args:
        launcher: ``onpolicy_distill``, ``rlvr`` or ``agentic``.
        launcher_file: ``__file__`` of the script.
        description: for ``--help``.
        argv: command line without the program's name; ``sys.argv`` if None.
    """
    args = parse_args(description, argv)
    configure_logging()
    try:
        loaded = load_config(
            launcher, args.config_path, args.config_name, args.overrides, Path(launcher_file).resolve().parent
        )
        if args.plan:
            text = json.dumps(plan_as_dict(loaded), indent=2) if args.plan == "json" else render_plan_text(loaded)
            sys.stdout.write(text.rstrip("\n") + "\n")
            return 0
        blockers = launch_blockers(loaded)
        for blocker in blockers:
            logger.error("%s", blocker)
        if blockers:
            return 1
        for warning in launch_warnings(loaded):
            logger.warning("%s", warning)
        # Torch and Ray are imported here and not above: a plan needs neither.
        from roll_opd.pipeline.launch import run_pipeline

        summary_path = run_pipeline(loaded)
    except RollOPDError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; resume_from_checkpoint=true goes on from the last complete checkpoint")
        return 130
    sys.stdout.write(f"{summary_path}\n")
    return 0
