"""Which ranks of a role get the same work, and which of them answers.

A rank of a sharded model computes a part of what its data-parallel group computes: tensor- and pipeline-parallel ranks
see the same sequences, and one of them holds the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.worker_config import WorkerConfig


@dataclass(frozen=True)
class Layout:
    """How the ranks of one model share its work.

    Attributes:
        dp_ranks: for each rank, its data-parallel rank.
        answers: for each data-parallel rank, the rank whose results count.
    """

    dp_ranks: tuple[int, ...]
    answers: tuple[int, ...]

    @property
    def dp_size(self) -> int:
        """Shares that work is cut into."""
        return len(self.answers)

    @classmethod
    def data_parallel(cls, world_size: int) -> Layout:
        """Every rank has a share of its own."""
        return cls(tuple(range(world_size)), tuple(range(world_size)))

    @classmethod
    def megatron(cls, world_size: int, tensor: int, pipeline: int, context: int = 1) -> Layout:
        """Megatron-core's order of ranks: tensor, context, data, pipeline, the fastest first.

        The first tensor-parallel rank of the last pipeline stage answers.

        Raises:
            ValueError: the sizes do not divide the ranks.
        """
        inner = tensor * context
        if world_size % (inner * pipeline):
            raise ValueError(
                f"{world_size} ranks do not divide into tensor {tensor} x context {context} x pipeline {pipeline}"
            )
        data = world_size // (inner * pipeline)
        dp_ranks = tuple(rank // inner % data for rank in range(world_size))
        last_stage = inner * data * (pipeline - 1)
        return cls(dp_ranks, tuple(last_stage + inner * dp for dp in range(data)))


def layout_of(worker: WorkerConfig) -> Layout:
    """The layout of a role's processes, one model over all of them."""
    assert worker.strategy_args is not None
    world_size = worker.world_size or 1
    settings = backend_settings(worker.strategy_args)
    if not isinstance(settings, MegatronSettings):
        return Layout.data_parallel(world_size)
    return Layout.megatron(
        world_size,
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.context_parallel_size,
    )
