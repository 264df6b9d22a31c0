"""Which sequences share a packed row. No choice made here changes a score or a loss; it decides time and memory."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from roll_opd.configs.worker_config import WorkerConfig


@dataclass(frozen=True)
class RowLimits:
    """What a packed row may hold.

    Attributes:
        sequences: at most so many; None: no limit.
        tokens: at most so many, unless a single sequence is longer, which then has a row of its own; None: no limit.
        rows: at least so many, as far as there are sequences; of balanced rows only.
        balanced: spread sequences so that the rows' tokens are even; otherwise rows are filled in the order given.
    """

    sequences: int | None = None
    tokens: int | None = None
    rows: int = 1
    balanced: bool = False

    @classmethod
    def of_training(cls, config: WorkerConfig) -> RowLimits:
        """Limits of a training micro-batch."""
        packing = config.sequence_packing_args
        return _limits(
            config.training_args.per_device_train_batch_size,
            config.use_dynamic_batching_in_train,
            config.max_tokens_per_microbatch_in_train or None,
            config.use_sequence_packing,
            packing.max_packed_sequence_length_train,
            packing.min_num_micro_batches_train if packing.algorithm == "load_balance" else None,
        )

    @classmethod
    def of_scoring(cls, config: WorkerConfig) -> RowLimits:
        """Limits of a row that is scored."""
        packing = config.sequence_packing_args
        return _limits(
            config.infer_batch_size,
            config.use_dynamic_batching_in_infer,
            config.max_tokens_per_microbatch_in_infer,
            config.use_sequence_packing,
            packing.max_packed_sequence_length_forward,
            packing.min_num_micro_batches_forward if packing.algorithm == "load_balance" else None,
        )


def _limits(
    sequences: int, dynamic: bool, dynamic_tokens: int | None, packed: bool, packed_tokens: int | None, rows: int | None
) -> RowLimits:
    budgets = [tokens for on, tokens in ((dynamic, dynamic_tokens), (packed, packed_tokens)) if on and tokens]
    return RowLimits(
        sequences=None if budgets or dynamic else sequences,
        tokens=min(budgets, default=None),
        rows=rows if packed and rows else 1,
        balanced=dynamic or (packed and rows is not None),
    )


def rows_by_length(lengths: Sequence[int], limits: RowLimits, at_least: int = 1) -> list[list[int]]:
    """Return rows of indices into ``lengths``; each index once.

    Args:
        lengths: tokens of each sequence.
        limits: of a row.
        at_least: make this many balanced rows, as far as there are sequences, so that ranks have equally many. If it is
            as many as would be made without it, there will be no more.
    """
    if not limits.balanced:
        return _in_order(lengths, limits)
    count = max(limits.rows, at_least, -(-sum(lengths) // limits.tokens) if limits.tokens else 1)
    while True:
        rows = balanced(lengths, min(count, len(lengths)))
        heaviest = max((sum(lengths[i] for i in row) for row in rows if len(row) > 1), default=0)
        if limits.tokens is None or heaviest <= limits.tokens:
            return rows
        count += 1


def balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal indices into ``lengths`` out to ``count`` parts with about equally many tokens, the longest first.

    Returns:
        The parts, heaviest first, each in ascending order; parts may be empty only if there are too few sequences.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, part) for part in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, part = heapq.heappop(lightest)
        parts[part].append(index)
        heapq.heappush(lightest, (tokens + lengths[index], part))
    parts.sort(key=lambda part: -sum(lengths[i] for i in part))
    return [sorted(part) for part in parts]


def _in_order(lengths: Sequence[int], limits: RowLimits) -> list[list[int]]:
    rows: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        fits = rows and (limits.tokens is None or tokens + length <= limits.tokens)
        if fits and (limits.sequences is None or len(rows[-1]) < limits.sequences):
            rows[-1].append(index)
            tokens += length
        else:
            rows.append([index])
            tokens = length
    return rows
