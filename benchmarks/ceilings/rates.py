"""What the machine itself does: matrix products and copies. Everything else is held against these."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from benchmarks.ceilings.measure import Row, row, seconds
from benchmarks.roofline import Machine

SHAPES = {
    "decode, batch 32": (32, 512, 3072),
    "packed row": (4096, 512, 3072),
    "head": (256, 256, 8192),
    "large": (2048, 2048, 2048),
}
"""Rows, inputs and outputs of products: those of the workload's models, and one that nothing keeps from its peak."""
COPY_MB = 256


def product_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[float]:
    """Seconds of ``x @ weight.T``, the layout of a linear layer."""
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype)
    with torch.inference_mode():
        return seconds(lambda: torch.mm(x, weight.T, out=out))


def copy_seconds() -> list[float]:
    """Seconds of copying ``COPY_MB`` from one buffer to another, neither in a cache."""
    source = torch.ones(COPY_MB << 20, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return seconds(lambda: target.copy_(source))


def machine(dtype: torch.dtype) -> Machine:
    """The rates of this process, with as many threads as torch now uses."""
    flops = 2.0 * 2048**3 / min(product_seconds(*SHAPES["large"], dtype))
    return Machine("this machine", flops, 2.0 * (COPY_MB << 20) / min(copy_seconds()))


def measure() -> Iterable[Row]:
    """Products in fp32 and bf16, and copies, with one thread and with all."""
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            found = {
                what: [2e-9 * a * b * c / s for s in product_seconds(a, b, c, dtype)]
                for what, (a, b, c) in SHAPES.items()
            }
            peak = max(max(values) for values in found.values())
            for what, values in found.items():
                shape = " by ".join(map(str, SHAPES[what]))
                case = f"{name}, {threads} threads, {what} ({shape})"
                yield row("matmul", case, "GFLOP/s", values, peak, rate=True)
        values = [2e-9 * (COPY_MB << 20) / s for s in copy_seconds()]
        yield row("copy", f"{COPY_MB} MiB, {threads} threads, read and written", "GB/s", values, rate=True)
    torch.set_num_threads(1)
