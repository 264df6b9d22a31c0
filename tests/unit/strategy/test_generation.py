"""Decoding: equal to transformers, independent of the batch, ended by the right thing, and handed out early."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling, ScoreRequest
from roll_opd.distributed.strategy.decoding import DecodingLoop
from roll_opd.distributed.strategy.packed_model import decoder_layers
from roll_opd.trajectory import TrajectoryId

VOCAB = 305
PLAIN = Sampling(max_new_tokens=24)
GREEDY = Sampling(max_new_tokens=24, greedy=True)


def request(draw: int, prompt: tuple[int, ...], sampling: Sampling = PLAIN, sample: int = 0) -> GenerateRequest:
    name = TrajectoryId(draw, sample)
    return GenerateRequest(name, prompt, name.seed(5), sampling)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[tuple[int, ...]]:
    texts = ["12+5=", "3*4=", "Compute 7+8-2.", "9", "what is 15-6 and why does it matter?", "1+1=2, so 2+2="]
    return [tuple(tokenizer.encode(text)) for text in texts]


def run(strategy, requests: list[GenerateRequest], stop_ids=(2,), decode=None) -> dict[TrajectoryId, GenerateResult]:
    loop = DecodingLoop(strategy.model, stop_ids, decode or strategy._loop.decode)
    results = list(loop.run(requests, version=3))
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    return {r.id: r for r in results}


def same(a: GenerateResult, b: GenerateResult) -> None:
    assert a.response_ids.tolist() == b.response_ids.tolist()
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.infer_logprobs, b.infer_logprobs, atol=1e-5, rtol=0)
    assert a.sampled_mass == pytest.approx(b.sampled_mass, abs=1e-5)


@pytest.mark.parametrize("which", ["student", "random"])
def test_greedy_equals_transformers(request_models, which, prompts) -> None:
    strategy, plain = request_models(which)
    results = run(strategy, [request(i, p, GREEDY) for i, p in enumerate(prompts)])
    lengths = set()
    for i, prompt in enumerate(prompts):
        tokens = plain.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=list(range(VOCAB, 320)),
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        result = results[TrajectoryId(i, 0)]
        assert result.response_ids.tolist() == tokens
        assert result.finish_reason == ("stop" if tokens[-1] == 2 else "length")
        lengths.add(len(tokens))
    assert which == "random" or len(lengths) > 1, "the trained student should stop at different lengths"


@pytest.fixture
def request_models(student, random_strategy, plain_student, plain_random):
    pairs = {"student": (student, plain_student), "random": (random_strategy, plain_random)}
    return pairs.__getitem__


@pytest.mark.parametrize("which", ["student", "random"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_the_same_request_gives_the_same_tokens_whatever_else_is_in_the_batch(
    request_models, which, options, prompts
) -> None:
    strategy, _ = request_models(which)
    sampling = dataclasses.replace(PLAIN, **options)
    requests = [request(i, p, sampling, k) for i, p in enumerate(prompts) for k in range(3)]
    together = run(strategy, requests)
    reversed_ = run(strategy, requests[::-1])
    assert len({tuple(r.response_ids.tolist()) for r in together.values()}) > len(prompts)
    for one in requests[:: 2 if which == "random" else 1]:
        alone = run(strategy, [one])[one.id]
        same(together[one.id], alone)
        same(reversed_[one.id], alone)


def test_left_padding_does_not_matter(random_strategy, prompts) -> None:
    short, long = request(0, prompts[3]), request(1, tuple(range(5, 5 + 60)))
    assert len(short.prompt_ids) == 1
    same(run(random_strategy, [short, long])[short.id], run(random_strategy, [short])[short.id])


def test_a_group_shares_its_prompt_without_sharing_its_samples(random_strategy, prompts) -> None:
    group = [request(0, prompts[0], PLAIN, k) for k in range(6)]
    together = run(random_strategy, group)
    assert len({tuple(r.response_ids.tolist()) for r in together.values()}) == 6
    for one in group:
        same(together[one.id], run(random_strategy, [one])[one.id])


def test_another_limit_gives_the_same_beginning(random_strategy, prompts) -> None:
    long = run(random_strategy, [request(0, prompts[0])], stop_ids=())
    short = run(random_strategy, [request(0, prompts[0], Sampling(max_new_tokens=7))], stop_ids=())
    name = TrajectoryId(0, 0)
    assert short[name].response_ids.tolist() == long[name].response_ids[:7].tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 10, "top_p": 0.8}, {"greedy": True}])
def test_infer_logprobs_equal_scoring(student, random_strategy, prompts, options) -> None:
    """The untruncated softmax at temperature 1, however the token was drawn."""
    sampling = dataclasses.replace(PLAIN, **options)
    for strategy in (student, random_strategy):
        requests = [request(i, p, sampling) for i, p in enumerate(prompts)]
        results = run(strategy, requests)
        for one in requests:
            result = results[one.id]
            tokens = np.array([*one.prompt_ids, *result.response_ids], dtype=np.int32)
            mask = np.arange(len(tokens)) >= len(one.prompt_ids)
            (scores,) = strategy.score([ScoreRequest(one.id, tokens, mask)])
            np.testing.assert_allclose(result.infer_logprobs, scores.logprobs[mask], atol=1e-4, rtol=0)
            assert (result.weight_version == 3).all() and len(result.weight_version) == mask.sum()


def test_sampled_mass(random_strategy, prompts) -> None:
    name = TrajectoryId(0, 0)
    assert run(random_strategy, [request(0, prompts[0])])[name].sampled_mass == 1.0
    cut = run(random_strategy, [request(0, prompts[0], dataclasses.replace(PLAIN, top_p=0.5))])[name]
    assert 0.5 <= cut.sampled_mass < 1.0
    greedy = run(random_strategy, [request(0, prompts[0], GREEDY)])[name]
    assert greedy.sampled_mass == pytest.approx(float(np.exp(greedy.infer_logprobs).mean()), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 10, "top_p": 0.8}, {"greedy": True}])
def test_top_ids_are_those_of_the_logits(random_strategy, plain_random, prompts, options) -> None:
    """Best first, of the untruncated distribution, at every sampled token; whoever has left the batch by then."""
    sampling = dataclasses.replace(PLAIN, report_top_ids=4, **options)
    requests = [request(i, p, sampling, k) for i, p in enumerate(prompts) for k in range(2)]
    free = run(random_strategy, requests, stop_ids=())
    stops = tuple({int(free[r.id].response_ids[3 * i]) for i, r in enumerate(requests[:4])})
    results = run(random_strategy, requests, stop_ids=stops)
    assert len({len(r.response_ids) for r in results.values()}) > 2
    for one in requests:
        result = results[one.id]
        tokens = torch.tensor([[*one.prompt_ids, *result.response_ids]])
        with torch.no_grad():
            logits = plain_random(input_ids=tokens).logits[0, len(one.prompt_ids) - 1 : -1, :VOCAB]
        assert result.top_ids.shape == (len(result.response_ids), 4) and result.top_ids.dtype == np.int32
        assert result.top_ids.tolist() == logits.topk(4, dim=-1).indices.tolist()
        if options.get("greedy"):
            assert result.top_ids[:, 0].tolist() == result.response_ids.tolist()


def test_top_ids_only_when_asked_for_and_no_more_than_there_are(random_strategy, prompts) -> None:
    name = TrajectoryId(0, 0)
    plain = run(random_strategy, [request(0, prompts[0])])[name]
    assert plain.top_ids is None
    all_of_them = dataclasses.replace(PLAIN, report_top_ids=1000, max_new_tokens=2)
    result = run(random_strategy, [request(0, prompts[0], all_of_them)])[name]
    assert sorted(result.top_ids[1].tolist()) == list(range(VOCAB))
    same(run(random_strategy, [request(0, prompts[0], dataclasses.replace(PLAIN, report_top_ids=3))])[name], plain)


def test_padding_rows_are_never_sampled(random_strategy, prompts, tmp_path) -> None:
    """Even where the model puts nearly all its mass there; the fitting score is over the tokenizer's tokens alone."""
    lm = random_strategy.model.lm
    saved = lm.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            lm.lm_head.weight[VOCAB:] = 1e3 * torch.randn(15, 32, generator=torch.Generator().manual_seed(1))
        for sampling in (PLAIN, GREEDY, dataclasses.replace(PLAIN, temperature=3.0)):
            for result in run(random_strategy, [request(i, p, sampling) for i, p in enumerate(prompts)]).values():
                assert result.response_ids.max() < VOCAB
                assert np.isfinite(result.infer_logprobs).all()
    finally:
        with torch.no_grad():
            lm.lm_head.weight.copy_(saved)


