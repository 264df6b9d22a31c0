"""What Megatron-core needs to run where there is no CUDA; nothing here acts where there is.

Megatron-core computes correctly on the CPU over gloo, but names the device in its code: it asks for the current CUDA
device, moves tensors to it and waits for it. Each patch below answers one of these with the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Answers calls that name CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": "cpu"}
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(out, str):
            # The optimizers sort parameters by the names of their CUDA types.
            return out.replace("torch.", "torch.cuda.")
        return out


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A stream, or an event on it, of a device that has only one and is never ahead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


@cache
def _install() -> None:
    """Patch functions that a :class:`TorchFunctionMode` does not see; once a process, and for good."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    cpu, stream = torch.device("cpu"), _Stream()
    cuda: Any = torch.cuda
    # Buffers of all collectives are made on "the current device".
    cuda.current_device = lambda: cpu
    # Pipeline communication and the optimizer wait for it.
    cuda.synchronize = lambda *_: None
    # The all-to-all of experts copies token counts on a stream of its own, and turns into numbers only what it copied.
    cuda.Stream = _Stream
    cuda.current_stream = lambda *_: stream
    cuda.stream = contextlib.nullcontext
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **_: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )
    # Dropout and initialisation draw from tracked CUDA generators, and recomputation restores them. Our models have no
    # dropout and are loaded, not initialised: there is nothing to draw.
    random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()  # type: ignore[method-assign]
    random._get_cuda_rng_state = lambda *_, **__: None  # type: ignore[assignment]
    random._set_cuda_rng_state = lambda *_, **__: None


@contextlib.contextmanager
def cuda_shim() -> Iterator[None]:
    """Run Megatron-core's code on the CPU where there is no CUDA; a null context where there is.

    Needed around the construction of the model and everything that runs forward, backward or optimizer. May be nested.
    """
    if torch.cuda.is_available():
        yield
        return
    _install()
    with _OnCPU():
        yield
