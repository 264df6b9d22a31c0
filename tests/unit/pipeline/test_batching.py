"""Mini-batches, ranks, micro-batches: whatever the split, every trajectory is trained once with the same weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from roll_opd.algorithms.aggregation import LOSS_AGG_MODES, sequence_weights
from roll_opd.configs.strategy_args import SequencePackingArguments
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.row_packing import RowLimits, balanced, rows_by_length
from roll_opd.distributed.strategy.scoring import in_order_of, rows_of
from roll_opd.pipeline.batching import micro_batches, mini_batch_size, mini_batches, rank_shares, undeal
from roll_opd.trajectory import TrajectoryId


def config(per_device: int = 2, accumulation: int = 3, budget: int | None = None) -> WorkerConfig:
    training = TrainingArguments(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    packing = SequencePackingArguments(max_packed_sequence_length_train=budget)
    return WorkerConfig(training_args=training, use_sequence_packing=budget is not None, sequence_packing_args=packing)


HOW = {
    "by count": config(2),
    "by tokens": config(2, budget=14),
    "dynamic": dataclasses.replace(
        config(2), use_dynamic_batching_in_train=True, max_tokens_per_microbatch_in_train=14
    ),
    "dynamic, no limit": dataclasses.replace(config(2), use_dynamic_batching_in_train=True),
    "load_balance": dataclasses.replace(
        config(2, budget=14),
        sequence_packing_args=SequencePackingArguments(
            algorithm="load_balance", max_packed_sequence_length_train=14, min_num_micro_batches_train=3
        ),
    ),
}


def test_mini_batches_by_hand() -> None:
    assert mini_batch_size(config(2, 3), 4) == 24
    """Episodes of three samples a step; the two segments of 1/0 stay together and count once."""
    names = ["0/0/0", "0/1/0", "1/0/0", "1/0/1", "1/1/0", "2/0/0"]
    samples = [SimpleNamespace(id=TrajectoryId(*map(int, name.split("/")))) for name in names]
    cut = [[str(t.id) for t in step] for step in mini_batches(samples, 3)]
    assert cut == [["0/0/0", "0/1/0", "1/0/0", "1/0/1"], ["1/1/0", "2/0/0"]]
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
@pytest.mark.parametrize("how", HOW)
def test_every_trajectory_once_with_its_global_weight(mini_batch, mode: str, ranks: int, how: str) -> None:
    out = micro_batches(mini_batch, HOW[how], ranks, mode, 10)
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
            elif how != "dynamic, no limit":
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


# ---- balanced rows ---------------------------------------------------------------------------------------------------


def test_balanced_by_hand() -> None:
    # The longest first, each to the lightest part: 9, 8, 7 open them; 5 joins 7, 4 joins 8, and both 2 join 9.
    assert balanced([5, 9, 2, 7, 8, 4, 2], 3) == [[1, 2, 6], [4, 5], [0, 3]]
    assert balanced([3, 1], 3) == [[0], [1], []]
    assert balanced([], 2) == [[], []]


def test_rows_by_length_by_hand() -> None:
    limits = RowLimits(tokens=10, balanced=True)
    # 22 tokens need 3 rows of 10; 12 has a row of its own.
    assert rows_by_length([3, 12, 5, 2], limits) == [[1], [2], [0, 3]]
    assert rows_by_length([3, 12, 5, 2], limits, at_least=4) == [[1], [2], [0], [3]]
    assert rows_by_length([3, 12, 5, 2], limits, at_least=9) == [[1], [2], [0], [3]]
    # Two rows would be enough for the tokens, but no two of these share one.
    assert rows_by_length([6, 6, 6], limits) == [[0], [1], [2]]
    assert rows_by_length([6, 6, 6], RowLimits(balanced=True)) == [[0, 1, 2]]
    assert rows_by_length([1, 1, 1], RowLimits(rows=2, balanced=True)) == [[0, 2], [1]]
    assert rows_by_length([1], RowLimits(rows=2, balanced=True)) == [[0]]
    assert rows_by_length([], limits) == []


def test_limits_of_the_config() -> None:
    packing = SequencePackingArguments(max_packed_sequence_length_forward=64, max_packed_sequence_length_train=32)
    even = dataclasses.replace(
        packing, algorithm="load_balance", min_num_micro_batches_train=2, min_num_micro_batches_forward=3
    )
    worker = WorkerConfig(infer_batch_size=5, training_args=TrainingArguments(per_device_train_batch_size=4))
    assert RowLimits.of_training(worker) == RowLimits(sequences=4)
    assert RowLimits.of_scoring(worker) == RowLimits(sequences=5)

    packed = dataclasses.replace(worker, use_sequence_packing=True, sequence_packing_args=packing)
    assert RowLimits.of_training(packed) == RowLimits(tokens=32)
    assert RowLimits.of_scoring(packed) == RowLimits(tokens=64)
    packed = dataclasses.replace(packed, sequence_packing_args=even)
    assert RowLimits.of_training(packed) == RowLimits(tokens=32, rows=2, balanced=True)
    assert RowLimits.of_scoring(packed) == RowLimits(tokens=64, rows=3, balanced=True)
    idle = dataclasses.replace(worker, sequence_packing_args=even)
    assert RowLimits.of_training(idle) == RowLimits(sequences=4), "use_sequence_packing switches its settings on"

    dynamic = dataclasses.replace(
        worker, use_dynamic_batching_in_train=True, max_tokens_per_microbatch_in_train=16,
        use_dynamic_batching_in_infer=True,
    )  # fmt: skip
    assert RowLimits.of_training(dynamic) == RowLimits(tokens=16, balanced=True)
    assert RowLimits.of_scoring(dynamic) == RowLimits(balanced=True)
    both = dataclasses.replace(dynamic, use_sequence_packing=True, sequence_packing_args=packing)
    assert RowLimits.of_training(both) == RowLimits(tokens=16, balanced=True)
    assert RowLimits.of_scoring(both) == RowLimits(tokens=64, balanced=True)


@pytest.mark.parametrize("seed", range(12))
def test_balanced_rows_hold_their_limits(seed: int, fakes) -> None:
    """Lengths with a long tail, several budgets and numbers of ranks."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.02, int(rng.integers(1, 60))) + 1, 300).tolist()
    budget, ranks = int(rng.integers(40, 400)), int(rng.integers(1, 5))
    batch = [fakes.trajectory(i, prompt=1, response=n - 1) for i, n in enumerate(lengths)]
    worker = dataclasses.replace(
        config(1), use_dynamic_batching_in_train=True, max_tokens_per_microbatch_in_train=budget
    )
    out = micro_batches(batch, worker, ranks, "token-mean", 300)
    assert len({len(rows) for rows in out}) == 1
    rows = [[i for i in row if i.token_weight > 0] for rank in out for row in rank]
    assert sorted(i.trajectory.id.draw for row in rows for i in row) == list(range(len(lengths)))
    tokens = [sum(len(i.trajectory) for i in row) for row in rows]
    assert all(n <= budget or len(row) == 1 for n, row in zip(tokens, rows, strict=True))
    limits = RowLimits(tokens=budget, balanced=True)
    fewest = len(rows_by_length(lengths, limits))
    for more in range(fewest, len(lengths) + 3):
        assert len(rows_by_length(lengths, limits, at_least=more)) == min(more, len(lengths))
    loads = [sum(len(i.trajectory) for row in rank for i in row if i.token_weight > 0) for rank in out]
    # The longest first: nobody has more than the mean by as much as the longest sequence.
    assert max(loads) - min(loads) <= max(lengths)
    # No more rows than fill to half on the average, plus those that single sequences need.
    assert len(out[0]) <= 2 * max(loads) / budget + 1 + sum(n > budget / 2 for n in lengths)


@pytest.mark.parametrize("balance", [False, True])
def test_scores_come_back_in_the_order_of_the_requests(balance: bool) -> None:
    lengths = [3, 12, 5, 2, 9, 9, 1]
    requests = [
        ScoreRequest(TrajectoryId(i, 0), np.zeros(n, np.int32), np.zeros(n, bool)) for i, n in enumerate(lengths)
    ]
    worker = WorkerConfig(infer_batch_size=2)
    if balance:
        worker = dataclasses.replace(worker, use_dynamic_batching_in_infer=True, max_tokens_per_microbatch_in_infer=14)
    rows = rows_of(requests, worker)
    flat = [r.id.draw for row in rows for r in row]
    assert (flat == sorted(flat)) == (not balance)
    assert in_order_of(requests, rows, flat) == list(range(len(lengths)))
    assert sum(len(row) for row in rows_of(requests, worker, at_least=5)) == len(lengths)
    assert len(rows_of(requests, worker, at_least=6)) == (6 if balance else len(rows))