# ---- how a response ends -----------------------------------------------------------------------------------------


def unstopped(strategy, prompt: tuple[int, ...], draw: int = 0) -> list[int]:
    return run(strategy, [request(draw, prompt)], stop_ids=())[TrajectoryId(draw, 0)].response_ids.tolist()


def test_a_stop_id_belongs_to_the_response_and_ends_it(random_strategy, prompts) -> None:
    free = unstopped(random_strategy, prompts[0])
    stop = free[5]
    first = free.index(stop)
    result = run(random_strategy, [request(0, prompts[0])], stop_ids=(stop, 999))[TrajectoryId(0, 0)]
    assert result.response_ids.tolist() == free[: first + 1]
    assert result.finish_reason == "stop"


def test_a_stop_id_that_is_to_be_ignored_is_a_token_like_others(random_strategy, prompts) -> None:
    free = unstopped(random_strategy, prompts[0])
    sampling = dataclasses.replace(PLAIN, ignore_eos=True)
    result = run(random_strategy, [request(0, prompts[0], sampling)], stop_ids=(free[5],))[TrajectoryId(0, 0)]
    assert result.response_ids.tolist() == free
    assert result.finish_reason == "length"


def test_the_limit_cuts(random_strategy, prompts) -> None:
    result = run(random_strategy, [request(0, prompts[0])], stop_ids=())[TrajectoryId(0, 0)]
    assert len(result.response_ids) == 24 and result.finish_reason == "length"


