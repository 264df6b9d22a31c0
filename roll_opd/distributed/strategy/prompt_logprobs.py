"""From the prompt log-probabilities of a vLLM engine or server to scores.

vLLM scores a prompt with ``prompt_logprobs=k`` and ``max_tokens=1``: for each position the log-probability of the token
that stands there and of the ``k`` most probable ones, untempered and untruncated whatever the sampling parameters say.
Entry ``t`` speaks about token ``t``, as our arrays do; entry 0 is empty.

What such an answer cannot hold, and what is made of it:

- *The mass outside the top k* is ``1 - sum p``, which cancels: below :data:`TAIL_FLOOR` it is rounding of the engine's
  softmax. A tail is therefore never less than the floor, unless the set is the whole vocabulary (then -inf).
- *Padded rows of the head.* vLLM's softmax runs over the ``vocab_size`` of the model's config, ours over the ids of the
  tokenizer, so vLLM's log-probabilities are too low: by ``-log(1 - m)``, ``m`` being the mass on padding. It is next to
  nothing where padding was part of the softmax in training, and anything where it was not. Padding that shows among the
  top k is taken out, the set is that much smaller, and all log-probabilities of the position are normalised to what
  remains: exact if all padding shows, nearer to exact if some does. With ``top_k = 0`` none shows, and nothing is
  corrected.
- *Entropies* are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult, ScoreWant
from roll_opd.errors import ModelError
from roll_opd.trajectory import SupportScores

TAIL_FLOOR = 1e-6
"""Least mass that is believed to lie outside a top-k set: a few roundings of a softmax in fp32."""

PADDING_LIMIT = 0.5
"""Mass on ids that the tokenizer does not have beyond which a model is not taken for one of this vocabulary."""

_MINUS_INFINITY = -9999.0
"""What vLLM's server writes in place of minus infinity, which JSON cannot hold."""

_ROUNDING = 1e-3
"""How far a sum of probabilities may exceed 1, or a log-probability 0."""

PromptLogprobs = Sequence[Mapping[Any, Any] | None]
"""For each position a mapping of token id (a string in JSON) to an entry with a ``logprob`` (a key in JSON)."""


@runtime_checkable
class FlatLogprobs(Protocol):
    """vLLM's flat form: a position's entries lie between its start and end index, that of its own token first."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]

    def __len__(self) -> int: ...


def check_want(role: str, want: ScoreWant) -> None:
    """Refuse what prompt log-probabilities cannot give.

    Raises:
        ModelError: given ids or hidden states are wanted.
    """
    if want.given or want.hidden:
        what = "hidden states" if want.hidden else "log-probabilities of given ids"
        raise ModelError(
            f"{role}: a vLLM engine gives the sampled tokens' log-probabilities and its own top k, not {what}; set "
            f"opd_args.support to sampled or teacher_topk, or score with hf_infer"
        )


def score_result(
    request: ScoreRequest, prompt_logprobs: PromptLogprobs | FlatLogprobs, want: ScoreWant, vocab_size: int
) -> ScoreResult:
    """Turn vLLM's answer to ``request.tokens`` into the scores that were asked for.

    Args:
        request: ``T`` tokens, ``n`` of them to be scored.
        prompt_logprobs: one entry for each of the ``T`` positions, asked for with ``prompt_logprobs=want.top_k``: from
            the engine (a list or the flat form) or the server's JSON.
        want: sampled tokens, and ``top_k``; see :func:`check_want`.
        vocab_size: largest token id of the tokenizer plus one.

    Returns:
        Log-probabilities; with ``top_k`` also :class:`~roll_opd.trajectory.SupportScores` of ``[n, top_k]``, best
        first. Ids of probability 0 are not part of a set.

    Raises:
        ValueError: entries are missing, speak about other tokens, or are not log-probabilities of one distribution.
    """
    positions = np.flatnonzero(request.response_mask)
    if len(prompt_logprobs) != len(request.tokens):
        raise ValueError(f"{len(prompt_logprobs)} prompt log-probabilities for {len(request.tokens)} tokens")
    if len(positions) and positions[0] == 0:
        raise ValueError("the first token of a sequence has nothing before it and cannot be scored")
    read = _from_flat if isinstance(prompt_logprobs, FlatLogprobs) else _from_mappings
    ids, logprobs = read(prompt_logprobs, request.tokens, positions, want.top_k)
    logprobs[logprobs <= _MINUS_INFINITY] = -np.inf
    _check_table(ids, logprobs, positions, vocab_size)

    set_ids, set_logprobs = ids[:, 1:], logprobs[:, 1:]
    padding = set_ids >= vocab_size
    padded = np.where(padding, np.exp(set_logprobs), 0.0).sum(axis=1)
    _refuse(
        padded > PADDING_LIMIT, positions, lambda i: f"{padded[i]:.0%} on ids beyond the vocabulary of {vocab_size}"
    )
    logprobs -= np.log1p(-padded)[:, None]

    out = np.zeros(len(request.tokens), dtype=np.float32)
    out[positions] = np.minimum(logprobs[:, 0], 0.0)
    set_logprobs[padding] = -np.inf
    details = _support(set_ids, set_logprobs, positions, vocab_size) if want.top_k else None
    return ScoreResult(request.id, request.checksum, out, None, details)


def padding_mass(entries: PromptLogprobs, vocab_size: int) -> float:
    """Return the largest probability at a position of ids from ``vocab_size`` on, as far as the entries show it."""
    beyond = [[_logprob(e) for i, e in entry.items() if int(i) >= vocab_size] for entry in entries if entry]
    return max((float(np.exp(logprobs).sum()) for logprobs in beyond if logprobs), default=0.0)


Table = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids and log-probabilities ``[n, 1 + k]`` of the positions to score: the token that stands there, then the top k."""


