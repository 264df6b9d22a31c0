"""The chunked head against the naive one, in value and in gradient."""

from __future__ import annotations

import math

import pytest
import torch

from roll_opd.algorithms.token_logprobs import chunked_token_logprobs

TOKENS, HIDDEN, VOCAB = 11, 6, 17


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    head = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    return hidden, head, bias, torch.randint(VOCAB, (TOKENS,), generator=generator)


def naive(hidden, head, targets, bias=None, soft_cap=None):
    logits = hidden @ head.T + (0 if bias is None else bias)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logprobs = logits.log_softmax(-1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1)


def test_by_hand() -> None:
    # logits (ln 1, ln 2, ln 5) give probabilities 1/8, 1/4, 5/8
    head = torch.tensor([[math.log(1)], [math.log(2)], [math.log(5)]])
    logprobs, entropy = chunked_token_logprobs(torch.ones(3, 1), head, torch.tensor([0, 1, 2]))
    assert logprobs.exp().tolist() == pytest.approx([1 / 8, 1 / 4, 5 / 8])
    assert entropy.tolist() == pytest.approx([math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)] * 3)


@pytest.mark.parametrize("chunk", [1, 4, 11, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_chunked_equals_naive_in_value_and_gradient(chunk: int, with_bias: bool, soft_cap: float | None) -> None:
    hidden, head, bias, targets = inputs()
    weights = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(4))
    results = []
    for chunked in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, head, bias)]
        b = leaves[2] if with_bias else None
        if chunked:
            logprobs, entropy = chunked_token_logprobs(
                leaves[0], leaves[1], targets, bias_V=b, soft_cap=soft_cap, chunk_tokens=chunk
            )
        else:
            logprobs, entropy = naive(leaves[0], leaves[1], targets, b, soft_cap)
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), *(x.grad for x in leaves if x.grad is not None)])
    assert len(results[0]) == len(results[1]) == (5 if with_bias else 4)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_no_grad_gives_the_same_values() -> None:
    hidden, head, _, targets = inputs()
    with_grad = chunked_token_logprobs(hidden.requires_grad_(), head, targets, chunk_tokens=3)
    with torch.no_grad():
        without = chunked_token_logprobs(hidden, head, targets, chunk_tokens=3)
    assert not without[0].requires_grad and with_grad[0].requires_grad
    assert torch.equal(with_grad[0], without[0]) and torch.equal(with_grad[1], without[1])


def test_the_softmax_is_fp32_for_bf16_inputs() -> None:
    hidden, head, _, targets = inputs(torch.bfloat16)
    logprobs, entropy = chunked_token_logprobs(hidden, head, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = (hidden @ head.T).float().log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)


def test_no_tokens_still_takes_part_in_the_backward_pass() -> None:
    hidden, head, _, targets = inputs()
    hidden, head = hidden[:0].requires_grad_(), head.requires_grad_()
    logprobs, entropy = chunked_token_logprobs(hidden, head, targets[:0])
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert head.grad is not None and head.grad.abs().max() == 0


def test_large_logits_do_not_overflow() -> None:
    head = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    logprobs, entropy = chunked_token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 1]))
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    logprobs.sum().backward()
    assert torch.isfinite(head.grad).all()
