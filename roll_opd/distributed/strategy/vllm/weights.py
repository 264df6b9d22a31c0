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
from collections.abc import Mapping, Sequence
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

from roll_opd.distributed.strategy.base import tensor_checksum
from roll_opd.distributed.strategy.packed_model import as_bytes
from roll_opd.distributed.strategy.vllm.shared_memory import Entry, tensors_in

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

    def opd_load(self, path: str, size: int, entries: Sequence[Entry]) -> None:
        """Load tensors from a file; see :mod:`~roll_opd.distributed.strategy.vllm.shared_memory`."""
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            for name, tensor in tensors_in(path, size, entries):
                self._opd_update.load(name, tensor)

    def opd_finish_update(self) -> dict[str, int]:
        """Make the model fit to run; return checksums by Hugging Face name of what it holds now.

        Those of parameters that got nothing, or too little, are added under vLLM's own names.
        """
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            return self._opd_update.finish()


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
        return tensor_checksum(as_bytes(view)) == self.checksum


class _Copies(TorchDispatchMode):
    """Notes every copy into a tensor of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            self.seen.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


class _Update:
    """One weight update of one rank's model."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self.model, self.model_config = model, model_config
        self.ties = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self.received: dict[str, int] = {}
        self.tied: dict[str, int] = {}
        self.parts: dict[str, list[_Part]] = {}
        self.loaded: set[str] = set()
        self.filled: dict[str, int] = {}
        self.embedding: str | None = None
        initialize_layerwise_reload(model)
        # As the checkpoint has them, for this rank: their shapes are compared with what the model keeps in the end.
        self.shapes = {name: (p.shape, p.stride()) for name, p in model.named_parameters()}

    @torch.no_grad()
    def load(self, name: str, tensor: Tensor) -> None:
        """Take over one tensor."""
        checksum = tensor_checksum(as_bytes(tensor))
        if self.ties and name.endswith("lm_head.weight"):
            # Models that tie have no such parameter, or the embedding's under a second name.
            self.tied[name] = checksum
            return
        with _Copies() as copies:
            loaded: set[str] = set(self.model.load_weights([(name, tensor)]))  # type: ignore[operator]
        if not loaded:  # another pipeline rank's
            return
        self.loaded |= loaded
        self.received[name] = checksum
        if any(isinstance(self._owner(parameter), VocabParallelEmbedding) for parameter in loaded):
            self.embedding = self.embedding or name
        if len(loaded) == 1:
            (parameter,) = loaded
            self.filled[parameter] = self.filled.get(parameter, 0) + sum(t.numel() for t, _ in copies.seen)
            self.parts[name] = [
                _Part(
                    parameter,
                    tuple(target.shape),
                    target.stride(),
                    target.storage_offset(),
                    checksum if source.numel() == tensor.numel() else tensor_checksum(as_bytes(source)),
                )
                for target, source in copies.seen
                if source.dtype == target.dtype
            ]

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
        parameters = dict(self.model.named_parameters())
        held = {name: self._held(name, checksum, parameters) for name, checksum in self.received.items()}
        if self.embedding is not None:
            same = {
                name: held[self.embedding] if self._is_embedding(c) else HELD_OTHERWISE for name, c in self.tied.items()
            }
            held |= same
        short = {name for name in parameters if name not in self.loaded or self._has_gaps(name, parameters)}
        return held | dict.fromkeys(sorted(short), HELD_OTHERWISE)

    def _has_gaps(self, name: str, parameters: Mapping[str, Tensor]) -> bool:
        """Whether a part of a parameter got nothing, such as one of several tensors that are fused in it."""
        if isinstance(self._owner(name), VocabParallelEmbedding) or not self._readable(name, parameters):
            return False  # the first is padded
        return self.filled.get(name, 0) < parameters[name].numel()

    def _is_embedding(self, checksum: int) -> bool:
        assert self.embedding is not None
        return checksum == self.received[self.embedding]

    def _held(self, name: str, checksum: int, parameters: Mapping[str, Tensor]) -> int:
        parts = [part for part in self.parts.get(name, []) if self._readable(part.parameter, parameters)]
        return checksum if all(part.lies_in(parameters[part.parameter]) for part in parts) else HELD_OTHERWISE

    def _readable(self, name: str, parameters: Mapping[str, Tensor]) -> bool:
        """Whether a parameter is as the checkpoint has it: same shape, and nothing that puts its values elsewhere."""
        parameter = parameters.get(name)
        if parameter is None or (parameter.shape, parameter.stride()) != self.shapes[name]:
            return False
        method = getattr(self._owner(name), "quant_method", None)
        return method is None or type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)

    def _owner(self, parameter: str) -> nn.Module:
        return self.model.get_submodule(parameter.rpartition(".")[0])
