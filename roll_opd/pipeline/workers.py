"""The worker of each model role: thin, it holds a strategy and passes calls on."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import ray
import torch
from ray.exceptions import ObjectLostError

from roll_opd.algorithms.loss import Loss
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.process_spec import give_back_memory
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    BorrowsCores,
    GenerateRequest,
    GenerateResult,
    GenerateStrategy,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreStrategy,
    ScoreWant,
    TokenScores,
    TrainItem,
)
from roll_opd.distributed.strategy.factory import (
    build_infer_strategy,
    build_train_strategy,
    build_value_strategy,
)
from roll_opd.distributed.strategy.tokenizer import check_same_vocabulary, load_tokenizer, vocabulary_of
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, Way, WeightBucket, in_buckets, pack
from roll_opd.distributed.worker import Worker, open_store
from roll_opd.trajectory import DetailsRef, FloatArray, TrajectoryId

T = TypeVar("T")

DetailsKey = tuple[TrajectoryId, str]
"""A trajectory and the teacher that scored it."""

SIDE_BY_SIDE = {"vllm": 16, "remote": 16}
"""Calls that a backend works on at once. The others have one model and take call after call, in the order in which they
were sent: ranks that hold a model together depend on it."""


async def ready_together(stream: AsyncIterator[T]) -> AsyncGenerator[list[T], None]:
    """Yield what ``stream`` yields, in lists: all that came while the list before was being dealt with.

    What came before an error is yielded before the error is raised. Closing this ends ``stream``.
    """
    ready: list[T] = []
    news = asyncio.Event()

    async def listen() -> None:
        try:
            async for item in stream:
                ready.append(item)
                news.set()
        finally:
            news.set()

    listening = asyncio.ensure_future(listen())
    try:
        while ready or not listening.done():
            await news.wait()
            news.clear()
            if ready:
                batch = ready.copy()
                ready.clear()
                yield batch
        await listening
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


class InferWorker(Worker):
    """``actor_infer`` and the teachers: samples and scores. An async actor; the model works in a thread."""

    async def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, generates: bool, max_length: int
    ) -> None:
        """Load the model.

        Args:
            yaml_name: the role's name in the YAML, for messages.
            config: of the role.
            student: names the tokenizer that everybody uses.
            generates: whether the role samples, or only scores.
            max_length: tokens of the longest sequence.
        """
        assert config.strategy_args is not None
        threads = SIDE_BY_SIDE.get(config.strategy_args.strategy_name, 1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="strategy")

        def load() -> ScoreStrategy:
            vocabulary = vocabulary_of(load_tokenizer(student, yaml_name), student)
            return build_infer_strategy(
                yaml_name, config, vocabulary, self.device, generates=generates, max_length=max_length
            )

        self.strategy = await self._call(load)
        give_back_memory()
        # A backend that only scores is never asked to sample, and none but a self-teacher follows the student: see the
        # checks of the config.
        self._engine = cast(GenerateStrategy, self.strategy)

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def use_threads(self, count: int) -> None:
        """Compute with ``count`` threads; to be called on backends that can (see ``lent_cores``)."""
        # Beside what is being computed, not behind it.
        borrower = cast(BorrowsCores, self.strategy)
        await asyncio.get_running_loop().run_in_executor(None, borrower.use_threads, count)

    async def restart(self) -> None:
        """Replace a dead engine."""
        await self._call(self._engine.restart)

    async def offload(self, keep_weights: bool) -> None:
        """Leave the device."""
        await self._call(self.strategy.offload, keep_weights)

    async def onload(self, weights_only: bool) -> None:
        """Come back to the device."""
        await self._call(self.strategy.onload, weights_only)

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[list[GenerateResult]]:
        """Yield responses as they finish; those that are ready together come together, which costs Ray one object."""
        async with contextlib.aclosing(ready_together(self._engine.generate(requests))) as batches:
            async for batch in batches:
                yield batch

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score sequences, in their order."""
        return await self._call(self.strategy.score, requests, SAMPLED_ONLY)

    async def score_with_details(
        self, requests: Sequence[ScoreRequest], want: ScoreWant
    ) -> tuple[list[ScoreResult], list[Any]]:
        """Score sequences; return the results, and the details of each.

        To be called with ``num_returns=2``: the details are an object of their own, which the caller owns (and so
        outlives this process) and passes on to a trainer without ever holding it. One for all of a call, because each
        object costs the caller about a millisecond.
        """
        results = await self._call(self.strategy.score, requests, want)
        return [dataclasses.replace(r, details=None) for r in results], [r.details for r in results]

    async def head(self) -> HeadWeights:
        """Return the output projection."""
        return await self._call(self.strategy.head)

    async def save_model(self, folder: str) -> None:
        """Write the weights that are held."""
        await self._call(self.strategy.save_model, folder)

    async def load_model(self, folder: str) -> None:
        """Read what :meth:`save_model` wrote."""
        await self._call(self.strategy.load_model, folder)

    async def weight_dtype(self) -> str:
        """Precision in which weights are held here."""
        return self._engine.weight_dtype()

    async def receivers(self) -> int:
        """Processes here that take over weights, each for itself."""
        return self._engine.receivers()

    async def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """Form a process group with the trainer."""
        await self._call(self._engine.join_transfer, host, port, first_rank, size, timeout)

    async def begin_weight_update(self, version: int, mix: float) -> None:
        """Stop serving."""
        await self._call(self._engine.begin_weight_update, version, mix)

    async def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over a bucket; return the checksums of what was received."""
        return await self._call(self._engine.load_weights, bucket)

    async def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Serve again; return the checksums of what is held."""
        return await self._call(self._engine.finish_weight_update, version)


