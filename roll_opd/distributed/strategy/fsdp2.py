"""``fsdp2_train`` of a language model: PyTorch FSDP2 over gloo or NCCL, one rank or many, on packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from roll_opd.algorithms.chunked_head import Head
from roll_opd.algorithms.loss import Loss
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
    TokenScores,
    TrainItem,
)
from roll_opd.distributed.strategy.loss_inputs import row_loss
from roll_opd.distributed.strategy.packed_model import head_of, packed_model_of
from roll_opd.distributed.strategy.pretrained import DTYPES, Checkpoint
from roll_opd.distributed.strategy.scoring import score_row
from roll_opd.distributed.strategy.sharded_trainer import ShardedTrainer, disk_errors
from roll_opd.distributed.strategy.tokenizer import Vocabulary


class FSDP2Strategy:
    """Trains a transformers model; see :class:`ShardedTrainer` for how it is held.

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
        self.config = config
        self.device = device
        checkpoint = Checkpoint(AutoModelForCausalLM, config.model_args, role=role, device=device, dtype=torch.float32)
        self.model = packed_model_of(checkpoint, checkpoint.empty(), vocabulary.size, config.logits_in_fp32)
        self._teacher_heads: dict[str, Head] = {}
        self._tied = _tied_names(self.model.lm)
        self.trainer = ShardedTrainer(
            config,
            checkpoint,
            self.model,
            self.model.lm,
            max_grad_norm=max_grad_norm,
            total_updates=total_updates,
            guests=lambda: [t for h in self._teacher_heads.values() for t in (h.weight_VH, h.bias_V) if t is not None],
        )

    # ---- scoring -------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`."""
        return self.trainer.by_row(requests, lambda row: score_row(self.model, row, want))

    # ---- training ------------------------------------------------------------------------------------------------

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; every rank holds a whole copy."""
        self._teacher_heads[teacher] = head_of(head, self.device)

    def train_step(
        self, micro_batches: Sequence[Sequence[TrainItem]], loss: Loss, said: list[TokenScores] | None = None
    ) -> dict[str, float]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`.

        Returns:
            What :meth:`ShardedTrainer.update` does; ``sum/*`` are to be divided by ``sum/tokens``. And ``max/*`` of
            this rank.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        ratios = [0.0]

        def loss_of(items: Sequence[TrainItem]) -> tuple[Tensor, dict[str, Tensor]]:
            total, stats = row_loss(self.model, items, loss, self._teacher_heads, self.device, said)
            if stats["ratio"].numel():
                ratios.append(float(stats["ratio"].max()))
            return total, stats

        return self.trainer.update(micro_batches, loss_of) | {"max/ratio": max(ratios)}

    # ---- weights -------------------------------------------------------------------------------------------------

    def full_weights(self, dtype: str | None, everywhere: bool = False) -> Iterator[tuple[list[str], Tensor]]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`."""
        for name, full in self.trainer.full_parameters(self.model.lm, everywhere):
            yield [name, *self._tied.get(name, [])], full.to(getattr(torch, dtype)) if dtype else full

    def export_hf(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; weights are written in the model's dtype."""
        dtype = DTYPES[self.config.model_args.dtype]
        state = {name: full.cpu().to(dtype) for name, full in self.trainer.full_parameters(self.model.lm)}
        if state:
            self.model.lm.config.dtype = dtype
            with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
                self.model.lm.save_pretrained(folder, state_dict=state)
        self.trainer.export_adapters(f"{folder}/adapter")
        dist.barrier()

    # ---- residence -----------------------------------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.trainer.offload(keep_weights)

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.trainer.onload(weights_only)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part."""
        self.trainer.save(folder)

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote; the number of ranks may differ."""
        self.trainer.load(folder)


def _tied_names(lm: torch.nn.Module) -> dict[str, list[str]]:
    """Map the first name of each shared parameter to its other names."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied.setdefault(owner, []).append(name)
    return tied
