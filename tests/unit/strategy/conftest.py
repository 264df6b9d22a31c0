"""Strategies over the tiny models, built once; every test leaves their weights as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary, vocabulary_of
from roll_opd.trajectory import Trajectory, TrajectoryId

VOCAB = 305


@pytest.fixture(scope="session")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models.student)


@pytest.fixture(scope="session")
def vocabulary(tokenizer, tiny_models) -> Vocabulary:
    return vocabulary_of(tokenizer, ModelArguments(tiny_models.student))


@pytest.fixture(scope="session")
def make_strategy(vocabulary) -> Callable[..., HFStrategy]:
    def make(path: str, dtype: str = "fp32", **settings) -> HFStrategy:
        config = WorkerConfig(model_args=ModelArguments(path, dtype=dtype), **settings)
        return HFStrategy("student_infer", config, vocabulary, torch.device("cpu"), generates=True)

    return make


@pytest.fixture(scope="session")
def student(make_strategy, tiny_models) -> HFStrategy:
    """The quickstart's student, tied embeddings, fp32."""
    return make_strategy(tiny_models.student)


@pytest.fixture(scope="session")
def random_strategy(make_strategy, random_model) -> HFStrategy:
    """The random model, untied head with 15 rows of padding, fp32."""
    return make_strategy(random_model)


@pytest.fixture(scope="session")
def plain_student(tiny_models):
    """The student as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(tiny_models.student, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="session")
def plain_random(random_model):
    """The random model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="session")
def sequences() -> list[ScoreRequest]:
    """Sequences of many lengths; in some the response is interrupted, as in multi-turn episodes."""
    rng = np.random.default_rng(8)
    requests = []
    for i, (length, prompt) in enumerate([(2, 1), (40, 7), (9, 8), (17, 3), (5, 1), (33, 20), (12, 4)]):
        mask = np.arange(length) >= prompt
        if i % 2:
            mask &= np.arange(length) % 5 != 0
        tokens = rng.integers(3, VOCAB, length).astype(np.int32)
        requests.append(ScoreRequest(TrajectoryId(i, 0), tokens, mask))
    return requests


# ---- FSDP2 with one rank, in this process --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def fsdp2_config() -> Callable[..., WorkerConfig]:
    """A trainer's or scorer's settings; what is not named is settled so that a step can be compared exactly."""

    def make(path: str, *, model: dict[str, Any] | None = None, fsdp2: dict[str, Any] | None = None,
             training: dict[str, Any] | None = None, **worker: Any) -> WorkerConfig:  # fmt: skip
        steady = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "per_device_train_batch_size": 3}
        return WorkerConfig(
            model_args=ModelArguments(
                path, **({"dtype": "fp32", "disable_gradient_checkpointing": True} | (model or {}))
            ),
            training_args=TrainingArguments(**(steady | (training or {}))),
            strategy_args=StrategyArguments("fsdp2_train", fsdp2 or {}),
            **worker,
        )

    return make


@pytest.fixture(scope="session")
def trained_items(sequences) -> list[Trajectory]:
    """The sequences with random advantages; old log-probabilities are to be added."""
    rng = np.random.default_rng(5)
    return [
        Trajectory(
            id=s.id,
            tag="",
            tokens=s.tokens,
            response_mask=s.response_mask,
            infer_logprobs=np.zeros(len(s.tokens), np.float32),
            weight_version=np.zeros(len(s.tokens), np.int32),
            old_logprobs=np.full(len(s.tokens), -5.0, np.float32),
            advantages=rng.normal(size=len(s.tokens)).astype(np.float32),
            policy_weights=np.full(len(s.tokens), 0.5, np.float32),
        )
        for s in sequences
    ]