def _from_flat(flat: Any, tokens: NDArray[Any], positions: NDArray[Any], top_k: int) -> Table:
    starts, ends = np.asarray(flat.start_indices)[positions], np.asarray(flat.end_indices)[positions]
    _refuse(ends - starts != top_k + 1, positions, lambda i: f"{ends[i] - starts[i]} entries, expected {top_k + 1}")
    index = starts[:, None] + np.arange(top_k + 1)
    ids = np.asarray(flat.token_ids, dtype=np.int64)[index]
    own = tokens[positions]
    _refuse(ids[:, 0] != own, positions, lambda i: f"speaks about token {ids[i, 0]}, the prompt has {own[i]}")
    return ids, np.asarray(flat.logprobs, dtype=np.float64)[index]


def _from_mappings(entries: Any, tokens: NDArray[Any], positions: NDArray[Any], top_k: int) -> Table:
    ids = np.empty((len(positions), top_k + 1), dtype=np.int64)
    logprobs = np.empty((len(positions), top_k + 1), dtype=np.float64)
    for row, position in enumerate(positions):
        own, where = int(tokens[position]), _where(position)
        try:
            entry = {int(i): _logprob(e) for i, e in (entries[position] or {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # policy: one error for any malformed entry
            raise ValueError(f"{where}: not understood ({error!r})") from error
        if own not in entry:
            raise ValueError(f"{where}: none of token {own}, which stands there")
        # The token that stands there is one of the best k, or comes on top of them.
        best = entry if len(entry) == top_k else {i: value for i, value in entry.items() if i != own}
        if len(best) != top_k:
            raise ValueError(f"{where}: {len(entry)} entries, expected {top_k} or {top_k + 1}")
        ids[row] = own, *best
        logprobs[row] = entry[own], *best.values()
    return ids, logprobs


def _logprob(entry: Any) -> float:
    return float(entry["logprob"] if isinstance(entry, Mapping) else entry.logprob)


def _check_table(ids: NDArray[Any], logprobs: NDArray[Any], positions: NDArray[Any], vocab_size: int) -> None:
    _refuse(ids.min(axis=1) < 0, positions, lambda i: f"token id {ids[i].min()}")
    _refuse(ids[:, 0] >= vocab_size, positions, lambda i: f"token {ids[i, 0]}, but the vocabulary has {vocab_size}")
    _refuse(np.isnan(logprobs).any(axis=1), positions, lambda i: "not a number")
    largest = logprobs.max(axis=1)
    total = np.exp(np.minimum(logprobs[:, 1:], 1.0)).sum(axis=1)
    impossible: NDArray[np.bool_] = (largest > _ROUNDING) | (total > 1.0 + _ROUNDING)
    _refuse(
        impossible,
        positions,
        lambda i: (
            f"{largest[i]:.4g} is the largest, and the best sum to a probability of {total[i]:.4g}; these are no "
            f"log-probabilities (vLLM's logprobs_mode must be raw_logprobs or processed_logprobs)"
        ),
    )
    _refuse(~np.isfinite(logprobs[:, 0]), positions, lambda i: f"token {ids[i, 0]} has probability 0")


def _support(ids: NDArray[Any], logprobs: NDArray[Any], positions: NDArray[Any], vocab_size: int) -> SupportScores:
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    member = logprobs > -np.inf
    outside = np.maximum(1.0 - np.exp(logprobs).sum(axis=1), TAIL_FLOOR)
    tail = np.where(member.sum(axis=1) == vocab_size, -np.inf, np.log(outside))
    return SupportScores(
        np.where(member, ids, -1).astype(np.int32), logprobs.astype(np.float32), tail.astype(np.float32)
    )


def _refuse(bad: NDArray[np.bool_], positions: NDArray[Any], why: Callable[[int], str]) -> None:
    """Raise for the first row that is bad; ``why`` says what is wrong with a row."""
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(f"{_where(positions[first])}: {why(first)}")


def _where(position: int) -> str:
    return f"prompt log-probabilities of position {position}"
