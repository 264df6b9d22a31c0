"""``megatron_train`` and ``megatron_infer``: a model over tensor-, pipeline- and data-parallel ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from roll_opd.algorithms.chunked_head import Head
from roll_opd.algorithms.loss import Loss
from roll_opd.configs.backends import backend_settings
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
from roll_opd.distributed.strategy.megatron.model import MegatronChunk, load_chunks, whole_head
from roll_opd.distributed.strategy.megatron.parallel import initialize
from roll_opd.distributed.strategy.megatron.shim import cuda_shim
from roll_opd.distributed.strategy.megatron.trainer import MegatronTrainer, microbatches_in_step, run_pipeline
from roll_opd.distributed.strategy.packed_model import head_of, raw_of
from roll_opd.distributed.strategy.pretrained import DTYPES
from roll_opd.distributed.strategy.residence import Residence
from roll_opd.distributed.strategy.scoring import idle_request, in_order_of, rows_of, score_row
from roll_opd.distributed.strategy.sharded_model import disk_errors
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket, tensor_checksum
from roll_opd.errors import TrainingError
from roll_opd.trajectory import BoolArray, IntArray, PackedBatch, RawTensor


class _MegatronModel:
    """This rank's part of the model, and scoring with it.

    Args:
        role: named in messages.
        config: the role's worker config.
        vocabulary: the student's tokenizer facts; ids beyond it never enter a softmax.
        device: this rank's device.
        trains: whether there will be a backward pass.
    """

    def __init__(
        self, role: str, config: WorkerConfig, vocabulary: Vocabulary, device: torch.device, *, trains: bool
    ) -> None:
        assert config.strategy_args is not None
        self.role, self.config, self.device = role, config, device
        self.settings = backend_settings(config.strategy_args, f"{role}.strategy_args")
        initialize(self.settings, device)
        self.chunks: list[MegatronChunk] = load_chunks(
            config.model_args, self.settings, role=role, vocab_size=vocabulary.size, device=device, trains=trains
        )
        self.bridge = self.chunks[0].bridge

    @property
    def last(self) -> MegatronChunk | None:
        """The chunk that ends in the head, on the ranks that hold it."""
        return self.chunks[-1] if self.chunks[-1].post_process else None

    @property
    def answers(self) -> bool:
        """Whether this rank's results count; see :class:`~roll_opd.distributed.layout.Layout`."""
        return self.last is not None and parallel_state.get_tensor_model_parallel_rank() == 0

    def parameters(self) -> Iterator[Tensor]:
        """Yield this rank's parameters, detached."""
        for chunk in self.chunks:
            yield from (parameter.data for parameter in chunk.parameters())

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant) -> list[ScoreResult]:
        """Score ``requests``; ranks that do not answer return nothing."""
        # Hidden states are the same on all tensor-parallel ranks.
        own = want if self.answers else dataclasses.replace(want, hidden=False)
        count = microbatches_in_step(len(rows_of(requests, self.config)), self.device)
        rows = rows_of(requests, self.config, at_least=count)
        idle = ([idle_request()], SAMPLED_ONLY)
        pipelined = [(row, own) for row in rows] + [idle] * (count - len(rows))
        if not pipelined:
            return []

        def forward(chunk: MegatronChunk, row: tuple[list[ScoreRequest], ScoreWant]) -> tuple[Tensor, Any]:
            requests, want = row
            if chunk.post_process:
                return torch.zeros((), device=self.device), score_row(chunk, requests, want)
            return _send_on(chunk, [r.tokens for r in requests], [r.response_mask for r in requests])

        with cuda_shim(), torch.no_grad():
            scores = run_pipeline(self.chunks, pipelined, forward, self.device, backward=False)
        if not self.answers:
            return []
        return in_order_of(requests, rows, [result for row in scores[: len(rows)] for result in row])

    def export_hf(self, folder: str, dtype: torch.dtype) -> None:
        """Write a Hugging Face checkpoint from rank 0."""
        state = {name: tensor.cpu().to(dtype) for name, tensor in self.bridge.export(self.chunks)}
        if state:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(self.chunks[0].hf_config, dtype=dtype)
            path = self.config.model_args.model_name_or_path
            assert path is not None
            with contextlib.suppress(OSError):  # policy: a checkpoint need not say how it likes to be sampled from
                lm.generation_config = GenerationConfig.from_pretrained(path)
            with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
                lm.save_pretrained(folder, state_dict=state)
        dist.barrier()


