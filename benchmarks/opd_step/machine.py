"""The machine under both sides: who uses its cores, how much memory a tree of processes holds, and what it is."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

PROC = Path("/proc")
HERTZ = os.sysconf("SC_CLK_TCK")
MEMORY_PERIOD = 0.1
"""Seconds between two looks at a tree's memory."""


def busy_seconds(stat: str) -> float:
    """CPU seconds that all cores together have been busy since boot, by the text of ``/proc/stat``.

    Time stolen by the hypervisor counts as busy: it was lost to whoever wanted to run.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / HERTZ


def parent_and_cpu(stat: str) -> tuple[int, float]:
    """Parent and CPU seconds of a process, its reaped children's included, by the text of ``/proc/<pid>/stat``."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) / HERTZ


def pss_bytes(rollup: str) -> int:
    """Proportional set size by the text of ``/proc/<pid>/smaps_rollup``: shared pages count by their share."""
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class ProcessTree:
    """A process and all its descendants, also those whose parents have died since they were first seen.

    Args:
        root: its process id.
    """

    def __init__(self, root: int) -> None:
        self._members = {root}

    def cpu_seconds(self) -> float:
        """CPU seconds used so far; of the dead as far as a parent in the tree has waited for them."""
        table = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit() and (text := _read(entry / "stat")):
                table[int(entry.name)] = parent_and_cpu(text)
        self._members &= table.keys()
        grown = True
        while grown:
            found = {pid for pid, (parent, _) in table.items() if parent in self._members} - self._members
            self._members |= found
            grown = bool(found)
        return sum(table[pid][1] for pid in self._members)

    def send(self, number: int) -> None:
        """Send a signal to all processes, as of the last :meth:`cpu_seconds`."""
        for pid in tuple(self._members):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pss(self) -> int:
        """Bytes of memory that the processes hold, as of the last :meth:`cpu_seconds`; shared pages counted once."""
        return sum(pss_bytes(_read(PROC / str(pid) / "smaps_rollup")) for pid in tuple(self._members))


class Watch:
    """What happens on the machine while one tree has its turn.

    Attributes:
        others: mean number of cores that were busy with something else.
        peak_pss: bytes; most that the tree was seen to hold.

    Args:
        tree: whose turn it is.
        memory: look at its memory all the time. The kernel takes some 5 ms for a GiB, which is too much for a turn
            that is timed.
    """

    def __init__(self, tree: ProcessTree, memory: bool) -> None:
        self.tree, self.memory = tree, memory
        self.others = 0.0
        self.peak_pss = 0

    def __enter__(self) -> Watch:
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample_memory, daemon=True)
        self._began, self._busy, self._own = _now(), _busy(), self.tree.cpu_seconds()
        if self.memory:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, elapsed = _busy() - self._busy, self.tree.cpu_seconds() - self._own, _now() - self._began
        self.others = max(0.0, busy - own) / elapsed
        if self.memory:
            self._done.set()
            self._sampler.join()

    def _sample_memory(self) -> None:
        while True:
            self.peak_pss = max(self.peak_pss, self.tree.pss())
            if self._done.wait(MEMORY_PERIOD):
                return


def facts(repository: Path) -> dict[str, Any]:
    """What a result must say about where it was made."""
    info = (PROC / "cpuinfo").read_text()
    memory = (PROC / "meminfo").read_text().split()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    git = ["git", "-C", str(repository)]
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "cpu_flags": sorted(cpu.get("flags", "").split()),
        "memory_gib": round(int(memory[1]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _output([*git, "rev-parse", "HEAD"]),
        "uncommitted_changes": bool(_output([*git, "status", "--porcelain", "--", "roll_opd", "benchmarks/opd_step"])),
    }


def _now() -> float:
    return os.times().elapsed


def _busy() -> float:
    return busy_seconds((PROC / "stat").read_text())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
