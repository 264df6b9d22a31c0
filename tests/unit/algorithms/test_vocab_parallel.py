"""A head whose vocabulary is split over ranks against the whole one, which is proven in ``test_chunked_head.py``.

The ranks are threads with a barrier between them; in the last test, processes that talk over gloo.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from roll_opd.algorithms.chunked_head import FullTarget, Head, SupportTarget, VocabShard, head_outputs, support_scores
from roll_opd.algorithms.divergences import DIVERGENCES

TOKENS, VOCAB, K = 7, 13, 4
PADDING = 1e3
"""What stands in rows that are no ids: far above every logit."""

Layout = tuple[tuple[int, int], ...]
"""First row and number of rows of each rank, padding included."""

LAYOUTS: dict[str, Layout] = {
    "alone": ((0, VOCAB),),
    "uneven": ((0, 9), (9, 4)),
    "one empty": ((0, 5), (5, 0), (5, 8)),
    "padded": ((0, 8), (8, 8), (16, 8)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- ranks ------------------------------------------------------------------------------------------------------------


class Ranks:
    """Runs a function once a rank, in threads. Asserts that all meet in the same collectives, and counts these."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: list[str] = []
        self._given: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=60)

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return job(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return [f.result() for f in [pool.submit(guarded, rank) for rank in range(self.count)]]

    def shard(self, rank: int, first: int) -> VocabShard:
        def add(x: Tensor) -> Tensor:
            return x.copy_(torch.stack(self._exchange(rank, "sum", x)).sum(dim=0))

        def concatenate(x: Tensor) -> Tensor:
            return torch.cat(self._exchange(rank, "gather", x), dim=-1)

        return VocabShard(first, self.count, add, concatenate)

    def _exchange(self, rank: int, name: str, x: Tensor) -> list[Tensor]:
        self._given[rank] = name, x.shape, x.dtype, x.clone()
        self._barrier.wait()
        assert all(given[:3] == self._given[0][:3] for given in self._given)
        if rank == 0:
            self.calls.append(name)
        tensors = [given[3] for given in self._given]
        self._barrier.wait()
        return tensors


def cut(head: Head, first: int, rows: int, shard: VocabShard) -> Head:
    """The rows of a whole head as a rank's parameters, which may reach beyond the vocabulary."""
    held = slice(first, first + rows)
    weight, bias = head.weight_VH[held], None if head.bias_V is None else head.bias_V[held]
    beyond = rows - len(weight)
    weight = torch.cat([weight, weight.new_full((beyond, weight.shape[1]), PADDING)])
    bias = None if bias is None else torch.cat([bias, bias.new_full((beyond,), PADDING)])
    return Head(weight, bias, head.soft_cap, head.total, shard)


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Inputs of ``head_outputs`` and the derivative of a loss by each of its outputs (``None``: does not enter)."""

    hidden: Tensor
    head: Head
    targets: Tensor
    divergences: Sequence[FullTarget | SupportTarget]
    upstream: Sequence[Tensor | None]


Found = tuple[list[Tensor], list[Tensor]]
"""Outputs; gradients of hidden states, weight and bias."""


def student(soft_cap: float | None = None, bias: bool = True, dtype: torch.dtype = torch.float64) -> Head:
    return Head(normal(VOCAB, 5, seed=1, dtype=dtype), normal(VOCAB, seed=2, dtype=dtype) if bias else None, soft_cap)


def teacher(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head]:
    """Of another width, in fp64 with a bias and a bound."""
    head = Head(normal(VOCAB, 6, seed=5, dtype=dtype), normal(VOCAB, seed=6, dtype=dtype), 4.0)
    return normal(TOKENS, 6, seed=4, dtype=dtype), head


def target_of(
    support: str, divergence: str, rows: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> FullTarget | SupportTarget:
    """``full``; ``tail`` or ``set``: the teacher's best, and given ids of which some repeat these."""
    at = None if rows is None else torch.tensor(rows, dtype=torch.long)
    hidden, head = teacher(dtype)
    hidden = hidden if at is None else hidden[at]
    if support == "full":
        return FullTarget(divergence, hidden, head, 0.3, at)
    given = torch.randint(VOCAB, (len(hidden), 3), generator=torch.Generator().manual_seed(7))
    _, ids, logprobs, tail = support_scores(hidden, head, torch.zeros(len(hidden), dtype=torch.long), K, given)
    assert ids is not None and logprobs is not None and (ids == -1).any() == (len(ids) > 0)
    return SupportTarget(divergence, ids, logprobs, tail if support == "tail" else None, 0.3, at)


def case_of(
    divergences: Sequence[FullTarget | SupportTarget],
    *,
    announced: bool = False,
    soft_cap: float | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """A loss of everything, or of the divergences alone, whose weights are announced up to a factor of 3."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream: list[Tensor | None] = [None if announced else normal(TOKENS, seed=i, dtype=wide) for i in (8, 9)]
    told = []
    for i, target in enumerate(divergences):
        rows = torch.arange(TOKENS) if target.rows_m is None else target.rows_m
        weights_m = normal(len(rows), seed=20 + i, dtype=wide)
        # 0 where the teacher covers nothing, as in the trainer.
        upstream.append(torch.zeros(TOKENS, dtype=wide).index_copy(0, rows, 3.0 * weights_m))
        told.append(replace(target, weights_m=weights_m) if announced else target)
    targets = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    return Case(normal(TOKENS, 5, seed=0, dtype=dtype), student(soft_cap, bias, dtype), targets, told, upstream)


def compute(case: Case, head: Head, divergences: Sequence[FullTarget | SupportTarget]) -> Found:
    """What one rank finds, two tokens at a time."""
    hidden, weight = case.hidden.clone().requires_grad_(), head.weight_VH.clone().requires_grad_()
    bias = None if head.bias_V is None else head.bias_V.clone().requires_grad_()
    head = replace(head, weight_VH=weight, bias_V=bias)
    out = head_outputs(hidden, head, case.targets, divergences, chunk_tokens=2)
    values = [out.logprobs_n, out.entropy_n, *out.divergences]
    used = [(v, u) for v, u in zip(values, case.upstream, strict=True) if u is not None]
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad([v for v, _ in used], leaves, [u for _, u in used])
    return [v.detach() for v in values], list(grads)


def whole(case: Case) -> Found:
    return compute(case, case.head, case.divergences)


def split(case: Case, layout: Layout, ranks: Ranks | None = None) -> Found:
    """The same on several ranks: their common outputs, the sum of the hidden states' gradients, the others joined."""
    ranks = ranks or Ranks(len(layout))
    padding: list[Tensor] = []

    def job(rank: int) -> Found:
        first, rows = layout[rank]
        shard = ranks.shard(rank, first)
        head = cut(case.head, first, rows, shard)
        divergences = [
            replace(t, head=cut(t.head, first, rows, shard)) if isinstance(t, FullTarget) else t
            for t in case.divergences
        ]
        values, (hidden, *of_head) = compute(case, head, divergences)
        padding.extend(g[head.rows :] for g in of_head)
        return values, [hidden, *(g[: head.rows] for g in of_head)]

    found = ranks.run(job)
    for values, _ in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values, found[0][0], strict=True))
    assert not any(g.any() for g in padding)
    hidden, *of_head = zip(*(grads for _, grads in found), strict=True)
    return found[0][0], [torch.stack(hidden).sum(dim=0), *map(torch.cat, of_head)]


