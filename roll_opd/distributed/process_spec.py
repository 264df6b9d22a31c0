"""What a worker process is told at its start; imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessSpec:
    """What a worker process has to know about itself.

    Attributes:
        role: for example ``actor_train``.
        rank: this process among the role's.
        world_size: processes of the role.
        gpu_ids: GPUs of this node that it may use; empty for a CPU process.
        threads: threads for tensor work.
        log_dir: where its log file goes.
        seed: of torch's global generator.
    """

    role: str
    rank: int
    world_size: int
    gpu_ids: tuple[int, ...]
    threads: int
    log_dir: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the process in logs."""
        return f"{self.role}-{self.rank}"


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that shall use ``threads`` cores; must be set before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Idle threads sleep instead of spinning, because roles take turns on the same cores; but only after some tens
        # of microseconds, or the pauses between two operations would cost a fifth of the time.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "10000",
        # Freed memory is kept for the next operation instead of being given back and faulted in page by page, which
        # costs as much as many an operation. Blocks above the first number still are: they would leave holes.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "TOKENIZERS_PARALLELISM": "false",
    }


def give_back_memory() -> None:
    """Give back what loading a model and a tokenizer has freed, which the settings above would keep."""
    gc.collect()
    # The C library of Linux has it.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
