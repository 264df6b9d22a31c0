"""Loss and gradient of every objective: whatever shares a row, in whatever order, and equal to those by the book."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from roll_opd.algorithms.aggregation import sequence_weights
from roll_opd.algorithms.divergences import policy_gradient_score
from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant, TrainItem
from roll_opd.distributed.strategy.loss_inputs import RowTensors
from roll_opd.distributed.strategy.packed_model import head_of, load_model
from roll_opd.trajectory import REFERENCE, TeacherScores, Trajectory, TrajectoryId

VOCAB, TOP_K = 305, 6
CPU = torch.device("cpu")
KINDS = ("reverse_kl", "forward_kl", "jsd")
TOPK_WANTS = {
    "teacher_topk": ScoreWant(top_k=TOP_K),
    "student_topk": ScoreWant(given=True),
    "union_topk": ScoreWant(top_k=TOP_K, given=True),
}
WANTS = {"sampled": ScoreWant(), "full": ScoreWant(hidden=True), **TOPK_WANTS}


def direct(divergence: str, support: str, **settings) -> Loss:
    return Loss(PolicyLoss(), DivergenceLoss(divergence, support, jsd_beta=0.3, **settings))


LOSSES: dict[str, Loss] = {
    # Here the divergence is in the advantages.
    **{f"policy_gradient-{kind}": Loss(PolicyLoss()) for kind in KINDS},
    "policy_gradient-seq": Loss(PolicyLoss(0.1, 0.3, 3.0, "seq")),
    "policy_gradient-entropy-kl": Loss(PolicyLoss(), entropy_coef=0.05, kl_coef=0.3),
    **{f"direct-sampled-{kind}": direct(kind, "sampled") for kind in KINDS[:2]},
    **{f"direct-{support}-{kind}": direct(kind, support) for support in ("full", *TOPK_WANTS) for kind in KINDS},
    "direct-teacher_topk-no tail": direct("forward_kl", "teacher_topk", add_tail=False),
    "everything": dataclasses.replace(direct("jsd", "union_topk"), entropy_coef=0.05, kl_coef=0.3, kl_kind="mse"),
}


@pytest.fixture(scope="module")
def model(vocabulary, random_model):
    """The student: its head is untied, and longer than the vocabulary."""
    args = ModelArguments(random_model, dtype="fp32")
    return load_model(args, role="student_train", vocab_size=vocabulary.size, device=CPU)


@pytest.fixture(scope="module")
def teachers(make_strategy, tiny_models):
    """Models of another size than the student; the second one covers every other sequence."""
    return {"one": make_strategy(tiny_models.teacher), "two": make_strategy(tiny_models.student)}


@pytest.fixture(scope="module")
def batch(random_strategy, teachers, sequences) -> dict[str, list[Trajectory]]:
    """The same trajectories with each support's scores. The second teacher sees a longer prompt than the student."""
    rng = np.random.default_rng(1)
    own = random_strategy.score(sequences, ScoreWant(top_k=TOP_K))
    base = []
    for i, (s, result) in enumerate(zip(sequences, own, strict=True)):
        mask, n = s.response_mask, int(s.response_mask.sum())

        def spread(values, mask=mask):
            out = np.full(len(mask), np.nan, dtype=np.float32)
            out[mask] = values
            return out

        base.append(
            Trajectory(
                id=TrajectoryId(i, 0),
                tag="",
                tokens=s.tokens,
                response_mask=mask,
                infer_logprobs=result.logprobs,
                weight_version=np.zeros(len(mask), dtype=np.int32),
                top_ids=result.details.ids,
                # Ratios on both sides of the clip.
                old_logprobs=spread(result.logprobs[mask] + 0.2 * rng.standard_normal(n)),
                advantages=spread(rng.standard_normal(n)),
                policy_weights=spread(rng.choice([0.0, 0.5, 1.0], n)),
                divergence_weights={
                    name: spread(rng.uniform(0.1, 1.0, n)) for name in (["one", "two"] if i % 2 else ["one"])
                },
                teacher_scores={REFERENCE: TeacherScores(spread(result.logprobs[mask] - rng.random(n)))},
            )
        )
    return {support: [_scored(t, teachers, want) for t in base] for support, want in WANTS.items()}


