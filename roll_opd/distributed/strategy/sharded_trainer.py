"""What all models that are trained with FSDP2 have in common; what they compute is their strategies' business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import get_scheduler

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.pretrained import Checkpoint, own_part
from roll_opd.distributed.strategy.residence import Residence
from roll_opd.distributed.strategy.sharded_model import ShardedModel, disk_errors, on_device
from roll_opd.errors import ModelError, TrainingError

T = TypeVar("T")

RowLoss = Callable[[T], tuple[Tensor, dict[str, Tensor]]]
"""A micro-batch's share of the loss, and per-token quantities to be summed."""

# Frozen weights are in the model's own files.
_STATE = StateDictOptions(ignore_frozen_params=True, strict=False)

_NORM_NUMBERS = 2**20
"""Numbers of a gradient that are squared together."""


class ShardedTrainer(ShardedModel):
    """A sharded model with its optimizer, schedule and checkpoints.

    Parameters and optimizer state are fp32; ``dtype: bf16`` computes in bf16 with fp32 gradient reduction.

    Args:
        config: the role's worker config.
        checkpoint: see :class:`ShardedModel`; its parameters are fp32.
        model: what is trained.
        lm: the transformers model in it.
        max_grad_norm: gradients are scaled down to this L2 norm; <= 0 switches it off.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        full_precision: see :class:`ShardedModel`.
        rtol: likewise.
        guests: what else leaves the device with the optimizer's state.

    Raises:
        ModelError: as :class:`ShardedModel`, or nothing is left to train.
    """

    def __init__(
        self,
        config: WorkerConfig,
        checkpoint: Checkpoint,
        model: torch.nn.Module,
        lm: Any,
        *,
        max_grad_norm: float,
        total_updates: int,
        full_precision: Iterable[torch.nn.Module] = (),
        rtol: float = 0.0,
        guests: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        if not config.model_args.disable_gradient_checkpointing:
            # transformers recomputes in training mode only; without dropout the mode changes nothing else.
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(config, checkpoint, model, lm, trains=True, full_precision=full_precision, rtol=rtol)
        self.max_grad_norm = max_grad_norm
        self.optimizer = _build_optimizer(model, config, self.role)
        training = config.training_args
        warmup = training.warmup_steps or int(np.ceil(training.warmup_ratio * total_updates))
        self.scheduler = get_scheduler(training.lr_scheduler_type, self.optimizer, warmup, total_updates)
        self._guests = guests
        self._other = Residence()

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
        assert not (self._weights.away or self._other.away), f"{self.role} has left its device"
        for micro_batch in micro_batches:
            total, stats = loss_of(micro_batch)
            # FSDP averages gradients over the ranks; the loss is already a share of the global sum. It does so after
            # each micro-batch: to wait for the last one would take memory for the whole gradient on every rank.
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
                # A part at a time: in fp64 the whole is twice as large as it is.
                for part in own_part(parameter.grad)[0].flatten().split(_NORM_NUMBERS):
                    square += part.double().square_().sum().to(self.device)
        dist.all_reduce(square)
        return float(square.sqrt().item())

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_STATE)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: str) -> None:
        """Write trained weights, optimizer, schedule and random state; every rank its part. Changes nothing here."""
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
            options=_STATE,
        )
        mine = Path(folder) / f"extra_rank{self.rank}.pt"
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            extra = torch.load(mine if mine.exists() else mine.with_name("extra_rank0.pt"), weights_only=True)
        if extra.get("fresh", False):
            # All ranks took as many steps, so all say the same. What was written is only torch's zero step.
            self.optimizer.state.clear()
        self.scheduler.load_state_dict(extra["scheduler"])
        torch.set_rng_state(extra["rng"])

    # ---- residence -----------------------------------------------------------------------------------------------

    def _leave(self, keep_weights: bool) -> None:
        if not self._other.away:
            state = [value for each in self.optimizer.state.values() for value in each.values()]
            gradients = [parameter.grad for parameter in self.model.parameters()]
            tensors = [t for t in (*state, *gradients, *self._guests()) if isinstance(t, Tensor)]
            self._other.leave(on_device(self.device, tensors))
        super()._leave(keep_weights)

    def _come_back(self, weights_only: bool) -> None:
        super()._come_back(weights_only)
        if not weights_only:
            self._other.come_back()


def _build_optimizer(model: torch.nn.Module, config: WorkerConfig, role: str) -> torch.optim.Optimizer:
    """AdamW or SGD for what is trained; weight decay on matrices alone, as is usual for transformers."""
    training = config.training_args
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ModelError(f"{role}.model_args.freeze_module_prefix: nothing is left to train")
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
