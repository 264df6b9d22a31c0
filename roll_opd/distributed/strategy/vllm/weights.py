"""What runs inside vLLM's worker processes: it takes over the trainer's weights and says what the model then holds.

vLLM mixes :class:`WorkerExtension` into its worker class (``worker_extension_cls``), which is the way in that has
stayed the same over its versions; its own weight-transfer interfaces have not. This module is imported there alone.

A weight update is vLLM's layer-wise reload: parameters go back to the checkpoint's format, on the meta device, loaders
keep what they are given until a layer is complete, and the layer is then processed (fused, sharded, packed) and copied
over the memory in which it lay, where CUDA graphs expect it. Two things it does not do:

- *A tied output layer on CPU.* There linear layers multiply with a packed copy of their weight. The output layer is
  given none to load, so it would keep the copy that it made of the old weight.
- *Say what came of it.* Each loader is first run on the meta parameters, to count; that shows which part of which
  parameter a tensor fills. In the end those parts are read back. Where the model keeps no such parameter (packed on
  CPU, quantised, experts in a kernel's own order), what was received is what is known.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from roll_opd.distributed.strategy.weight_transfer import TensorSpec, TransferEnd, WeightBucket, tensor_checksum

HELD_OTHERWISE = -1
"""In place of a checksum: the model holds something else. No checksum is negative."""


class WorkerExtension:
    """Methods of vLLM's workers that :class:`~roll_opd.distributed.strategy.vllm.engine.Engine` calls."""

    def opd_mask_vocabulary(self, size: int) -> None:
        """Give ids from ``size`` on, the padding of the model's head, probability 0 from now on."""

        def mask(module: nn.Module, arguments: Any, logits: Tensor | None) -> Tensor | None:
            if logits is not None:  # only one of several tensor-parallel ranks may have them
                logits[..., size:] = float("-inf")
            return logits

        for module in _model_of(self).modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(mask)

    def opd_begin_update(self) -> None:
        """Make the model ready to be loaded again; it cannot run until :meth:`opd_finish_update`."""
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            self._opd_update = _Update(_model_of(self), self.model_config)  # type: ignore[attr-defined]

    def opd_join(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """Form a process group with the trainer; this worker's rank counts from ``first_rank``."""
        self._opd_end().join(host, port, first_rank + self.rank, size, timeout)  # type: ignore[attr-defined]

    def opd_load(self, specs: Sequence[tuple[Any, ...]], handles: dict[str, Any] | None) -> None:
        """Load the tensors of a bucket, which comes as plain values; its bytes, if it has any, in shared memory."""
        bucket = WeightBucket(tuple(TensorSpec(tuple(n), d, tuple(s)) for n, d, s in specs), {}, handles=handles)
        # Loaders keep tensors until a layer is complete; the memory behind a handle is the trainer's.
        borrowed = bucket.way == "handles" and self.device.type == "cuda"  # type: ignore[attr-defined]
        tensors = [(n, t.clone() if borrowed else t) for n, t in self._opd_end().tensors_of(bucket)]
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            self._opd_update.load(tensors)

    def opd_finish_update(self) -> dict[str, int]:
        """Make the model fit to run; return checksums by Hugging Face name of what it holds now.

        Those of parameters that got nothing, or too little, are added under vLLM's own names.
        """
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            return self._opd_update.finish()

    def _opd_end(self) -> TransferEnd:
        if not hasattr(self, "_opd_transfer"):
            self._opd_transfer = TransferEnd(self.device)  # type: ignore[attr-defined]
        return self._opd_transfer


def _model_of(worker: Any) -> nn.Module:
    model: nn.Module = worker.model_runner.get_model()
    return model


@dataclass(frozen=True)
class _Part:
    """Where a tensor, or this rank's part of it, lies in a parameter, and the checksum of what belongs there."""

    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    checksum: int

    def lies_in(self, parameter: Tensor) -> bool:
        """Whether it was read from ``parameter`` as it should be."""
        view = parameter.detach().as_strided(self.size, self.stride, parameter.storage_offset() + self.offset)
        return tensor_checksum(view) == self.checksum


class _Copies(TorchDispatchMode):
    """Notes every copy into a tensor of the meta device, and those that are worked on further."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.altered: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            if args[1].is_meta:
                self.altered.append(args[0])
            else:
                self.seen.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


class _Update:
    """One weight update of one rank's model."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self.model, self.model_config = model, model_config
        self.ties = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self.received: dict[str, int] = {}
        self.heads: dict[str, int] = {}
        self.parts: dict[str, list[_Part]] = {}
        self.loaded: set[str] = set()
        self.altered: set[str] = set()
        initialize_layerwise_reload(model)
        # As a checkpoint has them, for this rank; those that are loaded are replaced.
        self.wanted = dict(model.named_parameters())
        self.names = {_memory(parameter): name for name, parameter in self.wanted.items()}

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Take over some tensors."""
        own = []
        for name, tensor in tensors:
            # Models that tie have no such parameter, or the embedding's under a second name.
            is_tied_head = self.ties and name.endswith("lm_head.weight")
            (self.heads if is_tied_head else self.received)[name] = tensor_checksum(tensor)
            if not is_tied_head:
                own.append((name, tensor))
        last = ""

        def one_by_one() -> Iterator[tuple[str, Tensor]]:
            nonlocal last
            for entry in own:
                last = entry[0]
                yield entry

        with _Copies() as copies:
            try:
                self.loaded |= set(self.model.load_weights(one_by_one()))  # type: ignore[operator]
            except Exception as error:
                # Policy: refuse. A loader says in its own way that it has no place for a tensor.
                raise ValueError(f"{last}: {error!r}") from error
        self._follow(own, copies)

    def _follow(self, tensors: Sequence[tuple[str, Tensor]], copies: _Copies) -> None:
        """Note where each tensor went. One that was made into another first is lost sight of."""
        tensors = sorted(tensors, key=lambda entry: entry[1].data_ptr())
        starts = [tensor.data_ptr() for _, tensor in tensors]
        for target, source in copies.seen:
            parameter = self.names.get(_memory(target))
            index = bisect_right(starts, source.data_ptr()) - 1
            if parameter is None or index < 0 or source.dtype != target.dtype:
                continue
            name, tensor = tensors[index]
            if source.data_ptr() >= tensor.data_ptr() + tensor.nbytes:
                continue
            whole = source.shape == tensor.shape and source.stride() == tensor.stride()
            checksum = self.received[name] if whole else tensor_checksum(source)
            part = _Part(parameter, tuple(target.shape), target.stride(), int(target.storage_offset()), checksum)
            self.parts.setdefault(name, []).append(part)
        self.altered |= {self.names[_memory(target)] for target in copies.altered if _memory(target) in self.names}

    @torch.no_grad()
    def finish(self) -> dict[str, int]:
        """Make the model fit to run; return checksums of what it holds."""
        # It warns of layers that got no weights, such as a tied output layer. We look ourselves.
        reload_logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = reload_logger.level
        reload_logger.setLevel(logging.ERROR)
        finalize_layerwise_reload(self.model, self.model_config)
        reload_logger.setLevel(level)
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
        holds = dict(self.model.named_parameters())
        held = {name: self._held(name, checksum, holds) for name, checksum in self.received.items()}
        return held | self._held_heads(held) | dict.fromkeys(sorted(self._short(holds)), HELD_OTHERWISE)

    def _held(self, name: str, checksum: int, holds: Mapping[str, Tensor]) -> int:
        parts = [part for part in self.parts.get(name, []) if self._readable(part.parameter, holds)]
        return checksum if all(part.lies_in(holds[part.parameter]) for part in parts) else HELD_OTHERWISE

    def _held_heads(self, held: Mapping[str, int]) -> dict[str, int]:
        """A tied output layer is the embedding, which must be what was sent for both."""
        embeddings = {held[n] for n, parts in self.parts.items() if any(self._is_embedding(p.parameter) for p in parts)}
        return {name: sum_ if embeddings in ({sum_}, set()) else HELD_OTHERWISE for name, sum_ in self.heads.items()}

    def _short(self, holds: Mapping[str, Tensor]) -> set[str]:
        """Parameters that got nothing, or not enough: where one of several tensors that are fused was not sent."""
        filled: dict[str, int] = {}
        for part in (part for parts in self.parts.values() for part in parts):
            filled[part.parameter] = filled.get(part.parameter, 0) + torch.Size(part.size).numel()
        gaps = {
            name
            for name, count in filled.items()
            # A vocabulary is padded.
            if count < self.wanted[name].numel() and self._is_plain(name) and not self._is_embedding(name)
        }
        return gaps | (set(holds) - self.loaded)

    def _readable(self, name: str, holds: Mapping[str, Tensor]) -> bool:
        """Whether the values of a parameter lie where a checkpoint has them."""
        parameter, wanted = holds.get(name), self.wanted[name]
        if parameter is None or (parameter.shape, parameter.stride()) != (wanted.shape, wanted.stride()):
            return False
        return self._is_plain(name) and name not in self.altered

    def _is_plain(self, name: str) -> bool:
        """Whether nothing but fusing and sharding is done to a parameter when it is loaded."""
        method = getattr(self._owner(name), "quant_method", None)
        return method is None or type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)

    def _is_embedding(self, name: str) -> bool:
        return isinstance(self._owner(name), VocabParallelEmbedding)

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


def _memory(tensor: Tensor) -> int:
    """Name the memory of a tensor, which its views share; on the meta device it has no address."""
    return int(tensor.untyped_storage()._cdata)
