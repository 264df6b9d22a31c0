"""The chunked head against a naive fp64 implementation and autograd, for every divergence and support."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roll_opd.algorithms.chunked_head import (
    CHUNK_TOKENS,
    FullTarget,
    Head,
    HeadOutputs,
    SupportTarget,
    head_outputs,
    support_scores,
    tail_logprob,
)
from roll_opd.algorithms.divergences import DIVERGENCES, bucket_divergence, policy_gradient_score
from roll_opd.algorithms.projection import VocabShard, chunk_rows

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, K = 7, 5, 6, 13, 4
SUPPORTS = ("full", "teacher_topk", "student_topk", "union")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def student(soft_cap: float | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head, Tensor]:
    head = Head(normal(VOCAB, HIDDEN, seed=1, dtype=dtype), normal(VOCAB, seed=2, dtype=dtype), soft_cap)
    targets = torch.randint(VOCAB, (TOKENS,), generator=rng(3))
    return normal(TOKENS, HIDDEN, seed=0, dtype=dtype), head, targets


def teacher(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head]:
    head = Head(normal(VOCAB, TEACHER_HIDDEN, seed=5, dtype=dtype), normal(VOCAB, seed=6, dtype=dtype), 4.0)
    return normal(TOKENS, TEACHER_HIDDEN, seed=4, dtype=dtype), head


def naive_logprobs(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight_VH.T + (0 if head.bias_V is None else head.bias_V)
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits.log_softmax(-1)


def naive_divergence(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """From the definition; finite log-probabilities only."""
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return {
        "reverse_kl": p.exp() * (p - q),
        "forward_kl": q.exp() * (q - p),
        "jsd": beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m),
    }[name].sum(-1)


def naive(hidden: Tensor, head: Head, targets: Tensor, divergences: list[FullTarget | SupportTarget]) -> HeadOutputs:
    logprobs = naive_logprobs(hidden, head)
    values = []
    for target in divergences:
        rows = torch.arange(len(targets)) if target.rows_m is None else target.rows_m
        value = torch.zeros(len(targets), dtype=hidden.dtype)
        for i, row in enumerate(rows.tolist()):
            p = logprobs[row]
            if isinstance(target, FullTarget):
                buckets = p, naive_logprobs(target.hidden_mH[i], target.head)
            else:
                ids = target.ids_mK[i]
                kept = ids >= 0
                inside = torch.zeros(len(p), dtype=torch.bool).index_fill(0, ids[kept], True)
                buckets = p[ids[kept]], target.logprobs_mK[i][kept]
                if target.tail_m is not None and not inside.all():
                    buckets = (
                        torch.cat([buckets[0], p[~inside].logsumexp(0)[None]]),
                        torch.cat([buckets[1], target.tail_m[i][None]]),
                    )
            value = value.index_add(0, torch.tensor([row]), naive_divergence(target.divergence, *buckets, 0.3)[None])
        values.append(value)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return HeadOutputs(logprobs[torch.arange(len(targets)), targets], entropy, tuple(values))


def build(support: str, divergence: str, rows: Tensor | None = None, tail: bool = True) -> FullTarget | SupportTarget:
    """A target of the kind named, for the rows named."""
    hidden, head = teacher()
    if rows is not None:
        hidden = hidden[rows]
    if support == "full":
        return FullTarget(divergence, hidden, head, 0.3, rows)
    own = naive_logprobs(*student()[:2]).topk(K, -1).indices
    given = None if support == "teacher_topk" else own if rows is None else own[rows]
    top_k = 0 if support == "student_topk" else K
    _, ids, logprobs, tail_n = support_scores(hidden, head, torch.zeros(len(hidden), dtype=torch.long), top_k, given)
    assert ids is not None and logprobs is not None
    return SupportTarget(divergence, ids, logprobs, tail_n if tail else None, 0.3, rows)


def run(
    compute, hidden: Tensor, head: Head, targets: Tensor, divergences: list, upstream: Tensor, **kwargs: int
) -> list[Tensor]:
    """All values and the gradients of their weighted sum with respect to hidden states, weight and bias."""
    assert head.bias_V is not None
    leaves = [x.clone().requires_grad_() for x in (hidden, head.weight_VH, head.bias_V)]
    out = compute(leaves[0], Head(leaves[1], leaves[2], head.soft_cap), targets, divergences, **kwargs)
    values = [out.logprobs_n, out.entropy_n, *out.divergences]
    loss = sum((w * v).sum() for w, v in zip(upstream, values, strict=True) if w.abs().max() > 0)
    return [v.detach() for v in values] + list(torch.autograd.grad(loss, leaves))


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
def test_value_and_gradient_are_naive(support: str, divergence: str, soft_cap: float | None, chunk: int) -> None:
    inputs, upstream = student(soft_cap), normal(3, TOKENS, seed=8)
    upstream[:2] = 0  # the divergence alone
    targets = [build(support, divergence)]
    expected = run(naive, *inputs, targets, upstream)
    assert all(x.norm() > 0.01 for x in expected)
    assert_same(run(head_outputs, *inputs, targets, upstream, chunk_tokens=chunk), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS[1:])
def test_without_a_tail_the_sum_is_over_the_set(support: str, divergence: str) -> None:
    upstream, targets = normal(3, TOKENS, seed=8), [build(support, divergence, tail=False)]
    expected = run(naive, *student(), targets, upstream)
    assert_same(run(head_outputs, *student(), targets, upstream, chunk_tokens=3), expected)


@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(
    "supports", [("full", "full"), ("full", "union"), ("teacher_topk", "full"), ("union", "union")]
)
@pytest.mark.parametrize("rows", [(None, [5, 0, 3]), ([6], [1, 2, 4]), ([0, 1, 2], None), ([4, 2], [])])
def test_several_teachers_and_all_upstream_gradients(supports, rows, soft_cap: float | None, chunk: int) -> None:
    """Logprob, entropy and two divergences at once; each teacher covers its own rows, in any order."""
    targets = [
        build(support, divergence, None if r is None else torch.tensor(r, dtype=torch.long))
        for support, divergence, r in zip(supports, ("jsd", "reverse_kl"), rows, strict=True)
    ]
    upstream = normal(4, TOKENS, seed=9)
    expected = run(naive, *student(soft_cap), targets, upstream)
    got = run(head_outputs, *student(soft_cap), targets, upstream, chunk_tokens=chunk)
    assert_same(got, expected)
    for value, r in zip(got[2:4], rows, strict=True):
        assert ((value != 0).nonzero().flatten().tolist()) == (list(range(TOKENS)) if r is None else sorted(r))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 1], [1, 2]])
def test_outputs_that_no_loss_uses_cost_no_gradient(used: list[int]) -> None:
    upstream = normal(3, TOKENS, seed=10)
    for i in {0, 1, 2} - set(used):
        upstream[i] = 0
    targets = [build("full", "reverse_kl")]
    expected = run(naive, *student(), targets, upstream)
    assert_same(run(head_outputs, *student(), targets, upstream, chunk_tokens=2), expected)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_what_asks_for_a_gradient_gets_one(wanted: tuple[bool, bool, bool]) -> None:
    hidden, head, targets = student()
    assert head.bias_V is not None
    leaves = [x.requires_grad_(want) for x, want in zip((hidden, head.weight_VH, head.bias_V), wanted, strict=True)]
    t_hidden, t_head = teacher()
    target = FullTarget("jsd", t_hidden.requires_grad_(), replace(t_head, weight_VH=t_head.weight_VH.requires_grad_()))
    head_outputs(hidden, head, targets, [target], chunk_tokens=3).divergences[0].sum().backward()
    assert tuple(x.grad is not None for x in leaves) == wanted
    assert t_hidden.grad is None and target.head.weight_VH.grad is None


def test_by_hand() -> None:
    # Student (1/8, 1/4, 5/8), teacher (1/2, 1/4, 1/4):
    # KL(p||q) = 1/8 log(1/4) + 5/8 log(5/2); KL(q||p) = 1/2 log 4 + 1/4 log(2/5).
    def head(*masses: float) -> Head:
        return Head(torch.tensor([[math.log(m)] for m in masses]))

    one = torch.ones(1, 1)
    targets = [FullTarget(d, one, head(2, 1, 1)) for d in ("reverse_kl", "forward_kl")]
    # Support {0} and the rest: P = (1/8, 7/8), Q = (1/2, 1/2).
    half = torch.tensor([math.log(0.5)])
    support = SupportTarget("reverse_kl", torch.tensor([[0, -1]]), torch.stack([half, half], 1), half)
    out = head_outputs(one, head(1, 2, 5), torch.tensor([2]), [*targets, support])
    reverse, forward, coarse = (x.item() for x in out.divergences)
    assert out.logprobs_n.item() == pytest.approx(math.log(5 / 8))
    assert out.entropy_n.item() == pytest.approx(math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5))
    assert reverse == pytest.approx(math.log(1 / 4) / 8 + 5 / 8 * math.log(5 / 2))
    assert forward == pytest.approx(math.log(4) / 2 + math.log(2 / 5) / 4)
    assert coarse == pytest.approx(math.log(1 / 4) / 8 + 7 / 8 * math.log(7 / 4))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(divergence: str) -> None:
    """K = V: the tail is empty on both sides, -inf."""
    hidden, head = teacher()
    _, ids, logprobs, tail = support_scores(hidden, head, torch.zeros(TOKENS, dtype=torch.long), VOCAB)
    assert ids is not None and logprobs is not None and tail is not None
    assert (tail == -math.inf).all()
    upstream = normal(3, TOKENS, seed=11)
    whole = SupportTarget(divergence, ids, logprobs, tail, 0.3)
    expected = run(head_outputs, *student(), [FullTarget(divergence, hidden, head, 0.3)], upstream)
    assert_same(run(head_outputs, *student(), [whole], upstream, chunk_tokens=2), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_a_tail_never_negative_and_below_the_full_one(divergence: str) -> None:
    """Random students close to their teachers and far from them, in fp32."""
    for seed in range(20):
        hidden = normal(64, 8, seed=seed, dtype=torch.float32)
        head = Head(normal(200, 8, seed=seed + 100, dtype=torch.float32))
        near = 10.0 ** -(seed % 5)
        other = Head(head.weight_VH + near * normal(200, 8, seed=seed + 200, dtype=torch.float32))
        targets = torch.zeros(64, dtype=torch.long)
        _, ids, logprobs, tail = support_scores(hidden, other, targets, 10)
        assert ids is not None and logprobs is not None
        coarse, full = head_outputs(
            hidden,
            head,
            targets,
            [SupportTarget(divergence, ids, logprobs, tail), FullTarget(divergence, hidden, other)],
        ).divergences
        assert coarse.min() >= 0
        assert (full - coarse).min() >= -1e-6
        assert full.max() > 0


def test_the_students_tail_does_not_cancel() -> None:
    """One token holds all but e^-25 of the mass: 1 - sum is 0 in fp32, the complement is not."""
    logits = torch.tensor([[25.0, 0.0, math.log(0.5), -1e9]])
    got = tail_logprob(logits, torch.tensor([[0, -1]]))
    assert got.item() == pytest.approx(-25 + math.log(1.5), rel=1e-6)
    target = SupportTarget(
        "reverse_kl", torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)])
    )
    weight = logits.T.clone().requires_grad_()
    out = head_outputs(torch.ones(1, 1), Head(weight), torch.tensor([0]), [target])
    out.divergences[0].sum().backward()
    # dz_0 = p_0 (log 2 - D), where D = p_0 log 2 + T (log T + log 2) = log 2 + T log T - T + O(T^2), T = 1.5 e^-25
    mass = 1.5 * math.exp(-25)
    assert weight.grad is not None
    assert weight.grad[1:3, 0].sum().item() == pytest.approx(mass * math.log(mass), rel=1e-3)


def test_a_vanishing_tail_keeps_the_gradient_of_the_set_exact() -> None:
    """Forward KL, T = e^-20, Q_tail = 1/2: dD/dT is -e^20 / 2, and what it puts on the set must not be left there."""
    weight = torch.tensor([[20.0], [0.0]], requires_grad=True)
    half = torch.tensor([math.log(0.5)])
    target = SupportTarget("forward_kl", torch.tensor([[0]]), half[None], half)
    head_outputs(torch.ones(1, 1), Head(weight), torch.tensor([0]), [target]).divergences[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([0.5, -0.5], rel=1e-5)  # p - q


def test_rows_without_any_id_and_ids_that_are_padding() -> None:
    """Everything is in the tail: no divergence, no gradient. Padding's log-probability is not read."""
    hidden, head, targets = student()
    ids = torch.full((TOKENS, 2), -1)
    target = SupportTarget("jsd", ids, torch.full((TOKENS, 2), math.nan), torch.zeros(TOKENS, dtype=torch.float64))
    got = run(head_outputs, hidden, head, targets, [target], torch.tensor([[0.0], [0.0], [1.0]]))
    assert max(x.abs().max() for x in got[2:]) <= 1e-12


