"""Weights from one process's CUDA memory to another's. Not run by its authors: they had no such device."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from roll_opd.distributed.strategy.weight_transfer import TransferEnd, device_key, pack, tensor_checksum
from roll_opd.distributed.worker import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL has one rank on each"
)


def weights(round_: int, device: torch.device) -> list[tuple[list[str], torch.Tensor]]:
    g = torch.Generator().manual_seed(round_)
    tensors = [torch.randn(1000, 500, generator=g), torch.randn(300, 400, generator=g).t(), torch.tensor(2.5)]
    odd = torch.randn(7, generator=g).bfloat16()
    names = [["embed", "head"], ["view"], ["scalar"], ["odd"]]
    return [(n, t.to(device)) for n, t in zip(names, [*tensors, odd], strict=True)]


def receive(device: torch.device, join: tuple[Any, ...] | None, inbox: Any, outbox: Any) -> None:
    end = TransferEnd(device)
    if join is not None:
        end.join(*join)
    while (bucket := inbox.get()) is not None:
        held = {name: tensor.clone() for name, tensor in end.tensors_of(bucket)}
        assert all(tensor.device == device for tensor in held.values())
        outbox.put({name: tensor_checksum(tensor) for name, tensor in held.items()})


@pytest.mark.parametrize("way", ["handles", pytest.param("group", marks=needs_two)])
def test_between_processes(way: str) -> None:
    there = torch.device("cuda:1" if way == "group" else "cuda:0")
    here = torch.device("cuda:0")
    store = open_store(2)
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    join = (store.host, store.port, 1, 2, 60.0) if way == "group" else None
    child = context.Process(target=receive, args=(there, join, inbox, outbox))
    child.start()
    sender = TransferEnd(here)
    if way == "group":
        sender.join(store.host, store.port, 0, 2, 60.0)
    for round_ in range(3):
        tensors = weights(round_, here)
        bucket, kept = pack(tensors, way)  # type: ignore[arg-type]
        assert way == "group" or (bucket.handles is not None and list(bucket.handles) == [device_key(here)])
        inbox.put(bucket)
        if way == "group":
            sender.broadcast(tensor for _, tensor in tensors)
        assert outbox.get(timeout=120) == bucket.checksums
        del kept
    inbox.put(None)
    child.join(60)
    assert child.exitcode == 0


def test_a_checksum_does_not_depend_on_the_device() -> None:
    for (_, there), (_, here) in zip(weights(0, torch.device("cuda:0")), weights(0, torch.device("cpu")), strict=True):
        assert tensor_checksum(there) == tensor_checksum(here)