class TrainWorker(Worker):
    """``actor_train``: one rank of the trainer."""

    def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, max_grad_norm: float, total_updates: int
    ) -> None:
        """Load and shard the model; the process group must exist."""
        self.strategy = build_train_strategy(
            yaml_name,
            config,
            vocabulary_of(load_tokenizer(student, yaml_name), student),
            self.device,
            max_grad_norm=max_grad_norm,
            total_updates=total_updates,
        )
        give_back_memory()
        self._details: dict[DetailsKey, Any] = {}
        self._end = TransferEnd(self.device)
        # What receivers may still be copying: of the bucket that was yielded last, and of the one before.
        self._sent: collections.deque[list[Any]] = collections.deque(maxlen=2)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score this rank's sequences."""
        return self.strategy.score(requests)

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None:
        """Take over a teacher's output projection."""
        self.strategy.set_teacher_head(teacher, head)

    def fetch_details(self, refs: Mapping[DetailsKey, DetailsRef]) -> list[DetailsKey]:
        """Get the teachers' details that this rank's next optimizer steps need; return the keys of those that are lost.

        Before anything is computed: a rank that found out in the middle of a step would leave the others waiting.
        Arrays are not copied: they stay in the object store's memory, each call's as long as any of them is held.
        """
        self._details = {}
        calls: dict[Any, list[DetailsKey]] = {}
        for key, ref in refs.items():
            calls.setdefault(ref.call, []).append(key)
        lost = []
        for call, keys in calls.items():
            try:
                parts = ray.get(call)
            except ObjectLostError:
                lost += keys
            else:
                self._details |= {key: parts[refs[key].index] for key in keys}
        return lost

    def train_step(
        self, micro_batches: Sequence[Sequence[TrainItem]], loss: Loss, tell: bool
    ) -> tuple[dict[str, float], list[TokenScores]]:
        """One optimizer step; with ``tell``, also what its forward pass said of each trajectory."""
        rows = [[self._with_details(item) for item in row] for row in micro_batches]
        said: list[TokenScores] = []
        return self.strategy.train_step(rows, loss, said if tell else None), said

    def _with_details(self, item: TrainItem) -> TrainItem:
        trajectory = item.trajectory
        scores = {
            name: dataclasses.replace(score, details=self._details.get((trajectory.id, name)))
            for name, score in trajectory.teacher_scores.items()
        }
        return dataclasses.replace(item, trajectory=dataclasses.replace(trajectory, teacher_scores=scores))

    def offload(self, keep_weights: bool) -> None:
        """Leave the device."""
        self.strategy.offload(keep_weights)

    def onload(self, weights_only: bool) -> None:
        """Come back to the device."""
        self.strategy.onload(weights_only)

    def open_transfer(self, size: int) -> tuple[str, int]:
        """Start the store through which this rank and those that receive from it form a group of ``size``."""
        self._transfer_store = open_store(size)
        return self._transfer_store.host, self._transfer_store.port

    def join_transfer(self, host: str, port: int, size: int, timeout: float) -> None:
        """Form the group, as its sender."""
        self._end.join(host, port, 0, size, timeout)

    def export_weights(self, dtype: str | None, bucket_bytes: int, way: Way | None) -> Iterator[WeightBucket]:
        """Yield the weights, bucket by bucket.

        With ``handles``, the caller must have done with a bucket before it asks for the next but one, and call
        :meth:`end_transfer` at the end; every rank yields the same tensors. Otherwise rank 0 alone has any.

        Args:
            dtype: rounded to this, as torch names it; ``None``: as they are.
            bucket_bytes: a bucket is closed once it holds as much.
            way: how they travel; ``None``: take part, and send nothing.
        """
        weights = self.strategy.full_weights(dtype, everywhere=way == "handles")
        for tensors in in_buckets(weights, bucket_bytes):
            if way is not None:
                bucket, kept = pack(tensors, way)
                self._sent.append(kept)
                yield bucket
                if way == "group":
                    self._end.broadcast(tensor for _, tensor in tensors)
            # The next bucket is gathered before this name is used again.
            del tensors

    def end_transfer(self) -> None:
        """Let go of what was sent by ``handles``."""
        self._sent.clear()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint."""
        self.strategy.save(folder)

    def load(self, folder: str) -> None:
        """Read this rank's part of a checkpoint."""
        self.strategy.load(folder)

    def export_hf(self, folder: str) -> None:
        """Write the model in Hugging Face format."""
        self.strategy.export_hf(folder)