class MegatronTrainStrategy:
    """Trains a model that Megatron-core spreads over ranks; see :class:`MegatronTrainer` for how it is held.

    The rank that answers for a data-parallel group is the first tensor-parallel one of the last pipeline stage.

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
        self.device = device
        self.model = _MegatronModel(role, config, vocabulary, device, trains=True)
        self.trainer = MegatronTrainer(
            role,
            config,
            self.model.settings,
            self.model.chunks,
            device,
            max_grad_norm=max_grad_norm,
            total_updates=total_updates,
        )
        self._teacher_heads: dict[str, Head] = {}
        self._weights, self._other = Residence(), Residence()

    # ---- scoring -------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; ranks that do not answer return nothing."""
        return self.model.score(requests, want)

    # ---- training ------------------------------------------------------------------------------------------------

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; a rank holds what its own head has of the
        vocabulary.
        """
        if self.model.last is not None:
            self._teacher_heads[teacher] = head_of(head, self.device).cut_like(self.model.last.head())

    def train_step(
        self, micro_batches: Sequence[Sequence[TrainItem]], loss: Loss, said: list[TokenScores] | None = None
    ) -> dict[str, float]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`.

        Returns:
            What :meth:`MegatronTrainer.update` does; ``sum/*`` are to be divided by ``sum/tokens``. And ``max/*`` of
            this data-parallel rank.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        assert not self._other.away, f"{self.model.role} has left its device"
        ratios: list[Tensor] = []

        def forward(chunk: MegatronChunk, items: Sequence[TrainItem]) -> tuple[Tensor, dict[str, Tensor] | None]:
            if not chunk.post_process:
                trajectories = [item.trajectory for item in items]
                return _send_on(chunk, [t.tokens for t in trajectories], [t.response_mask for t in trajectories])
            total, stats = row_loss(chunk, items, loss, self._teacher_heads, self.device, said)
            if stats["ratio"].numel():
                ratios.append(stats["ratio"].max())
            return total, stats

        idle = microbatches_in_step(len(micro_batches), self.device) - len(micro_batches)
        shortest = min((item.trajectory for row in micro_batches for item in row), key=len)
        rows = [*micro_batches, *[[TrainItem(shortest, 0.0)]] * idle]
        return self.trainer.update(rows, forward) | {"max/ratio": max((float(r) for r in ratios), default=0.0)}

    # ---- weights -------------------------------------------------------------------------------------------------

    def full_weights(self, dtype: str | None, everywhere: bool = False) -> Iterator[tuple[list[str], Tensor]]:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; never everywhere."""
        if everywhere:
            raise TrainingError(
                "megatron_train gathers whole weights on its first rank alone and cannot hand them over on each "
                "device; use model_update_transport: host, or nccl"
            )
        bridge = self.model.bridge
        for name, tensor in bridge.export(self.model.chunks):
            yield [name, *bridge.aliases.get(name, [])], tensor.to(getattr(torch, dtype)) if dtype else tensor

    def export_hf(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TrainStrategy`; weights are written in the model's dtype."""
        self.model.export_hf(folder, self.trainer.dtype)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part."""
        assert not self._other.away, f"{self.model.role} has left its device"
        self.trainer.save(folder)

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote, in the same layout of ranks."""
        self.trainer.load(folder)

    # ---- residence -----------------------------------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`; on a CPU nothing moves."""
        if self.device.type == "cuda":
            self._leave(keep_weights)
            torch.cuda.empty_cache()

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self._weights.come_back()
        if not weights_only:
            self._other.come_back()

    def _leave(self, keep_weights: bool) -> None:
        if not self._other.away:
            heads = (t for h in self._teacher_heads.values() for t in (h.weight_VH, h.bias_V) if t is not None)
            own = _not_views_of(self.model.parameters(), [*self.trainer.optimizer_state(), *heads])
            self._other.leave(own, self.trainer.gradient_buffers())
        if not keep_weights and not self._weights.away:
            self._weights.leave(self.model.parameters())


class MegatronInferStrategy:
    """Scores with a model that Megatron-core spreads over ranks. All ranks call every method together.

    Args:
        role: named in messages.
        config: the role's worker config.
        vocabulary: the student's tokenizer facts; ids beyond it never enter a softmax.
        device: this rank's device.
    """

    def __init__(self, role: str, config: WorkerConfig, vocabulary: Vocabulary, device: torch.device) -> None:
        self.device = device
        self.model = _MegatronModel(role, config, vocabulary, device, trains=False)
        self._residence = Residence()
        self._end = TransferEnd(device)
        self._mix = 1.0
        self._received: list[str] = []

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; ranks that do not answer return nothing."""
        return self.model.score(requests, want)

    def head(self) -> HeadWeights:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`.

        Returns:
            The whole projection on ranks of the last stage; empty on the others, which do not answer.
        """
        if self.model.last is None:
            return HeadWeights(RawTensor("float32", (0, 0), np.zeros(0, dtype=np.uint8)), None, None)
        head = whole_head(self.model.last).trimmed()
        return HeadWeights(raw_of(head.weight_VH), None if head.bias_V is None else raw_of(head.bias_V), head.soft_cap)

    # ---- weights that move during a run --------------------------------------------------------------------------

    def save_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; in Hugging Face format."""
        self.model.export_hf(folder, DTYPES[self.model.config.model_args.dtype])

    def load_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; the layout of ranks may differ."""
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            self.model.bridge.read(self.model.chunks, folder, "resume_from_checkpoint")

    def weight_dtype(self) -> str:
        """The dtype in which weights should be sent here, as torch names it."""
        return str(DTYPES[self.model.config.model_args.dtype]).removeprefix("torch.")

    def receivers(self) -> int:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`; of this rank."""
        return 1

    def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`."""
        self._end.join(host, port, first_rank, size, timeout)

    def begin_weight_update(self, version: int, mix: float = 1.0) -> None:
        """Take over weights until :meth:`finish_weight_update`; ``mix`` is their share in what is then held."""
        self._mix, self._received = mix, []

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over this rank's part of the tensors of ``bucket``; return the checksums that its sender gave."""
        self._received += [name for spec in bucket.specs for name in spec.names]
        self.model.bridge.put(self.model.chunks, self._end.tensors_of(bucket), self._mix)
        return dict(bucket.checksums)

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Return the checksum of each tensor as the ranks now hold it together."""
        held: dict[str, int] = {}
        for name, tensor in self.model.bridge.export(self.model.chunks):
            checksum = tensor_checksum(tensor)
            held |= dict.fromkeys([name, *self.model.bridge.aliases.get(name, [])], checksum)
        # Rank 0 alone has seen whole tensors. All ranks received the same ones, in the same order.
        sums = np.array([held.get(name, 0) for name in self._received], dtype=np.uint64)
        # Collectives know no unsigned numbers.
        shared = torch.from_numpy(sums.view(np.int64)).to(self.device)
        dist.broadcast(shared, 0)
        return held or dict(zip(self._received, shared.cpu().numpy().view(np.uint64).tolist(), strict=True))

    # ---- residence -----------------------------------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`; a scorer has nothing but weights."""
        if self.device.type == "cuda" and not keep_weights and not self._residence.away:
            self._residence.leave(self.model.parameters())
            torch.cuda.empty_cache()

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self._residence.come_back()


def _not_views_of(bases: Iterable[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``tensors`` that do not lie in the memory of ``bases``; fp32 weights are the optimizer's own."""
    memory = {base.untyped_storage().data_ptr() for base in bases}
    return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in memory]


def _send_on(chunk: MegatronChunk, tokens: list[IntArray], masks: list[BoolArray]) -> tuple[Tensor, None]:
    """What a stage before the last one makes of a packed row: hidden states for the next one, and no result."""
    hidden: Tensor = chunk(PackedBatch.pack(tokens, masks), None)
    return hidden, None
