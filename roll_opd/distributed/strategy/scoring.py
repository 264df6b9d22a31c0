"""Scoring as a packed forward; shared by every strategy that holds a :class:`PackedModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from roll_opd.algorithms.chunked_head import Head, head_outputs, support_scores
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import SAMPLED_ONLY, ScoreRequest, ScoreResult, ScoreWant
from roll_opd.distributed.strategy.packed_model import PackedModel, raw_of
from roll_opd.distributed.strategy.row_packing import RowLimits, rows_by_length
from roll_opd.trajectory import PackedBatch, RawTensor, SupportScores, TrajectoryId

T = TypeVar("T")


def rows_of(requests: Sequence[ScoreRequest], config: WorkerConfig, at_least: int = 1) -> list[list[ScoreRequest]]:
    """Cut into packed rows, each request into one of them; see :class:`RowLimits` for what a row holds.

    Balanced rows are not in the order of the requests: :func:`in_order_of` undoes that. ``at_least`` asks for so many
    of them, as far as there are requests.
    """
    rows = rows_by_length([len(r.tokens) for r in requests], RowLimits.of_scoring(config), at_least)
    return [[requests[index] for index in row] for row in rows]


def in_order_of(requests: Sequence[ScoreRequest], rows: Sequence[Sequence[ScoreRequest]], results: list[T]) -> list[T]:
    """Put ``results``, one for each sequence in the rows' order, into the order of ``requests``."""
    place = {id(request): index for index, request in enumerate(requests)}
    ordered = sorted(zip((place[id(r)] for row in rows for r in row), results, strict=True), key=lambda pair: pair[0])
    return [result for _, result in ordered]


def score_row(model: PackedModel, row: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
    """Score one packed row; call inside ``torch.no_grad()`` or ``inference_mode``."""
    batch = PackedBatch.pack([r.tokens for r in row], [r.response_mask for r in row])
    given = _given_ids(row) if want.given else None

    def apply(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor | None, Tensor | None, Any]:
        if want.top_k or want.given:
            ids = None if given is None else given.to(hidden.device)
            logprobs, *over_set = support_scores(hidden, head, targets, want.top_k, ids)
            return logprobs, None, over_set
        if not want.logprobs:
            states = hidden if want.hidden else None
            if bool(torch.isfinite(hidden).all()):
                return None, None, states
            # They would not be finite either, and whoever gets them refuses that.
            return hidden.new_full((len(hidden),), math.nan), None, states
        outputs = head_outputs(hidden, head, targets)
        return outputs.logprobs_n, outputs.entropy_n, hidden if want.hidden else None

    (logprobs, entropy, extra), target = model.at_sampled_tokens(batch, apply)
    details = _details(extra, [int(r.response_mask.sum()) for r in row])

    def spread(values: Tensor | None) -> Sequence[np.ndarray[Any, Any] | None]:
        if values is None:
            return [None] * len(row)
        out = np.zeros(len(batch.tokens), dtype=np.float32)
        out[target] = values.float().cpu().numpy()
        return batch.split(out)

    return [
        ScoreResult(r.id, r.checksum, v, e, d)
        for r, v, e, d in zip(row, spread(logprobs), spread(entropy), details, strict=True)
    ]


def idle_request() -> ScoreRequest:
    """A tiny sequence that keeps a rank without work in step with the others; its score is thrown away."""
    nothing = np.full((1, 1), -1, dtype=np.int32)
    return ScoreRequest(TrajectoryId(-1, -1), np.zeros(2, dtype=np.int32), np.array([False, True]), nothing)


def _details(extra: Any, counts: list[int]) -> Sequence[SupportScores | RawTensor | None]:
    """Cut what the head gave besides log-probabilities into one part per sequence."""
    if extra is None:
        return [None] * len(counts)
    if isinstance(extra, Tensor):
        return [raw_of(part) for part in extra.split(counts)]
    ids, logprobs, tail = (values.cpu().split(counts) for values in extra)
    return [
        SupportScores(i.numpy().astype(np.int32), p.float().numpy(), t.float().numpy())
        for i, p, t in zip(ids, logprobs, tail, strict=True)
    ]


def _given_ids(row: Sequence[ScoreRequest]) -> Tensor:
    """Stack the requests' ids ``[n, K]``; smaller sets are filled with -1."""
    sets = [r.given_ids for r in row if r.given_ids is not None]
    assert len(sets) == len(row), "ids to report on were asked for, but a request brings none"
    widest = max(s.shape[1] for s in sets)
    filled = [np.pad(s, ((0, 0), (0, widest - s.shape[1])), constant_values=-1) for s in sets]
    return torch.from_numpy(np.concatenate(filled).astype(np.int64))
