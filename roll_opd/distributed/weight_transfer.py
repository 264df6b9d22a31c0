"""How the tensors of a weight update travel from the trainer's processes to those that generate.

======== ======================================== ================================================================
way      what travels                             where it can be used
======== ======================================== ================================================================
host     the bytes, in Ray's object store         everywhere; shared memory between processes of one node
handles  handles of the sender's memory           both on the same device: CUDA IPC; without CUDA, shared memory
group    nothing: a collective moves the tensors  every process in one group: NCCL between GPUs, gloo without CUDA
======== ======================================== ================================================================

A sender turns tensors into buckets, :func:`tensors_of` turns a bucket into tensors again. What a generator does with
them, and how it proves that it holds them, is the same in each case.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from roll_opd.errors import GenerationError

Way = Literal["host", "handles", "group"]

_WORDS = 1 << 20
"""Words of a tensor that a checksum looks at together: bounds the memory that it needs."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that travels: its names (a tied weight has several), its dtype as torch names it, its shape."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str], tensor: Tensor) -> TensorSpec:
        """Describe ``tensor``."""
        return cls(tuple(names), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def empty(self, device: torch.device) -> Tensor:
        """Return memory for such a tensor."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)


@dataclass(frozen=True)
class WeightBucket:
    """Some of a model's tensors on their way.

    Attributes:
        specs: what they are.
        checksums: of the sender, by name.
        raw: ``host``: their bytes, uint8, because numpy has no bfloat16.
        handles: ``handles``: by device (:func:`device_key`), pickled handles of all tensors. Written and read by processes
            of one run alone.
    """

    specs: tuple[TensorSpec, ...]
    checksums: dict[str, int]
    raw: tuple[NDArray[np.uint8], ...] = ()
    handles: dict[str, bytes] | None = None

    @property
    def way(self) -> Way:
        """How the tensors travel."""
        return "host" if self.raw else "group" if self.handles is None else "handles"


class Group(Protocol):
    """Moves a tensor from the sender to every receiver."""

    def broadcast(self, tensor: Tensor) -> None:
        """Fill ``tensor`` with the sender's; all take part, in the same order."""
        ...


class TransferGroup:
    """A process group of the trainer's rank 0 and of every process that receives, beside any group these already have.

    Args:
        host: address of the sender's store.
        port: its port.
        rank: 0 is the sender.
        size: processes.
        device: where tensors are; decides between NCCL and gloo.
        timeout: seconds that one tensor may take.
    """

    def __init__(self, host: str, port: int, rank: int, size: int, device: torch.device, timeout: float) -> None:
        limit = timedelta(seconds=timeout)
        # Rank 0's store listens since open_rendezvous; it is a client of its own store like everybody else.
        store = dist.PrefixStore("weights", dist.TCPStore(host, port, is_master=False, timeout=limit))
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, limit)
        self.device = device

    def broadcast(self, tensor: Tensor) -> None:
        """See :class:`Group`."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()


def pack(tensors: Sequence[tuple[Sequence[str], Tensor]], way: Way) -> WeightBucket:
    """Turn tensors, each with its names, into a bucket.

    With ``group`` the bucket only announces them: the sender then broadcasts them, in this order. With ``handles`` the
    tensors must live until the receivers have copied them.
    """
    specs = tuple(TensorSpec.of(names, tensor) for names, tensor in tensors)
    sums = {name: total for names, tensor in tensors for total in [tensor_checksum(tensor)] for name in names}
    if way == "host":
        return WeightBucket(specs, sums, raw=tuple(as_bytes(tensor) for _, tensor in tensors))
    if way == "group":
        return WeightBucket(specs, sums)
    device = tensors[0][1].device
    reduced = [reduce_tensor(tensor.detach().contiguous()) for _, tensor in tensors]
    return WeightBucket(specs, sums, handles={device_key(device): pickle.dumps(reduced)})


def tensors_of(bucket: WeightBucket, device: torch.device, group: Group | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield each name and its tensor, on ``device`` or on the CPU; to be copied, not kept.

    Raises:
        GenerationError: the bucket holds nothing for this device.
    """
    if bucket.way == "host":
        for spec, raw in zip(bucket.specs, bucket.raw, strict=True):
            # copy(): what comes from the object store is read-only memory.
            tensor = torch.from_numpy(raw.copy()).view(getattr(torch, spec.dtype)).reshape(spec.shape)
            yield from ((name, tensor) for name in spec.names)
    elif bucket.way == "group":
        assert group is not None, "a weight update by a collective, but no group was joined"
        for spec in bucket.specs:
            tensor = spec.empty(device)
            group.broadcast(tensor)
            yield from ((name, tensor) for name in spec.names)
    else:
        assert bucket.handles is not None
        handles = bucket.handles.get(device_key(device))
        if handles is None:
            raise GenerationError(
                f"weight update: nothing was sent to device {device_key(device)}, only to {sorted(bucket.handles)}; "
                f"use model_update_transport: host"
            )
        for spec, (rebuild, arguments) in zip(bucket.specs, pickle.loads(handles), strict=True):
            tensor = rebuild(*arguments)
            yield from ((name, tensor) for name in spec.names)


def merged(buckets: Sequence[WeightBucket]) -> WeightBucket:
    """One bucket of what several ranks sent of the same tensors, each for its own device."""
    first = buckets[0]
    handles = {device: packed for bucket in buckets for device, packed in (bucket.handles or {}).items()}
    return WeightBucket(first.specs, first.checksums, first.raw, handles or None)


def device_key(device: torch.device) -> str:
    """Name a device so that two processes mean the same one, whatever number each knows it by."""
    if device.type != "cuda":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """View a tensor's values as bytes, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@torch.no_grad()
def tensor_checksum(tensor: Tensor) -> int:
    """Checksum of a tensor's bytes, formed where the tensor is; equal on both sides of a transfer.

    ``sum_i word_i c_i mod 2^64`` over its 64-bit words, with an odd multiplier ``c_i`` for each position: it notices
    every single word that changed, and words that changed places, in whatever order it is summed.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    total = 0
    for number, part in enumerate(words.split(_WORDS)):
        places = _places(part.device)[: part.numel()]
        total += int((part * places).sum()) * (2 * number + 1)
    return total & 0xFFFFFFFFFFFFFFFF


@functools.cache
def _places(device: torch.device) -> Tensor:
    """Odd multipliers: a linear congruence's low bit is set, so that no bit of a word is lost. Products wrap around."""
    return torch.arange(_WORDS, device=device).mul_(-7046029254386353131).bitwise_or_(1)