class CriticWorker(Worker):
    """``critic``: one rank of the value model."""

    def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, max_grad_norm: float, total_updates: int
    ) -> None:
        """Load and shard the model; the process group must exist."""
        tokenizer = load_tokenizer(student, "the student")
        if config.model_args.model_name_or_path != student.model_name_or_path:
            check_same_vocabulary(tokenizer, load_tokenizer(config.model_args, yaml_name), yaml_name)
        self.strategy = build_value_strategy(
            yaml_name,
            config,
            vocabulary_of(tokenizer, student),
            self.device,
            max_grad_norm=max_grad_norm,
            total_updates=total_updates,
        )
        del tokenizer
        give_back_memory()

    def offload(self, keep_weights: bool) -> None:
        """Leave the device."""
        self.strategy.offload(keep_weights)

    def onload(self, weights_only: bool) -> None:
        """Come back to the device."""
        self.strategy.onload(weights_only)

    def values(self, requests: Sequence[ScoreRequest]) -> list[FloatArray]:
        """Value this rank's sequences."""
        return self.strategy.values(requests)

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], value_clip: float | None) -> dict[str, float]:
        """One optimizer step."""
        return self.strategy.train_step(micro_batches, value_clip)

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint."""
        self.strategy.save(folder)

    def load(self, folder: str) -> None:
        """Read this rank's part of a checkpoint."""
        self.strategy.load(folder)

    def export_hf(self, folder: str) -> None:
        """Write the model in Hugging Face format, its head beside it."""
        self.strategy.export_hf(folder)