def assert_same(got: Found, expected: Found, tolerance: float = 1e-12) -> None:
    for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1.0)


# --- values and gradients ---------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("support", ["full", "tail", "set"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_whole_head(
    divergence: str, support: str, soft_cap: float | None, bias: bool, announced: bool, layout: Layout
) -> None:
    case = case_of([target_of(support, divergence)], announced=announced, soft_cap=soft_cap, bias=bias)
    expected = whole(case)
    assert all(x.norm() > 0.01 for x in expected[0] + expected[1])
    assert_same(split(case, layout), expected)


@layouts
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("supports", [("full", "full"), ("full", "tail"), ("set", "full")])
@pytest.mark.parametrize("rows", [(None, [5, 0, 3]), ([6], [1, 2, 4]), ([4, 2], [])])
def test_several_teachers(rows, supports, announced: bool, layout: Layout) -> None:
    """Each covers its own tokens, in any order."""
    targets = [target_of(s, d, r) for s, d, r in zip(supports, ("jsd", "reverse_kl"), rows, strict=True)]
    case = case_of(targets, announced=announced, soft_cap=2.0)
    assert_same(split(case, layout), whole(case))


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("support", ["full", "tail"])
def test_no_tokens(support: str, announced: bool) -> None:
    case = case_of([target_of(support, "jsd", [])], announced=announced)
    nothing = [None if u is None else u[:0] for u in case.upstream]
    none = replace(case, hidden=case.hidden[:0], targets=case.targets[:0], upstream=nothing)
    values, grads = split(none, LAYOUTS["one empty"])
    assert [v.shape for v in values] == [(0,)] * 3 and not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("support", ["full", "tail"])