def _scored(t: Trajectory, teachers, want: ScoreWant) -> Trajectory:
    scores = dict(t.teacher_scores)
    for name in t.divergence_weights:
        given = t.top_ids if want.given else None
        extra = 5 if name == "two" else 0
        tokens = np.concatenate([np.full(extra, 9, dtype=np.int32), t.tokens])
        mask = np.concatenate([np.zeros(extra, dtype=bool), t.response_mask])
        (result,) = teachers[name].score([ScoreRequest(t.id, tokens, mask, given)], want)
        scores[name] = TeacherScores(result.logprobs[extra:], result.details)
    return dataclasses.replace(t, teacher_scores=scores)


def items_of(trajectories: list[Trajectory]) -> list[TrainItem]:
    weights = sequence_weights("seq-mean-token-mean", [t.response_length for t in trajectories], 64)
    return [TrainItem(t, w) for t, w in zip(trajectories, weights, strict=True)]


def trajectories_of(name: str, batch: dict[str, list[Trajectory]]) -> list[Trajectory]:
    """The batch that the loss ``name`` trains on; with a direct one there is nothing for a policy gradient to push."""
    trajectories = batch[support_of(name)]
    objective, _, kind = name.partition("-")
    if objective == "direct":
        return [without_policy(t) for t in trajectories]
    return [with_scores_of(t, kind) for t in trajectories] if kind in KINDS else trajectories


def without_policy(t: Trajectory) -> Trajectory:
    return dataclasses.replace(t, advantages=np.zeros_like(t.advantages))


def with_scores_of(t: Trajectory, divergence: str) -> Trajectory:
    d = torch.tensor(t.sampled(t.old_logprobs) - t.sampled(t.teacher_scores["one"].logprobs))
    # The bound: this teacher knows nothing of these random tokens, and forward KL's score is exp(-d) - 1.
    return dataclasses.replace(t, advantages=t.spread(policy_gradient_score(divergence, d.clamp(-2, 2), 0.3).numpy()))


def support_of(name: str) -> str:
    divergence = LOSSES[name].divergence
    return "sampled" if divergence is None else divergence.support


