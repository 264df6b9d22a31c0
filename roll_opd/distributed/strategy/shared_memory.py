"""Bytes that other processes of this node read without a copy: a nameless file in shared memory.

It has no place in a file system, so none can be too small for it (``/dev/shm`` of a container often is) and nothing is
left behind, however a process ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64
"""Every part starts at a multiple of this, in bytes."""


@dataclass(frozen=True)
class Place:
    """Where the parts of a file lie: its path, for processes of this user on this node, and offsets and lengths."""

    path: str
    size: int
    parts: tuple[tuple[int, int], ...]


class SharedFile:
    """A file of some arrays that lives until it is closed or forgotten, and as long as any mapping of it."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]]) -> None:
        self._file = os.fdopen(os.memfd_create("roll_opd weights"), "wb")
        parts = []
        for raw in arrays:
            self._file.seek(-self._file.tell() % ALIGNMENT, os.SEEK_CUR)
            parts.append((self._file.tell(), raw.nbytes))
            self._file.write(raw.data)
        self._file.flush()
        self.place = Place(f"/proc/{os.getpid()}/fd/{self._file.fileno()}", self._file.tell(), tuple(parts))

    def close(self) -> None:
        """Let no further process open it."""
        self._file.close()


def parts_in(place: Place) -> Iterator[Tensor]:
    """Yield the parts of a file as bytes, ``[n]`` uint8; their memory lives as long as they do, with or without it."""
    file = torch.from_file(place.path, shared=False, size=place.size, dtype=torch.uint8)
    for offset, length in place.parts:
        yield file[offset : offset + length]
