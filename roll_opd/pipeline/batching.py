"""From a step's trajectories to optimizer steps, ranks and micro-batches; none of it changes the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

from roll_opd.algorithms.aggregation import sequence_weights
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import TrainItem
from roll_opd.distributed.strategy.row_packing import RowLimits, balanced, rows_by_length
from roll_opd.trajectory import Trajectory

T = TypeVar("T")


def mini_batch_size(config: WorkerConfig, num_ranks: int) -> int:
    """Samples of one optimizer step; an episode is one, however many segments it has."""
    training = config.training_args
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * num_ranks


def mini_batches(trajectories: Sequence[Trajectory], size: int) -> Iterator[list[Trajectory]]:
    """Cut into optimizer steps of ``size`` samples, in the order given; the segments of an episode stay together.

    The number of steps therefore follows from the number of episodes, which the learning rate's schedule counts on. The
    last one may be smaller; its loss is normalised by itself.
    """
    episodes = [list(segments) for _, segments in itertools.groupby(trajectories, key=lambda t: t.id[:2])]
    for start in range(0, len(episodes), size):
        yield [t for segments in episodes[start : start + size] for t in segments]


def rank_shares(items: Sequence[T], num_ranks: int) -> list[list[T]]:
    """Deal items out to ranks, one by one."""
    return [list(items[rank::num_ranks]) for rank in range(num_ranks)]


def undeal(shares: Sequence[Sequence[T]]) -> list[T]:
    """Put what :func:`rank_shares` dealt out back in order."""
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def micro_batches(
    mini_batch: Sequence[Trajectory], config: WorkerConfig, num_ranks: int, loss_agg_mode: str, max_length: int
) -> list[list[list[TrainItem]]]:
    """Return, for each rank, equally many micro-batches of items with their global token weights.

    What a micro-batch holds is said by :meth:`RowLimits.of_training`. Balanced ones have about equally many tokens, and
    so have the ranks. A rank that runs out gets an item of weight 0: collectives need every rank, the loss must not
    notice.
    """
    weights = sequence_weights(loss_agg_mode, [t.response_length for t in mini_batch], max_length)
    items = [TrainItem(t, w if t.trained else 0.0) for t, w in zip(mini_batch, weights, strict=True)]
    limits = RowLimits.of_training(config)
    if limits.balanced:
        shares = [[items[i] for i in part] for part in balanced([len(t) for t in mini_batch], num_ranks)]
    else:
        shares = rank_shares(items, num_ranks)
    lengths = [[len(item.trajectory) for item in share] for share in shares]
    most = max(len(rows_by_length(each, limits)) for each in lengths)
    ranks = [
        [[share[i] for i in row] for row in rows_by_length(each, limits, at_least=most)]
        for share, each in zip(shares, lengths, strict=True)
    ]
    shortest = min(mini_batch, key=len)
    for rows in ranks:
        rows.extend([TrainItem(shortest, 0.0)] for _ in range(most - len(rows)))
    return ranks
