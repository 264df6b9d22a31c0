"""The three jobs a backend can do, as protocols; a class may serve more than one.

Messages are plain dataclasses of numpy arrays and numbers, so they cross Ray without ceremony.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.trajectory import FinishReason, FloatArray, IntArray, Trajectory, TrajectoryId


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
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class ScoreRequest:
    """A sequence to score; log-probabilities are wanted where ``response_mask`` is true."""

    id: TrajectoryId
    tokens: IntArray
    response_mask: NDArray[np.bool_]

    @property
    def checksum(self) -> int:
        """Checksum of the token ids, by which a score is matched to the sequence it was made for."""
        return zlib.crc32(np.ascontiguousarray(self.tokens, dtype=np.int32).tobytes())


@dataclass(frozen=True)
class ScoreResult:
    """Scores of one sequence: ``logprobs [T]`` float32, 0 where none were wanted."""

    id: TrajectoryId
    checksum: int
    logprobs: FloatArray


@dataclass(frozen=True)
class WeightBucket:
    """Some of a model's tensors as raw bytes: ``(name, torch dtype name, shape, uint8 bytes)`` for each.

    Bytes, because numpy has no bfloat16. ``checksums`` are the sender's.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...], NDArray[np.uint8]], ...]
    checksums: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, str, tuple[int, ...], NDArray[np.uint8]]]) -> WeightBucket:
        """Make a bucket on the sending side."""
        return cls(tuple(tensors), {name: tensor_checksum(raw) for name, _, _, raw in tensors})


@dataclass(frozen=True)
class TrainItem:
    """A trajectory to train on and the weight that each of its sampled tokens has in the loss.

    A weight of 0 makes the item take part in the collectives and in nothing else.
    """

    trajectory: Trajectory
    token_weight: float


@runtime_checkable
class GenerateStrategy(Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """Yield results as sequences finish.

        The requests come as one sorted list, so that an engine that forms its own batches forms the same ones when
        a run is repeated.
        """
        ...

    def weight_dtype(self) -> str:
        """The dtype in which weights are held, as torch names it (``float32``)."""
        ...

    def begin_weight_update(self, version: int) -> None:
        """Stop serving until :meth:`finish_weight_update`."""
        ...

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over the tensors of ``bucket``; return the checksums that its sender gave."""
        ...

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Serve again, with weights ``version``; return the checksum of each tensor as it is now held."""
        ...


@runtime_checkable
class ScoreStrategy(Protocol):
    """Gives token log-probabilities of given sequences."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score ``requests``, in their order."""
        ...


@runtime_checkable
class TrainStrategy(Protocol):
    """Trains a model across ranks. All ranks call every method together."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score this rank's ``requests``; ranks with fewer take part with empty rows."""
        ...

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], loss: PolicyLoss) -> dict[str, float]:
        """One optimizer step over this rank's ``micro_batches`` (equally many on each rank)."""
        ...

    def export_weights(self, dtype: str | None, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all tensors under their Hugging Face names (rank 0; the others take part and yield nothing)."""
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


def tensor_checksum(raw: NDArray[Any]) -> int:
    """Checksum of a tensor's bytes; equal on both sides of a weight transfer."""
    return zlib.crc32(np.ascontiguousarray(raw).view(np.uint8).reshape(-1).data)
