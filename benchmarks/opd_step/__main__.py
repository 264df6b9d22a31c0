"""``python -m benchmarks.opd_step``: run the comparison and write its results."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks.opd_step import report
from benchmarks.opd_step.machine import facts
from benchmarks.opd_step.rounds import REPOSITORY, TRL_SETTINGS, Bench, BenchError, learned, scratch
from benchmarks.opd_step.workload import LEARNING, REGIMES

RESULTS = REPOSITORY / "benchmarks" / "results"
LEARN = "learning"


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code: 1 when the sides do not compute the same, or one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opd_step", description=__doc__)
    names = [*REGIMES, LEARN]
    parser.add_argument("--regimes", nargs="+", choices=names, default=names)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of turns that count, for each regime")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help=f"of `{LEARN}`")
    parser.add_argument("--quick", action="store_true", help="2 pairs, a short calibration, one seed and fewer steps")
    parser.add_argument("--trl-setting", choices=list(TRL_SETTINGS), help="known to be TRL's best: not calibrated")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; regimes join those there")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.output.mkdir(parents=True, exist_ok=True)
    pairs, seeds, plan = args.pairs, args.seeds, LEARNING
    if args.quick:
        pairs, seeds, plan = 2, seeds[:1], dataclasses.replace(plan, max_steps=2 * plan.every, prompts=32)
    results = report.load(args.output)

    def keep(name: str, result: dict[str, Any], versions: dict[str, Any]) -> None:
        machine = facts(REPOSITORY) | {"versions": versions}
        results[name] = result | {"machine": {key: value for key, value in machine.items() if key != "cpu_flags"}}
        results["machine"] = machine
        report.write(results, args.output)

    with scratch() as folder:
        try:
            bench = Bench(Path(folder))
            setting = args.trl_setting
            for name in args.regimes:
                if name == LEARN:
                    setting = setting or bench.calibrate(REGIMES["ragged"], 1 if args.quick else 2)[0]
                    runs: list[dict[str, Any]] = []
                    for seed in seeds:
                        runs.append(bench.learning(setting, seed, plan))
                        keep(LEARN, learned(plan, runs), bench.versions)
                else:
                    result = bench.speed(REGIMES[name], pairs, 1 if args.quick else 2, args.trl_setting)
                    keep(name, result, bench.versions)
                    if name == "ragged":
                        setting = result["trl_setting"]
        except BenchError as error:
            sys.stdout.write(f"NO RATIO: {error}\n")
            return 1
    sys.stdout.write(report.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
