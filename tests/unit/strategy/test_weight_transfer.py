"""Three ways for a tensor to travel, between real processes; and the checksum that proves that it has arrived."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest
import torch

from roll_opd.distributed.strategy.weight_transfer import (
    TensorSpec,
    TransferEnd,
    WeightBucket,
    _multipliers,
    _products,
    _row_sums,
    as_bytes,
    device_key,
    in_buckets,
    in_shared_memory,
    merged,
    pack,
    tensor_checksum,
)
from roll_opd.distributed.worker import open_store
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


@pytest.mark.filterwarnings("ignore:The given NumPy array")
def test_bytes_that_are_read_only() -> None:
    bucket, kept = pack(weights(), "host")
    assert not kept
    for raw in bucket.raw:
        raw.setflags(write=False)
    received = dict(TransferEnd(CPU).tensors_of(bucket))
    check(received, bucket.checksums)
    assert received["embed"].data_ptr() == bucket.raw[0].ctypes.data, "copied on the way"


def test_nothing_is_said_of_memory_that_must_not_be_written_to() -> None:
    """torch says it once in a process, so in a new one."""
    code = (
        "import numpy as np\nfrom roll_opd.distributed.strategy.weight_transfer import read_only\n"
        "raw = np.ones(4, np.uint8)\nraw.setflags(write=False)\nassert read_only(raw).tolist() == [1, 1, 1, 1]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "writable" not in done.stderr


def test_bytes_become_a_file_that_outlives_its_name() -> None:
    """What is mapped stays, nothing else does."""
    bucket, file = in_shared_memory(pack(weights(), "host")[0])
    assert bucket.way == "handles"
    received = dict(TransferEnd(CPU).tensors_of(bucket))
    file.close()
    check(received, bucket.checksums)
    with pytest.raises(RuntimeError):
        next(TransferEnd(CPU).tensors_of(bucket))


@pytest.mark.parametrize(("size", "counts"), [(1, [1, 1, 1, 1]), (150, [2, 2]), (10**6, [4])])
def test_buckets_are_closed_once_they_are_full(size, counts) -> None:
    """140, 48, 6 and 4 bytes."""
    buckets = list(in_buckets(weights(), size))
    assert [len(bucket) for bucket in buckets] == counts
    assert [names for bucket in buckets for names, _ in bucket] == [names for names, _ in weights()]
    assert not list(in_buckets([], size))


def _receive(bucket: WeightBucket, addresses: list[tuple[str, int]], results) -> None:
    torch.set_num_threads(1)
    end = TransferEnd(CPU)
    for address in addresses or [None]:
        if address:
            end.join(*address, 1, 2, 60.0)
        received = {name: tensor.clone() for name, tensor in end.tensors_of(bucket)}
        sums = {name: tensor_checksum(tensor) for name, tensor in received.items()}
        results.put(({name: as_bytes(tensor).tobytes() for name, tensor in received.items()}, sums))


@pytest.mark.parametrize("way", ["handles", "group"])
def test_between_processes(way) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    tensors = weights()
    bucket, kept = pack(tensors, way)
    assert bucket.way == way and not bucket.raw and bool(kept) == (way == "handles")
    stores = [open_store(2), open_store(2)] if way == "group" else []  # the second group replaces the first
    addresses = [(store.host, store.port) for store in stores]
    child = context.Process(target=_receive, args=(bucket, addresses, results))
    child.start()
    sender = TransferEnd(CPU)
    for address in addresses or [None]:
        if address:
            sender.join(*address, 0, 2, 60.0)
            sender.broadcast(tensor for _, tensor in tensors)
        received, sums = results.get(timeout=60)
        assert received == {name: as_bytes(tensor).tobytes() for name, tensor in expected().items()}
        assert sums == bucket.checksums
    child.join(60)
    assert child.exitcode == 0


def test_a_device_that_nothing_was_sent_to_is_named() -> None:
    bucket = WeightBucket((TensorSpec(("a",), "float32", (1,)),), {}, handles={"GPU-1": [], "GPU-2": []})
    assert device_key(CPU) == "cpu"
    with pytest.raises(GenerationError, match=r"nothing was sent to device cpu, only to \['GPU-1', 'GPU-2'\]"):
        next(TransferEnd(CPU).tensors_of(bucket))


def test_ranks_send_the_same_tensors_from_their_own_devices() -> None:
    one, other = WeightBucket((), {"a": 1}, handles={"x": 1}), WeightBucket((), {"a": 1}, handles={"y": 2})
    assert merged([one, other]) == WeightBucket((), {"a": 1}, handles={"x": 1, "y": 2})
    plain, _ = pack(weights(), "host")
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
    # Words that change places with those of another row, and whole rows that do.
    words = (1 << 12) * 8 // tensor.element_size()
    if size > 3 * words:
        swapped = tensor.clone()
        swapped[:2], swapped[words : words + 2] = 5, 9
        other = tensor.clone()
        other[:2], other[words : words + 2] = 9, 5
        assert tensor_checksum(swapped) != tensor_checksum(other)
        rows = tensor.clone()
        rows[:words], rows[words : 2 * words] = tensor[words : 2 * words], tensor[:words]
        assert torch.equal(rows, tensor) or tensor_checksum(rows) != total


def test_the_checksum_is_the_sum_that_it_says_it_is() -> None:
    """Two rows of words and a rest, in Python's integers; and as it is formed where integers have no matrix product."""
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (2 * 4096 + 3,), generator=torch.Generator().manual_seed(0))
    columns, rows = (_multipliers(first, count, CPU).tolist() for first, count in ((0, 4096), (4096, 3)))
    places = [row * column for row in rows for column in columns]
    expected = sum(word * place for word, place in zip(words.tolist(), places, strict=False)) % (1 << 64)
    assert tensor_checksum(words) == expected == tensor_checksum(words.view(torch.float16))
    matrix = words[:8192].view(2, 4096)
    assert torch.equal(_products(matrix, _multipliers(0, 4096, CPU)), _row_sums(matrix, _multipliers(0, 4096, CPU)))
    # Another multiplier for each place, all odd.
    assert len(set(columns + rows)) == 4099 and all(number % 2 for number in columns + rows)


@pytest.mark.parametrize("distance", [1, 512, 4096, 1 << 17])
def test_the_checksum_sees_round_numbers_change_places(distance) -> None:
    """Words that differ in an exponent alone, a power of two apart: where multipliers in a progression see nothing."""
    tensor = torch.zeros(2 * (distance + 1))
    tensor[1], tensor[2 * distance + 1] = 1.0, 2.0
    swapped = tensor.clone()
    swapped[1], swapped[2 * distance + 1] = 2.0, 1.0
    assert tensor_checksum(tensor) != tensor_checksum(swapped)
