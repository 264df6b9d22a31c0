"""A remote teacher against a real vLLM server: the numbers of the model itself, and what happens when it stops."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.remote import RemoteStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from roll_opd.errors import ConfigError, ModelError, TeacherError
from roll_opd.trajectory import TrajectoryId

pytestmark = pytest.mark.integration

MAX_LENGTH = 100
"""As the server was started for."""
WITHOUT_LAST = 290
"""Ids of the vocabulary but the last 15."""


@pytest.fixture(scope="module")
def vocabulary(tiny_models) -> Vocabulary:
    args = ModelArguments(tiny_models.student)
    return vocabulary_of(load_tokenizer(args, "student"), args)


@pytest.fixture
def connect(vllm_server, vocabulary, monkeypatch) -> Callable[..., RemoteStrategy]:
    monkeypatch.setenv("TEACHER_KEY", vllm_server.key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(vocabulary: Vocabulary = vocabulary, max_length: int = MAX_LENGTH, **settings: Any) -> RemoteStrategy:
        values = {"base_url": vllm_server.url, "api_key_env": "TEACHER_KEY"} | settings
        config = WorkerConfig(strategy_args=StrategyArguments("remote", values))
        return RemoteStrategy("teacher", config, vocabulary, max_length=max_length)

    return make


@pytest.fixture(scope="module")
def hf(tiny_models, vocabulary) -> Callable[[int], HFStrategy]:
    """The same model through the default backend, for a vocabulary of so many ids."""
    torch.set_num_threads(1)

    def make(size: int = vocabulary.size) -> HFStrategy:
        config = WorkerConfig(model_args=ModelArguments(tiny_models.teacher, dtype="fp32"))
        return HFStrategy("teacher", config, replace(vocabulary, size=size), torch.device("cpu"), generates=False)

    return make


@pytest.fixture(scope="module")
def requests() -> list[ScoreRequest]:
    """Short and long ones, some that begin alike, some whose response is interrupted."""
    rng = np.random.default_rng(4)
    common = rng.integers(3, WITHOUT_LAST, MAX_LENGTH).astype(np.int32)
    out = []
    for i, (length, prompt) in enumerate([(2, 1), (90, 40), (MAX_LENGTH, 3), (33, 8), (70, 65), (5, 1), (95, 20)]):
        tokens = rng.integers(3, WITHOUT_LAST, length).astype(np.int32)
        tokens[: length // 2] = common[: length // 2]
        mask = np.arange(length) >= prompt
        out.append(ScoreRequest(TrajectoryId(i, 0), tokens, mask & (np.arange(length) % 7 != 6)))
    return out


@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_the_numbers_of_the_model(connect, hf, requests, top_k):
    want = ScoreWant(top_k=top_k)
    for remote, local in zip(connect().score(requests, want), hf().score(requests, want), strict=True):
        assert (remote.id, remote.checksum) == (local.id, local.checksum)
        np.testing.assert_allclose(remote.logprobs, local.logprobs, atol=1e-4)
        if top_k:
            np.testing.assert_array_equal(remote.details.ids, local.details.ids)
            np.testing.assert_allclose(remote.details.logprobs, local.details.logprobs, atol=1e-4)
            np.testing.assert_allclose(remote.details.tail, local.details.tail, atol=1e-4)


def test_padding_that_shows_is_taken_out(connect, hf, requests, vocabulary, monkeypatch, caplog):
    """To a student with fewer tokens the last ones are padding; where all of it shows the scores are exact."""
    monkeypatch.setattr(RemoteStrategy, "_compare", lambda *_: None)
    strategy = connect(replace(vocabulary, size=WITHOUT_LAST))
    assert "rows of its head that are no tokens" in caplog.text
    ours = strategy.score(requests[:3], ScoreWant(top_k=vocabulary.size))
    theirs = hf(WITHOUT_LAST).score(requests[:3], ScoreWant(top_k=WITHOUT_LAST))
    for remote, local in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(remote.logprobs, local.logprobs, atol=1e-4)
        np.testing.assert_array_equal(remote.details.ids[:, :8], local.details.ids[:, :8])
        np.testing.assert_allclose(remote.details.logprobs[:, :WITHOUT_LAST], local.details.logprobs, atol=1e-4)
        assert (remote.details.ids[:, WITHOUT_LAST:] == -1).all()
        assert (remote.details.tail == -np.inf).all()


def test_the_same_again(connect, requests):
    """Caches of the server do not show."""
    strategy = connect()
    first, again = strategy.score(requests), strategy.score(list(reversed(requests)))
    for a, b in zip(first, reversed(again), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_another_tokenizer_is_refused(connect, vocabulary):
    # 33 and 34 have changed places.
    swapped = replace(vocabulary, decode=lambda ids: vocabulary.decode([{33: 34, 34: 33}.get(i, i) for i in ids]))
    with pytest.raises(ModelError, match=r"vocabularies: the first difference is id 33, '@' for .* and '\?' for"):
        connect(swapped)
    smaller = replace(vocabulary, size=vocabulary.size - 1)
    with pytest.raises(ModelError, match=f"the first difference is id {vocabulary.size - 1}, '' for the student"):
        connect(smaller)
    with pytest.raises(ModelError, match="a response ends with"):
        connect(replace(vocabulary, stop_ids=(7,)))


def test_a_wrong_key_is_refused(connect, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "another")
    with pytest.raises(ConfigError, match=r"api_key_env: .*TEACHER_KEY \(HTTP 401: Unauthorized\)"):
        connect()


def test_what_the_server_was_not_started_for(connect, requests, vocabulary):
    with pytest.raises(ModelError, match=f"--max-model-len {MAX_LENGTH + 2}"):
        connect(max_length=MAX_LENGTH + 1)
    with pytest.raises(TeacherError, match=f"HTTP 400: .*--max-logprobs {vocabulary.size + 1}"):
        connect().score(requests[:1], ScoreWant(top_k=vocabulary.size + 1))


def test_a_server_that_hangs_and_goes_on(connect, requests, vllm_server):
    strategy = connect(timeout=1.0, max_retries=0)
    vllm_server.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="no answer within 1 s"):
            strategy.score(requests)
        assert time.monotonic() - started < 5.0
    finally:
        vllm_server.signal(signal.SIGCONT)
    assert len(connect(timeout=60.0).score(requests)) == len(requests)


@pytest.mark.long
def test_a_server_that_is_killed_and_started_again(connect, requests, vllm_server):
    strategy = connect(max_retries=1)
    before = strategy.score(requests)
    vllm_server.kill()
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"refused.*attempt 2 of 2"):
        strategy.score(requests)
    assert time.monotonic() - started < 10.0
    vllm_server.start()
    for a, b in zip(before, strategy.score(requests), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