def loss_and_gradient(model, teachers, rows: list[list[TrainItem]], loss: Loss) -> tuple[float, torch.Tensor]:
    """What a trainer of one rank does with ``rows`` as the micro-batches of a step."""
    heads = {name: head_of(strategy.head(), CPU) for name, strategy in teachers.items()}
    model.zero_grad()
    value = 0.0
    for items in rows:
        row = RowTensors(items, loss, heads, CPU)
        outputs, _ = model.token_logprobs(row.batch, row.targets)
        losses, _ = loss(row.inputs(outputs))
        total = (losses * row.token_weights).sum()
        total.backward()
        value += float(total.detach())
    return value, torch.cat([p.grad.flatten().double() for p in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def layouts(items: list[TrainItem]) -> dict[str, list[list[TrainItem]]]:
    order = [4, 1, 6, 0, 3, 5, 2]
    shuffled = [items[i] for i in order]
    idle = [dataclasses.replace(items[2], token_weight=0.0), dataclasses.replace(items[5], token_weight=0.0)]
    return {
        "one row per sequence": [[item] for item in items],
        "shuffled": [shuffled],
        "shuffled rows": [shuffled[5:], shuffled[:2], shuffled[2:5]],
        "with idle items": [[idle[0], *items[:3]], [idle[1]], items[3:]],
    }


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_their_order_change_nothing(model, teachers, batch, name) -> None:
    items, loss = items_of(trajectories_of(name, batch)), LOSSES[name]
    value, gradient = loss_and_gradient(model, teachers, [items], loss)
    assert abs(value) > 1e-3 and gradient.norm() > 1e-3
    for layout, rows in layouts(items).items():
        other, other_gradient = loss_and_gradient(model, teachers, rows, loss)
        assert other == pytest.approx(value, rel=1e-5), layout
        assert difference(other_gradient, gradient) <= 1e-5, layout


def test_a_weight_of_another_sequence_would_be_seen(model, teachers, batch) -> None:
    """The comparison above can fail: one advantage of 63 moved by a tenth is a hundred times the tolerance."""
    items = items_of(batch["sampled"])
    _, gradient = loss_and_gradient(model, teachers, [items], LOSSES["policy_gradient-reverse_kl"])
    t = items[1].trajectory
    advantages = t.advantages.copy()
    # A token that is neither clipped nor weighted with 0.
    position = next(
        p
        for p in np.flatnonzero(t.response_mask)
        if t.policy_weights[p] > 0 and abs(t.infer_logprobs[p] - t.old_logprobs[p]) < 0.1
    )
    advantages[position] += 0.1
    items[1] = dataclasses.replace(items[1], trajectory=dataclasses.replace(t, advantages=advantages))
    _, moved = loss_and_gradient(model, teachers, [items], LOSSES["policy_gradient-reverse_kl"])
    assert difference(moved, gradient) > 1e-4


# ---- by the book -------------------------------------------------------------------------------------------------


def distributions(lm, tokens: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """``[n, V]`` log-probabilities of the sampled tokens' positions, from transformers."""
    logits = lm(input_ids=torch.tensor(tokens, dtype=torch.long)[None]).logits[0, :, :VOCAB].double()
    return logits.log_softmax(-1)[np.flatnonzero(mask) - 1]


def divergence_by_the_book(spec: DivergenceLoss, student: torch.Tensor, teacher: torch.Tensor, given) -> torch.Tensor:
    """One position: arguments are ``[V]`` log-probabilities; ``given`` the student's ids."""
    p, q = student, teacher
    if spec.support != "full":
        best = teacher.topk(TOP_K).indices.tolist()
        chosen = {"teacher_topk": best, "student_topk": given, "union_topk": [*best, *given]}[spec.support]
        inside = torch.zeros(VOCAB, dtype=torch.bool)
        inside[chosen] = True

        def buckets(x):
            tail = [x[~inside].logsumexp(0, keepdim=True)] if spec.add_tail else []
            return torch.cat([x[inside], *tail])

        p, q = buckets(p), buckets(q)
    beta = spec.jsd_beta
    mixture = torch.logaddexp(q + math.log(beta), p + math.log(1 - beta))
    return {
        "reverse_kl": (p.exp() * (p - q)).sum(),
        "forward_kl": (q.exp() * (q - p)).sum(),
        "jsd": beta * (q.exp() * (q - mixture)).sum() + (1 - beta) * (p.exp() * (p - mixture)).sum(),
    }[spec.divergence]


BOOK = [name for name in LOSSES if "topk" in name or "full" in name]


@pytest.fixture(scope="module")
def plain_teachers(tiny_models):
    from transformers import AutoModelForCausalLM

    paths = {"one": tiny_models.teacher, "two": tiny_models.student}
    return {n: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for n, p in paths.items()}


@pytest.mark.parametrize("name", BOOK)
def test_loss_and_gradient_by_the_book(model, teachers, plain_teachers, plain_random, batch, name) -> None:
    """Against transformers' own logits and autograd over whole rows, in fp64 from the logits on."""
    loss = LOSSES[name]
    items = items_of(trajectories_of(name, batch))
    got, gradient = loss_and_gradient(model, teachers, [items], loss)
    plain_random.zero_grad()
    value = torch.zeros((), dtype=torch.float64)
    for item in items:
        t = item.trajectory
        student = distributions(plain_random, t.tokens, t.response_mask)
        for teacher, weights in t.divergence_weights.items():
            extra = 5 if teacher == "two" else 0
            seen = np.concatenate([np.full(extra, 9, dtype=np.int32), t.tokens])
            with torch.no_grad():
                q = distributions(plain_teachers[teacher], seen, np.pad(t.response_mask, (extra, 0)))
            terms = [
                float(w) * divergence_by_the_book(loss.divergence, student[i], q[i], t.top_ids[i].tolist())
                for i, w in enumerate(weights[t.response_mask])
            ]
            value = value + item.token_weight * torch.stack(terms).sum()
    value.backward()
    expected = torch.cat([p.grad.flatten().double() for p in plain_random.parameters()])
    plain_random.zero_grad()
    assert got == pytest.approx(float(value.detach()), rel=2e-6)
    assert difference(gradient, expected) <= 1e-5