def test_low_precision(support: str, announced: bool, dtype: torch.dtype) -> None:
    """No further from the fp64 results of the same inputs than the whole head, give or take a rounding."""
    case = case_of([target_of(support, "reverse_kl", dtype=dtype)], announced=announced, dtype=dtype)
    got, expected = split(case, LAYOUTS["padded"]), whole(case)
    exact = whole(in_fp64(case))
    assert [x.dtype for x in got[0] + got[1]] == [torch.float32] * 3 + [dtype] * 3
    for a, b, c in zip(got[0] + got[1], expected[0] + expected[1], exact[0] + exact[1], strict=True):
        rounding = torch.finfo(a.dtype).eps
        assert (a.double() - c).norm() <= 2.0 * (b.double() - c).norm() + rounding * c.norm()
        assert (b.double() - c).norm() <= 0.02 * c.norm()


def in_fp64(case: Case) -> Case:
    def wide(head: Head) -> Head:
        return replace(
            head, weight_VH=head.weight_VH.double(), bias_V=None if head.bias_V is None else head.bias_V.double()
        )

    (target,) = case.divergences
    if isinstance(target, FullTarget):
        target = replace(target, hidden_mH=target.hidden_mH.double(), head=wide(target.head))
    upstream = [None if u is None else u.double() for u in case.upstream]
    target = replace(target, weights_m=None)
    return replace(case, hidden=case.hidden.double(), head=wide(case.head), divergences=[target], upstream=upstream)


def test_large_logits_lose_no_digits() -> None:
    """Logits around 2^13, a multiple of 2^-10 each and so exact in fp32: log-probabilities are their differences."""
    logits = 8192.0 + (normal(VOCAB, 1, seed=1) * 1024).round() / 1024
    one, targets = torch.ones(VOCAB, 1), torch.arange(VOCAB)
    case = Case(one, Head(logits.float()), targets, [], [torch.ones(VOCAB), None])
    (logprobs, entropy), _ = split(case, LAYOUTS["one empty"])
    expected = logits[:, 0].log_softmax(0)
    assert (logprobs.double() - expected).abs().max() <= 1e-6
    assert entropy.tolist() == pytest.approx([-(expected.exp() * expected).sum().item()] * VOCAB, abs=1e-6)


@pytest.mark.parametrize("support", ["full", "tail"])
def test_a_shard_whose_ids_all_do_not_exist(support: str) -> None:
    """Masked by a bias of -inf."""
    mask = torch.zeros(VOCAB, dtype=torch.float64)
    mask[9:] = -math.inf
    target, case = target_of(support, "reverse_kl"), case_of([])
    if isinstance(target, FullTarget):
        assert target.head.bias_V is not None
        target = replace(target, head=replace(target.head, bias_V=target.head.bias_V + mask, soft_cap=None))
    assert case.head.bias_V is not None
    head = replace(case.head, bias_V=case.head.bias_V + mask)
    case = replace(case_of([target]), head=head, targets=case.targets.clamp(max=8))
    found = split(case, LAYOUTS["uneven"])
    assert all(torch.isfinite(x).all() for x in found[0] + found[1])
    assert_same(found, whole(case))


def test_a_tail_on_another_shard_does_not_cancel() -> None:
    """One token holds all but e^-25 of the mass: 1 - sum is 0 in fp32, the complement is not."""
    logits = torch.tensor([[25.0], [0.0], [math.log(0.5)]])
    half = torch.tensor([math.log(0.5)])
    target = SupportTarget("reverse_kl", torch.tensor([[0]]), half[None], half)
    one = torch.ones(1)
    case = Case(torch.ones(1, 1), Head(logits), torch.tensor([2]), [target], [None, None, one])
    values, (_, weight) = split(case, ((0, 1), (1, 1), (2, 1)))
    mass = 1.5 * math.exp(-25)
    assert values[0].item() == pytest.approx(-25 + math.log(0.5), rel=1e-6)
    assert values[2].item() == pytest.approx(math.log(2), rel=1e-6)
    assert weight[1:, 0].sum().item() == pytest.approx(mass * math.log(mass), rel=1e-3)


