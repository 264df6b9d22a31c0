"""What Megatron-core does in training, whatever the model computes: schedules, gradient buffers, the optimizer.

Three things differ from Megatron's own training loop:

- *Gradients are sums.* A loss is already a share of the global sum, so nothing is divided by micro-batches, ranks or
  tokens: ``calculate_per_token_loss`` keeps the schedules and the buffers from it, and no token count is handed on.
- *The norm is taken in fp64*, each parameter counted once over all ranks: fp32 sums depend on the sharding.
- *The learning rate* follows the schedule that all our trainers have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import get_scheduler

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.megatron.shim import cuda_shim
from roll_opd.distributed.strategy.pretrained import DTYPES
from roll_opd.distributed.strategy.sharded_model import disk_errors
from roll_opd.errors import LaunchError, TrainingError

T = TypeVar("T")

_LAYOUT_FILE = "layout.pt"

StageForward = Callable[[Any, T], tuple[Tensor, Any]]
"""What a stage makes of a row: the hidden states that it sends on, or on the last stage a loss, and a result."""


def run_pipeline(
    chunks: Sequence[Any], rows: Sequence[T], forward: StageForward[T], device: torch.device, *, backward: bool
) -> list[Any]:
    """Send rows through the stages of the pipeline, and their gradients back.

    All ranks of a pipeline call this together with the same number of rows. With interleaved stages that number must be
    a multiple of the pipeline's size.

    Args:
        chunks: this rank's parts of the model.
        rows: one for each micro-batch.
        forward: called with a chunk and a row.
        device: of the chunks.
        backward: whether to go backward from each row's loss.

    Returns:
        The result of each row, on the last stage; nothing on the others.
    """
    no_tokens = torch.zeros((), dtype=torch.int, device=device)

    def step(iterator: Iterator[T], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        output, result = forward(chunk, next(iterator))

        def finish(tensor: Tensor, non_loss_data: bool = False) -> Any:
            return result if non_loss_data else (tensor, no_tokens, result)

        return output, finish

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(rows),
        # Rows differ in length: stages tell each other the shapes, and these two numbers are not used.
        seq_length=1,
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return results


def microbatches_in_step(count: int, device: torch.device) -> int:
    """How many rows each rank must send through the pipeline when this one has ``count``: as many as any, at least.

    Interleaved stages take multiples of the pipeline's size.
    """
    most = torch.tensor([count], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    unit = stages if parallel_state.get_virtual_pipeline_model_parallel_world_size() else 1
    return -(-int(most.item()) // unit) * unit


class MegatronTrainer:
    """Gradient buffers, optimizer, schedule and checkpoints of a model that is spread over tensor-, pipeline- and
    data-parallel ranks.

    All ranks call every method together. With ``dtype: bf16`` parameters are bf16, gradients are summed in fp32 and
    the optimizer keeps fp32 parameters of its own.

    Args:
        role: named in messages.
        config: the role's worker config.
        settings: how the model is spread.
        chunks: this rank's parts of the model, as :mod:`~roll_opd.distributed.strategy.megatron.model` makes them.
        device: this rank's device.
        max_grad_norm: gradients are scaled down to this L2 norm; <= 0 switches it off.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self,
        role: str,
        config: WorkerConfig,
        settings: MegatronSettings,
        chunks: Sequence[Any],
        device: torch.device,
        *,
        max_grad_norm: float,
        total_updates: int,
    ) -> None:
        self.role, self.settings, self.device = role, settings, device
        self.max_grad_norm = max_grad_norm
        self.training = config.training_args
        self.dtype = DTYPES[config.model_args.dtype]
        # Megatron spreads the state of Adam alone. SGD has none.
        self.distributed = settings.use_distributed_optimizer and self.training.optimizer == "adamw"
        with cuda_shim():
            self.chunks = [self._wrap(chunk, index) for index, chunk in enumerate(chunks)]
            model_config = self.chunks[0].config
            model_config.finalize_model_grads_func = _finalize
            if settings.overlap_grad_reduce:
                holds = [chunk.no_sync for chunk in self.chunks]
                model_config.no_sync_func = holds[0] if len(holds) == 1 else holds
            self.optimizer = get_megatron_optimizer(
                self._optimizer_config(), self.chunks, use_gloo_process_groups=False
            )
        self.updates = 0
        self._rate = self._schedule(total_updates)

    def _wrap(self, chunk: Any, index: int) -> DistributedDataParallel:
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.settings.overlap_grad_reduce,
            use_distributed_optimizer=self.distributed,
        )
        # Gradients of later chunks are reduced while earlier ones still compute: buckets would only cost.
        return DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)

    def _optimizer_config(self) -> OptimizerConfig:
        training = self.training
        return OptimizerConfig(
            optimizer="adam" if training.optimizer == "adamw" else "sgd",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_epsilon,
            sgd_momentum=0.0,
            bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype,
            use_distributed_optimizer=self.distributed,
            clip_grad=0.0,
        )

    def _schedule(self, total_updates: int) -> Callable[[int], float]:
        """Share of the learning rate by number of updates made; the shapes are those of transformers."""
        training = self.training
        warmup = training.warmup_steps or int(np.ceil(training.warmup_ratio * total_updates))
        nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=training.learning_rate)
        schedule = get_scheduler(training.lr_scheduler_type, nothing, warmup, total_updates)
        rate: Callable[[int], float] = schedule.lr_lambdas[0]
        return rate

    # ---- training ------------------------------------------------------------------------------------------------

    def update(self, micro_batches: Sequence[T], forward: StageForward[T]) -> dict[str, float]:
        """One optimizer step over this rank's ``micro_batches`` (equally many on each rank).

        Args:
            micro_batches: whatever ``forward`` takes.
            forward: see :data:`StageForward`; the loss is the micro-batch's share of the *global* loss, the result
                per-token quantities by name.

        Returns:
            Sums over *all* data-parallel ranks: ``loss``, and ``sum/*`` of the results, on the last stage alone;
            ``grad_norm`` (before clipping) and ``lr``.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        sums: dict[str, Tensor] = {}

        def summed(chunk: Any, micro_batch: T) -> tuple[Tensor, None]:
            output, stats = forward(chunk.module, micro_batch)
            if stats is not None:
                _add(sums, "loss", output.detach())
                for name, values in stats.items():
                    _add(sums, f"sum/{name}", values)
            return output, None

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        with cuda_shim():
            self.optimizer.zero_grad()
            run_pipeline(self.chunks, micro_batches, summed, self.device, backward=True)
            self.optimizer.prepare_grads()
        norm = self._grad_norm()
        if not np.isfinite(norm):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"{self.role}: the gradient norm is {norm}; the weights were left unchanged. Lower learning_rate, or "
                f"resume from the last checkpoint"
            )
        if 0 < self.max_grad_norm < norm:
            for gradient in self._gradients():
                gradient.mul_(self.max_grad_norm / norm)
        lr = self.training.learning_rate * self._rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.training.weight_decay * group["wd_mult"]
        with cuda_shim():
            self.optimizer.step_with_ready_grads()
            self.optimizer.zero_grad()
        self.updates += 1
        return self._sum_over_ranks(sums) | {"grad_norm": norm, "lr": lr}

    def _sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if not sums:
            return {}
        names = sorted(sums)
        values = torch.stack([sums[n] for n in names])
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return dict(zip(names, values.tolist(), strict=True))

    @property
    def _parts(self) -> list[Any]:
        """Megatron's optimizers of dense parameters and of experts, where this rank has any."""
        return [part for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer]

    def _gradients(self) -> Iterator[Tensor]:
        for part in self._parts:
            for parameter in part.get_parameters():
                if parameter.grad is not None:
                    yield parameter.grad

    @torch.no_grad()
    def _grad_norm(self) -> float:
        """L2 norm of the gradient of the whole model; Megatron leaves out what other ranks hold too."""
        square = torch.zeros(1, dtype=torch.float64, device=self.device)
        for part in self._parts:
            if self._counts(part):
                for gradient in part.get_main_grads_for_grad_norm():
                    square += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        dist.all_reduce(square)
        return float(square.sqrt().item())

    def _counts(self, part: Any) -> bool:
        """Whether the gradients of ``part`` are this rank's to count: all are where data-parallel ranks share them."""
        if isinstance(part, DistributedOptimizer):
            return True
        if part.param_groups[0]["is_expert_parallel"]:
            return bool(parallel_state.get_expert_data_parallel_rank() == 0)
        return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)

    # ---- memory --------------------------------------------------------------------------------------------------

    def gradient_buffers(self) -> Iterator[Tensor]:
        """Yield the memory in which gradients are summed; outside of :meth:`update` nothing in it counts."""
        for chunk in self.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                yield buffer.grad_data

    def optimizer_state(self) -> Iterator[Tensor]:
        """Yield the optimizer's parameters, which may be the model's, and their moments."""
        for part in self._parts:
            yield from (parameter.data for parameter in part.get_parameters())
            for moments in part.optimizer.state.values():
                # Torch keeps the number of steps on the CPU.
                yield from (m for m in moments.values() if isinstance(m, Tensor) and m.device.type == self.device.type)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> dict[str, Any]:
        """What must be the same for each rank to find its own tensors in a checkpoint."""
        settings = self.settings
        return {
            "world_size": dist.get_world_size(),
            "tensor_model_parallel_size": settings.tensor_model_parallel_size,
            "pipeline_model_parallel_size": settings.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": settings.virtual_pipeline_model_parallel_size,
            "expert_model_parallel_size": settings.expert_model_parallel_size,
            "use_distributed_optimizer": self.distributed,
            "optimizer": self.training.optimizer,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def save(self, folder: str) -> None:
        """Write weights, optimizer, schedule and random state; every rank its part. Changes nothing here."""
        state = {
            "updates": self.updates,
            "rng": torch.get_rng_state(),
            # The fp32 weights; those that the model computes with follow from them.
            "weights": [[_on_host(p) for p in part.get_parameters()] for part in self._parts],
            "optimizers": [part.optimizer.state_dict() for part in self._parts],
        }
        with disk_errors("checkpoint_config.output_dir", f"cannot write {folder}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            if dist.get_rank() == 0:
                torch.save(self._layout, Path(folder) / _LAYOUT_FILE)
            torch.save(state, _rank_file(folder))
        dist.barrier()

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            LaunchError: it cannot be read, or was written by ranks in another layout.
        """
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            layout = torch.load(Path(folder) / _LAYOUT_FILE, weights_only=True)
        for name, value in self._layout.items():
            if layout.get(name) != value:
                raise LaunchError(
                    f"resume_from_checkpoint: {folder} was written with {name} {layout.get(name)}, but it is {value} "
                    f"now; megatron_train resumes in the layout that it was stopped in"
                )
        with disk_errors("resume_from_checkpoint", f"cannot read {folder}"):
            state = torch.load(_rank_file(folder), map_location="cpu", weights_only=True)
            for part, weights, optimizer in zip(self._parts, state["weights"], state["optimizers"], strict=True):
                for parameter, value in zip(part.get_parameters(), weights, strict=True):
                    parameter.data.copy_(value)
                part.optimizer.load_state_dict(optimizer)
        self._follow_optimizer()
        self.updates = state["updates"]
        torch.set_rng_state(state["rng"])

    def _follow_optimizer(self) -> None:
        """Have the model's parameters follow the optimizer's, as after a step."""
        with cuda_shim(), torch.no_grad():
            for part in self._parts:
                if isinstance(part, MixedPrecisionOptimizer):
                    part._copy_main_params_to_model_params()
            if self.distributed:
                for chunk in self.chunks:
                    chunk.start_param_sync()


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    total = values.double().sum()
    sums[name] = sums[name] + total if name in sums else total


def _finalize(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Reduce the gradients over the ranks, as Megatron does, but do not divide them by a number of tokens."""
    finalize_model_grads(model, None, **options)


def _on_host(view: Tensor) -> Tensor:
    """A copy on the host; of a view, torch would write all that it is a view of."""
    return torch.empty(view.shape, dtype=view.dtype).copy_(view.detach())


def _rank_file(folder: str) -> Path:
    return Path(folder) / f"rank{dist.get_rank()}.pt"
