"""Scoring as a packed forward; shared by every strategy that holds a :class:`PackedModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult
from roll_opd.distributed.strategy.packed_model import PackedModel
from roll_opd.trajectory import PackedBatch


def rows_of(requests: Sequence[ScoreRequest], config: WorkerConfig) -> Iterator[list[ScoreRequest]]:
    """Cut into packed rows, in the order given.

    A row holds at most ``infer_batch_size`` sequences, or, with ``use_sequence_packing``, at most
    ``max_packed_sequence_length_forward`` tokens (a single longer sequence gets a row of its own).
    """
    budget = config.sequence_packing_args.max_packed_sequence_length_forward if config.use_sequence_packing else None
    row: list[ScoreRequest] = []
    tokens = 0
    for request in requests:
        full = tokens + len(request.tokens) > budget if budget else len(row) == config.infer_batch_size
        if row and full:
            yield row
            row, tokens = [], 0
        row.append(request)
        tokens += len(request.tokens)
    if row:
        yield row


def score_row(model: PackedModel, row: Sequence[ScoreRequest]) -> list[ScoreResult]:
    """Score one packed row; call inside ``torch.no_grad()`` or ``inference_mode``."""
    batch = PackedBatch.pack([r.tokens for r in row], [r.response_mask for r in row])
    logprobs, _, target = model.token_logprobs(batch)
    values = np.zeros(len(batch.tokens), dtype=np.float32)
    values[target] = logprobs.float().cpu().numpy()
    return [ScoreResult(r.id, r.checksum, v) for r, v in zip(row, batch.split(values), strict=True)]
