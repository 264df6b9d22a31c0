"""A real vLLM engine on CPU: the same contract as ``hf_infer``, weights that are replaced under it, and its death.

One engine, in fp32, of a tiny model with a tied and padded head. It is started inside an event loop that ends at once,
and started again outside of any.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from roll_opd.algorithms.sampler import sample
from roll_opd.configs import ModelArguments, StrategyArguments, WorkerConfig
from roll_opd.distributed.strategy.base import (
    GenerateRequest,
    GenerateResult,
    Sampling,
    ScoreRequest,
    ScoreWant,
)
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary, vocabulary_of
from roll_opd.distributed.strategy.vllm.strategy import VLLMStrategy
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket, pack
from roll_opd.distributed.weight_sync import _compare
from roll_opd.distributed.worker import open_store
from roll_opd.errors import EngineDiedError, GenerationError, ModelError
from roll_opd.trajectory import TrajectoryId

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "models" / "student"
VOCAB, ROWS, LONGEST = 305, 320, 800
PLAIN = Sampling(max_new_tokens=24)
GREEDY = dataclasses.replace(PLAIN, greedy=True)
CUT = dataclasses.replace(PLAIN, top_k=20, top_p=0.8)
COLD = dataclasses.replace(PLAIN, temperature=0.7, top_p=0.9)
DEATH_SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3 whose padding rows would take most of the probability, were they not masked."""
    folder = tmp_path_factory.mktemp("tied_model")
    config = Qwen3Config(
        vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LONGEST + 1, tie_word_embeddings=True,
        initializer_range=0.15, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(11)
        model = Qwen3ForCausalLM(config).float()
        model.lm_head.weight[VOCAB:] *= 3.0
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_a(folder: str) -> PreTrainedModel:
    """What lies on disk, as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def model_b(model_a: PreTrainedModel) -> PreTrainedModel:
    """What training might have made of it, in every parameter."""
    other = copy.deepcopy(model_a)
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            parameter += (
                0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    return other


@pytest.fixture(scope="module")
def config(folder: str) -> WorkerConfig:
    settings = {"enforce_eager": True}
    return WorkerConfig(
        model_args=ModelArguments(folder, dtype="fp32"), strategy_args=StrategyArguments("vllm", settings)
    )


@pytest.fixture(scope="module")
def vocabulary(config: WorkerConfig) -> Vocabulary:
    return vocabulary_of(AutoTokenizer.from_pretrained(QUICKSTART), config.model_args)


@pytest.fixture(scope="module")
def hf(config: WorkerConfig, vocabulary: Vocabulary) -> HFStrategy:
    return HFStrategy("student_infer", config, vocabulary, torch.device("cpu"), generates=True)


@pytest.fixture(scope="module")
def engine(config: WorkerConfig, vocabulary: Vocabulary) -> Iterator[VLLMStrategy]:
    async def inside_a_loop() -> VLLMStrategy:
        device = torch.device("cpu")
        return VLLMStrategy("student_infer", config, vocabulary, device, generates=True, max_length=LONGEST)

    strategy = asyncio.run(inside_a_loop())
    yield strategy
    strategy.close()


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """Of many lengths; the longer ones fill more than one block of 128 tokens of the prefix cache."""
    random = np.random.default_rng(3)
    return [tuple(random.integers(3, VOCAB, length).tolist()) for length in (1, 5, 17, 130, 300)]


def request(draw: int, prompt: Sequence[int], sampling: Sampling = PLAIN, member: int = 0) -> GenerateRequest:
    name = TrajectoryId(draw, member)
    return GenerateRequest(name, tuple(prompt), name.seed(5), sampling)


def run(strategy: VLLMStrategy | HFStrategy, requests: list[GenerateRequest]) -> dict[TrajectoryId, GenerateResult]:
    async def gather() -> list[GenerateResult]:
        return [result async for result in strategy.generate(requests)]

    results = asyncio.run(gather())
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    return {r.id: r for r in results}


@torch.no_grad()
def logits_of(lm: PreTrainedModel, one: GenerateRequest, result: GenerateResult) -> torch.Tensor:
    """``[n, 305]``, from which each token of the response was drawn."""
    tokens = torch.tensor([[*one.prompt_ids, *result.response_ids.tolist()]])
    return lm(input_ids=tokens).logits[0, len(one.prompt_ids) - 1 : -1, :VOCAB]


def logprobs_of(lm: PreTrainedModel, one: GenerateRequest, result: GenerateResult) -> np.ndarray:
    ids = torch.from_numpy(result.response_ids.astype(np.int64))
    return logits_of(lm, one, result).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1).numpy()


def check_against(lm: PreTrainedModel, requests: list[GenerateRequest], results: dict, version: int) -> None:
    for one in requests:
        result = results[one.id]
        np.testing.assert_allclose(result.infer_logprobs, logprobs_of(lm, one, result), atol=1e-5, rtol=0)
        assert (result.weight_version == version).all() and len(result.weight_version) == len(result.response_ids)


def entries_of(lm: PreTrainedModel) -> list[tuple[list[str], torch.Tensor]]:
    """All names, tied ones twice."""
    return [([name], p.detach().clone()) for name, p in lm.named_parameters(remove_duplicate=False)]


def buckets_of(lm: PreTrainedModel, per_bucket: int = 3) -> list[WeightBucket]:
    """Cut through fused layers, as read-only bytes."""
    entries = entries_of(lm)
    buckets = [pack(entries[i : i + per_bucket], "host")[0] for i in range(0, len(entries), per_bucket)]
    for bucket in buckets:
        for raw in bucket.raw:
            raw.setflags(write=False)
    return buckets


def update(strategy: VLLMStrategy, lm: PreTrainedModel, version: int) -> None:
    sent: dict[str, int] = {}
    strategy.begin_weight_update(version)
    for bucket in buckets_of(lm):
        sent |= strategy.load_weights(bucket)
    held = strategy.finish_weight_update(version)
    _compare(sent, held, "student_infer-0", version)
    assert held.keys() == sent.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}


def engine_process() -> psutil.Process:
    # Not of all descendants: other tests' vLLM server lives until the session ends.
    (core,) = [p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline())]
    return core


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        GREEDY,
        CUT,
        COLD,
        dataclasses.replace(PLAIN, temperature=1.7),
    ],
    ids=["plain", "greedy", "cut", "cold and cut", "hot"],
)
def test_what_is_reported_is_the_untruncated_distribution(engine, model_a, prompts, sampling) -> None:
    """Of the checkpoint, over the tokenizer's ids alone; and how much of it the sampling kept."""
    sampling = dataclasses.replace(sampling, report_top_ids=4)
    measured = [dataclasses.replace(cut, report_top_ids=4) for cut in (CUT, COLD)]
    requests = [request(i, p, sampling, k) for i, p in enumerate(prompts) for k in range(2)]
    results = run(engine, requests)
    check_against(model_a, requests, results, version=0)
    for one in requests:
        result, logits = results[one.id], logits_of(model_a, one, results[one.id])
        assert (
            result.response_ids.max() < VOCAB and result.response_ids.dtype == result.weight_version.dtype == np.int32
        )
        assert result.top_ids.dtype == np.int32 and result.infer_logprobs.dtype == np.float32
        assert result.top_ids.tolist() == logits.topk(4, dim=-1).indices.tolist()
        if sampling.greedy:
            assert result.response_ids.tolist() == logits.argmax(-1).tolist()
            kept = torch.exp(logits.log_softmax(-1).amax(-1))
        else:
            cuts = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            kept = sample(logits, torch.zeros(len(logits)), **cuts)[2]
        if one.id.sample and sampling in measured:  # it costs too much to be asked of every response
            assert np.isnan(result.sampled_mass)
        else:
            exact = sampling.temperature == 1.0 or sampling.top_p == 1.0
            assert result.sampled_mass == pytest.approx(float(kept.mean()), abs=1e-5 if exact else 0.02)


def test_greedy_equals_hf_infer(engine, hf, prompts) -> None:
    requests = [request(i, p, GREEDY) for i, p in enumerate(prompts)]
    theirs, ours = run(hf, requests), run(engine, requests)
    for name, result in ours.items():
        assert result.response_ids.tolist() == theirs[name].response_ids.tolist()
        assert result.finish_reason == theirs[name].finish_reason
        assert result.top_ids is None


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(engine, prompts, sampling) -> None:
    requests = [request(i, p, sampling, k) for i, p in enumerate(prompts) for k in range(3)]
    together, backwards = run(engine, requests), run(engine, requests[::-1])
    assert len({tuple(r.response_ids.tolist()) for r in together.values()}) > 2 * len(prompts)
    for one in requests[::4]:
        alone = run(engine, [one])[one.id].response_ids.tolist()
        assert together[one.id].response_ids.tolist() == backwards[one.id].response_ids.tolist() == alone


@pytest.mark.parametrize(
    "sampling", [PLAIN, dataclasses.replace(PLAIN, temperature=0.8, top_p=0.7)], ids=["plain", "cut"]
)
def test_tokens_follow_the_distribution(engine, model_a, prompts, sampling) -> None:
    """Pearson's statistic over the tokens that are expected five times or more, a tenth above its mean at most."""
    count = 2000
    sampling = dataclasses.replace(sampling, max_new_tokens=1)
    requests = [request(0, prompts[2], sampling, k) for k in range(count)]
    tokens = np.array([int(r.response_ids[0]) for r in run(engine, requests).values()])
    with torch.no_grad():
        logits = model_a(input_ids=torch.tensor([prompts[2]])).logits[0, -1, :VOCAB] / sampling.temperature
    probs, order = logits.softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0.0
    expected = torch.zeros(VOCAB).scatter(0, order, count * probs / probs.sum()).numpy()
    seen = np.bincount(tokens, minlength=VOCAB)
    assert not seen[expected == 0].any()
    often = expected >= 5
    assert often.sum() > 20
    assert ((seen - expected) ** 2 / np.maximum(expected, 1e-9))[often].sum() / often.sum() < 1.4


def test_how_a_response_ends(engine, prompts, monkeypatch) -> None:
    """As in ``hf_infer``: what ends it belongs to it; a text counts once it is there, wherever tokens begin and end."""

    def result(sampling: Sampling, stop_ids: tuple[int, ...] = ()) -> GenerateResult:
        vocabulary = dataclasses.replace(engine.vocabulary, stop_ids=stop_ids, decode=decode)
        monkeypatch.setattr(engine, "vocabulary", vocabulary)
        one = request(0, prompts[2], sampling)
        return run(engine, [one])[one.id]

    def decode(ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    free = result(PLAIN).response_ids.tolist()
    assert len(free) == 24 and result(PLAIN).finish_reason == "length"
    last = next(i for i in range(5, 24) if free[i] not in free[:i])
    stopped = result(PLAIN, (999, free[last]))
    assert stopped.response_ids.tolist() == free[: last + 1] and stopped.finish_reason == "stop"
    at_the_limit = result(dataclasses.replace(PLAIN, max_new_tokens=last + 1), (free[last],))
    assert at_the_limit.response_ids.tolist() == free[: last + 1] and at_the_limit.finish_reason == "stop"
    text = decode(free[8:11])[2:-2]
    by_text = result(dataclasses.replace(PLAIN, stop_strings=("never", text), report_top_ids=2))
    assert by_text.response_ids.tolist() == free[:11] and by_text.finish_reason == "stop"
    assert len(by_text.top_ids) == len(by_text.infer_logprobs) == len(by_text.weight_version) == 11
    in_the_prompt = dataclasses.replace(PLAIN, stop_strings=(decode(list(prompts[2][:2])),))
    assert result(in_the_prompt).response_ids.tolist() == free


def test_results_come_as_they_finish_and_closing_aborts_the_rest(engine, prompts) -> None:
    lengths = {0: 500, 1: 4, 2: 500, 3: 60}
    requests = [request(i, prompts[2], Sampling(max_new_tokens=n)) for i, n in lengths.items()]
    monkeypatched = dataclasses.replace(engine.vocabulary, stop_ids=())

    async def two() -> list[int]:
        async with contextlib.aclosing(engine.generate(requests)) as results:
            return [(await anext(results)).id.draw for _ in range(2)]

    before, engine.vocabulary = engine.vocabulary, monkeypatched
    try:
        assert asyncio.run(two()) == [1, 3]
    finally:
        engine.vocabulary = before
    deadline = time.monotonic() + 5.0
    while engine._engine.llm.output_processor.has_unfinished_requests():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run(engine, []) == {}


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((5, VOCAB), PLAIN, "beyond the vocabulary"),
        ((), PLAIN, "empty"),
        ((5,) * (LONGEST - 20), PLAIN, "max_model_len"),
        ((5,), dataclasses.replace(PLAIN, temperature=2.5), "temperatures from"),
        ((5,), dataclasses.replace(PLAIN, temperature=0.001), "temperatures from"),
        ((5,), dataclasses.replace(PLAIN, top_p=-1.0), "vLLM refuses request.*top_p"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_hurts_nobody_else(engine, prompts, prompt, sampling, message) -> None:
    with pytest.raises(GenerationError, match=message):
        run(engine, [request(0, prompt, sampling)])
    run(engine, [request(1, prompts[0])])


# ---- scoring ---------------------------------------------------------------------------------------------------------


def test_scores_equal_those_of_hf_infer(engine, hf) -> None:
    random = np.random.default_rng(8)
    requests = []
    for i, (length, prompt) in enumerate([(2, 1), (400, 7), (33, 20), (LONGEST, 4)]):
        mask = np.arange(length) >= prompt
        mask &= np.arange(length) % 5 != 0
        requests.append(ScoreRequest(TrajectoryId(i, 0), random.integers(3, VOCAB, length).astype(np.int32), mask))
    for want in (ScoreWant(), ScoreWant(top_k=6)):
        for ours, theirs in zip(engine.score(requests, want), hf.score(requests, want), strict=True):
            assert (ours.id, ours.checksum) == (theirs.id, theirs.checksum)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
            if want.top_k:
                np.testing.assert_array_equal(ours.details.ids, theirs.details.ids)
                np.testing.assert_allclose(ours.details.logprobs, theirs.details.logprobs, atol=1e-5, rtol=0)
                np.testing.assert_allclose(ours.details.tail, theirs.details.tail, atol=1e-4, rtol=0)
    assert engine.score([]) == []


def test_what_an_engine_cannot_do_is_said(engine) -> None:
    long = ScoreRequest(TrajectoryId(0, 0), np.full(LONGEST + 1, 5, np.int32), np.arange(LONGEST + 1) > 3)
    with pytest.raises(ModelError, match="max_model_len"):
        engine.score([long])
    for want in (ScoreWant(given=True), ScoreWant(hidden=True)):
        with pytest.raises(ModelError, match="student_infer"):
            engine.score([], want)
    for impossible in (engine.head, lambda: engine.save_model("x"), lambda: engine.load_model("x")):
        with pytest.raises(ModelError, match="hf_infer"):
            impossible()
    with pytest.raises(GenerationError, match="moving average"):
        engine.begin_weight_update(1, mix=0.5)
    engine.offload()  # there is nowhere to go without CUDA
    engine.onload()
    assert engine.weight_dtype() == "float32"


# ---- weight updates --------------------------------------------------------------------------------------------------


def test_there_and_back_again(engine, model_a, model_b, prompts) -> None:
    """Equal to a fresh model each time. The long prompt is in the prefix cache from the round before."""
    requests = [request(i, p) for i, p in enumerate(prompts)]
    for version, lm in enumerate((model_b, model_a, model_b, model_a), start=1):
        update(engine, lm, version)
        check_against(lm, requests, run(engine, requests), version)
    tokens = np.array(prompts[4], dtype=np.int32)
    (score,) = engine.score([ScoreRequest(TrajectoryId(0, 0), tokens, np.arange(300) > 0)])
    with torch.no_grad():
        logprobs = model_a(input_ids=torch.tensor([prompts[4]])).logits[0, :-1, :VOCAB].log_softmax(-1)
    np.testing.assert_allclose(score.logprobs[1:], logprobs[range(299), tokens[1:].tolist()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["handles", "group"])
def test_weights_that_do_not_come_as_bytes(engine, model_a, model_b, prompts, way) -> None:
    """A trainer on the same device, whose memory the engine opens, or one in a process group with the engine."""
    requests = [request(4, prompts[4])]
    sender = TransferEnd(torch.device("cpu"))
    if way == "group":
        assert engine.receivers() == 1
        store = open_store(2)
        with ThreadPoolExecutor(1) as thread:
            joining = thread.submit(engine.join_transfer, store.host, store.port, 1, 2, 60.0)
            sender.join(store.host, store.port, 0, 2, 60.0)
            joining.result()
    for version, lm in ((5, model_b), (6, model_a)):
        engine.begin_weight_update(version)
        sent: dict[str, int] = {}
        entries = entries_of(lm)
        for some in (entries[:7], entries[7:]):
            bucket, kept = pack(some, way)
            with ThreadPoolExecutor(1) as thread:
                loading = thread.submit(engine.load_weights, bucket)
                if way == "group":
                    sender.broadcast(tensor for _, tensor in some)
                sent |= loading.result()
            del kept
        _compare(sent, engine.finish_weight_update(version), "student_infer-0", version)
        check_against(lm, requests, run(engine, requests), version)


def test_responses_in_flight_go_on_with_the_new_weights(engine, model_a, model_b, prompts) -> None:
    update(engine, model_a, 10)
    engine_stops, engine.vocabulary = engine.vocabulary, dataclasses.replace(engine.vocabulary, stop_ids=())
    short = request(0, prompts[2], Sampling(max_new_tokens=10))
    long = [request(i, prompts[4], Sampling(max_new_tokens=400, report_top_ids=2)) for i in range(1, 5)]

    async def updated_meanwhile() -> dict[TrajectoryId, GenerateResult]:
        results: AsyncIterator[GenerateResult] = engine.generate([short, *long])
        first = await anext(results)
        await asyncio.to_thread(update, engine, model_b, 11)
        return {r.id: r for r in [first, *[result async for result in results]]}

    try:
        results = asyncio.run(updated_meanwhile())
    finally:
        engine.vocabulary = engine_stops
    check_against(model_a, [short], results, 10)
    for one in long:
        result = results[one.id]
        new = result.weight_version == 11
        split = int(new.argmax())
        assert 10 <= split < 390 and new[split:].all() and (result.weight_version[:split] == 10).all()
        before, after = logprobs_of(model_a, one, result), logprobs_of(model_b, one, result)
        np.testing.assert_allclose(result.infer_logprobs, np.where(new, after, before), atol=1e-5, rtol=0)
        assert np.abs(before - after).max() > 0.1
        best = torch.where(torch.from_numpy(new)[:, None], *(
            logits_of(lm, one, result).topk(2, dim=-1).indices for lm in (model_b, model_a)
        ))  # fmt: skip
        assert result.top_ids.tolist() == best.tolist()


def test_what_was_not_sent_is_named_and_not_served(engine, model_a, model_b, prompts) -> None:
    """A tied head that is not the embedding, a layer's norm that never came, a part of a fused layer likewise."""
    entries = [(name, tensor) for (name,), tensor in entries_of(model_b)]

    def held_after(entries: list) -> tuple[dict[str, int], dict[str, int]]:
        bucket, _ = pack([([name], tensor) for name, tensor in entries], "host")
        engine.begin_weight_update(20)
        sent = engine.load_weights(bucket)
        return sent, dict(engine.finish_weight_update(20))

    other_head = [(n, torch.zeros_like(t) if n == "lm_head.weight" else t) for n, t in entries]
    with pytest.raises(GenerationError, match=r"other values than were sent in \['lm_head\.weight'\]"):
        _compare(*held_after(other_head), "student_infer-0", 20)
    with pytest.raises(GenerationError, match="no weights that could be served"):
        run(engine, [request(0, prompts[0])])
    for left_out, named in {
        "model.layers.1.post_attention_layernorm.weight": "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.qkv_proj.weight",
    }.items():
        sent, held = held_after([entry for entry in entries if entry[0] != left_out])
        with pytest.raises(GenerationError, match=re.escape(f"were not sent: ['{named}']")):
            _compare(sent, held, "student_infer-0", 20)
    update(engine, model_a, 21)
    check_against(model_a, requests := [request(4, prompts[4])], run(engine, requests), 21)


# ---- death -----------------------------------------------------------------------------------------------------------


def test_death_while_sampling(engine, model_a, model_b, prompts) -> None:
    """What had finished stands; the rest is told within seconds; a new engine serves when it has the weights again."""
    update(engine, model_a, 30)
    requests = [request(0, prompts[0], Sampling(max_new_tokens=4))]
    requests += [request(i, prompts[0], Sampling(max_new_tokens=700)) for i in range(1, 5)]
    results: list[GenerateResult] = []
    killed: list[float] = []

    async def die() -> None:
        async for result in engine.generate(requests):
            results.append(result)
            if not killed:
                engine_process().kill()
                killed.append(time.monotonic())

    with pytest.raises(EngineDiedError, match="student_infer"):
        asyncio.run(die())
    assert time.monotonic() - killed[0] < DEATH_SECONDS
    assert results[0].id == requests[0].id and len(results) < len(requests)
    check_against(model_a, [requests[0]], {results[0].id: results[0]}, 30)
    with pytest.raises(EngineDiedError):
        engine.begin_weight_update(31)
    engine.restart()
    with pytest.raises(GenerationError, match="no weights that could be served"):
        run(engine, [request(1, prompts[0])])
    update(engine, model_b, 31)
    check_against(model_b, requests := [request(4, prompts[4])], run(engine, requests), 31)


def test_death_during_a_weight_update(engine, model_a, model_b, prompts) -> None:
    """Of a call that is under way, which vLLM would wait for without end."""
    update(engine, model_a, 40)
    buckets = buckets_of(model_b)
    engine.begin_weight_update(41)
    for name in ("model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"):  # unknown; of another shape
        with pytest.raises(GenerationError, match="student_infer"):
            engine.load_weights(pack([([name], torch.ones(64))], "host")[0])
    core = engine_process()
    core.suspend()
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(engine.load_weights, buckets[0])
        with pytest.raises(TimeoutError):
            loading.result(1.0)
        core.kill()
        began = time.monotonic()
        with pytest.raises(EngineDiedError, match="student_infer"):
            loading.result()
        assert time.monotonic() - began < DEATH_SECONDS
    with pytest.raises(EngineDiedError):
        engine.finish_weight_update(41)
    engine.restart()
    update(engine, model_b, 41)
    check_against(model_b, requests := [request(4, prompts[4])], run(engine, requests), 41)
