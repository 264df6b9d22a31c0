"""How a bucket of weights gets from this process to vLLM's worker processes: as a nameless file in shared memory.

It has no place in a file system, so none can be too small for it (``/dev/shm`` of a container often is) and nothing is
left behind, however a process ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_opd.distributed.strategy.base import WeightBucket

ALIGNMENT = 64
"""Every tensor starts at a multiple of this, in bytes."""

Entry = tuple[str, str, Sequence[int], int]
"""Name, dtype as torch names it, shape, and offset in bytes."""


@dataclass(frozen=True)
class Spooled:
    """A bucket in a file: its path, for processes of this user on this node, its size in bytes, and what is in it."""

    path: str
    size: int
    entries: tuple[Entry, ...]


@contextmanager
def spooled(bucket: WeightBucket) -> Iterator[Spooled]:
    """Lay the tensors of ``bucket`` into a file that lives as long as the context, and as any mapping of it."""
    entries: list[Entry] = []
    with os.fdopen(os.memfd_create("roll_opd weights"), "wb") as file:
        for name, dtype, shape, raw in bucket.tensors:
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            entries.append((name, dtype, shape, file.tell()))
            file.write(raw.data)
        file.flush()
        yield Spooled(f"/proc/{os.getpid()}/fd/{file.fileno()}", file.tell(), tuple(entries))


def tensors_in(path: str, size: int, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield what lies in a file; a tensor's memory lives as long as the tensor, with or without the file."""
    file = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    for name, dtype_name, shape, offset in entries:
        dtype = getattr(torch, dtype_name)
        length = torch.Size(shape).numel() * dtype.itemsize
        yield name, file[offset : offset + length].view(dtype).reshape(tuple(shape))