# --- staying in step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "divergence", "in_chunk", "again"),
    [
        ("full", "reverse_kl", ["gather", "gather", "sum"], ["gather", "gather", "sum"]),
        ("full", "forward_kl", ["gather", "gather"], ["gather", "gather"]),
        ("full", "jsd", ["gather", "gather", "sum"], ["gather", "gather", "sum"]),
        ("tail", "jsd", ["gather", "gather", "sum"], ["gather", "sum"]),
        ("set", "jsd", ["gather", "sum"], ["gather", "sum"]),
    ],
)
def test_how_often_the_ranks_talk(support: str, divergence: str, in_chunk: list[str], again: list[str]) -> None:
    """Two chunks of 2 x 2 tokens, and what is done once a call."""
    ahead, recomputed = Ranks(2), Ranks(2)
    split(case_of([target_of(support, divergence)], announced=True), LAYOUTS["uneven"], ahead)
    assert ahead.calls == 2 * in_chunk + ["sum", "sum"]
    split(case_of([target_of(support, divergence)]), LAYOUTS["uneven"], recomputed)
    forward = [c for c in in_chunk if support != "full" or c != "sum"]
    assert recomputed.calls == 2 * forward + ["sum"] + 2 * again


def test_one_rank_that_cannot_use_what_was_made_ahead_is_enough_for_all() -> None:
    """Its loss differs by more than a rounding; the others would not meet it in the recomputation."""
    case, layout = case_of([target_of("full", "jsd")], announced=True), LAYOUTS["uneven"]
    ranks = Ranks(2)

    def job(rank: int) -> Found:
        first, rows = layout[rank]
        head = cut(case.head, first, rows, ranks.shard(rank, first))
        (target,) = case.divergences
        assert isinstance(target, FullTarget)
        target = replace(target, head=target.head.cut_like(head))
        upstream = [None, None, case.upstream[2].clone()]
        upstream[2][3] *= 1.0 + rank * 1e-5
        return compute(replace(case, upstream=upstream), head, [target])

    (_, first), (_, second) = ranks.run(job)
    assert ranks.calls[-6:] == ["gather", "gather", "sum"] * 2
    found = ([], [first[0] + second[0], torch.cat([first[1], second[1]]), torch.cat([first[2], second[2]])])
    assert_same(found, ([], whole(case)[1]), 1e-5)


# --- the teacher's side -----------------------------------------------------------------------------------------------


def split_scores(layout: Layout, hidden: Tensor, head: Head, targets: Tensor, *args: Any) -> list[Tensor | None]:
    ranks = Ranks(len(layout))

    def job(rank: int) -> tuple[Tensor | None, ...]:
        first, rows = layout[rank]
        shard = cut(head, first, rows, ranks.shard(rank, first))
        return support_scores(hidden, shard, targets, *args, chunk_tokens=2)

    found = ranks.run(job)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    return list(found[0])


@layouts
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("top_k", [0, 3, 6, VOCAB])
def test_scores_are_the_whole_heads(top_k: int, given: bool, layout: Layout) -> None:
    """Also where a shard has fewer ids than are wanted."""
    hidden, head = teacher()
    targets = torch.arange(TOKENS) * 2
    ids = torch.randint(VOCAB, (TOKENS, 5), generator=torch.Generator().manual_seed(1))
    ids[:, 2] = -1
    asked = (top_k, ids) if given else (top_k,)
    got, expected = split_scores(layout, hidden, head, targets, *asked), support_scores(hidden, head, targets, *asked)
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None
        elif b.dtype == torch.long:
            assert torch.equal(a, b)
        else:
            assert a.dtype == b.dtype and torch.equal(a.isinf(), b.isinf())
            assert (a - b).masked_fill(b.isinf(), 0.0).abs().max() <= 1e-12


def test_equals_are_chosen_alike_on_all_ranks() -> None:
    """All 13 logits are the same: any 4 ids are right, but every rank must name the same ones."""
    head = Head(torch.ones(VOCAB, 6).double())
    _, ids, logprobs, tail = split_scores(LAYOUTS["padded"], teacher()[0], head, torch.zeros(TOKENS).long(), K)
    assert all(len(set(row)) == K and set(row) <= set(range(VOCAB)) for row in ids.tolist())
    assert logprobs.exp().sum(-1).tolist() == pytest.approx([K / VOCAB] * TOKENS)
    assert tail.exp().tolist() == pytest.approx([1 - K / VOCAB] * TOKENS)


