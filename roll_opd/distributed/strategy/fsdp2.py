"""``fsdp2_train``: PyTorch FSDP2 over gloo or NCCL, one rank or many, on packed rows."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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

from roll_opd.algorithms.chunked_head import Head
from roll_opd.algorithms.loss import Loss
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
    TrainItem,
    WeightBucket,
)
from roll_opd.distributed.strategy.loss_inputs import RowTensors
from roll_opd.distributed.strategy.packed_model import DTYPES, as_bytes, head_of, load_model
from roll_opd.distributed.strategy.scoring import rows_of, score_row
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.errors import LaunchError, TrainingError
from roll_opd.trajectory import TrajectoryId

logger = logging.getLogger(__name__)


class FSDP2Strategy:
    """Trains a transformers model whose parameters are sharded over all ranks.

    The process group must exist before. Parameters and optimizer state are fp32; ``dtype: bf16`` computes in bf16
    with fp32 gradient reduction.

    Args:
        role: named in messages.
        config: the role's worker config.
        vocabulary: the student's tokenizer facts.
        device: this rank's device.
        max_grad_norm: gradients are scaled down to this L2 norm; <= 0 switches it off.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self,
        role: str,
        config: WorkerConfig,
        vocabulary: Vocabulary,
        device: torch.device,
        *,
        max_grad_norm: float,
        total_updates: int,
    ) -> None:
        self.role = role
        self.config = config
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.max_grad_norm = max_grad_norm
        self.model = load_model(
            config.model_args, role=role, vocab_size=vocabulary.size, device=device, dtype=torch.float32
        )
        self._teacher_heads: dict[str, Head] = {}
        self._tied = _tied_names(self.model.lm)
        self._shard()
        self.optimizer = _build_optimizer(self.model, config)
        training = config.training_args
        warmup = training.warmup_steps or int(np.ceil(training.warmup_ratio * total_updates))
        self.scheduler = get_scheduler(training.lr_scheduler_type, self.optimizer, warmup, total_updates)

    def _shard(self) -> None:
        lm = self.model.lm
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
        # Embedding, final norm and head belong to the root, whose forward applies the head to the gathered weight.
        self._fsdp = fully_shard(self.model, mesh=mesh, mp_policy=policy)

    # ---- scoring -------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`."""
        rows = list(rows_of(requests, self.config))
        num_rows = self._max_over_ranks(len(rows))
        results: list[ScoreResult] = []
        with torch.no_grad():
            for index in range(num_rows):
                if index < len(rows):
                    results += score_row(self.model, rows[index], want)
                else:
                    score_row(self.model, [_idle_request()])
        return results

    def _max_over_ranks(self, value: int) -> int:
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    # ---- training ------------------------------------------------------------------------------------------------

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; every rank holds a whole copy."""
        self._teacher_heads[teacher] = head_of(head, self.device)

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], loss: Loss) -> dict[str, float]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`.

        Returns:
            Sums over *all* ranks: ``loss`` (already normalised), and ``sum/*`` to be divided by ``sum/tokens``; and
            ``grad_norm`` (before clipping), ``lr``, ``max/*``.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        sums: dict[str, float] = {}
        max_ratio = 0.0
        for index, items in enumerate(micro_batches):
            self._fsdp.set_requires_gradient_sync(index + 1 == len(micro_batches))
            total, stats = self._micro_batch_loss(items, loss)
            # FSDP averages gradients over the ranks; the loss is already a share of the global sum.
            (total * self.world_size).backward()
            sums["loss"] = sums.get("loss", 0.0) + float(total.detach())
            for name, values in stats.items():
                sums[f"sum/{name}"] = sums.get(f"sum/{name}", 0.0) + float(values.double().sum())
            if stats["ratio"].numel():
                max_ratio = max(max_ratio, float(stats["ratio"].max()))
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
        return self._sum_over_ranks(sums) | {"grad_norm": norm, "lr": lr, "max/ratio": max_ratio}

    def _micro_batch_loss(self, items: Sequence[TrainItem], loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
        row = RowTensors(items, loss, self._teacher_heads, self.device)
        outputs, _ = self.model.token_logprobs(row.batch, row.targets)
        losses, stats = loss(row.inputs(outputs))
        counted = row.token_weights > 0
        stats = {name: values[counted] for name, values in stats.items()}
        stats["entropy"] = outputs.entropy_n.detach()[counted]
        stats["tokens"] = counted.float()
        return (losses * row.token_weights).sum(), stats

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

    def export_weights(self, dtype: str | None, bucket_bytes: int) -> Iterator[WeightBucket]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; tied weights are sent under both names."""
        bucket: list[tuple[str, str, tuple[int, ...], np.ndarray[Any, Any]]] = []
        size = 0
        for name, parameter in self.model.lm.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self.rank:
                continue
            full = full.detach().to(getattr(torch, dtype)) if dtype else full.detach()
            raw = as_bytes(full)
            for alias in [name, *self._tied.get(name, [])]:
                bucket.append((alias, str(full.dtype).removeprefix("torch."), tuple(full.shape), raw))
            size += raw.nbytes
            if size >= bucket_bytes:
                yield WeightBucket.of(bucket)
                bucket, size = [], 0
        if bucket:
            yield WeightBucket.of(bucket)

    def export_hf(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; weights are written in the model's dtype."""
        dtype = DTYPES[self.config.model_args.dtype]
        state = {}
        for name, parameter in self.model.lm.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self.rank == 0:
                state[name] = full.detach().cpu().to(dtype)
        if self.rank == 0:
            self.model.lm.config.dtype = dtype
            with _disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
                self.model.lm.save_pretrained(folder, state_dict=state)
        dist.barrier()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part."""
        with _disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
            dcp.save(self._state(), checkpoint_id=folder)
            torch.save(
                {"scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state()},
                f"{folder}/extra_rank{self.rank}.pt",
            )
        dist.barrier()

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote; the number of ranks may differ (then the random state is rank 0's)."""
        state = self._state()
        with _disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        mine = Path(folder) / f"extra_rank{self.rank}.pt"
        with _disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            extra = torch.load(mine if mine.exists() else mine.with_name("extra_rank0.pt"), weights_only=True)
        self.scheduler.load_state_dict(extra["scheduler"])
        torch.set_rng_state(extra["rng"])


@contextlib.contextmanager
def _disk_errors(field: str, what: str) -> Iterator[None]:
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


def _tied_names(lm: torch.nn.Module) -> dict[str, list[str]]:
    """Map the first name of each shared parameter to its other names."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied.setdefault(owner, []).append(name)
    return tied


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
