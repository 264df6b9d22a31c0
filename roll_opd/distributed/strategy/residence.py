"""Device memory that can be given up for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Residence:
    """Moves the memory under tensors to the host and back; every view of that memory stays valid.

    Parameters and gradients may be views of large buffers, of which an optimizer holds other views: what they all lie
    in can be moved, but none of them can be replaced.
    """

    def __init__(self) -> None:
        self._moved: list[tuple[Tensor, Tensor | None]] = []
        self._host: list[Tensor] = []

    @property
    def away(self) -> bool:
        """Whether the memory is on the host."""
        return bool(self._moved)

    def leave(self, kept: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> None:
        """Free the memory of ``kept``, whose values go to the host, and of ``scratch``, whose values are zeros."""
        assert not self._moved, "it has left already"
        for index, memory in enumerate(_memory_of(kept)):
            host = self._host_memory(index, memory)
            host.copy_(memory)
            self._moved.append((memory, host))
        self._moved += [(memory, None) for memory in _memory_of(scratch)]
        for memory, _ in self._moved:
            memory.untyped_storage().resize_(0)

    def come_back(self) -> None:
        """Undo :meth:`leave`."""
        for memory, host in self._moved:
            memory.untyped_storage().resize_(len(memory))
            if host is None:
                memory.zero_()
            else:
                memory.copy_(host)
        self._moved = []

    def _host_memory(self, index: int, like: Tensor) -> Tensor:
        """The buffer of the last time, if it fits: to allocate page-locked memory takes longer than the copy."""
        if index == len(self._host):
            self._host.append(torch.empty(0, dtype=torch.uint8))
        if len(self._host[index]) != len(like):
            self._host[index] = torch.empty(len(like), dtype=torch.uint8, pin_memory=like.is_cuda)
        return self._host[index]


def _memory_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the whole memory under ``tensors`` as bytes, each piece once."""
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
