"""What share of the machine each part of a step reaches: ``python -m benchmarks.ceilings [--only controller,sampler]``.

Each group runs in a process of its own, with the thread settings that the product gives to a role's process, so that
neither memory nor Ray nor a busy thread of one disturbs the next. Results go to ``benchmarks/results``; what an earlier
run measured of groups that are not asked for stays in there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.ceilings.measure import Row, short, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = {
    "rates": "rates:measure",
    "controller": "controller:measure",
    "weight_sync": "transport:weight_sync",
    "objects": "transport:objects",
    "decoding": "decoding:measure",
    "engines": "engines:measure",
    "sampler": "sampling:measure",
    "scoring": "models:scoring",
    "training": "models:training",
    "head": "heads:measure",
}
"""Name on the command line -> module and function."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "ray", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(GROUPS), help=f"comma-separated, of {', '.join(GROUPS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of ceilings.json and ceilings.md")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        run_group(args.group)
        return
    chosen = args.only.split(",")
    unknown = sorted(set(chosen) - set(GROUPS))
    if unknown:
        parser.error(f"no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    target = args.results / "ceilings.json"
    found: dict[str, Any] = json.loads(target.read_text())["groups"] if target.exists() else {}
    for name in chosen:
        began = time.perf_counter()
        rows = in_own_process(name)
        load = os.getloadavg()[0]
        found[name] = {"rows": rows, "seconds": time.perf_counter() - began, "load": load, "date": time.strftime("%F")}
        print(f"{name}: {found[name]['seconds']:.0f} s, load {load:.1f}", flush=True)
    write(target, {"machine": machine_facts(), "groups": {n: found[n] for n in GROUPS if n in found}})
    print(target.with_suffix(".md").read_text())


def in_own_process(name: str) -> list[dict[str, Any]]:
    """Run a group; return its rows."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Ray's workers import this package too.
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "benchmarks.ceilings", "--group", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    # Libraries may write to stdout as well.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def run_group(name: str) -> None:
    """Measure, one line of JSON a row."""
    module, _, function = GROUPS[name].partition(":")
    for found in getattr(import_module(f"benchmarks.ceilings.{module}"), function)():
        print(json.dumps(dataclasses.asdict(found)), flush=True)
        print(f"  {found.part}: {found.case}: {short(found.median)} {found.unit} {found.note}", file=sys.stderr)


def write(target: Path, results: dict[str, Any]) -> None:
    """Write the JSON, and the table beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    rows = [Row(**values) for group in results["groups"].values() for values in group["rows"]]
    facts = results["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES)
    head = f"# Ceilings\n\n{facts['cpu']}, {facts['cores']} cores ({', '.join(facts['flags'])}), {versions}.\n\n"
    target.with_suffix(".md").write_text(
        f"{head}Median of at least 5 repeats after a warm-up. `fraction` is the measured share of the ceiling: a rate "
        f"measured above, a roofline of\nmeasured rates, or a target. One thread unless it says otherwise.\n\n"
        f"{table(rows)}"
    )


def machine_facts() -> dict[str, Any]:
    """CPU, what it can do, and the versions that matter."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info)}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "python": platform.python_version(),
    } | {name: version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
