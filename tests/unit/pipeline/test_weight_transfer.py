"""Three ways for a tensor to travel, between real processes; and the checksum that proves that it has arrived."""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from roll_opd.distributed.weight_transfer import (
    TransferGroup,
    WeightBucket,
    as_bytes,
    device_key,
    merged,
    pack,
    tensor_checksum,
    tensors_of,
)
from roll_opd.errors import GenerationError

CPU = torch.device("cpu")


def weights() -> list[tuple[list[str], torch.Tensor]]:
    """A tied matrix, a transposed view, an odd number of bf16 elements, a scalar."""
    g = torch.Generator().manual_seed(0)
    return [
        (["embed", "head"], torch.randn(7, 5, generator=g)),
        (["view"], torch.randn(3, 4, generator=g).t()),
        (["odd"], torch.randn(3, generator=g).bfloat16()),
        (["scalar"], torch.tensor(2.5)),
    ]


def expected() -> dict[str, torch.Tensor]:
    return {name: tensor for names, tensor in weights() for name in names}


def check(received: dict[str, torch.Tensor], sums: dict[str, int]) -> None:
    assert list(received) == ["embed", "head", "view", "odd", "scalar"]
    for name, tensor in expected().items():
        assert torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype
        assert tensor_checksum(received[name]) == sums[name] == tensor_checksum(tensor)


def test_bytes_that_are_read_only() -> None:
    bucket = pack(weights(), "host")
    for raw in bucket.raw:
        raw.setflags(write=False)
    received = {name: tensor.clone() for name, tensor in tensors_of(bucket, CPU)}
    check(received, bucket.checksums)
    next(tensors_of(bucket, CPU))[1].zero_()  # what is handed out may be written to, the bucket is as it was
    check({name: tensor.clone() for name, tensor in tensors_of(bucket, CPU)}, bucket.checksums)


def _receive(bucket: WeightBucket, address: tuple[str, int] | None, results) -> None:
    torch.set_num_threads(1)
    group = TransferGroup(*address, rank=1, size=2, device=CPU, timeout=60) if address else None
    received = {name: as_bytes(t).tobytes() for name, t in tensors_of(bucket, CPU, group)}
    sums = {name: tensor_checksum(t) for name, t in tensors_of(bucket, CPU)} if group is None else {}
    results.put((received, sums))


@pytest.mark.parametrize("way", ["handles", "group"])
def test_between_processes(way) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    tensors = weights()
    bucket = pack(tensors, way)
    assert bucket.way == way and not bucket.raw
    address = None
    if way == "group":
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(2)
        address = listener.getsockname()
        store = dist.TCPStore(  # noqa: F841 - it serves as long as it lives
            *address, 2, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    child = context.Process(target=_receive, args=(bucket, address, results))
    child.start()
    if address is not None:
        group = TransferGroup(*address, rank=0, size=2, device=CPU, timeout=60)
        for _, tensor in tensors:
            group.broadcast(tensor.contiguous())
    received, sums = results.get(timeout=60)
    child.join(60)
    assert received == {name: as_bytes(tensor).tobytes() for name, tensor in expected().items()}
    assert way == "group" or sums == bucket.checksums


def test_a_device_that_nothing_was_sent_to_is_named() -> None:
    bucket = WeightBucket((), {}, handles={"GPU-1": b"", "GPU-2": b""})
    assert device_key(CPU) == "cpu"
    with pytest.raises(GenerationError, match=r"nothing was sent to device cpu, only to \['GPU-1', 'GPU-2'\]"):
        next(tensors_of(bucket, CPU))


def test_ranks_send_the_same_tensors_from_their_own_devices() -> None:
    one, other = WeightBucket((), {"a": 1}, handles={"x": b"1"}), WeightBucket((), {"a": 1}, handles={"y": b"2"})
    assert merged([one, other]) == WeightBucket((), {"a": 1}, handles={"x": b"1", "y": b"2"})
    plain = pack(weights(), "host")
    assert merged([plain]).way == "host"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 8, 9, (1 << 21) + 3])
def test_the_checksum_sees_every_change(dtype, size) -> None:
    tensor = torch.arange(1, size + 1).remainder(251).to(dtype)
    total = tensor_checksum(tensor)
    assert tensor_checksum(tensor.clone()) == total == tensor_checksum(torch.stack([tensor, tensor])[1])
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed.view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert tensor_checksum(changed) != total
    if size > 8:
        swapped = tensor.clone()
        swapped[[0, size - 1]] = tensor[[size - 1, 0]]
        assert torch.equal(swapped, tensor) or tensor_checksum(swapped) != total
    # Words that change places between the parts that are looked at together.
    if size > 1 << 20:
        words = (1 << 20) * 8 // tensor.element_size()
        if size >= 2 * words or dtype == torch.float32:
            swapped = tensor.clone()
            swapped[:2], swapped[words : words + 2] = 5, 9
            other = tensor.clone()
            other[:2], other[words : words + 2] = 9, 5
            assert tensor_checksum(swapped) != tensor_checksum(other)
