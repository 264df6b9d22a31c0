"""Reward alone, teacher alone, both: the three configurations of ``examples/mixed_rewards`` at equal steps.

    python benchmarks/signal_comparison.py --output_dir output/signal_comparison --seeds 1 2 3

Each run goes through its launcher, in a process of its own, one after the other. The mixed configuration runs once for
every coefficient of the teacher. The script then prints a markdown table with a line for each configuration (mean over
seeds, and lowest to highest) and one with a line for each run. ``--table_only`` prints the tables of runs that are
already there. The reverse KL is the held-out one, to the teacher; without a teacher it is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
EXAMPLE = REPO / "examples" / "mixed_rewards"
TAGS = ("ascending", "descending")
LAUNCHERS = {"rlvr": "rlvr", "pure_opd": "onpolicy_distill", "mixed": "rlvr"}


@dataclass(frozen=True)
class Setup:
    """One line of the table."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one run came to. ``curve`` maps the name of a validation metric to its values, in order of steps."""

    setup: Setup
    seed: int
    steps: int
    curve: dict[str, list[float]]
    seconds: float


def setups(coefs: Sequence[float]) -> list[Setup]:
    """The configurations that are compared."""
    mixed = [Setup(f"mixed, coefficient {c:g}", "mixed", (f"opd_kl_coef={c:g}",)) for c in coefs]
    return [Setup("RLVR", "rlvr"), Setup("pure OPD", "pure_opd"), *mixed]


def folder_of(setup: Setup, seed: int, output_dir: Path) -> Path:
    """Where a run writes."""
    name = "-".join([setup.config, *(o.split("=")[1] for o in setup.overrides)])
    return output_dir / f"{name}-seed{seed}"


def launch(setup: Setup, seed: int, steps: int, eval_steps: int, folder: Path) -> None:
    """Run one configuration to its end; SystemExit with the end of its log if it fails."""
    command = [
        sys.executable,
        str(REPO / "examples" / f"start_{LAUNCHERS[setup.config]}_pipeline.py"),
        *("--config_path", str(EXAMPLE), "--config_name", setup.config),
        *(f"seed={seed}", f"max_steps={steps}", f"eval_steps={eval_steps}", f"output_dir={folder}", "html_samples=0"),
        *setup.overrides,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # A summary from an earlier run must not pass for this one's.
    (folder / "summary.json").unlink(missing_ok=True)
    log = folder / "launcher.log"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, cwd=REPO, check=False).returncode
    if code:
        raise SystemExit(f"{setup.name}, seed {seed}: exit code {code}\n{log.read_text(encoding='utf-8')[-3000:]}")
    print(f"{setup.name}, seed {seed}: {time.monotonic() - began:.0f} s, {folder}", file=sys.stderr, flush=True)


def read(setup: Setup, seed: int, folder: Path) -> Outcome:
    """Read a finished run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    curve: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for key, value in json.loads(line).items():
            if key.startswith("val/"):
                curve.setdefault(key.removeprefix("val/"), []).append(value)
    return Outcome(setup, seed, summary["steps"], curve, summary["seconds"]["total"])


def share(name: str, index: int) -> Callable[[Outcome], float | None]:
    """A column: a validation metric in percent, first (0) or last (-1)."""
    return lambda outcome: 100 * outcome.curve[name][index]


def nats(index: int) -> Callable[[Outcome], float | None]:
    """A column: the held-out reverse KL, or None without a teacher."""
    return lambda outcome: outcome.curve["reverse_kl"][index] if "reverse_kl" in outcome.curve else None


COLUMNS: dict[str, tuple[Callable[[Outcome], float | None], str]] = {
    "accuracy, first": (share("accuracy", 0), ".1f"),
    "accuracy, last": (share("accuracy", -1), ".1f"),
    **{
        f"{tag}, {when}": (share(f"accuracy/tag/{tag}", index), ".1f")
        for tag in TAGS
        for when, index in (("first", 0), ("last", -1))
    },
    "reverse KL, first": (nats(0), ".2f"),
    "reverse KL, last": (nats(-1), ".3f"),
    "seconds": (lambda outcome: outcome.seconds, ".0f"),
}


def cell(outcomes: Sequence[Outcome], column: str) -> str:
    """Mean over runs, and lowest to highest where they differ in print."""
    measure, form = COLUMNS[column]
    values = [value for value in map(measure, outcomes) if value is not None]
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    mean = format(statistics.fmean(values), form)
    return mean if low == high else f"{mean} ({low} to {high})"


def table(groups: dict[str, list[Outcome]]) -> str:
    """A markdown table with a line for each group of runs."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[name, *(cell(outcomes, column) for column in COLUMNS)] for name, outcomes in groups.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_curve(groups: dict[str, list[Outcome]], eval_steps: int) -> str:
    """A markdown table of the accuracy by tag at every validation, mean over runs."""
    longest = max(len(o.curve["accuracy"]) for outcomes in groups.values() for o in outcomes)
    last = max(o.steps for outcomes in groups.values() for o in outcomes)
    steps = [min(i * eval_steps, last) for i in range(longest)]
    lines = [[f"{' / '.join(TAGS)}, % after", *(f"{s} steps" for s in steps)], ["---"] * (longest + 1)]
    for name, outcomes in groups.items():
        values = [
            [statistics.fmean(100 * o.curve[f"accuracy/tag/{tag}"][i] for o in outcomes) for tag in TAGS]
            for i in range(min(len(o.curve["accuracy"]) for o in outcomes))
        ]
        lines.append([name, *(" / ".join(f"{v:.1f}" for v in pair) for pair in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/signal_comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval_steps", type=int, default=10)
    parser.add_argument("--coefs", type=float, nargs="+", default=[0.03, 0.1, 1.0], help="of the mixed configuration")
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.eval_steps < 1:
        parser.error("--steps and --eval_steps must be at least 1")
    output_dir = args.output_dir.resolve()
    groups: dict[str, list[Outcome]] = {}
    # Seeds outside: a machine that gets slower or faster on the way touches all configurations alike.
    for seed in args.seeds:
        for setup in setups(args.coefs):
            folder = folder_of(setup, seed, output_dir)
            if not args.table_only:
                launch(setup, seed, args.steps, args.eval_steps, folder)
            groups.setdefault(setup.name, []).append(read(setup, seed, folder))
    runs = {f"{name}, seed {o.seed}": [o] for name, outcomes in groups.items() for o in outcomes}
    print("\n\n".join([table(groups), accuracy_curve(groups, args.eval_steps), table(runs)]))


if __name__ == "__main__":
    main()
