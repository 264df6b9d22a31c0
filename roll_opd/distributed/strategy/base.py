"""The three jobs a backend can do, as protocols; a class may serve more than one.

Messages are plain dataclasses of numpy arrays and numbers, so they cross Ray without ceremony.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from roll_opd.algorithms.loss import Loss
from roll_opd.distributed.strategy.weight_transfer import WeightBucket
from roll_opd.trajectory import (
    FinishReason,
    FloatArray,
    IntArray,
    RawTensor,
    SupportScores,
    Trajectory,
    TrajectoryId,
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: > 0; 1 is the model's own distribution.
        top_p: nucleus mass in (0, 1]; 1 = off.
        top_k: keep this many tokens; <= 0 = off.
        max_new_tokens: limit of the response, in tokens.
        greedy: take the most probable token instead of drawing one.
        stop_strings: the response ends once one of these appears in its text.
        report_top_ids: also report this many most probable tokens at each step; 0 = none.
        ignore_eos: sample on after a token that ends a response, up to ``max_new_tokens``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()
    report_top_ids: int = 0
    ignore_eos: bool = False

    @property
    def truncates(self) -> bool:
        """Whether the sampled distribution differs from the untruncated softmax at temperature 1."""
        return self.greedy or self.temperature != 1.0 or self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True)
class GenerateRequest:
    """One response to sample; ``seed`` alone decides its randomness, whatever batch it runs in."""

    id: TrajectoryId
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling


@dataclass(frozen=True)
class GenerateResult:
    """A finished response; the arrays have one entry per sampled token."""

    id: TrajectoryId
    response_ids: IntArray
    infer_logprobs: FloatArray
    weight_version: IntArray
    finish_reason: FinishReason
    sampled_mass: float
    top_ids: IntArray | None = None


@dataclass(frozen=True)
class ScoreWant:
    """What to report for each sampled token besides its log-probability.

    Attributes:
        top_k: log-probabilities of the scorer's own ``k`` most probable tokens.
        given: log-probabilities of the ids that come with each request.
        hidden: final hidden states, from which the receiver forms whole distributions.
        logprobs: whether the sampled token's log-probability is wanted. A receiver of hidden states can do without, and
            then the scorer leaves its head alone.
    """

    top_k: int = 0
    given: bool = False
    hidden: bool = False
    logprobs: bool = True

    @property
    def details(self) -> bool:
        """Whether more than one number per token is wanted."""
        return self.top_k > 0 or self.given or self.hidden


SAMPLED_ONLY = ScoreWant()


@dataclass(frozen=True)
class ScoreRequest:
    """A sequence to score; log-probabilities are wanted where ``response_mask`` is true.

    ``given_ids [n, K]``: for each sampled token, ids to report on; -1 fills sets that are smaller.
    """

    id: TrajectoryId
    tokens: IntArray
    response_mask: NDArray[np.bool_]
    given_ids: IntArray | None = None

    @property
    def checksum(self) -> int:
        """Checksum of the token ids, by which a score is matched to the sequence it was made for."""
        return zlib.crc32(np.ascontiguousarray(self.tokens, dtype=np.int32).tobytes())


@dataclass(frozen=True)
class ScoreResult:
    """Scores of one sequence.

    Attributes:
        id: of the request.
        checksum: of the tokens that were scored.
        logprobs: ``[T]`` float32, 0 where none were wanted; None where none were wanted at all.
        entropies: ``[T]`` float32, likewise; None where the scorer does not see whole distributions.
        details: what a :class:`ScoreWant` asked for besides.
    """

    id: TrajectoryId
    checksum: int
    logprobs: FloatArray | None
    entropies: FloatArray | None = None
    details: SupportScores | RawTensor | None = None


@dataclass(frozen=True)
class HeadWeights:
    """An output projection: ``weight [V, H]`` and ``bias [V]``, trimmed to the tokenizer's vocabulary."""

    weight: RawTensor
    bias: RawTensor | None
    soft_cap: float | None


@dataclass(frozen=True)
class TrainItem:
    """A trajectory to train on and the weight that each of its sampled tokens has in the loss.

    A weight of 0 makes the item take part in the collectives and in nothing else.
    """

    trajectory: Trajectory
    token_weight: float


@dataclass(frozen=True)
class TokenScores:
    """What an update's own forward pass says of one trajectory, with the weights as they were before the update.

    Attributes:
        id: of the trajectory.
        logprobs: ``[T]`` float32, 0 where no token was sampled.
        entropies: likewise.
        teachers: teacher -> log-probabilities, likewise, of those whose whole distributions the loss compares with.
    """

    id: TrajectoryId
    logprobs: FloatArray
    entropies: FloatArray
    teachers: dict[str, FloatArray]


