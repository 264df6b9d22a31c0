"""Megatron-core's process groups, laid over the process group of a role."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.distributed.layout import Layout

ORDER = "tp-cp-ep-dp-pp"
"""Which ranks lie next to each other, the fastest first; :meth:`Layout.megatron` deals out work by it."""


def expert_tensor_size(settings: MegatronSettings) -> int:
    """Ranks that share each matrix of an expert: as all matrices, or one where experts have ranks of their own."""
    return 1 if settings.expert_model_parallel_size > 1 else settings.tensor_model_parallel_size


def initialize(settings: MegatronSettings, device: torch.device) -> None:
    """Make the groups of ranks and, on CUDA, the random generators that Megatron-core expects; once a process.

    The default process group must exist and hold exactly the role's ranks. That the sizes fit their number has been
    checked when the config was loaded.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    # Our attention sees whole sequences.
    assert settings.context_parallel_size == 1, "context parallelism was not refused"
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline_model_parallel_size,
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
