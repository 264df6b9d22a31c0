"""``make bench-check``: has something become slower beside TRL, or larger, than the stored result says?"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.opd_step import report
from benchmarks.opd_step.__main__ import RESULTS
from benchmarks.opd_step.rounds import Bench, BenchError, scratch
from benchmarks.opd_step.workload import REGIMES

SLOWER = 0.15
"""Share of a ratio to TRL that may be lost."""
LARGER = 0.05
"""Share by which peak memory may grow."""
PAIRS = 3


@dataclass(frozen=True)
class Move:
    """A figure then and now.

    Attributes:
        what: regime and figure.
        then: stored.
        now: measured.
        worse: whether it moved further to the worse than it may.
        ranges: smallest and largest of what ``then`` and ``now`` are medians of, in words; few pairs of ragged lengths
            lie far apart.
    """

    what: str
    then: float
    now: float
    worse: bool
    ranges: str = ""

    def __str__(self) -> str:
        change = self.now / self.then - 1
        told = f"{self.what}: {self.then:.4g} → {self.now:.4g} ({change:+.1%})"
        return told + (f"; {self.ranges}" if self.ranges else "") + ("  WORSE" if self.worse else "")


def moves(name: str, stored: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Move]:
    """Compare the results of one regime."""
    ratios = stored["ratio"]["median"], measured["ratio"]["median"]
    ranges = [f"{result['ratio']['min']:.3g} to {result['ratio']['max']:.3g}" for result in (stored, measured)]
    memory = stored["ours"]["peak_pss_mib"], measured["ours"]["peak_pss_mib"]
    return [
        Move(f"{name}, ratio to TRL", *ratios, worse=ratios[1] < (1 - SLOWER) * ratios[0], ranges=" → ".join(ranges)),
        Move(f"{name}, peak memory MiB", *memory, worse=memory[1] > (1 + LARGER) * memory[0]),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure again, shorter; return 1 when something got worse, or nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opd_step.guard", description=__doc__)
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=["fixed", "ragged", "vocab-152k"])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    stored = report.load(RESULTS)
    found: list[Move] = []
    with scratch() as folder:
        try:
            bench = Bench(Path(folder))
            for name in args.regimes:
                if name not in stored:
                    raise BenchError(f"{name} has no stored result in {RESULTS}; `make bench` makes one")
                result = bench.speed(REGIMES[name], PAIRS, setting=stored[name]["trl_setting"])
                if result["disturbed"]:
                    sys.stdout.write(f"{name}: other processes used the cores; the ratio may be theirs\n")
                found += moves(name, stored[name], result)
        except BenchError as error:
            sys.stdout.write(f"NO RATIO: {error}\n")
            return 1
    sys.stdout.write("".join(f"{move}\n" for move in found))
    return int(any(move.worse for move in found))


if __name__ == "__main__":
    sys.exit(main())
