"""Transformers checkpoints: read whole, or by each rank its shards of it; never in part."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy import attention
from roll_opd.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Checkpoint:
    """A transformers model on disk or on the hub. The models made from it have no dropout.

    Args:
        auto_class: of transformers: says which head is wanted (``AutoModel``: none).
        args: which model.
        role: named in error messages.
        device: where it will compute.
        dtype: of the parameters; by default the one in ``args`` (a trainer keeps fp32 masters).
        decodes: whether :class:`~roll_opd.distributed.strategy.decoding.DecodingLoop` will sample from it.

    Attributes:
        attention: name of the attention function of its models.
        packs: whether that function reads ``cu_seq_lens_q``.

    Raises:
        ModelError: the path does not hold a model, or ``attn_implementation`` cannot run here.
    """

    def __init__(
        self,
        auto_class: Any,
        args: ModelArguments,
        *,
        role: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        decodes: bool = False,
    ) -> None:
        self.args, self.role, self.device = args, role, device
        self.dtype = dtype or DTYPES[args.dtype]
        self.field = f"{role}.model_args.model_name_or_path"
        self._auto_class = auto_class
        self._places: dict[str, tuple[nn.Module, str]] = {}
        if args.model_name_or_path is None:
            raise ModelError(f"{self.field} is not set")
        self.path = args.model_name_or_path
        if Path(self.path).is_dir() and not (Path(self.path) / "config.json").is_file():
            raise ModelError(f"{self.field}: the folder {self.path!r} holds no config.json")
        with self._model_errors():
            self.config, unknown = AutoConfig.from_pretrained(
                self.path,
                trust_remote_code=args.trust_remote_code,
                return_unused_kwargs=True,
                **args.model_config_kwargs,
            )
            _without_dropout(self.config, role)
        if unknown:
            field = f"{role}.model_args.model_config_kwargs"
            raise ModelError(f"{field}: the config of {self.path!r} has no {', '.join(sorted(unknown))}")
        self.attention, self.packs = attention.choose(
            args.attn_implementation,
            self.config,
            DTYPES[args.dtype],
            device,
            field=f"{role}.model_args.attn_implementation",
            decodes=decodes,
        )

    def load(self) -> PreTrainedModel:
        """Read the whole model, onto the CPU.

        Raises:
            ModelError: it cannot be loaded, or only a part of it.
        """
        with self._model_errors():
            loaded: Any = self._auto_class.from_pretrained(
                self.path,
                config=self.config,
                dtype=self.dtype,
                attn_implementation=self.attention,
                trust_remote_code=self.args.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        lm, loading = loaded
        # transformers fills what a file lacks with random numbers and goes on; such a model must neither teach nor
        # learn.
        absent = sorted(loading["missing_keys"]) + sorted(key[0] for key in loading["mismatched_keys"])
        if absent:
            raise ModelError(
                f"{self.field}: the weights in {self.path!r} lack {len(absent)} tensor(s) of the model, or have them "
                f"in another shape; first {absent[0]}"
            )
        return lm

    def empty(self) -> PreTrainedModel:
        """Build the model without memory for its parameters, which :meth:`fill` fills once they have some.

        In between, modules may be sharded and put into others, but must stay the same objects. Buffers have their
        values: those that are in no file, as the rotary embedding's, could not be filled.
        """
        with self._model_errors(), init_empty_weights(include_buffers=False):
            lm: PreTrainedModel = self._auto_class.from_config(
                self.config,
                dtype=self.dtype,
                attn_implementation=self.attention,
                trust_remote_code=self.args.trust_remote_code,
            )
        lm.tie_weights()
        if lm.can_generate():
            with contextlib.suppress(OSError):  # policy: a checkpoint need not say how it likes to be sampled from
                lm.generation_config = GenerationConfig.from_pretrained(self.path)
        modules = dict(lm.named_modules(remove_duplicate=False))
        for name in lm.state_dict():
            module, _, attribute = name.rpartition(".")
            self._places[name] = (modules[module], attribute)
        self._prefix = f"{lm.base_model_prefix}."
        return lm

    @torch.no_grad()
    def fill(self) -> None:
        """Read the values of the model that :meth:`empty` made; all ranks together.

        Each rank reads its rows of each tensor, and no more, if the files hold the tensors as the model has them.
        Where transformers has to convert them, rank 0 reads the model whole and hands out tensor by tensor.

        Raises:
            ModelError: as :meth:`load`.
        """
        names: dict[int, list[str]] = {}  # tied tensors have several
        tensors: dict[int, Tensor] = {}
        for name, (module, attribute) in self._places.items():
            tensor = getattr(module, attribute)
            tensors[id(tensor)] = tensor
            names.setdefault(id(tensor), []).append(name)
        with contextlib.ExitStack() as stack:
            slices = self._slices(stack)
            sources = {key: self._source(names[key], tensor, slices) for key, tensor in tensors.items()}
            if None not in sources.values():
                for key, tensor in tensors.items():
                    own, rows = own_part(tensor)
                    own.copy_(sources[key][rows])
                return
        whole: dict[str, Tensor] = self.load().state_dict() if dist.get_rank() == 0 else {}
        for key, tensor in tensors.items():
            full = whole[names[key][0]] if whole else torch.empty(tensor.shape)
            full = full.to(self.device, tensor.dtype)
            dist.broadcast(full, src=0)
            own, rows = own_part(tensor)
            own.copy_(full[rows])

    def _source(self, names: list[str], tensor: Tensor, slices: dict[str, Any]) -> Any:
        """Find the slice of a file that is this tensor as it stands, with or without the base model's prefix."""
        for name in (*names, *(self._prefix + n for n in names), *(n.removeprefix(self._prefix) for n in names)):
            if name in slices and tuple(slices[name].get_shape()) == tuple(tensor.shape):
                return slices[name]
        return None

    def _slices(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Open the model's safetensors files; empty if they cannot be read, or hold something else than its values."""
        folder = self.folder()
        if folder is None or getattr(self.config, "quantization_config", None) is not None:
            return {}
        index = folder / "model.safetensors.index.json"
        files = [folder / "model.safetensors"]
        slices: dict[str, Any] = {}
        try:
            if not files[0].is_file():
                files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            for file in files:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (OSError, ValueError, KeyError, SafetensorError):
            # Policy: what is wrong with the files transformers is to say.
            return {}
        return slices

    def folder(self) -> Path | None:
        """The folder with the model's safetensors files, which are fetched if the hub has them; None if it has not."""
        if Path(self.path).is_dir():
            return Path(self.path)
        try:
            return Path(snapshot_download(self.path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
        except (OSError, ValueError):  # policy: as above
            return None

    @property
    def family(self) -> str:
        """Name of the model's class, as far as the config says it."""
        return (self.config.architectures or [self.config.model_type])[0]

    @contextlib.contextmanager
    def _model_errors(self) -> Iterator[None]:
        """Turn what transformers raises over a model into one line."""
        try:
            yield
        except Exception as error:
            # Policy: refuse. A damaged folder makes it raise anything, from its validators to ZeroDivisionError.
            where = "" if Path(self.path).exists() else " (no such folder here, and no cached or reachable hub model)"
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise ModelError(f"{self.field}: cannot load {self.path!r}{where}: {reason}") from error


def own_part(tensor: Tensor) -> tuple[Tensor, Any]:
    """Return what this rank holds of a tensor, and the index of it in the whole: all, or FSDP2's share of the rows."""
    if not isinstance(tensor, DTensor):
        return tensor, ...
    mesh = tensor.device_mesh
    share = -(-tensor.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * share, tensor.shape[0])
    own = tensor.to_local()
    return own, slice(start, start + len(own))


def _without_dropout(config: Any, role: str) -> None:
    """Switch every dropout of a model off.

    Old and new log-probabilities must be those of the same function; with dropout the ratio of an unchanged model would
    not be 1. Attention reads its rate from the config at every call, so modules alone would not do.
    """
    text = config.get_text_config()
    rates = [n for n, v in vars(text).items() if "drop" in n and isinstance(v, float) and v > 0]
    for name in rates:
        setattr(text, name, 0.0)
    if rates:
        logger.warning("%s: dropout of the model is switched off (%s)", role, ", ".join(rates))