@pytest.mark.parametrize("target", [build("full", "jsd"), build("union", "forward_kl")])
def test_ids_that_do_not_exist_are_finite_in_value_and_gradient(target: FullTarget | SupportTarget) -> None:
    """A bias of -inf masks a column on both sides."""
    hidden, head, targets = student()
    mask = torch.zeros(VOCAB, dtype=torch.float64)
    mask[-1] = -math.inf
    assert head.bias_V is not None
    if isinstance(target, FullTarget):
        assert target.head.bias_V is not None
        target = replace(target, head=replace(target.head, bias_V=target.head.bias_V + mask, soft_cap=None))
    targets = targets.clamp(max=VOCAB - 2)
    masked = replace(head, bias_V=head.bias_V + mask)
    got = run(head_outputs, hidden, masked, targets, [target], normal(3, TOKENS, seed=1))
    assert all(torch.isfinite(x).all() for x in got)
    if isinstance(target, FullTarget):
        assert target.head.bias_V is not None
        shorter = replace(target, head=Head(target.head.weight_VH[:-1], target.head.bias_V[:-1]))
        cut = Head(head.weight_VH[:-1], head.bias_V[:-1])
        expected = run(head_outputs, hidden, cut, targets, [shorter], normal(3, TOKENS, seed=1))
        assert_same([*got[:4], got[4][:-1], got[5][:-1]], expected)