def test_a_stop_on_the_last_token_is_a_stop(random_strategy, prompts) -> None:
    free = unstopped(random_strategy, prompts[0])
    limit = next(i for i in range(3, 24) if free[i] not in free[:i]) + 1
    one = request(0, prompts[0], Sampling(max_new_tokens=limit))
    result = run(random_strategy, [one], stop_ids=(free[limit - 1],))[one.id]
    assert len(result.response_ids) == limit and result.finish_reason == "stop"


@pytest.mark.parametrize("stops", [(), (2,)])
def test_one_new_token(random_strategy, prompts, stops) -> None:
    one_token = Sampling(max_new_tokens=1)
    requests = [request(i, p, one_token, k) for i, p in enumerate(prompts) for k in range(2)]
    for result in run(random_strategy, requests, stop_ids=stops).values():
        assert len(result.response_ids) == len(result.infer_logprobs) == 1
        assert result.finish_reason == ("stop" if result.response_ids[0] in stops else "length")


def test_a_stop_string_spread_over_tokens(random_strategy, prompts) -> None:
    """Found by its text; the response keeps the tokens up to the one that completes it."""
    free = unstopped(random_strategy, prompts[0])

    def decode(ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    # Ends in the middle of one token's text and begins in the middle of another's.
    stop = decode(free[8:11])[2:-2]
    sampling = dataclasses.replace(PLAIN, stop_strings=("never", stop))
    result = run(random_strategy, [request(0, prompts[0], sampling)], stop_ids=(), decode=decode)[TrajectoryId(0, 0)]
    assert result.response_ids.tolist() == free[:11]
    assert result.finish_reason == "stop"


def test_a_stop_string_in_the_prompt_does_not_count(student, tokenizer) -> None:
    prompt = tuple(tokenizer.encode("STOP 1+1="))
    with_stop = request(0, prompt, dataclasses.replace(PLAIN, stop_strings=("STOP",)))
    same(run(student, [with_stop])[with_stop.id], run(student, [request(0, prompt)])[with_stop.id])


def test_stop_strings_with_the_real_tokenizer(student, prompts, tokenizer) -> None:
    free = run(student, [request(0, prompts[2])], stop_ids=())[TrajectoryId(0, 0)].response_ids.tolist()
    text = tokenizer.decode(free)
    stop = text[3:6]
    sampling = dataclasses.replace(PLAIN, stop_strings=(stop,))
    result = run(student, [request(0, prompts[2], sampling)], stop_ids=())[TrajectoryId(0, 0)]
    ended = tokenizer.decode(result.response_ids.tolist())
    assert stop in ended and stop not in tokenizer.decode(result.response_ids.tolist()[:-1])
    assert text.startswith(ended)


# ---- handing out -------------------------------------------------------------------------------------------------


def test_a_short_response_is_handed_out_before_a_long_one_is_finished(random_strategy, prompts) -> None:
    short, long = unstopped(random_strategy, prompts[0], 0), unstopped(random_strategy, prompts[1], 1)
    stop = next(token for token in short[:6] if token not in long)
    loop = DecodingLoop(random_strategy.model, (stop,), random_strategy._loop.decode)
    forwards = 0
    original = loop._forward_one

    def counted(*args):
        nonlocal forwards
        forwards += 1
        return original(*args)

    loop._forward_one = counted
    results: Iterator[GenerateResult] = loop.run([request(1, prompts[1]), request(0, prompts[0])], version=0)
    first = next(results)
    assert first.id == TrajectoryId(0, 0) and forwards == short.index(stop) < 6
    second = next(results)
    # ... and leaving the batch did not disturb the one that stayed.
    assert second.response_ids.tolist() == long and forwards == 23
    assert next(results, None) is None


def test_leaving_the_batch_disturbs_nobody(random_strategy, prompts) -> None:
    """Eight responses that end at different steps, so that the batch shrinks more than once."""
    requests = [request(i, prompts[i % len(prompts)], PLAIN, i) for i in range(8)]
    free = run(random_strategy, requests, stop_ids=())
    stops = {int(free[r.id].response_ids[2 * i]) for i, r in enumerate(requests[:6])}
    ended = run(random_strategy, requests, stop_ids=tuple(stops))
    assert len({len(r.response_ids) for r in ended.values()}) > 2
    for one in requests:
        tokens = free[one.id].response_ids.tolist()
        cut = next((i + 1 for i, token in enumerate(tokens) if token in stops), 24)
        assert ended[one.id].response_ids.tolist() == tokens[:cut]


def test_each_response_of_a_batch_ends_at_its_own_limit(random_strategy, prompts) -> None:
    limits = (5, 24, 1, 9, 24, 5)
    requests = [
        request(i, prompt, dataclasses.replace(PLAIN, max_new_tokens=limit))
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    together = run(random_strategy, requests, stop_ids=())
    for one, limit in zip(requests, limits, strict=True):
        result = together[one.id]
        assert (len(result.response_ids), result.finish_reason) == (limit, "length")
        same(result, run(random_strategy, [one], stop_ids=())[one.id])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_in_fp32_is_applied_to_hidden_states_in_fp32(make_strategy, random_model, prompts, dtype) -> None:
    """Its log-probabilities are those that scoring computes with the same head."""
    strategy = make_strategy(random_model, logits_in_fp32=True, dtype=dtype)
    result = run(strategy, [request(0, prompts[0])], stop_ids=())[TrajectoryId(0, 0)]
    tokens = np.array([*prompts[0], *result.response_ids], np.int32)
    mask = np.arange(len(tokens)) >= len(prompts[0])
    (score,) = strategy.score([ScoreRequest(TrajectoryId(0, 0), tokens, mask)])
    atol = 1e-5 if dtype == "fp32" else 0.1  # hidden states of decoding and of a packed row differ in bf16
    np.testing.assert_allclose(result.infer_logprobs, score.logprobs[mask], atol=atol, rtol=0)


def test_closing_the_stream_ends_the_work(make_strategy, random_model, prompts) -> None:
    strategy = make_strategy(random_model, infer_batch_size=1)
    steps = 0
    original = strategy._loop._draw

    def counted(*args) -> None:
        nonlocal steps
        steps += 1
        original(*args)

    strategy._loop._draw = counted

    async def first_only() -> None:
        results = strategy.generate([request(i, prompts[i % len(prompts)]) for i in range(50)])
        await anext(results)
        await results.aclose()

    asyncio.run(first_only())
    assert strategy._lock.acquire(timeout=60)
    strategy._lock.release()
    assert steps < 25 * 24


async def gather(strategy, requests: list[GenerateRequest]) -> list[GenerateResult]:
    return [result async for result in strategy.generate(requests)]


def test_the_strategy_batches_and_streams(make_strategy, random_model, random_strategy, prompts) -> None:
    """Batches of 4; a change of sampling settings but the limit begins a new one. Nothing of it shows in the tokens."""
    strategy = make_strategy(random_model, infer_batch_size=4)
    requests = [request(i, p, PLAIN, k) for i, p in enumerate(prompts) for k in range(2)]
    requests += [request(20 + i, p, GREEDY) for i, p in enumerate(prompts)]
    results = {r.id: r for r in asyncio.run(gather(strategy, requests))}
    assert sorted(results) == sorted(r.id for r in requests)
    for one in requests:
        same(results[one.id], run(random_strategy, [one])[one.id])
        assert (results[one.id].weight_version == 0).all()
    assert asyncio.run(gather(strategy, [])) == []


def test_an_error_while_generating_reaches_the_caller(make_strategy, random_model, prompts) -> None:
    strategy = make_strategy(random_model)
    bad = request(0, (9999,))
    with pytest.raises(IndexError):
        asyncio.run(gather(strategy, [bad]))
    # and the strategy still works
    assert len(asyncio.run(gather(strategy, [request(1, prompts[0])]))) == 1


def test_lent_threads_are_taken_over_between_two_layers(make_strategy, random_model, prompts) -> None:
    strategy = make_strategy(random_model)
    first, second, *_ = decoder_layers(strategy.model.lm)
    seen: list[int] = []
    told: list[threading.Thread] = []

    def tell(*_: object) -> None:
        if not told:
            seen.append(torch.get_num_threads())
            told.append(threading.Thread(target=strategy.use_threads, args=(2,)))
            told[0].start()
            told[0].join(0.05)
            assert told[0].is_alive(), "nobody has paused yet"

    first.register_forward_pre_hook(tell)
    second.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    strategy.use_threads(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(strategy.score, [ScoreRequest(TrajectoryId(0, 0), np.arange(3, 9), np.arange(6) > 2)]).result()
    told[0].join(5)
    assert not told[0].is_alive()
    assert seen == [1, 2]
