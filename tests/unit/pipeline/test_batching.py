"""Mini-batches, ranks, micro-batches: whatever the split, every trajectory is trained once with the same weight."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from roll_opd.algorithms.aggregation import LOSS_AGG_MODES, sequence_weights
from roll_opd.configs.strategy_args import SequencePackingArguments
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.pipeline.batching import micro_batches, mini_batch_size, mini_batches, rank_shares, undeal


def config(per_device: int = 2, accumulation: int = 3, budget: int | None = None) -> WorkerConfig:
    training = TrainingArguments(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    packing = SequencePackingArguments(max_packed_sequence_length_train=budget)
    return WorkerConfig(training_args=training, use_sequence_packing=budget is not None, sequence_packing_args=packing)


def test_mini_batches_by_hand() -> None:
    assert mini_batch_size(config(2, 3), 4) == 24
    assert list(mini_batches(list("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(mini_batches([], 3)) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 4, 7, 9])
def test_undeal_inverts_rank_shares(ranks: int, count: int) -> None:
    items = list(range(count))
    shares = rank_shares(items, ranks)
    assert len(shares) == ranks and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert undeal(shares) == items


@pytest.fixture
def mini_batch(fakes):
    rng = np.random.default_rng(4)
    lengths = [(int(rng.integers(1, 6)), int(n)) for n in (1, 9, 4, 4, 2, 7, 3)]
    return [fakes.trajectory(i, prompt=p, response=r) for i, (p, r) in enumerate(lengths)]


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("how", ["by count", "by tokens"])
def test_every_trajectory_once_with_its_global_weight(mini_batch, mode: str, ranks: int, how: str) -> None:
    worker = config(2) if how == "by count" else config(2, budget=14)
    out = micro_batches(mini_batch, worker, ranks, mode, 10)
    assert len(out) == ranks
    assert len({len(batches) for batches in out}) == 1, "ranks must agree on the number of collectives"
    items = [item for batches in out for batch in batches for item in batch]
    real = [item for item in items if item.token_weight > 0]
    assert Counter(i.trajectory.id for i in real) == Counter(t.id for t in mini_batch)
    expected = sequence_weights(mode, [t.response_length for t in mini_batch], 10)
    assert {i.trajectory.id: i.token_weight for i in real} == dict(
        zip((t.id for t in mini_batch), expected, strict=True)
    )
    for batches in out:
        for batch in batches:
            assert batch, "an empty micro-batch cannot take part in a forward pass"
            if how == "by count":
                assert len(batch) <= 2
            else:
                assert len(batch) == 1 or sum(len(i.trajectory) for i in batch) <= 14


def test_a_rank_without_work_gets_a_weightless_item(mini_batch) -> None:
    out = micro_batches(mini_batch[:3], config(1), 2, "token-mean", 10)
    assert [[i.token_weight > 0 for batch in batches for i in batch] for batches in out] == [
        [True, True],
        [True, False],
    ]
    assert len(out[1][1][0].trajectory) == min(map(len, mini_batch[:3]))


def test_micro_batches_by_hand(fakes) -> None:
    batch = [fakes.trajectory(i, prompt=1, response=r) for i, r in enumerate([1, 2, 3, 4])]
    (rank,) = micro_batches(batch, config(3), 1, "token-mean", 10)
    assert [[i.trajectory.id.draw for i in row] for row in rank] == [[0, 1, 2], [3]]
    # lengths 2, 3, 4, 5 with 7 tokens a row
    (rank,) = micro_batches(batch, config(1, budget=7), 1, "token-mean", 10)
    assert [[i.trajectory.id.draw for i in row] for row in rank] == [[0, 1], [2], [3]]
    first, second = micro_batches(batch, config(1), 2, "token-mean", 10)
    assert [[i.trajectory.id.draw for i in row] for row in first] == [[0], [2]]
    assert [[i.trajectory.id.draw for i in row] for row in second] == [[1], [3]]


def test_a_masked_trajectory_counts_in_the_normaliser_and_weighs_nothing(mini_batch) -> None:
    """Otherwise the weight of the others would depend on how many were masked."""
    masked = [dataclasses.replace(t, trained=i != 1) for i, t in enumerate(mini_batch)]
    (rank,) = micro_batches(masked, config(1), 1, "token-mean", 10)
    total = sum(t.response_length for t in mini_batch)
    assert [item.token_weight * total for row in rank for item in row] == pytest.approx([1, 0, 1, 1, 1, 1, 1])
