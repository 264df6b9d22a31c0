"""How the tensors of a weight update travel from the trainer's processes to those that generate.

======== ======================================== ================================================================
way      what travels                             where it can be used
======== ======================================== ================================================================
host     the bytes, in Ray's object store         everywhere; shared memory between processes of one node
handles  handles of the sender's memory           both on the same device: CUDA IPC; without CUDA, one node's memory
group    nothing: a collective moves the tensors  every process in one group: NCCL between GPUs, gloo without CUDA
======== ======================================== ================================================================

A sender turns tensors into buckets, :func:`tensors_of` turns a bucket into tensors again. What a generator does with
them, and how it proves that it holds them, is the same in each case.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from roll_opd.distributed.strategy.shared_memory import Place, SharedFile, parts_in
from roll_opd.errors import GenerationError

Way = Literal["host", "handles", "group"]

# What comes from the object store is read-only memory, which :func:`read_only` hands out as it is.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

HOST = "cpu"
"""Key of memory that every process of the node can read."""

_ROW = 1 << 12
"""Words of a tensor that its checksum sums first; such rows have multipliers of their own."""

_ROWS = 1 << 8
"""Rows whose products a checksum forms at a time where it must hold them: bounds the memory that it needs."""


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
        handles: ``handles``: by device (:func:`device_key`), what opens the sender's memory, as plain values. Of a CUDA
            device: for each tensor, arguments of torch's ``rebuild_cuda_tensor``. Of the ``cpu``: a :class:`Place`.
    """

    specs: tuple[TensorSpec, ...]
    checksums: Mapping[str, int]
    raw: tuple[NDArray[np.uint8], ...] = ()
    handles: dict[str, Any] | None = None

    @property
    def way(self) -> Way:
        """How the tensors travel."""
        return "host" if self.raw else "group" if self.handles is None else "handles"


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
        # The store is listening; rank 0's process is a client of its own store like everybody else.
        store = dist.PrefixStore("weights", dist.TCPStore(host, port, is_master=False, timeout=limit))
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, limit)

    def broadcast(self, tensor: Tensor) -> None:
        """Fill ``tensor`` with the sender's; all take part, in the same order."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Leave; others may be gone already."""
        self._group.abort()


class TransferEnd:
    """What a process that sends or receives has for it: its device and, once it has joined one, a group."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._group: TransferGroup | None = None

    def join(self, host: str, port: int, rank: int, size: int, timeout: float) -> None:
        """Form a :class:`TransferGroup` with the others; it replaces the one before."""
        if self._group is not None:
            self._group.close()
        self._group = TransferGroup(host, port, rank, size, self.device, timeout)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Send what a bucket has announced."""
        assert self._group is not None, "a weight update by a collective, but no group was joined"
        for tensor in tensors:
            self._group.broadcast(tensor.detach().contiguous())

    def tensors_of(self, bucket: WeightBucket) -> Iterator[tuple[str, Tensor]]:
        """Yield each name and its tensor, on this device or on the CPU; to be copied, not kept, and never written to.

        Raises:
            GenerationError: the bucket holds nothing for this device.
        """
        if bucket.way == "host":
            tensors = _unpacked(bucket)
        elif bucket.way == "group":
            tensors = self._received(bucket)
        else:
            tensors = self._opened(bucket)
        for spec, tensor in zip(bucket.specs, tensors, strict=True):
            yield from ((name, tensor) for name in spec.names)

    def _received(self, bucket: WeightBucket) -> Iterator[Tensor]:
        assert self._group is not None, "a weight update by a collective, but no group was joined"
        for spec in bucket.specs:
            tensor = spec.empty(self.device)
            self._group.broadcast(tensor)
            yield tensor

    def _opened(self, bucket: WeightBucket) -> Iterator[Tensor]:
        assert bucket.handles is not None
        key = device_key(self.device)
        if key != HOST and key in bucket.handles:
            for spec, handle in zip(bucket.specs, bucket.handles[key], strict=True):
                yield _open(spec, handle, self.device)
            # The sender may write to this memory, or free it, once it is told that we have copied it.
            torch.cuda.synchronize(self.device)
        elif HOST in bucket.handles:
            for spec, raw in zip(bucket.specs, parts_in(Place(*bucket.handles[HOST])), strict=True):
                yield _as_tensor(spec, raw)
        else:
            raise GenerationError(
                f"weight update: nothing was sent to device {key}, only to {sorted(bucket.handles)}; "
                f"use model_update_transport: host"
            )