def test_the_same_student_and_teacher_give_no_signal() -> None:
    hidden, head, targets = student()
    for divergence in DIVERGENCES:
        upstream = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
        got = run(head_outputs, hidden, head, targets, [FullTarget(divergence, hidden, head)], upstream)
        assert max(x.abs().max() for x in got[2:]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    """fp32 outputs; gradients in the dtype of the inputs, close to the fp64 ones of the same inputs."""
    hidden, head, targets = student(dtype=dtype)
    t_hidden, t_head = teacher(dtype)
    upstream = normal(3, TOKENS, seed=12, dtype=torch.float32)
    target = FullTarget("reverse_kl", t_hidden, t_head)
    got = run(head_outputs, hidden, head, targets, [target], upstream, chunk_tokens=2)
    assert [x.dtype for x in got] == [torch.float32] * 3 + [dtype] * 3
    wide = [x.double() for x in (hidden, head.weight_VH, head.bias_V)]
    wide_t = FullTarget("reverse_kl", t_hidden.double(), Head(t_head.weight_VH.double(), t_head.bias_V.double(), 4.0))
    expected = run(naive, wide[0], Head(wide[1], wide[2]), targets, [wide_t], upstream.double())
    assert_same([x.double() for x in got], expected, 1e-6 if dtype == torch.float32 else 0.02)


def test_low_precision_gradients_of_the_head_are_summed_in_fp32() -> None:
    """512 tokens pull a row of the head by the same small amount: in bf16 the sum would stop at 256 of its units."""
    n = 512
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    head_outputs(hidden, Head(weight), torch.zeros(n, dtype=torch.long), chunk_tokens=1).logprobs_n.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [n / 2, -n / 2]


def test_no_grad_gives_the_same_values() -> None:
    hidden, head, targets = student()
    hidden.requires_grad_()
    divergences = [build("full", "jsd"), build("union", "reverse_kl")]
    with_grad = head_outputs(hidden, head, targets, divergences, chunk_tokens=3)
    with torch.no_grad():
        without = head_outputs(hidden, head, targets, divergences, chunk_tokens=3)
    assert with_grad.logprobs_n.requires_grad and with_grad.divergences[1].requires_grad
    assert not without.logprobs_n.requires_grad and without.logprobs_n.grad_fn is None
    for a, b in zip(tree_leaves(vars(with_grad)), tree_leaves(vars(without)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("support", ["full", "union"])
def test_no_tokens_still_takes_part_in_the_backward_pass(support: str) -> None:
    hidden, head, targets = student()
    hidden, weight = hidden[:0].requires_grad_(), head.weight_VH.requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    target = build(support, "jsd", none)
    out = head_outputs(hidden, Head(weight), targets[:0], [target, replace(target, rows_m=None)])
    assert out.logprobs_n.shape == out.entropy_n.shape == out.divergences[1].shape == (0,)
    (out.logprobs_n.sum() + out.entropy_n.sum() + out.divergences[0].sum()).backward()
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_large_logits_do_not_overflow() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    targets = [FullTarget(d, torch.ones(2, 1), Head(torch.tensor([[0.0], [1e4], [-1e4]]))) for d in DIVERGENCES]
    out = head_outputs(torch.ones(2, 1), Head(weight), torch.tensor([0, 1]), targets)
    assert out.logprobs_n.tolist() == [0.0, -2e4]
    assert out.entropy_n.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    reverse, forward, jsd = (x[0].item() for x in out.divergences)
    assert (reverse, forward) == (1e4, 2e4)
    assert jsd == pytest.approx(math.log(2), rel=1e-3)
    (out.logprobs_n.sum() + sum(x.sum() for x in out.divergences)).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    hidden, head, targets = student()
    weight = head.weight_VH.requires_grad_()
    out = head_outputs(hidden, Head(weight), targets)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs_n.sum().backward()


# --- gradients made in the forward pass -------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


Case = tuple[list[FullTarget | SupportTarget], list[Tensor], list[Tensor]]
"""Targets without hints; the weight of each covered token, and the same spread over all tokens."""


def cases(support: str, divergence: str, rows: list[int] | None, second: str | None) -> Case:
    wanted = [(support, divergence, rows)] + ([(second, "jsd", [6, 1, 3])] if second else [])
    targets, weights, spread = [], [], []
    for i, (kind, name, r) in enumerate(wanted):
        at = None if r is None else torch.tensor(r, dtype=torch.long)
        targets.append(build(kind, name, at))
        everywhere = normal(TOKENS, seed=20 + i)
        everywhere[1] = 0.0
        weights.append(everywhere if at is None else everywhere[at])
        spread.append(everywhere if at is None else torch.zeros(TOKENS).double().index_copy(0, at, weights[-1]))
    return targets, weights, spread


def told(targets: list[FullTarget | SupportTarget], weights: list[Tensor]) -> list[FullTarget | SupportTarget]:
    return [replace(t, weights_m=w) for t, w in zip(targets, weights, strict=True)]


def backward_products(
    targets: list, upstream: list[Tensor | None], *, soft_cap: float | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[int, int, list[Tensor]]:
    """Products in the forward and in the backward pass, and gradients; upstream of logprob, entropy, divergences."""
    hidden, head, ids = student(soft_cap)
    assert head.bias_V is not None
    leaves = [x.requires_grad_() for x in (hidden, head.weight_VH, head.bias_V)]
    with Products() as forward:
        out = head_outputs(hidden, head, ids, targets, chunk_tokens=chunk_tokens)
    values = [out.logprobs_n, out.entropy_n, *out.divergences]
    used = [(v, u) for v, u in zip(values, upstream, strict=True) if u is not None]
    with Products() as backward:
        grads = torch.autograd.grad([v for v, _ in used], leaves, [u for _, u in used])
    return forward.count, backward.count, list(grads)


@pytest.mark.parametrize(("chunk", "soft_cap"), [(3, 2.0), (TOKENS, None)])
@pytest.mark.parametrize("second", [None, "full", "union"])
@pytest.mark.parametrize("rows", [None, [5, 0, 3], [3, 1, 0, 6, 2, 5, 4], []])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_announced_weights_give_the_same_gradient_with_fewer_products(
    divergence: str, support: str, rows: list[int] | None, second: str | None, chunk: int, soft_cap: float | None
) -> None:
    """The loss has -2.5 times the weights announced, and a policy gradient without advantages, which adds zeros."""
    targets, weights, spread = cases(support, divergence, rows, second)
    upstream = [torch.zeros(TOKENS).double(), None, *(-2.5 * w for w in spread)]
    # Forward: the student's logits, and those of each teacher whose hidden states are at hand.
    logits, again, expected = backward_products(targets, upstream, soft_cap=soft_cap, chunk_tokens=chunk)
    ahead, after, got = backward_products(told(targets, weights), upstream, soft_cap=soft_cap, chunk_tokens=chunk)
    chunks = math.ceil(TOKENS / chunk)
    assert again == logits + 2 * chunks
    assert (ahead, after) == (logits + 2 * chunks, 0)
    assert_same(got, expected, 1e-12)
    if rows != []:
        assert all(x.norm() > 0.01 for x in got)


@pytest.mark.parametrize("second", [None, "full"])
@pytest.mark.parametrize(
    "change",
    ["one token a little", "one token's sign", "a token of weight 0", "logprobs", "entropy", "one teacher unused"],
)
def test_weights_that_turn_out_otherwise_cost_time_only(change: str, second: str | None) -> None:
    targets, weights, spread = cases("full", "reverse_kl", [5, 1, 0, 3], second)
    upstream: list[Tensor | None] = [None, None, *(3.0 * w for w in spread)]
    d_first = upstream[2]
    assert d_first is not None
    if change == "one token a little":
        d_first[5] *= 1 + 1e-5
    elif change == "one token's sign":
        d_first[0] *= -1
    elif change == "a token of weight 0":
        d_first[1] = 1e-3
    elif change == "one teacher unused":
        upstream = [normal(TOKENS, seed=1), None, d_first if second is None else None, *upstream[3:]]
    else:
        upstream[change == "entropy"] = normal(TOKENS, seed=1)
    _, products, got = backward_products(told(targets, weights), upstream, chunk_tokens=3)
    assert products > 0
    as_rows = torch.stack([torch.zeros(TOKENS).double() if u is None else u for u in upstream])
    assert_same(got, run(naive, *student(), targets, as_rows)[2 + len(targets) :])


def test_a_rounding_of_the_weights_is_no_other_weight() -> None:
    targets, weights, spread = cases("full", "jsd", None, None)
    rounded = [w.float() for w in weights]
    _, products, got = backward_products(told(targets, rounded), [None, None, *(1e-7 * w for w in spread)])
    assert products == 0
    assert_same(got, backward_products(targets, [None, None, *(1e-7 * w for w in spread)])[2], 1e-6)


def test_a_teacher_without_weights_is_enough_to_know_nothing() -> None:
    targets, weights, spread = cases("full", "jsd", None, "union")
    half_told = [replace(targets[0], weights_m=weights[0]), targets[1]]
    upstream = [None, None, *spread]
    assert backward_products(half_told, upstream)[:2] == backward_products(targets, upstream)[:2]


def test_weights_of_zero() -> None:
    """Nothing counts: a gradient of zeros. Something counts after all: its gradient."""
    targets, weights, spread = cases("full", "jsd", None, "union")
    nothing = told(targets, [torch.zeros_like(w) for w in weights])
    zeros = [torch.zeros(TOKENS).double()] * 2
    _, products, got = backward_products(nothing, [None, None, *zeros])
    assert products == 0 and all(x.abs().max() == 0 for x in got)
    _, products, got = backward_products(nothing, [None, None, *spread])
    assert products > 0
    assert_same(got, backward_products(targets, [None, None, *spread])[2])
    # Announced, but the divergence is not used by the loss.
    _, products, got = backward_products(told(targets, weights), [zeros[0], None, None, None])
    assert products == 0 and all(x.abs().max() == 0 for x in got)


def test_weights_of_no_tokens() -> None:
    hidden, head, targets = student()
    weight = head.weight_VH.requires_grad_()
    target = replace(build("full", "jsd", torch.zeros(0, dtype=torch.long)), weights_m=torch.zeros(0))
    out = head_outputs(hidden[:0], Head(weight), targets[:0], [target])
    out.divergences[0].sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.005)])
def test_announced_weights_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Times 3: in bf16 one rounding of the hidden states' gradient more, 2^-9, and none of the head's."""
    hidden, head, ids = student(dtype=dtype)
    t_hidden, t_head = teacher(dtype)
    weights = normal(TOKENS, seed=20, dtype=torch.float32)
    assert head.bias_V is not None
    found = []
    for hint in (weights, None):
        leaves = [x.clone().requires_grad_() for x in (hidden, head.weight_VH, head.bias_V)]
        target = FullTarget("reverse_kl", t_hidden, t_head, weights_m=hint)
        out = head_outputs(leaves[0], Head(leaves[1], leaves[2]), ids, [target], chunk_tokens=2)
        with Products() as backward:
            (3.0 * weights * out.divergences[0]).sum().backward()
        assert (backward.count == 0) == (hint is not None)
        found.append([x.grad for x in leaves])
    assert [x.dtype for x in found[0]] == [dtype] * 3
    for got, expected in zip(*found, strict=True):
        assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_announced_gradients_of_the_head_are_summed_in_fp32() -> None:
    """512 tokens of the same small pull, p - q = -1/4: in bf16 the sum would stop at 256 of its units."""
    n = 512
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    one = torch.ones(n, 1, dtype=torch.bfloat16)
    # float(log 3) is not a bf16 number: the teacher's head is the logit's closest, q = (0.7498, 0.2502).
    other = Head(torch.tensor([[math.log(3)], [0.0]], dtype=torch.bfloat16))
    q = torch.sigmoid(other.weight_VH[0, 0].float()).item()
    target = FullTarget("forward_kl", one, other, weights_m=torch.ones(n))
    out = head_outputs(one, Head(weight), torch.zeros(n, dtype=torch.long), [target], chunk_tokens=1)
    out.divergences[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([n * (0.5 - q), n * (q - 0.5)], rel=0.004)


def test_what_was_made_ahead_is_given_away_and_a_second_backward_makes_it_again() -> None:
    targets, weights, spread = cases("full", "jsd", None, None)
    hidden, head, ids = student()
    weight = head.weight_VH.requires_grad_()
    (value,) = head_outputs(hidden, Head(weight), ids, told(targets, weights)).divergences
    (first,) = torch.autograd.grad(value, weight, 2.0 * spread[0], retain_graph=True)
    kept = first.clone()
    with Products() as backward:
        (second,) = torch.autograd.grad(value, weight, 4.0 * spread[0], retain_graph=True)
    assert backward.count > 0
    assert_same([second, first], [2.0 * kept, kept], 1e-12)
    (third,) = torch.autograd.grad(value, weight, torch.ones(TOKENS).double())
    (other,) = head_outputs(hidden, Head(weight), ids, targets).divergences
    assert_same([third], list(torch.autograd.grad(other.sum(), weight)), 1e-12)


@pytest.mark.parametrize("factor", [torch.tensor(2.0).double(), normal(TOKENS, seed=3)])
def test_what_was_made_ahead_is_freed_by_the_backward_pass(factor: Tensor) -> None:
    targets, weights, spread = cases("full", "jsd", None, None)
    hidden, head, ids = student()
    weight = head.weight_VH.requires_grad_()
    (value,) = head_outputs(hidden, Head(weight), ids, told(targets, weights)).divergences
    assert value.grad_fn is not None and value.grad_fn.ahead is not None
    torch.autograd.grad(value, weight, factor * spread[0], retain_graph=True)
    assert value.grad_fn.ahead is None


def test_nothing_is_made_ahead_for_nobody() -> None:
    """Without gradients, or when nothing asks for one: two products a chunk, the logits."""
    targets, weights, _ = cases("full", "jsd", None, None)
    hidden, head, ids = student()
    with Products() as constant:
        head_outputs(hidden, head, ids, told(targets, weights))
    head.weight_VH.requires_grad_()
    with torch.no_grad(), Products() as disabled:
        head_outputs(hidden, head, ids, told(targets, weights))
    with torch.inference_mode(), Products() as inference:
        head_outputs(hidden, head, ids, told(targets, weights))
    with Products() as enabled:
        head_outputs(hidden, head, ids, told(targets, weights))
    assert (constant.count, disabled.count, inference.count, enabled.count) == (2, 2, 2, 3)


def test_weights_that_the_caller_changes_afterwards_are_not_believed() -> None:
    targets, weights, _ = cases("full", "jsd", None, None)
    hidden, head, ids = student()
    weight = head.weight_VH.requires_grad_()
    mine = weights[0].clone()
    (value,) = head_outputs(hidden, Head(weight), ids, told(targets, [mine])).divergences
    mine[3] = 7.0
    (got,) = torch.autograd.grad(value, weight, mine)
    (other,) = head_outputs(hidden, Head(weight), ids, targets).divergences
    assert_same([got], list(torch.autograd.grad(other, weight, mine)), 1e-12)


# --- what its gradient is good for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_expected_score_gradient_is_the_full_divergences(divergence: str) -> None:
    """The policy gradient through ``logprobs_n``, all tokens enumerated, is the gradient of the direct objective."""
    hidden, head, _ = student()
    t_hidden, t_head = teacher()
    weight = head.weight_VH.requires_grad_()
    everyone = hidden[:1].expand(VOCAB, -1)
    logprobs = head_outputs(everyone, head, torch.arange(VOCAB), chunk_tokens=4).logprobs_n
    d = logprobs.detach() - naive_logprobs(t_hidden[:1], t_head)[0]
    score = policy_gradient_score(divergence, d, 0.3)
    (sampled,) = torch.autograd.grad(-(logprobs.detach().exp() * score * logprobs).sum(), weight)
    target = FullTarget(divergence, t_hidden[:1], t_head, 0.3)
    (direct,) = torch.autograd.grad(
        head_outputs(hidden[:1], head, torch.tensor([0]), [target]).divergences[0].sum(), weight
    )
    assert direct.norm() > 0.01
    assert (sampled - direct).norm() <= 1e-6 * direct.norm()


def test_a_top_k_sum_used_as_an_advantage_has_no_expected_gradient() -> None:
    """One number a position does not depend on the sampled token: E[A grad log p] = A grad 1 = 0. Hence a refusal."""
    hidden, head, _ = student()
    weight = head.weight_VH.requires_grad_()
    everyone = hidden[:1].expand(VOCAB, -1)
    target = build("teacher_topk", "reverse_kl", torch.zeros(VOCAB, dtype=torch.long))
    out = head_outputs(everyone, head, torch.arange(VOCAB), [replace(target, rows_m=None)])
    advantage = -out.divergences[0].detach()
    assert advantage.abs().min() > 0.1
    (got,) = torch.autograd.grad((out.logprobs_n.detach().exp() * advantage * out.logprobs_n).sum(), weight)
    assert got.abs().max() <= 1e-12


# --- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("support", SUPPORTS)
def test_no_tensor_is_tokens_times_vocabulary(support: str, ahead: bool) -> None:
    n, vocab, chunk = 96, 50, 8
    hidden = normal(n, 4, seed=0).requires_grad_()
    head = Head(normal(vocab, 4, seed=1).requires_grad_())
    t_head = Head(normal(vocab, 4, seed=2))
    targets = torch.zeros(n, dtype=torch.long)
    rows = torch.arange(0, n, 2)
    with LargestTensor() as largest:
        if support == "full":
            divergences: list[FullTarget | SupportTarget] = [
                FullTarget("jsd", hidden.detach(), t_head),
                FullTarget("jsd", hidden.detach()[rows], t_head, rows_m=rows),
            ]
        else:
            given = None if support == "teacher_topk" else torch.arange(3).expand(n, 3)
            top_k = 0 if support == "student_topk" else 3
            _, ids, logprobs, tail = support_scores(hidden, t_head, targets, top_k, given, chunk_tokens=chunk)
            assert ids is not None and logprobs is not None
            divergences = [SupportTarget("jsd", ids, logprobs, tail)]
        if ahead:
            divergences = [replace(d, weights_m=torch.ones(n if d.rows_m is None else len(rows))) for d in divergences]
        out = head_outputs(hidden, head, targets, divergences, chunk_tokens=chunk)
        others = 0.0 if ahead else out.logprobs_n.sum() + out.entropy_n.sum()
        (others + sum(x.sum() for x in out.divergences)).backward()
    assert chunk * vocab <= largest.elements < 2 * n * 6
    with LargestTensor() as control:
        hidden.detach() @ head.weight_VH.T
    assert control.elements == n * vocab  # the measurement sees what it must not see above


def test_what_is_kept_for_the_backward_pass_is_inputs_and_a_few_numbers_a_token() -> None:
    hidden, head, targets = student()
    hidden.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        head_outputs(hidden, head, targets, [build("full", "jsd"), build("union", "jsd")])
    assert head.bias_V is not None
    inputs = {x.data_ptr() for x in (hidden, head.weight_VH, head.bias_V)}
    others = [x for x in kept if x.data_ptr() not in inputs]
    assert [tuple(x.shape) for x in others] == [(TOKENS,)] * 2  # entropy, and the tail of the union


# --- the teacher's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
@pytest.mark.parametrize("kind", SUPPORTS[1:])
def test_support_scores_are_the_naive_ones(kind: str, chunk: int) -> None:
    hidden, head = teacher()
    targets = student()[2]
    everything = naive_logprobs(hidden, head)
    given = torch.randint(VOCAB, (TOKENS, 5), generator=rng(1))
    given[:, 2] = -1
    top_k = 0 if kind == "student_topk" else K
    logprobs, ids, set_logprobs, tail = support_scores(
        hidden, head, targets, top_k, None if kind == "teacher_topk" else given, chunk_tokens=chunk
    )
    assert ids is not None and set_logprobs is not None and tail is not None
    assert (logprobs - everything[torch.arange(TOKENS), targets]).abs().max() <= 1e-12
    best = everything.topk(K, -1).indices
    duplicates = 0
    for i in range(TOKENS):
        asked = ([] if kind == "student_topk" else best[i].tolist()) + (
            [] if kind == "teacher_topk" else given[i].tolist()
        )
        seen: list[int] = []
        expected = [seen.append(v) or v if v >= 0 and v not in seen else -1 for v in asked]
        duplicates += sum(v >= 0 for v in asked) - len(seen)
        assert ids[i].tolist() == expected
        for v, logprob in zip(expected, set_logprobs[i].tolist(), strict=True):
            assert logprob == (pytest.approx(everything[i, v].item(), abs=1e-12) if v >= 0 else -math.inf)
        outside = [v for v in range(VOCAB) if v not in seen]
        assert tail[i].item() == pytest.approx(everything[i, outside].logsumexp(0).item(), abs=1e-12)
        assert set_logprobs[i].exp().sum() + tail[i].exp() == pytest.approx(1.0)
    assert (duplicates > 0) == (kind != "teacher_topk")


def test_support_scores_of_nothing_are_logprobs_alone() -> None:
    hidden, head = teacher()
    hidden.requires_grad_()
    logprobs, *nothing = support_scores(hidden, head, torch.zeros(TOKENS, dtype=torch.long))
    assert nothing == [None, None, None] and not logprobs.requires_grad
    assert support_scores(hidden[:0], head, torch.zeros(0, dtype=torch.long), 3)[1].shape == (0, 3)


def test_tail_logprob_by_hand() -> None:
    # masses 1, 2, 5 and 8 of 16; outside {3, 0}: 7/16
    logits = torch.tensor([[1.0, 2.0, 5.0, 8.0]]).log()
    assert tail_logprob(logits, torch.tensor([[3, -1, 0]])).item() == pytest.approx(math.log(7 / 16))
    assert tail_logprob(logits, torch.tensor([[3, 2, 1, 0]])).item() == -math.inf
    assert logits.exp()[0].tolist() == pytest.approx([1, 2, 5, 8])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_refused() -> None:
    hidden, head, targets = student()
    full, top = build("full", "jsd"), build("teacher_topk", "jsd")
    assert isinstance(full, FullTarget) and isinstance(top, SupportTarget)
    shorter = replace(full.head, weight_VH=full.head.weight_VH[:-1])
    for bad, message in [
        (replace(full, divergence="kl"), "unknown divergence 'kl'"),
        (replace(full, jsd_beta=1.0), "jsd_beta is 1.0"),
        (replace(full, hidden_mH=full.hidden_mH[1:]), "the teacher has 6 positions, 7 are to be covered"),
        (replace(full, head=shorter), "the teacher's head has 12 rows, the student's 13"),
        (replace(top, logprobs_mK=top.logprobs_mK[:, 1:]), "log-probabilities of shape"),
        (replace(top, tail_m=torch.zeros(2)), "a tail of shape"),
        (replace(full, weights_m=torch.ones(6)), r"weights of shape \(6,\) for 7 positions"),
        (replace(top, ids_mK=top.ids_mK + VOCAB), "but the vocabulary has 13"),
        (replace(top, rows_m=torch.arange(1, TOKENS + 1)), "rows between 1 and 7, but 7 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            head_outputs(hidden, head, targets, [bad])
    with pytest.raises(ValueError, match="6 hidden states for 7 targets"):
        head_outputs(hidden[1:], head, targets)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        head_outputs(hidden, head, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="top_k is 14"):
        support_scores(*teacher(), targets, top_k=VOCAB + 1)


def test_buckets_agree_with_the_full_target() -> None:
    hidden, head, targets = student()
    t_hidden, t_head = teacher()
    p, q = naive_logprobs(hidden, head), naive_logprobs(t_hidden, t_head)
    for divergence in DIVERGENCES:
        (got,) = head_outputs(hidden, head, targets, [FullTarget(divergence, t_hidden, t_head, 0.3)]).divergences
        assert (got - bucket_divergence(divergence, p, q, 0.3)).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [3, 64])
def test_what_teachers_of_a_whole_vocabulary_say_of_the_targets(chunk: int) -> None:
    hidden, head, targets = student()
    rows = torch.tensor([4, 1, 6])
    divergences = [build("full", "reverse_kl"), build("full", "jsd", rows), build("teacher_topk", "forward_kl")]
    out = head_outputs(hidden.requires_grad_(True), head, targets, divergences, chunk_tokens=chunk)
    expected = naive_logprobs(*teacher())[torch.arange(len(targets)), targets]
    everywhere, some, none = out.teacher_logprobs
    torch.testing.assert_close(everywhere, expected)
    torch.testing.assert_close(some, torch.zeros_like(expected).index_copy(0, rows, expected[rows]))
    assert not none.any()
    assert out.divergences[0].requires_grad and not any(x.requires_grad for x in out.teacher_logprobs)


@pytest.mark.parametrize(("vocab", "rows"), [(8, 256), (65536, 256), (131072, 128), (151936, 110), (1_000_000, 64)])
def test_chunks_of_a_large_vocabulary_are_smaller_on_a_cpu(vocab: int, rows: int) -> None:
    weight = torch.empty(1).expand(vocab, 4)
    assert chunk_rows(Head(weight)) == rows
    with torch.device("meta"):
        shard = VocabShard(0, 2, lambda x: x, lambda x: x)
        assert chunk_rows(Head(torch.empty(vocab // 2, 4), vocab_size=vocab, shard=shard)) == rows
