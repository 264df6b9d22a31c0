"""From trajectories to gradients through the head, whose weights in the loss are known beforehand or are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from roll_opd.algorithms.chunked_head import FullTarget, Head, SupportTarget
from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant, TrainItem
from roll_opd.distributed.strategy.loss_inputs import RowTensors
from roll_opd.distributed.strategy.packed_model import PackedModel, load_model
from roll_opd.distributed.strategy.scoring import score_row
from roll_opd.trajectory import TeacherScores, Trajectory

CPU = torch.device("cpu")
VOCAB = 305
FULL = Loss(PolicyLoss(), DivergenceLoss("reverse_kl", "full"))
TOPK = Loss(PolicyLoss(), DivergenceLoss("jsd", "teacher_topk"))
WORLD_SIZE = 3
"""The trainer multiplies its loss by the number of ranks."""


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, tiny_models, random_model) -> PackedModel:
    """What is trained: the quickstart's student, whose head is its embedding, or one with a head of its own.

    In fp64, so that differences are those of the weights, which are fp32: up to 6e-8 a rounding.
    """
    path = tiny_models.student if request.param == "tied" else random_model
    args = ModelArguments(path, dtype="fp32")
    return load_model(args, role="student_train", vocab_size=VOCAB, device=CPU).double()


@pytest.fixture(scope="module")
def items(student, random_strategy, sequences) -> Callable[..., list[TrainItem]]:
    """Trajectories scored by two teachers, each of which leaves some of them out; the last item counts for nothing."""
    scores = {
        (name, want): strategy.score(sequences, want)
        for name, strategy in (("a", random_strategy), ("b", student))
        for want in (ScoreWant(hidden=True), ScoreWant(top_k=4))
    }
    rng = np.random.default_rng(5)

    def make(loss: Loss, advantage: float | None = 0.0) -> list[TrainItem]:
        assert loss.divergence is not None
        want = ScoreWant(hidden=True) if loss.divergence.support == "full" else ScoreWant(top_k=4)
        made = []
        for i, s in enumerate(sequences):
            covered = [name for name, without in (("a", 1), ("b", 3)) if i != without]
            results = {name: scores[name, want][i] for name in covered}
            nothing = np.zeros(len(s.tokens), dtype=np.float32)
            trajectory = Trajectory(
                s.id,
                "",
                s.tokens,
                s.response_mask,
                nothing,
                nothing.astype(np.int32),
                old_logprobs=nothing - 2.0,
                advantages=None if advantage is None else advantage * s.response_mask,
                teacher_scores={name: TeacherScores(r.logprobs, r.details) for name, r in results.items()},
                divergence_weights={
                    name: s.response_mask * rng.uniform(0.1, 2, len(s.tokens)).astype(np.float32) for name in covered
                },
            )
            made.append(TrainItem(trajectory, 0.0 if i == len(sequences) - 1 else 1 / (7 + i)))
        return made

    return make


class HeadReads(TorchDispatchMode):
    """Counts matrix products with one of the matrices given."""

    def __init__(self, *matrices: Tensor) -> None:
        super().__init__()
        self.count = 0
        self._storages = {x.untyped_storage().data_ptr() for x in matrices}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm"):
            self.count += any(x.untyped_storage().data_ptr() in self._storages for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def heads(*strategies) -> dict[str, Head]:
    return dict(zip("ab", (s.model.head() for s in strategies), strict=True))


def gradients(
    model: PackedModel, row: RowTensors, loss: Loss, teacher_heads: dict[str, Head]
) -> tuple[list[Tensor], int, int]:
    """As the trainer makes them; and how often a teacher's logits were made, forward and backward."""
    parameters = list(model.parameters())
    matrices = [head.weight_VH for head in teacher_heads.values()]
    with HeadReads(*matrices) as forward:
        outputs, _ = model.token_logprobs(row.batch, row.targets)
    losses, _ = loss(row.inputs(outputs))
    with HeadReads(*matrices) as backward:
        grads = torch.autograd.grad((losses * row.token_weights).sum() * WORLD_SIZE, parameters)
    return list(grads), forward.count, backward.count


def with_hints(row: RowTensors, hints: Sequence[Tensor | None]) -> RowTensors:
    row.targets = [dataclasses.replace(t, weights_m=h) for t, h in zip(row.targets, hints, strict=True)]
    return row


@pytest.mark.parametrize("advantage", [0.0, None])
@pytest.mark.parametrize("loss", [FULL, TOPK])
def test_pure_distillation_makes_its_gradient_in_the_forward_pass(
    model, items, student, random_strategy, loss: Loss, advantage: float | None
) -> None:
    teacher_heads = heads(random_strategy, student)
    row = RowTensors(items(loss, advantage), loss, teacher_heads, CPU)
    assert [len(t.weights_m) for t in row.targets] == [len(t.rows_m) for t in row.targets]
    got, forward, backward = gradients(model, row, loss, teacher_heads)
    plain = with_hints(row, [None, None])
    expected, plain_forward, plain_backward = gradients(model, plain, loss, teacher_heads)
    reads = 2 if loss is FULL else 0
    assert (forward, backward) == (reads, 0)
    assert (plain_forward, plain_backward) == (reads, reads)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert sum(x.norm() for x in expected) > 0.1


