"""Megatron-core's process groups, laid over the process group of a role."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.distributed.layout import Layout
from roll_opd.errors import ConfigError

ORDER = "tp-cp-ep-dp-pp"
"""Which ranks lie next to each other, the fastest first; :meth:`Layout.megatron` deals out work by it."""


def setting_path(role: str, name: str) -> str:
    """Where a user finds a setting of a role's Megatron backend."""
    return f"{role}.strategy_args.strategy_config.{name}"


def expert_tensor_size(settings: MegatronSettings) -> int:
    """Ranks that share each matrix of an expert: as all matrices, or one where experts have ranks of their own."""
    return 1 if settings.expert_model_parallel_size > 1 else settings.tensor_model_parallel_size


def initialize(settings: MegatronSettings, role: str, device: torch.device) -> None:
    """Make the groups of ranks and, on CUDA, the random generators that Megatron-core expects; once a process.

    The default process group must exist and hold exactly the role's ranks.

    Raises:
        ConfigError: sizes that do not divide the ranks, or that this version cannot compute with.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    check_ranks(settings, role, world_size)
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_size(settings),
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(settings),
        order=ORDER,
        # They serve checkpoint formats that we do not write.
        create_gloo_process_groups=False,
    )
    layout = Layout.megatron(world_size, tensor, pipeline)
    dp_rank = parallel_state.get_data_parallel_rank()
    assert layout.dp_ranks[rank] == dp_rank, "driver and Megatron-core disagree on data-parallel ranks"
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    answers = last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
    assert (layout.answers[dp_rank] == rank) == answers, "driver and Megatron-core disagree on who answers"
    if device.type == "cuda":
        # Nothing draws from them (no dropout, weights are loaded), but the generators must exist.
        model_parallel_cuda_manual_seed(0)


def virtual_size(settings: MegatronSettings) -> int | None:
    """Parts of each pipeline rank's layers; None, as Megatron-core has it, for one."""
    parts = settings.virtual_pipeline_model_parallel_size
    return None if parts == 1 else parts


def check_ranks(settings: MegatronSettings, role: str, world_size: int) -> None:
    """Refuse sizes that do not fit the number of ranks or each other.

    Raises:
        ConfigError: says which setting, and what would fit.
    """

    def refuse(name: str, problem: str) -> None:
        raise ConfigError(setting_path(role, name), problem)

    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    experts = settings.expert_model_parallel_size
    if settings.context_parallel_size > 1:
        refuse(
            "context_parallel_size",
            "must be 1, because our attention sees whole sequences; for long ones raise tensor_model_parallel_size "
            "and set sequence_parallel: true",
        )
    if world_size % (tensor * pipeline):
        refuse(
            "tensor_model_parallel_size",
            f"{tensor} x pipeline_model_parallel_size {pipeline} must divide the role's {world_size} devices",
        )
    if (world_size // pipeline) % experts:
        refuse(
            "expert_model_parallel_size",
            f"{experts} must divide the {world_size // pipeline} devices of a pipeline stage",
        )
    if virtual_size(settings) is not None and pipeline == 1:
        refuse(
            "virtual_pipeline_model_parallel_size",
            "interleaves pipeline stages, but pipeline_model_parallel_size is 1; leave it out",
        )
    if settings.sequence_parallel and tensor == 1:
        refuse(
            "sequence_parallel",
            "splits activations over tensor-parallel ranks, but tensor_model_parallel_size is 1; set it to false",
        )
