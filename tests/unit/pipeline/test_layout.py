"""Which ranks share work, in Megatron-core's order of ranks."""

from __future__ import annotations

import pytest

from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.layout import Layout, layout_of


def test_every_rank_has_a_share_of_its_own_without_model_parallelism() -> None:
    assert Layout.data_parallel(3) == Layout((0, 1, 2), (0, 1, 2))
    assert layout_of(WorkerConfig(strategy_args=StrategyArguments("fsdp2_train"), world_size=2)).dp_size == 2


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context", "dp_ranks", "answers"),
    [
        (2, 2, 1, 1, (0, 0), (0,)),
        (2, 1, 2, 1, (0, 0), (1,)),
        (4, 2, 1, 1, (0, 0, 1, 1), (0, 2)),
        # Ranks are (tensor, data, pipeline): 0-3 are the first stage, 4-7 the last, where results are.
        (8, 2, 2, 1, (0, 0, 1, 1, 0, 0, 1, 1), (4, 6)),
        (8, 2, 1, 2, (0, 0, 0, 0, 1, 1, 1, 1), (0, 4)),
    ],
)
def test_megatron(world, tensor, pipeline, context, dp_ranks, answers) -> None:
    assert Layout.megatron(world, tensor, pipeline, context) == Layout(dp_ranks, answers)


def test_sizes_must_divide() -> None:
    with pytest.raises(ValueError, match="6 ranks do not divide into tensor 2 x context 1 x pipeline 2"):
        Layout.megatron(6, 2, 2)


def test_a_role_s_layout_follows_its_settings() -> None:
    strategy = StrategyArguments("megatron_train", {"tensor_model_parallel_size": 2})
    assert layout_of(WorkerConfig(strategy_args=strategy, world_size=4)) == Layout((0, 0, 1, 1), (0, 2))
