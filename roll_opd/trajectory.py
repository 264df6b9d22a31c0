"""The one data type that travels: a token sequence with arrays indexed by token position.

``x[t]`` always speaks about token ``t``: ``infer_logprobs[t]`` is the log-probability that the engine gave to
``tokens[t]`` given ``tokens[:t]``. The shift between logits and tokens exists in one place only, beside the model
forward (:mod:`roll_opd.distributed.strategy.packed_model`). Nothing here is padded: lists of trajectories travel, and
are packed into rows where they are computed on.

Arrays are numpy, so that they move through Ray's object store without a copy. What has been received that way is
read-only: derive new trajectories with :func:`dataclasses.replace`, never write into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]

FinishReason = Literal["stop", "length"]

REFERENCE = "reference"
"""Key of the frozen policy's scores among a trajectory's scores; no teacher may be called so."""
BASE_MODEL = "base_model"
"""Key of the scores of the model that a teacher was made from; no teacher may be called so."""


class TrajectoryId(NamedTuple):
    """Stable name of a trajectory; sorts in the order in which prompts were drawn.

    Attributes:
        draw: the prompt's number, counted from the start of the run (resume goes on counting).
        sample: which of the group's samples.
        segment: which part of the episode; 0 unless an episode was split.
        stream: ``train`` or ``val``; the two never mix, but their seeds must differ.
    """

    draw: int
    sample: int
    segment: int = 0
    stream: str = "train"

    def __str__(self) -> str:
        name = f"{self.draw}/{self.sample}/{self.segment}"
        return name if self.stream == "train" else f"{self.stream}:{name}"

    def seed(self, run_seed: int, turn: int = 0) -> int:
        """Return a 63-bit seed that depends on the run's seed, this id and the turn of the episode alone.

        Retries and restarts therefore sample the same tokens, whatever the batch around them.
        """
        name = f"{run_seed}|{self.stream}|{self.draw}|{self.sample}|{self.segment}"
        digest = hashlib.blake2b((f"{name}|{turn}" if turn else name).encode())
        return int.from_bytes(digest.digest()[:8], "little") >> 1


@dataclass(frozen=True)
class SupportScores:
    """A teacher's log-probabilities over a set of tokens, for each of ``n`` sampled tokens.

    Attributes:
        ids: ``[n, K]`` int32; -1 fills sets that are smaller.
        logprobs: ``[n, K]`` float32, untruncated softmax at temperature 1; -inf at the fillers.
        tail: ``[n]`` float32, log-probability of everything outside the set.
    """

    ids: IntArray
    logprobs: FloatArray
    tail: FloatArray


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes, because numpy has no bfloat16; ``dtype`` is torch's name (``bfloat16``).

    A teacher's final hidden states are one of shape ``[n, H]``: row ``i`` predicts the ``i``-th sampled token.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


@dataclass(frozen=True)
class DetailsRef:
    """Where the details of one sequence are, which nobody has fetched yet.

    Attributes:
        call: reference of a Ray object, the details of all sequences of one scoring call.
        index: which of them.
    """

    call: Any
    index: int


@dataclass(frozen=True)
class TeacherScores:
    """What one teacher says about one trajectory.

    Attributes:
        logprobs: ``[T]`` float32, untruncated softmax at temperature 1 over the tokenizer's vocabulary; 0 where
            ``response_mask`` is false. None as long as only the trainer can tell, which forms whole distributions of
            the details.
        details: :class:`SupportScores` or :class:`RawTensor`, for objectives that need more than the sampled token.
            Between processes it is a :class:`DetailsRef`: large, and of no use to the driver.
    """

    logprobs: FloatArray | None
    details: Any = None


@dataclass(frozen=True)
class Turn:
    """One decision of the student in an environment: what it saw, what it sampled, and what it got for that.

    Attributes:
        index: which turn of the episode, from 0; an episode's segments count on.
        start: position of the first token that was sampled in this turn, in the trajectory that holds it.
        end: position behind the last one.
        observation: the text that the environment showed.
        reward: what the environment gave for it, a format penalty included.
        state: equal for decisions of a group that were taken in the same state of their environment.
        is_valid: whether the environment understood the action; None: it does not tell.
    """

    index: int
    start: int
    end: int
    observation: str
    reward: float
    state: str
    is_valid: bool | None = None


@dataclass(frozen=True)
class Trajectory:
    """One sampled token sequence and everything that is known about it. All arrays have length ``T``.

    Attributes:
        id: see :class:`TrajectoryId`.
        tag: routes the sample to teachers and rewards.
        tokens: ``[T]`` int32, prompt and response.
        response_mask: ``[T]`` bool, true on the tokens the student sampled (the end-of-sequence token included).
        infer_logprobs: ``[T]`` float32, from the engine that sampled: untruncated softmax at temperature 1.
        weight_version: ``[T]`` int32, version of the student's weights that sampled the token; -1 elsewhere.
        finish_reason: ``stop`` (the student ended it) or ``length`` (cut at the limit).
        sampled_mass: mean over sampled tokens of the probability that the sampler's truncation kept; 1.0 = untruncated,
            NaN = not measured.
        top_ids: ``[n, K]`` int32, tokens that the sampling engine ranked first at each of the ``n`` sampled tokens,
            when they were asked for.
        contexts: scorer name -> prompt token ids that it sees in place of the student's (privileged context).
        old_logprobs: ``[T]`` float32, from the trainer before the update (or the engine, when so configured).
        entropies: ``[T]`` float32, of the student's distribution before the update, from the trainer.
        values: ``[T]`` float32, the critic's prediction before the update, when there is a critic.
        teacher_scores: scorer name -> scores (teachers, and the reference of a run without teachers).
        advantages: ``[T]`` float32; 0 where ``response_mask`` is false.
        returns: ``[T]`` float32, what the critic learns to predict.
        trained: false for a trajectory that a mask takes out of every part of the loss; it counts in the normaliser.
        policy_weights: ``[T]`` float32 weight of each token's policy loss; None: 1 on every sampled token.
        divergence_weights: teacher name -> ``[T]`` float32 weight of each token's divergence, coefficient included.
        turns: the student's turns in an environment, in order, which cover every sampled token; empty for a trajectory
            of a single response.
        reward: external reward, if one was graded; that of the whole episode, on each of its segments.
        correct: verdict of the grader or the environment, if it gives one.
        extras: whatever else a reward or a page wants to show (never needed for training).
    """

    id: TrajectoryId
    tag: str
    tokens: IntArray
    response_mask: BoolArray
    infer_logprobs: FloatArray
    weight_version: IntArray
    finish_reason: FinishReason = "stop"
    sampled_mass: float = 1.0
    top_ids: IntArray | None = None
    contexts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    old_logprobs: FloatArray | None = None
    entropies: FloatArray | None = None
    values: FloatArray | None = None
    teacher_scores: Mapping[str, TeacherScores] = field(default_factory=dict)
    advantages: FloatArray | None = None
    returns: FloatArray | None = None
    trained: bool = True
    policy_weights: FloatArray | None = None
    divergence_weights: Mapping[str, FloatArray] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    reward: float | None = None
    correct: bool | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def response_length(self) -> int:
        """Number of tokens the student sampled."""
        return int(self.response_mask.sum())

    @property
    def turn_lengths(self) -> list[int]:
        """Sampled tokens of each turn, in order; a single response is one turn."""
        if not self.turns:
            return [self.response_length]
        lengths = [turn.end - turn.start for turn in self.turns]
        assert sum(lengths) == self.response_length, f"turns of {self.id} do not cover its sampled tokens"
        return lengths

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that scored this trajectory, sorted."""
        return sorted(name for name in self.teacher_scores if name not in (REFERENCE, BASE_MODEL))

    def sampled(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the entries ``[n]`` of per-token ``values [T]`` on the sampled tokens."""
        return values[self.response_mask]

    def said_by(self, scorer: str) -> FloatArray:
        """Return the log-probabilities of a teacher, the reference or the base model, which must be known by now."""
        logprobs = self.teacher_scores[scorer].logprobs
        assert logprobs is not None, f"nobody has asked {scorer} for log-probabilities of trajectory {self.id}"
        return logprobs

    def spread(self, values: NDArray[Any]) -> FloatArray:
        """Return ``[T]`` float32 with ``values [n]`` on the sampled tokens and 0 elsewhere; undoes :meth:`sampled`."""
        out = np.zeros(len(self.tokens), dtype=np.float32)
        out[self.response_mask] = values
        return out


def check_per_token(name: str, values: NDArray[Any], trajectory: Trajectory) -> None:
    """Refuse per-token values that do not belong to ``trajectory``.

    Raises:
        ValueError: another length, or a value on a sampled token that is not finite.
    """
    if values.shape != trajectory.tokens.shape:
        raise ValueError(f"{name}: shape {values.shape} for {len(trajectory)} tokens of trajectory {trajectory.id}")
    if not np.isfinite(values[trajectory.response_mask]).all():
        raise ValueError(f"{name}: not finite on sampled tokens of trajectory {trajectory.id}")


@dataclass(frozen=True)
class PackedBatch:
    """Several sequences laid end to end in one row, without padding.

    Attributes:
        tokens: ``[N]`` int64.
        positions: ``[N]`` int64, restarting at 0 for each sequence.
        cu_seqlens: ``[S + 1]`` int32, start of each sequence and, last, ``N``.
        response_mask: ``[N]`` bool.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: IntArray
    response_mask: BoolArray

    @classmethod
    def pack(cls, tokens: Sequence[IntArray], response_masks: Sequence[BoolArray]) -> PackedBatch:
        """Lay sequences end to end, in the order given."""
        lengths = [len(t) for t in tokens]
        return cls(
            tokens=np.concatenate(tokens).astype(np.int64),
            positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            response_mask=np.concatenate(response_masks),
        )

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Cut ``values`` of shape ``[N]`` back into one array per sequence."""
        return np.split(values, self.cu_seqlens[1:-1])