def test_the_head_of_the_student_is_not_read_in_the_backward_pass(model, items, student, random_strategy) -> None:
    """For supports, where no teacher's head is read in any case. An embedding's gradient is no matrix product."""
    row = RowTensors(items(TOPK), TOPK, {}, CPU)
    outputs, _ = model.token_logprobs(row.batch, row.targets)
    losses, _ = TOPK(row.inputs(outputs))
    with HeadReads(model.head().weight_VH) as backward:
        torch.autograd.grad((losses * row.token_weights).sum(), list(model.parameters()))
    assert backward.count == 0


@pytest.mark.parametrize(
    "loss",
    [FULL, dataclasses.replace(FULL, entropy_coef=0.01), dataclasses.replace(FULL, kl_coef=0.01)],
    ids=["advantages", "entropy", "distance to a reference"],
)
def test_nothing_is_announced_where_the_loss_has_other_components(items, student, random_strategy, loss: Loss) -> None:
    made = items(loss, 0.5 if loss is FULL else 0.0)
    row = RowTensors(made, loss, heads(random_strategy, student), CPU)
    assert [t.weights_m for t in row.targets] == [None, None]


def test_advantages_of_what_does_not_count_are_no_policy_gradient(items, student, random_strategy) -> None:
    made = items(FULL)
    idle = dataclasses.replace(made[-1].trajectory, advantages=made[-1].trajectory.response_mask.astype(np.float32))
    made[-1] = dataclasses.replace(made[-1], trajectory=idle)
    row = RowTensors(made, FULL, heads(random_strategy, student), CPU)
    assert all(t.weights_m is not None for t in row.targets)


def test_a_mixed_loss_of_which_something_was_announced_is_right_all_the_same(
    model, items, student, random_strategy
) -> None:
    teacher_heads = heads(random_strategy, student)
    hints = [t.weights_m for t in RowTensors(items(FULL), FULL, teacher_heads, CPU).targets]
    row = RowTensors(items(FULL, 0.5), FULL, teacher_heads, CPU)
    expected, _, _ = gradients(model, row, FULL, teacher_heads)
    got, _, backward = gradients(model, with_hints(row, hints), FULL, teacher_heads)
    assert backward == 2
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_what_is_announced_is_weight_times_coefficient(items, student, random_strategy) -> None:
    made = items(FULL)
    row = RowTensors(made, FULL, heads(random_strategy, student), CPU)
    for name, target in zip(row.target_names, row.targets, strict=True):
        assert isinstance(target, FullTarget | SupportTarget) and target.weights_m is not None
        expected = [
            item.token_weight * item.trajectory.divergence_weights[name][item.trajectory.response_mask]
            for item in made
            if name in item.trajectory.divergence_weights and item.token_weight
        ]
        assert np.concatenate(expected) == pytest.approx(target.weights_m.numpy(), rel=1e-6)


def test_the_head_is_the_parameter_itself_with_its_padding(student) -> None:
    """The gradient of a slice would be copied into one of full size."""
    parameter, head = student.model.lm.get_output_embeddings().weight, student.model.head()
    assert head.weight_VH is parameter
    assert head.total == head.rows == len(head.trimmed().weight_VH) == VOCAB < len(parameter)


# ---- what the update's forward pass tells ----------------------------------------------------------------------------


def test_an_update_tells_what_scoring_would_have_told(model, items, student, random_strategy) -> None:
    """The student's and the teachers' log-probabilities of every item that counts, on its own positions."""
    made = items(FULL)
    row = RowTensors(made, FULL, heads(random_strategy, student), CPU)
    outputs, _ = model.token_logprobs(row.batch, row.targets)
    told = {scores.id: scores for scores in row.token_scores(outputs)}
    assert set(told) == {item.trajectory.id for item in made[:-1]}
    with torch.no_grad():
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in (item.trajectory for item in made)]
        asked = {result.id: result for result in score_row(model, requests)}
    for item in made[:-1]:
        t, scores = item.trajectory, told[item.trajectory.id]
        np.testing.assert_allclose(scores.logprobs, asked[t.id].logprobs, atol=1e-5, rtol=0)
        np.testing.assert_allclose(scores.entropies, asked[t.id].entropies, atol=1e-5, rtol=0)
        assert set(scores.teachers) == set(t.divergence_weights)
        for name, logprobs in scores.teachers.items():
            np.testing.assert_allclose(logprobs, t.said_by(name), atol=1e-5, rtol=0)
            assert not logprobs[~t.response_mask].any() and (logprobs[t.response_mask] < 0).all()


def test_old_logprobs_that_nobody_asked_for_are_the_updates_own(model, items, student, random_strategy) -> None:
    made = [
        dataclasses.replace(i, trajectory=dataclasses.replace(i.trajectory, old_logprobs=None)) for i in items(FULL)
    ]
    row = RowTensors(made, FULL, heads(random_strategy, student), CPU)
    outputs, _ = model.token_logprobs(row.batch, row.targets)
    inputs = row.inputs(outputs)
    assert torch.equal(inputs.old_logprobs, outputs.logprobs_n.detach())
    assert not inputs.old_logprobs.requires_grad
    _, stats = FULL(inputs)
    assert bool((stats["ratio"] == 1).all())
