"""A model whose parameters lie in shards on all ranks: what training it and scoring with it have in common."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.fsdp2 import FSDP2Settings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.packed_model import check_forward, decoder_layers
from roll_opd.distributed.strategy.pretrained import DTYPES, Checkpoint, own_part
from roll_opd.distributed.strategy.residence import Residence
from roll_opd.distributed.strategy.scoring import idle_request, in_order_of, rows_of
from roll_opd.errors import ConfigError, LaunchError, ModelError

if TYPE_CHECKING:
    from roll_opd.distributed.strategy.lora import Adapters

T = TypeVar("T")


class ShardedModel:
    """Shards a model that has no memory yet, and fills the shards; no rank ever holds more than them and one tensor.

    The process group must exist before. All ranks call every method together.

    Args:
        config: the role's worker config.
        checkpoint: what ``model`` was made from, by :meth:`Checkpoint.empty`.
        model: is changed in place. Has a method ``ours_and_own``, as :class:`PackedModel` has.
        lm: the transformers model in it, whose layers are sharded one by one.
        trains: whether it is put into training mode, and parameters of another dtype than the config's are cast to that
            where they compute.
        full_precision: modules that compute in fp32 whatever the config says.
        rtol: relative tolerance of the check that we compute the model as it does itself.

    Raises:
        ModelError: the checkpoint or the adapter cannot be loaded, or does not fit the settings.
    """

    def __init__(
        self,
        config: WorkerConfig,
        checkpoint: Checkpoint,
        model: Any,
        lm: Any,
        *,
        trains: bool,
        full_precision: Iterable[nn.Module] = (),
        rtol: float = 0.0,
    ) -> None:
        self.role, self.config, self.device = checkpoint.role, config, checkpoint.device
        self.model, self.lm = model, lm
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.settings = backend_settings(config.strategy_args) if config.strategy_args else FSDP2Settings()
        self.adapters = _put_adapters_into(lm, config.model_args, self.role, trains)
        if trains:
            _freeze(lm, config.model_args.freeze_module_prefix, self.role)
        else:
            model.requires_grad_(False)
        model.train(trains)
        made = {name: tensor.detach().clone() for name, tensor in _tensors(model) if not tensor.is_meta}
        self._shard(trains, full_precision)
        model.to_empty(device="cpu" if self.settings.offload_policy else self.device)
        self._restore(made)
        checkpoint.fill()
        if self.adapters:
            self.adapters.fill()
        register_fsdp_forward_method(model, "ours_and_own")
        ours, own = model.ours_and_own()
        check_forward(ours, own, checkpoint, rtol)
        self.reshard()
        self._weights = Residence()

    def _shard(self, trains: bool, full_precision: Iterable[nn.Module]) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        compute = DTYPES[self.config.model_args.dtype]
        cast = compute if trains and compute != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32)
        # Pinned memory is CUDA's.
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": mesh,
            "offload_policy": offload if self.settings.offload_policy else OffloadPolicy(),
        }
        for layer in decoder_layers(self.lm):
            fully_shard(layer, mp_policy=policy, reshard_after_forward=self.settings.reshard_after_forward, **options)
        for module in full_precision:
            fully_shard(module, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), **options)
        # Embedding, final norm and head belong to the root, whose forward applies the head to the gathered weight.
        fully_shard(self.model, mp_policy=policy, **options)

    @torch.no_grad()
    def _restore(self, made: dict[str, Tensor]) -> None:
        """Give what had values before the sharding those values again: buffers, and modules that no file fills."""
        for name, tensor in _tensors(self.model):
            if name not in made:
                continue
            if isinstance(tensor, nn.Parameter):
                own, rows = own_part(tensor)
                own.copy_(made[name][rows])
            else:
                tensor.data = made[name].to(self.device)

    # ---- forward -------------------------------------------------------------------------------------------------

    def by_row(self, requests: Sequence[ScoreRequest], compute: Callable[[list[ScoreRequest]], list[T]]) -> list[T]:
        """Return what ``compute`` gives for this rank's ``requests``, in their order.

        It is called with one packed row after the other, and, to keep in step with ranks that have more of them, with
        idle rows, whose results are dropped.
        """
        assert not self._weights.away, f"{self.role} has left its device"
        rows = rows_of(requests, self.config)
        count = torch.tensor([len(rows)], device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        most = int(count.item())
        rows = rows_of(requests, self.config, at_least=most)
        results: list[T] = []
        with torch.no_grad():
            for row in rows:
                results += compute(row)
            for _ in range(most - len(rows)):
                compute([idle_request()])
        self.reshard()
        return in_order_of(requests, rows, results)

    def reshard(self) -> None:
        """Free gathered parameters: a forward without a backward leaves some, and checkpoints need the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- weights -------------------------------------------------------------------------------------------------

    def full_parameters(self, module: nn.Module, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the whole of each parameter of ``module``, as the checkpoint would hold it.

        Adapters are added to the weights that they belong to, in the precision of the parameters. Unless it is wanted
        ``everywhere``, rank 0 alone gets something; the others take part.
        """
        pairs = self._gathered(module, everywhere=everywhere)
        yield from self.adapters.merged(pairs, module) if self.adapters else pairs

    def _gathered(
        self, module: nn.Module, *, trained: bool = False, everywhere: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        assert not self._weights.away, f"{self.role} has left its device"
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or not trained:
                whole = full_tensor(parameter)
                if everywhere or self.rank == 0:
                    yield name, whole

    def export_adapters(self, folder: str) -> None:
        """Write what is trained beside frozen weights in PEFT's format; without adapters nothing."""
        if self.adapters:
            trained = dict(self._gathered(self.lm, trained=True))
            if trained:
                with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
                    self.adapters.save(folder, trained)

    # ---- residence -----------------------------------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`; on a CPU nothing moves."""
        if self.device.type == "cuda":
            self._leave(keep_weights)
            torch.cuda.empty_cache()

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        if self.device.type == "cuda":
            self._come_back(weights_only)

    def _leave(self, keep_weights: bool) -> None:
        if not keep_weights and not self._weights.away:
            self.reshard()
            self._weights.leave(on_device(self.device, (tensor for _, tensor in _tensors(self.model))))

    def _come_back(self, weights_only: bool) -> None:
        self._weights.come_back()


def full_tensor(parameter: Tensor) -> Tensor:
    """Return the whole of a parameter, detached, on the device that computes; all ranks together."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # Shards that are kept in host memory are gathered on the device.
    whole: Tensor = parameter.detach().to(parameter.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole


def on_device(device: torch.device, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the local part of those tensors that are on a device of this kind."""
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.device.type == device.type:
            yield own.detach()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _put_adapters_into(lm: Any, args: ModelArguments, role: str, trains: bool) -> Adapters | None:
    # A scorer's fresh adapter would compute nothing.
    if args.adapter_name_or_path is None and not (trains and args.lora_target is not None):
        if trains and args.additional_target is not None:
            raise ConfigError(f"{role}.model_args.additional_target", "is trained beside an adapter; set lora_target")
        return None
    try:
        from roll_opd.distributed.strategy.lora import Adapters
    except ImportError as error:
        raise ModelError(
            f"{role}.model_args: adapters need the package peft ({error}); install the extra lora"
        ) from error
    return Adapters.put_into(lm, args, role)


def _freeze(lm: nn.Module, prefixes: str | None, role: str) -> None:
    """Switch training off for modules by the beginnings of their names."""
    for prefix in (p.strip() for p in (prefixes or "").split(",") if p.strip()):
        named = [parameter for name, parameter in lm.named_parameters() if name.startswith(prefix)]
        if not named:
            raise ModelError(f"{role}.model_args.freeze_module_prefix: no module's name begins with {prefix!r}")
        for parameter in named:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def disk_errors(field: str, what: str) -> Iterator[None]:
    """Turn what a full disk or a damaged file raises into one line that names the setting."""
    try:
        yield
    except (OSError, EOFError, CheckpointException, RuntimeError, pickle.UnpicklingError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise LaunchError(f"{field}: {what}: {lines[-1].strip()}") from error