def in_buckets(
    tensors: Iterable[tuple[list[str], Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[list[str], Tensor]]]:
    """Group tensors, in their order; a bucket is closed once it holds ``bucket_bytes``."""
    bucket: list[tuple[list[str], Tensor]] = []
    for names, tensor in tensors:
        bucket.append((names, tensor))
        if sum(t.nbytes for _, t in bucket) >= bucket_bytes:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def pack(tensors: Sequence[tuple[Sequence[str], Tensor]], way: Way) -> tuple[WeightBucket, list[Any]]:
    """Turn tensors, each with its names, into a bucket.

    With ``group`` the bucket only announces them: the sender then broadcasts them, in this order.

    Returns:
        The bucket, and what the sender must keep until the receivers have copied it.
    """
    specs = tuple(TensorSpec.of(names, tensor) for names, tensor in tensors)
    sums = {name: total for names, tensor in tensors for total in [tensor_checksum(tensor)] for name in names}
    if way == "group":
        return WeightBucket(specs, sums), []
    device = tensors[0][1].device
    if way == "handles" and device.type == "cuda":
        own = [tensor.detach().contiguous() for _, tensor in tensors]
        return WeightBucket(specs, sums, handles={device_key(device): [_handle(tensor) for tensor in own]}), own
    bucket = WeightBucket(specs, sums, raw=tuple(as_bytes(tensor) for _, tensor in tensors))
    if way == "host":
        return bucket, []
    bucket, file = in_shared_memory(bucket)
    return bucket, [file]


def in_shared_memory(bucket: WeightBucket) -> tuple[WeightBucket, SharedFile]:
    """Return a bucket of bytes as one that processes of this node can open as long as the file lives."""
    file = SharedFile(bucket.raw)
    return WeightBucket(bucket.specs, bucket.checksums, handles={HOST: dataclasses.astuple(file.place)}), file


def merged(buckets: Sequence[WeightBucket]) -> WeightBucket:
    """One bucket of what several ranks sent of the same tensors, each for its own device."""
    first = buckets[0]
    handles = {device: packed for bucket in buckets for device, packed in (bucket.handles or {}).items()}
    return WeightBucket(first.specs, first.checksums, first.raw, handles or None)


def device_key(device: torch.device) -> str:
    """Name a device so that two processes mean the same one, whatever number each knows it by."""
    if device.type != "cuda":
        return HOST
    return str(torch.cuda.get_device_properties(device).uuid)


def _unpacked(bucket: WeightBucket) -> Iterator[Tensor]:
    for spec, raw in zip(bucket.specs, bucket.raw, strict=True):
        yield _as_tensor(spec, read_only(raw))


def read_only(raw: np.ndarray[Any, Any]) -> Tensor:
    """Return the bytes of ``raw`` as a tensor, without a copy. Nobody may write to it.

    What comes from the object store is memory that cannot be written to, and that all processes of a node share.
    """
    return torch.from_numpy(raw)


def _as_tensor(spec: TensorSpec, raw: Tensor) -> Tensor:
    return raw.view(getattr(torch, spec.dtype)).reshape(spec.shape)


def _handle(tensor: Tensor) -> dict[str, Any]:
    """What another process on the same device needs to open a CUDA tensor's memory; without what its spec says."""
    _, values = reduce_tensor(tensor)
    arguments = dict(zip(inspect.signature(rebuild_cuda_tensor).parameters, values, strict=True))
    for said in ("tensor_cls", "tensor_size", "storage_cls", "dtype", "storage_device"):
        del arguments[said]
    return arguments


def _open(spec: TensorSpec, handle: dict[str, Any], device: torch.device) -> Tensor:
    # Each process counts its devices in its own way: the sender's number of this one says nothing here.
    number = torch.cuda.current_device() if device.index is None else device.index
    opened: Tensor = rebuild_cuda_tensor(
        tensor_cls=Tensor,
        tensor_size=spec.shape,
        storage_cls=torch.storage.TypedStorage,
        dtype=getattr(torch, spec.dtype),
        storage_device=number,
        **handle,
    )
    return opened


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """View a tensor's values as bytes, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@torch.no_grad()
def tensor_checksum(tensor: Tensor) -> int:
    """Checksum of a tensor's bytes, formed where the tensor is; equal on both sides of a transfer.

    ``sum_r row_r sum_i column_i word_ri mod 2^64`` over its 64-bit words, in rows of 4,096. All multipliers are odd:
    every single word that changed is noticed. Each place has another: so are words that changed places (except by
    chance where they differ in nothing but their highest bits). Sums of integers are exact in whatever order.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    columns = _multipliers(0, _ROW, words.device)
    whole = words.numel() // _ROW * _ROW
    rest = words[whole:]
    sums = (rest * columns[: rest.numel()]).sum(0, keepdim=True)
    if whole:
        sums = torch.cat([_products(words[:whole].view(-1, _ROW), columns), sums])
    return int((sums * _multipliers(_ROW, sums.numel(), words.device)).sum()) & 0xFFFFFFFFFFFFFFFF


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    if rows.device.type == "cpu":
        return rows.mv(columns)
    return _row_sums(rows, columns)


def _row_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """The same on CUDA, which has no matrix product of integers."""
    return torch.cat([(some * columns).sum(1) for some in rows.split(_ROWS)])


@functools.lru_cache(maxsize=64)
def _multipliers(first: int, count: int, device: torch.device) -> Tensor:
    """Multipliers of places ``first`` and following: hashes, because a progression's differences share their low bits.

    Odd, so that no bit of a word is lost. Products wrap around.
    """
    numbers = torch.arange(first, first + count, device=device).mul_(-7046029254386353131)
    for factor in (-4658895280553007687, -7723592293110705685):
        numbers.bitwise_xor_(numbers >> 29).mul_(factor)
    return numbers.bitwise_xor_(numbers >> 32).bitwise_or_(1)
