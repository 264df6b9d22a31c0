"""``fsdp2_train`` of a critic: the value model under the same trainer as the student's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModel

from roll_opd.algorithms.value_loss import value_loss
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest, TrainItem
from roll_opd.distributed.strategy.pretrained import DTYPES, Checkpoint
from roll_opd.distributed.strategy.sharded_trainer import ShardedTrainer, disk_errors
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.value_model import save_value_model, value_model_of
from roll_opd.trajectory import FloatArray, PackedBatch


class FSDP2ValueStrategy:
    """Trains a :class:`ValueModel`; see :class:`ShardedTrainer` for how it is held.

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
        checkpoint = Checkpoint(AutoModel, config.model_args, role=role, device=device, dtype=torch.float32)
        self.model = value_model_of(checkpoint, checkpoint.empty(), vocabulary.size)
        self.trainer = ShardedTrainer(
            config,
            checkpoint,
            self.model,
            self.model.backbone,
            max_grad_norm=max_grad_norm,
            total_updates=total_updates,
            full_precision=[self.model.value_head],
            rtol=1e-3,
        )

    def values(self, requests: Sequence[ScoreRequest]) -> list[FloatArray]:
        """See :class:`~roll_opd.distributed.strategy.factory.ValueStrategy`."""

        def values_of(row: Sequence[ScoreRequest]) -> list[FloatArray]:
            batch = PackedBatch.pack([r.tokens for r in row], [r.response_mask for r in row])
            values, target = self.model.values(batch)
            spread = np.zeros(len(batch.tokens), dtype=np.float32)
            spread[target] = values.cpu().numpy()
            return batch.split(spread)

        return self.trainer.by_row(requests, values_of)

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], value_clip: float | None) -> dict[str, float]:
        """See :class:`~roll_opd.distributed.strategy.factory.ValueStrategy`.

        Returns:
            What :meth:`ShardedTrainer.update` does; ``sum/*`` are to be divided by ``sum/tokens``.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """

        def loss_of(items: Sequence[TrainItem]) -> tuple[Tensor, dict[str, Tensor]]:
            return self._micro_batch_loss(items, value_clip)

        return self.trainer.update(micro_batches, loss_of)

    def _micro_batch_loss(
        self, items: Sequence[TrainItem], value_clip: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        trajectories = [item.trajectory for item in items]
        batch = PackedBatch.pack([t.tokens for t in trajectories], [t.response_mask for t in trajectories])
        values, _ = self.model.values(batch)
        weights = self._put([np.full(i.trajectory.response_length, i.token_weight, np.float32) for i in items])
        old_values = self._put([_sampled(item, item.trajectory.values) for item in items])
        returns = self._put([_sampled(item, item.trajectory.returns) for item in items])
        losses, stats = value_loss(values, old_values, returns, value_clip)
        counted = weights > 0
        stats = {name: each[counted] for name, each in stats.items()}
        stats["tokens"] = counted.float()
        return (losses * weights).sum(), stats

    def _put(self, parts: Sequence[FloatArray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def export_hf(self, folder: str) -> None:
        """Write the backbone in Hugging Face format and the head beside it."""
        state = {name: full.cpu() for name, full in self.trainer.full_parameters(self.model)}
        if state:
            with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
                save_value_model(self.model, state, folder, DTYPES[self.config.model_args.dtype])
        dist.barrier()

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.trainer.offload(keep_weights)

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.trainer.onload(weights_only)

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part."""
        self.trainer.save(folder)

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote; the number of ranks may differ."""
        self.trainer.load(folder)


def _sampled(item: TrainItem, values: FloatArray | None) -> FloatArray:
    assert values is not None, f"trajectory {item.trajectory.id} has no value or no return"
    return item.trajectory.sampled(values)
