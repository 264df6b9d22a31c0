"""What all models that are trained with FSDP2 have in common; what they compute is their strategies' business."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.packed_model import DTYPES
from roll_opd.distributed.strategy.scoring import rows_of
from roll_opd.errors import LaunchError, TrainingError
from roll_opd.trajectory import TrajectoryId

T = TypeVar("T")

RowLoss = Callable[[T], tuple[Tensor, dict[str, Tensor]]]
"""A micro-batch's share of the loss, and per-token quantities to be summed."""


class ShardedTrainer:
    """Parameters that are sharded over all ranks, their optimizer, schedule and checkpoints.

    The process group must exist before. Parameters and optimizer state are fp32; ``dtype: bf16`` computes in bf16
    with fp32 gradient reduction. All ranks call every method together.

    Args:
        role: named in messages.
        config: the role's worker config.
        model: what is trained; is sharded in place, and put into training mode.
        lm: the transformers model in it, whose layers are sharded one by one.
        device: this rank's device.
        max_grad_norm: gradients are scaled down to this L2 norm; <= 0 switches it off.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        full_precision: modules that compute in fp32 whatever the config says.
    """

    def __init__(
        self,
        role: str,
        config: WorkerConfig,
        model: torch.nn.Module,
        lm: Any,
        device: torch.device,
        *,
        max_grad_norm: float,
        total_updates: int,
        full_precision: Iterable[torch.nn.Module] = (),
    ) -> None:
        self.role = role
        self.config = config
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.max_grad_norm = max_grad_norm
        self.model = model
        self._shard(lm, full_precision)
        self.optimizer = _build_optimizer(model, config)
        training = config.training_args
        warmup = training.warmup_steps or int(np.ceil(training.warmup_ratio * total_updates))
        self.scheduler = get_scheduler(training.lr_scheduler_type, self.optimizer, warmup, total_updates)

    def _shard(self, lm: Any, full_precision: Iterable[torch.nn.Module]) -> None:
        if not self.config.model_args.disable_gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers recomputes in training mode only; without dropout the mode changes nothing else.
        self.model.train()
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        compute = DTYPES[self.config.model_args.dtype]
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32
        )
        for layer in _decoder_layers(lm):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        for module in full_precision:
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        # Embedding, final norm and head belong to the root, whose forward applies the head to the gathered weight.
        self._fsdp = fully_shard(self.model, mesh=mesh, mp_policy=policy)

    # ---- forward -------------------------------------------------------------------------------------------------

    def rows(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[ScoreRequest], bool]]:
        """Yield this rank's packed rows, each with true, then idle ones with false until all ranks have had as many."""
        rows = list(rows_of(requests, self.config))
        most = torch.tensor([len(rows)], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for index in range(int(most.item())):
            yield (rows[index], True) if index < len(rows) else ([_idle_request()], False)
        # A forward without a backward leaves the root's parameters gathered: checkpoints would not find their shards.
        self._fsdp.reshard()

    # ---- training ------------------------------------------------------------------------------------------------

    def update(self, micro_batches: Sequence[T], loss_of: RowLoss[T]) -> dict[str, float]:
        """One optimizer step over this rank's ``micro_batches`` (equally many on each rank).

        Args:
            micro_batches: whatever ``loss_of`` takes.
            loss_of: returns the micro-batch's share of the *global* loss, and per-token quantities.

        Returns:
            Sums over *all* ranks: ``loss``, and ``sum/*`` of what ``loss_of`` gave; ``grad_norm`` (before clipping) and
            ``lr``.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        sums: dict[str, float] = {}
        for index, micro_batch in enumerate(micro_batches):
            self._fsdp.set_requires_gradient_sync(index + 1 == len(micro_batches))
            total, stats = loss_of(micro_batch)
            # FSDP averages gradients over the ranks; the loss is already a share of the global sum.
            (total * self.world_size).backward()
            sums["loss"] = sums.get("loss", 0.0) + float(total.detach())
            for name, values in stats.items():
                sums[f"sum/{name}"] = sums.get(f"sum/{name}", 0.0) + float(values.double().sum())
        norm = self._grad_norm()
        if not np.isfinite(norm):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"{self.role}: the gradient norm is {norm}; the weights were left unchanged. Lower learning_rate, or "
                f"resume from the last checkpoint"
            )
        if self.max_grad_norm > 0 and norm > self.max_grad_norm:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.max_grad_norm / norm)
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return self._sum_over_ranks(sums) | {"grad_norm": norm, "lr": lr}

    def _sum_over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def _grad_norm(self) -> float:
        """Global L2 norm of the gradient, in fp64: fp32 sums over millions of elements depend on the sharding."""
        square = torch.zeros(1, dtype=torch.float64, device=self.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                square += _local(parameter.grad).double().square().sum()
        dist.all_reduce(square)
        return float(square.sqrt().item())

    # ---- weights -------------------------------------------------------------------------------------------------

    def full_parameters(self, module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and, detached, the whole of each parameter of ``module`` on rank 0; nothing on the others."""
        for name, parameter in module.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self.rank == 0:
                yield name, full.detach()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part. Changes nothing here."""
        # Of an optimizer without state torch makes one by a step with zero gradients, which Adam counts as its first:
        # bias correction, and so the updates to come, would depend on whether something was saved before them.
        fresh = not self.optimizer.state
        state = self._state()
        if fresh:
            self.optimizer.state.clear()
        with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
            dcp.save(state, checkpoint_id=folder)
            torch.save(
                {"scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state(), "fresh": fresh},
                f"{folder}/extra_rank{self.rank}.pt",
            )
        dist.barrier()

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote; the number of ranks may differ (then the random state is rank 0's)."""
        state = self._state()
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        mine = Path(folder) / f"extra_rank{self.rank}.pt"
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            extra = torch.load(mine if mine.exists() else mine.with_name("extra_rank0.pt"), weights_only=True)
        if extra.get("fresh", False):
            # All ranks took as many steps, so all say the same. What was written is only torch's zero step.
            self.optimizer.state.clear()
        self.scheduler.load_state_dict(extra["scheduler"])
        torch.set_rng_state(extra["rng"])


@contextlib.contextmanager
def disk_errors(field: str, what: str) -> Iterator[None]:
    """Turn what a full disk or a damaged file raises into one line that names the setting."""
    try:
        yield
    except (OSError, EOFError, CheckpointException, RuntimeError, pickle.UnpicklingError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise LaunchError(f"{field}: {what}: {lines[-1].strip()}") from error


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _decoder_layers(lm: Any) -> Iterator[torch.nn.Module]:
    layers = getattr(lm.base_model, "layers", None)
    yield from layers if layers is not None else []


def _build_optimizer(model: torch.nn.Module, config: WorkerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices alone, as is usual for transformers."""
    training = config.training_args
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )


def _idle_request() -> ScoreRequest:
    """A tiny sequence that keeps a rank without work in step with the others; its score is thrown away."""
    return ScoreRequest(TrajectoryId(-1, -1), np.zeros(2, dtype=np.int32), np.array([False, True]))