@runtime_checkable
class Resident(Protocol):
    """What can leave its device, so that a role that shares the device has room."""

    def offload(self, keep_weights: bool = False) -> None:
        """Move everything to host memory, or everything but the weights; idempotent.

        What comes back with the next weight update need not be kept at all.
        """
        ...

    def onload(self, weights_only: bool = False) -> None:
        """Undo :meth:`offload`, or bring the weights alone, as a weight update needs them; idempotent."""
        ...


@runtime_checkable
class TakesWeights(Protocol):
    """What follows the trainer: a generator, or a teacher that is the student."""

    def weight_dtype(self) -> str:
        """The dtype in which weights are held, as torch names it (``float32``)."""
        ...

    def receivers(self) -> int:
        """Processes here that take over weights, each for itself: this one, or those of an engine."""
        ...

    def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """Form a process group with the trainer; the receivers here are its ranks from ``first_rank`` on.

        Args:
            host: address of the group's store.
            port: its port.
            first_rank: > 0; 0 is the trainer's.
            size: processes of the group.
            timeout: seconds that one tensor may take.
        """
        ...

    def begin_weight_update(self, version: int, mix: float = 1.0) -> None:
        """Stop serving until :meth:`finish_weight_update`; ``mix`` is the new weights' share in what is then held.

        A backend may wait for the responses in flight, or interrupt them: their later tokens are then sampled with the
        new weights, and their ``weight_version`` says where that begins.
        """
        ...

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over the tensors of ``bucket``; return the checksums that its sender gave."""
        ...

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Serve again, with weights ``version``; return the checksum of each tensor as it is now held."""
        ...


@runtime_checkable
class BorrowsCores(Protocol):
    """What computes with as many threads as it is told, and can change their number between two pieces of work."""

    def use_threads(self, count: int) -> None:
        """Compute with ``count`` threads from now on; return once that is so."""
        ...


@runtime_checkable
class GenerateStrategy(Resident, TakesWeights, Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """Yield results as sequences finish. Closing the iterator aborts what has not finished.

        The requests come as one sorted list, so that an engine that forms its own batches forms the same ones when
        a run is repeated.

        Raises:
            EngineDiedError: the engine is gone; what was yielded before stands, the rest is to be asked for again once
                :meth:`restart` and a weight update have brought an engine back.
        """
        ...

    def restart(self) -> None:
        """Replace a dead engine. The new one does not serve before a weight update has finished."""
        ...


@runtime_checkable
class ScoreStrategy(Resident, Protocol):
    """Gives token log-probabilities of given sequences."""

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """Score ``requests``, in their order."""
        ...

    def save_model(self, folder: str) -> None:
        """Write the weights that are held, for a scorer whose weights move during a run."""
        ...

    def load_model(self, folder: str) -> None:
        """Read what :meth:`save_model` wrote."""
        ...

    def head(self) -> HeadWeights:
        """Return the output projection that turns this scorer's hidden states into logits."""
        ...


@runtime_checkable
class TrainStrategy(Resident, Protocol):
    """Trains a model across ranks. All ranks call every method together.

    Ranks that share a data-parallel rank (see :class:`~roll_opd.distributed.layout.Layout`) get the same requests and
    items; which of them answers, the layout says.
    """

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score this rank's ``requests``; ranks with fewer take part with empty rows."""
        ...

    def train_step(
        self, micro_batches: Sequence[Sequence[TrainItem]], loss: Loss, said: list[TokenScores] | None = None
    ) -> dict[str, float]:
        """One optimizer step over this rank's ``micro_batches`` (equally many on each rank).

        What its forward pass says of this rank's items is added to ``said``, in no certain order, unless that is None.
        """
        ...

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None:
        """Take over a teacher's output projection, for divergences over the whole vocabulary."""
        ...

    def full_weights(self, dtype: str | None, everywhere: bool = False) -> Iterator[tuple[list[str], Tensor]]:
        """Yield each tensor, whole, with its Hugging Face names; a tied weight has several.

        All ranks iterate to the end. Rank 0 alone gets tensors, or with ``everywhere`` each rank, on its own device.

        Args:
            dtype: rounded to this, as torch names it; ``None``: as they are.
            everywhere: yield on every rank.

        Raises:
            TrainingError: the backend cannot do so everywhere.
        """
        ...

    def save(self, folder: str) -> None:
        """Write weights and optimizer state."""
        ...

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote."""
        ...

    def export_hf(self, folder: str) -> None:
        """Write the model in Hugging Face format."""
        ...
