"""Strategies over the tiny models, built once; every test leaves their weights as they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary, vocabulary_of
from roll_opd.trajectory import TrajectoryId

VOCAB = 305


@pytest.fixture(scope="session")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models.student)


@pytest.fixture(scope="session")
def vocabulary(tokenizer, tiny_models) -> Vocabulary:
    return vocabulary_of(tokenizer, ModelArguments(tiny_models.student))


@pytest.fixture(scope="session")
def make_strategy(vocabulary) -> Callable[..., HFStrategy]:
    def make(path: str, **settings) -> HFStrategy:
        config = WorkerConfig(model_args=ModelArguments(path, dtype="fp32"), **settings)
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
