"""The worker of each model role: thin, it holds a strategy and passes calls on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
    TrainItem,
    WeightBucket,
)
from roll_opd.distributed.strategy.factory import build_infer_strategy, build_train_strategy
from roll_opd.distributed.strategy.tokenizer import load_tokenizer, vocabulary_of
from roll_opd.distributed.worker import Worker


class InferWorker(Worker):
    """``actor_infer`` and the teachers: samples and scores. An async actor; the model works in a thread."""

    async def setup(self, yaml_name: str, config: WorkerConfig, student: ModelArguments, generates: bool) -> None:
        """Load the model; ``student`` names the tokenizer that everybody uses."""
        vocabulary = vocabulary_of(load_tokenizer(student, yaml_name), student)
        self.strategy = build_infer_strategy(yaml_name, config, vocabulary, self.device, generates=generates)

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """Yield responses as they finish."""
        async for result in self.strategy.generate(requests):
            yield result

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score sequences, in their order."""
        return await asyncio.to_thread(self.strategy.score, requests)

    async def weight_dtype(self) -> str:
        """Precision in which weights are held here."""
        return self.strategy.weight_dtype()

    async def begin_weight_update(self, version: int) -> None:
        """Stop serving."""
        await asyncio.to_thread(self.strategy.begin_weight_update, version)

    async def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over a bucket; return the checksums of what was received."""
        return await asyncio.to_thread(self.strategy.load_weights, bucket)

    async def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """Serve again; return the checksums of what is held."""
        return await asyncio.to_thread(self.strategy.finish_weight_update, version)


class TrainWorker(Worker):
    """``actor_train``: one rank of the trainer."""

    def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, max_grad_norm: float, total_updates: int
    ) -> None:
        """Load and shard the model; the process group must exist."""
        vocabulary = vocabulary_of(load_tokenizer(student, yaml_name), student)
        self.strategy = build_train_strategy(
            yaml_name, config, vocabulary, self.device, max_grad_norm=max_grad_norm, total_updates=total_updates
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score this rank's sequences."""
        return self.strategy.score(requests)

    def train_step(self, micro_batches: Sequence[Sequence[TrainItem]], loss: PolicyLoss) -> dict[str, float]:
        """One optimizer step."""
        return self.strategy.train_step(micro_batches, loss)

    def export_weights(self, dtype: str | None, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield the weights, bucket by bucket."""
        yield from self.strategy.export_weights(dtype, bucket_bytes)

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint."""
        self.strategy.save(folder)

    def load(self, folder: str) -> None:
        """Read this rank's part of a checkpoint."""
        self.strategy.load(folder)

    def export_hf(self, folder: str) -> None:
        """Write the model in Hugging Face format."""
        self.strategy.export_hf(folder)
