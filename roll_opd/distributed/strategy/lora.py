"""LoRA adapters in a transformers model: PEFT's layers and file format; weights that leave are merged."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.pretrained import own_part
from roll_opd.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

_NAME = "default"
_FILE = "adapter_model.safetensors"


class Adapters:
    """Adapters of one model, and the modules that are trained in full beside them.

    A layer with an adapter computes ``W x + scaling * B (A x)``. Its merged weight ``W + scaling * B A`` is formed in
    the precision of the parameters (fp32 in training) and rounded once, where it is sent; training in bf16 rounds the
    two terms one by one, so the two differ by rounding.

    Args:
        lm: the model that they have been put into; may be sharded afterwards.
        config: their shape.
        in_full: names of the parameters that are trained in full, and under which of its names each one is known.
        field: names the setting in messages.
        folder: where their values are; None: A is random and B is 0, so that the model is the one without them.
    """

    def __init__(
        self, lm: nn.Module, config: LoraConfig, in_full: Mapping[str, str], field: str, folder: Path | None
    ) -> None:
        self._lm, self._config, self._in_full, self._field, self._folder = lm, config, in_full, field, folder

    @classmethod
    def put_into(cls, lm: PreTrainedModel, args: ModelArguments, role: str) -> Adapters:
        """Put the adapters that ``args`` describes into a model, and freeze the rest of it.

        Raises:
            ConfigError: the settings contradict each other.
            ModelError: they do not fit the model, or the adapter's folder cannot be read.
        """
        path = f"{role}.model_args"
        if args.lora_dropout > 0:
            problem = "old and new log-probabilities must be those of one function, which dropout is not; use 0"
            raise ConfigError(f"{path}.lora_dropout", problem)
        folder = Path(args.adapter_name_or_path) if args.adapter_name_or_path else None
        field = f"{path}.adapter_name_or_path" if folder else f"{path}.lora_target"
        config = _read_config(folder, args, field) if folder else _new_config(args)
        in_full = _names(args.additional_target) or list(config.modules_to_save or [])
        config.modules_to_save = None  # PEFT would keep a second copy of each
        try:
            inject_adapter_in_model(config, lm)
        except ValueError as error:
            raise ModelError(f"{field}: {str(error).splitlines()[0]}") from error
        for name, module in lm.named_modules():
            if isinstance(module, LoraLayer) and not _plain(module):
                kind = type(module.get_base_layer()).__name__
                raise ModelError(f"{field}: adapters are for linear layers, and {name} is a {kind}")
        if isinstance(lm.get_output_embeddings(), LoraLayer):
            raise ModelError(f"{field}: the output projection takes no adapter; name it in additional_target")
        trained = _unfreeze(lm, in_full, f"{path}.additional_target")
        config.modules_to_save = sorted({name.rpartition(".")[0] for name in trained}) or None
        config.base_model_name_or_path = args.model_name_or_path
        return cls(lm, config, trained, field, folder)

    @torch.no_grad()
    def fill(self) -> None:
        """Set the adapters' values, each rank its shards of them.

        Raises:
            ModelError: the folder that they are in cannot be read, or holds others.
        """
        stored = self._stored() if self._folder else None
        for name, parameter in self._lm.named_parameters(remove_duplicate=False):
            own, rows = own_part(parameter)
            if stored is None:
                if ".lora_A." in name:
                    own.copy_(_fresh(name, parameter)[rows])
                elif ".lora_B." in name:
                    own.zero_()
            elif name in self._in_full or _is_adapter(name):
                whole = stored.get(_key(name))
                if whole is not None and whole.shape == parameter.shape:
                    own.copy_(whole[rows])
                elif _is_adapter(name):
                    raise ModelError(f"{self._field}: {str(self._folder)!r} holds no {_key(name)} of this shape")

    def _stored(self) -> dict[str, Tensor]:
        assert self._folder is not None
        try:
            return load_file(self._folder / _FILE)
        except Exception as error:  # policy: refuse, as for a model
            raise ModelError(f"{self._field}: cannot read {str(self._folder / _FILE)!r}: {error}") from error

    def merged(self, pairs: Iterable[tuple[str, Tensor]], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Add each adapter to its weight, and give all parameters their names in the checkpoint.

        Args:
            pairs: name and value of each parameter of ``module``, in its order.
            module: holds the model.
        """
        scaling = {name: m.scaling[_NAME] for name, m in module.named_modules() if isinstance(m, LoraLinear)}
        weight = lora_a = torch.empty(0)
        for name, value in pairs:
            if name.endswith(".base_layer.weight"):
                weight = value
            elif ".lora_A." in name:
                lora_a = value
            elif ".lora_B." in name:
                layer = name.partition(".lora_B.")[0]
                yield f"{layer}.weight", torch.addmm(weight, value, lora_a, alpha=scaling[layer])
            else:
                yield name.replace(".base_layer.", "."), value

    def save(self, folder: str, trained: Mapping[str, Tensor]) -> None:
        """Write a folder that PEFT loads, and that ``adapter_name_or_path`` may name.

        Args:
            folder: is made if it does not exist.
            trained: the whole of each trained parameter by name.
        """
        state = {_key(name): value for name, value in trained.items() if _is_adapter(name)}
        state |= {_key(name): trained[known_as] for name, known_as in self._in_full.items() if known_as in trained}
        self._config.save_pretrained(folder)
        # clone(): tied tensors are written under each of their names, which must not share memory.
        state = {name: value.cpu().contiguous().clone() for name, value in state.items()}
        save_file(state, Path(folder) / _FILE, metadata={"format": "pt"})