def test_a_large_union_needs_no_table_of_pairs() -> None:
    """3,000 ids a row, each given twice: pairs would take 3 x 6000 x 6000 comparisons."""
    vocab, size = 4000, 3000
    hidden, head = normal(3, 4, seed=0), Head(normal(vocab, 4, seed=1))
    twice = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:size] for i in range(3)])
    _, ids, _, _ = support_scores(hidden, head, torch.zeros(3).long(), 0, torch.cat([twice, twice], -1))
    assert ids is not None
    assert torch.equal(ids[:, :size], twice) and (ids[:, size:] == -1).all()


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("support", ["full", "tail"])
def test_padding_of_a_whole_head_takes_no_part(support: str, announced: bool) -> None:
    """In the student's head and in the teacher's; and its gradient is 0."""
    case = case_of([target_of(support, "jsd")], announced=announced)

    def padded(head: Head) -> Head:
        return replace(cut(head, 0, VOCAB + 3, head.shard), vocab_size=VOCAB)

    targets = [replace(t, head=padded(t.head)) if isinstance(t, FullTarget) else t for t in case.divergences]
    values, (hidden, weight, bias) = compute(case, padded(case.head), targets)
    assert not weight[VOCAB:].any() and not bias[VOCAB:].any()
    assert_same((values, [hidden, weight[:VOCAB], bias[:VOCAB]]), whole(case), 0.0)
    t_hidden, t_head = teacher()
    for a, b in zip(
        support_scores(t_hidden, padded(t_head), case.targets, K),
        support_scores(t_hidden, t_head, case.targets, K),
        strict=True,
    ):
        assert a is not None and b is not None and torch.equal(a, b)


def test_a_head_is_cut_like_another() -> None:
    _, head = teacher()
    for first, rows in LAYOUTS["padded"]:
        mine = cut(student(), first, rows, Ranks(3).shard(0, first))
        got = head.cut_like(mine)
        assert (got.rows, got.total, got.soft_cap, got.shard) == (mine.rows, VOCAB, 4.0, mine.shard)
        assert torch.equal(got.weight_VH, head.weight_VH[first : first + rows])
        assert got.weight_VH.untyped_storage().nbytes() == 6 * 8 * mine.rows
    with pytest.raises(ValueError, match="a head for a vocabulary of 12 cannot be cut like one of 13"):
        replace(head, vocab_size=12).cut_like(mine)


def test_mistakes_are_refused() -> None:
    case, ranks = case_of([]), Ranks(2)
    t_hidden, t_head = teacher()
    half = cut(case.head, 0, 9, ranks.shard(0, 0))
    with pytest.raises(ValueError, match=r"cut into \(ranks, first, rows\) \(1, 0, 13\), the student's \(2, 0, 9\)"):
        head_outputs(case.hidden, half, case.targets, [FullTarget("jsd", t_hidden, t_head)])
    for bad in (-1, VOCAB):
        with pytest.raises(ValueError, match="in the targets, but the vocabulary has 13"):
            head_outputs(case.hidden, half, torch.full((TOKENS,), bad))
        with pytest.raises(ValueError, match="in the targets, but the vocabulary has 13"):
            support_scores(t_hidden, t_head, torch.full((TOKENS,), bad))
    with pytest.raises(ValueError, match="in a support, but the vocabulary has 13"):
        support_scores(t_hidden, t_head, case.targets, 0, torch.full((TOKENS, 1), VOCAB))
    with pytest.raises(ValueError, match="a head of 13 rows for a vocabulary of 14"):
        replace(case.head, vocab_size=14)


# --- real collectives -------------------------------------------------------------------------------------------------


def gloo_case() -> Case:
    return case_of([target_of("full", "jsd"), target_of("tail", "reverse_kl", [5, 0, 3])], soft_cap=2.0)


def gloo_rank(rank: int, folder: Path) -> None:
    """What one process does: the case above, once forward and backward, and a teacher's scores."""
    layout = LAYOUTS["uneven"]
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

    def add(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def concatenate(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in layout]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    first, rows = layout[rank]
    head = cut(gloo_case().head, first, rows, VocabShard(first, 2, add, concatenate))
    case = gloo_case()
    targets = [replace(t, head=t.head.cut_like(head)) if isinstance(t, FullTarget) else t for t in case.divergences]
    t_hidden, t_head = teacher()
    scores = support_scores(t_hidden, t_head.cut_like(head), case.targets, K, chunk_tokens=2)
    torch.save((compute(case, head, targets), scores), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_over_gloo(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    (found, scores), (others, other_scores) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b in zip([*found[0], *scores], [*others[0], *other_scores], strict=True):
        assert torch.equal(a, b)
    (hidden, *of_head), (more, *rest) = found[1], others[1]
    joined = [torch.cat(pair) for pair in zip(of_head, rest, strict=True)]
    assert_same((found[0], [hidden + more, *joined]), whole(gloo_case()))
    t_hidden, t_head = teacher()
    for a, b in zip(scores, support_scores(t_hidden, t_head, gloo_case().targets, K), strict=True):
        assert torch.equal(a, b) if a.dtype == torch.long else (a - b).abs().max() <= 1e-12


if __name__ == "__main__":
    torch.set_num_threads(1)
    gloo_rank(int(sys.argv[1]), Path(sys.argv[2]))
