"""``fsdp2_infer``: scores with a model that is sharded over its ranks, for one that does not fit on a single device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
)
from roll_opd.distributed.strategy.packed_model import packed_model_of, raw_of
from roll_opd.distributed.strategy.pretrained import Checkpoint
from roll_opd.distributed.strategy.scoring import score_row
from roll_opd.distributed.strategy.sharded_model import ShardedModel, disk_errors, full_tensor
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket, tensor_checksum
from roll_opd.distributed.strategy.weight_update import WeightUpdate


class FSDP2InferStrategy:
    """Scores with one model over all ranks, each its own share of the requests. All ranks call every method together.

    Args:
        role: named in messages.
        config: the role's worker config.
        vocabulary: the student's tokenizer facts; ids beyond it never enter a softmax.
        device: this rank's device.

    Raises:
        ModelError: the model cannot be loaded, or not do what is asked of it.
    """

    def __init__(self, role: str, config: WorkerConfig, vocabulary: Vocabulary, device: torch.device) -> None:
        checkpoint = Checkpoint(AutoModelForCausalLM, config.model_args, role=role, device=device)
        self.model = packed_model_of(checkpoint, checkpoint.empty(), vocabulary.size, config.logits_in_fp32)
        self.sharded = ShardedModel(config, checkpoint, self.model, self.model.lm, trains=False)
        self._dtype = checkpoint.dtype
        self._parameters = dict(self.model.lm.named_parameters(remove_duplicate=False))
        self._end = TransferEnd(device)
        self._update = WeightUpdate(self._parameters, self._end)

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; ``requests`` are this rank's."""
        return self.sharded.by_row(requests, lambda row: score_row(self.model, row, want))

    def head(self) -> HeadWeights:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; every rank returns the whole of it."""
        shards = self.model.head()
        bias = None if shards.bias_V is None else full_tensor(shards.bias_V)
        head = dataclasses.replace(shards, weight_VH=full_tensor(shards.weight_VH), bias_V=bias).trimmed()
        return HeadWeights(raw_of(head.weight_VH), None if head.bias_V is None else raw_of(head.bias_V), head.soft_cap)

    # ---- weights that move during a run --------------------------------------------------------------------------

    def save_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; every rank its part."""
        with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
            dcp.save({"model": get_model_state_dict(self.model)}, checkpoint_id=folder)
        dist.barrier()

    def load_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; the number of ranks may differ."""
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            # Into the shards themselves: the state holds the parameters, no copies of them.
            dcp.load({"model": get_model_state_dict(self.model)}, checkpoint_id=folder)

    def weight_dtype(self) -> str:
        """The dtype in which weights should be sent here, as torch names it."""
        return str(self._dtype).removeprefix("torch.")

    def receivers(self) -> int:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`; of this rank."""
        return 1

    def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`."""
        self._end.join(host, port, first_rank, size, timeout)

    def begin_weight_update(self, version: int, mix: float = 1.0) -> None:
        """Take over weights until :meth:`finish_weight_update`; ``mix`` is their share in what is then held."""
        self._update = WeightUpdate(self._parameters, self._end, mix)

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over this rank's shards of the tensors of ``bucket``; return the checksums that its sender gave."""
        return self._update.take(bucket)

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Return the checksum of each tensor as the ranks now hold it together."""
        sums = {id(p): tensor_checksum(full_tensor(p)) for p in self.model.lm.parameters()}
        return {name: sums[id(p)] for name, p in self._parameters.items()}

    # ---- residence -----------------------------------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.sharded.offload(keep_weights)

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self.sharded.onload(weights_only)