def _new_config(args: ModelArguments) -> LoraConfig:
    targets = _names(args.lora_target)
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def _read_config(folder: Path, args: ModelArguments, field: str) -> LoraConfig:
    """The shape of a stored adapter, which the settings must not contradict."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # policy: refuse, as for a model
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ModelError(f"{field}: cannot read an adapter in {str(folder)!r}: {reason}") from error
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.lora_bias:
        raise ModelError(f"{field}: {str(folder)!r} holds something else than plain LoRA")
    targets = _names(args.lora_target)
    if targets and targets != ["all-linear"] and set(targets) != set(config.target_modules or []):
        problem = f"the adapter in {str(folder)!r} is for {', '.join(sorted(config.target_modules or []))}; remove this"
        raise ConfigError(f"{field.rpartition('.')[0]}.lora_target", problem)
    logger.info("%s: an adapter of rank %d on %s", field, config.r, ", ".join(sorted(config.target_modules or [])))
    config.inference_mode, config.lora_dropout, config.init_lora_weights = False, 0.0, True
    return config


def _unfreeze(lm: nn.Module, targets: list[str], field: str) -> dict[str, str]:
    """Have the modules that ``targets`` name trained in full.

    Returns:
        The names of their parameters, tied ones under each name, and the first name of each.
    """
    wanted: set[int] = set()
    for target in targets:
        modules = [m for name, m in lm.named_modules() if name == target or name.endswith(f".{target}")]
        if not modules:
            raise ModelError(f"{field}: the model has no module {target!r}")
        if any(isinstance(inner, LoraLayer) for module in modules for inner in module.modules()):
            raise ConfigError(
                field, f"{target!r} has adapters in it; name other modules, or take it out of lora_target"
            )
        wanted |= {id(parameter) for module in modules for parameter in module.parameters()}
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            parameter.requires_grad_(True)
            names[name] = first.setdefault(id(parameter), name)
    return names


def _plain(module: LoraLayer) -> bool:
    """Whether a layer computes no more than the formula of :class:`Adapters`."""
    return type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.lora_variant


def _fresh(name: str, like: Tensor) -> Tensor:
    """The usual start of A: uniform, ``1 / sqrt(fan_in)`` at most. By name, so that all ranks make the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1.0 / math.sqrt(like.shape[1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _key(name: str) -> str:
    """A parameter's name in PEFT's files."""
    return "base_model.model." + name.replace(f".{_NAME}.", ".")


def _names(listed: str | None) -> list[str]:
    return [name.strip() for name in (listed or "").split(",") if name.strip()]
