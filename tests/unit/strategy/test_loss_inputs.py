"""From trajectories to the tensors of a packed row: every number on its token, and nothing from whom nothing counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from roll_opd.algorithms.chunked_head import FullTarget, Head, HeadOutputs, SupportTarget
from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.distributed.strategy.base import TrainItem
from roll_opd.distributed.strategy.loss_inputs import RowTensors
from roll_opd.distributed.strategy.packed_model import raw_of
from roll_opd.trajectory import REFERENCE, SupportScores, TeacherScores, Trajectory, TrajectoryId, Turn

CPU = torch.device("cpu")
PLAIN = PolicyLoss(None, None)
# Which tokens of three sequences were sampled; the second one's response is interrupted. Six in all.
MASKS = [[0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1]]
COUNTS = [2, 3, 1]
FULL = Loss(PLAIN, DivergenceLoss("jsd", "full", jsd_beta=0.3))
TOPK = Loss(PLAIN, DivergenceLoss("forward_kl", "union_topk", jsd_beta=0.3))
SAMPLED = Loss(PLAIN, DivergenceLoss(support="sampled"))


def numbered(i: int, start: float) -> np.ndarray:
    """``start + 10 i + position``; NaN where nothing was sampled."""
    mask = np.array(MASKS[i], dtype=bool)
    return np.where(mask, start + 10 * i + np.arange(len(mask)), np.nan).astype(np.float32)


def trajectory(i: int, **fields) -> Trajectory:
    mask = np.array(MASKS[i], dtype=bool)
    values = {
        "id": TrajectoryId(i, 0),
        "tag": "",
        "tokens": (100 * i + np.arange(len(mask))).astype(np.int32),
        "response_mask": mask,
        "infer_logprobs": numbered(i, 0),
        "weight_version": np.where(mask, 0, -1).astype(np.int32),
        "old_logprobs": numbered(i, 1000),
        "advantages": numbered(i, 2000),
    }
    return Trajectory(**(values | fields))


def row(*trajectories: Trajectory, loss: Loss = SAMPLED, heads=None, weights=(0.5, 0.25, 2.0)) -> RowTensors:
    items = [TrainItem(t, w) for t, w in zip(trajectories, weights, strict=False)]
    return RowTensors(items, loss, heads or {}, CPU)


def outputs(n: int, *divergences: torch.Tensor) -> HeadOutputs:
    return HeadOutputs(torch.full((n,), -1.0), torch.full((n,), 0.5), divergences)


def numbers(start: float) -> list[float]:
    """:func:`numbered` on the sampled tokens of all three sequences."""
    return [start + x for x in (2, 3, 11, 13, 14, 21)]


def test_every_number_lands_on_its_token() -> None:
    made = row(*(trajectory(i, policy_weights=numbered(i, 3000)) for i in range(3)))
    assert made.batch.tokens.tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 104, 200, 201]
    assert made.batch.tokens[made.batch.response_mask].tolist() == [2, 3, 101, 103, 104, 201]
    assert made.token_weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 2.0]
    x = made.inputs(outputs(6))
    assert x.old_logprobs.tolist() == numbers(1000)
    assert x.advantages.tolist() == numbers(2000)
    assert x.policy_weights.tolist() == numbers(3000)
    assert x.segments.tolist() == [0, 0, 1, 1, 1, 2] and x.segments.dtype == torch.int64
    assert x.num_segments == 3
    assert x.logprobs.tolist() == [-1.0] * 6 and x.entropy.tolist() == [0.5] * 6
    assert x.ref_logprobs is None and x.teacher_logprobs == x.divergences == x.divergence_weights == {}
    for values in (x.old_logprobs, x.advantages, x.policy_weights, made.token_weights):
        assert values.dtype == torch.float32


def test_what_a_trajectory_does_not_carry() -> None:
    """Without policy weights every token counts once; without advantages there is nothing to push."""
    bare = trajectory(0, old_logprobs=None, advantages=None)
    x = row(bare, trajectory(1, policy_weights=numbered(1, 0))).inputs(outputs(5))
    assert x.policy_weights.tolist() == [1.0, 1.0, 11.0, 13.0, 14.0]
    assert x.old_logprobs.tolist()[:2] == x.advantages.tolist()[:2] == [0.0, 0.0]


def test_a_ratio_by_turn_is_over_the_turns_of_an_episode() -> None:
    turns = (Turn(0, 1, 2, "", 0.0, "s"), Turn(1, 3, 5, "", 1.0, "t"))
    items = [trajectory(0), trajectory(1, turns=turns), trajectory(2)]
    x = row(*items, loss=Loss(PolicyLoss(None, None, ratio="turn"))).inputs(outputs(6))
    assert x.segments.tolist() == [0, 0, 1, 2, 2, 3] and x.num_segments == 4
    assert row(*items).inputs(outputs(6)).segments.tolist() == [0, 0, 1, 1, 1, 2]


def scored(i: int, *names: str, details=None, **fields) -> Trajectory:
    scores = {name: TeacherScores(numbered(i, 100 * ord(name[0])), (details or {}).get(name)) for name in names}
    weights = {name: numbered(i, 0) for name in names if name != REFERENCE}
    return trajectory(i, teacher_scores=scores, divergence_weights=weights, **fields)


def test_scores_of_several_teachers_and_of_none() -> None:
    """A teacher that does not cover a sequence has weight 0 there."""
    x = row(scored(0, "a"), scored(1), scored(2, "b", "a")).inputs(outputs(6))
    a, b = 100 * ord("a"), 100 * ord("b")
    assert x.teacher_logprobs["a"].tolist() == [a + 2, a + 3, 0, 0, 0, a + 21]
    assert x.teacher_logprobs["b"].tolist() == [0, 0, 0, 0, 0, b + 21]
    assert x.divergence_weights["a"].tolist() == [2, 3, 0, 0, 0, 21]
    assert x.divergence_weights["b"].tolist() == [0, 0, 0, 0, 0, 21]
    assert list(x.divergence_weights) == ["a", "b"]


def test_scores_without_a_weight_are_no_divergence() -> None:
    """The policy-gradient objective has the teacher in the advantages; its scores travel along."""
    t = dataclasses.replace(scored(0, "a"), divergence_weights={})
    x = row(t).inputs(outputs(2))
    assert x.teacher_logprobs == x.divergence_weights == {}


def test_the_reference_is_no_teacher() -> None:
    r = 100 * ord("r")
    x = row(scored(0, REFERENCE), scored(1, REFERENCE), loss=Loss(PLAIN, kl_coef=0.1)).inputs(outputs(5))
    assert x.ref_logprobs.tolist() == [r + 2, r + 3, r + 11, r + 13, r + 14]
    assert x.divergence_weights == {}


def test_a_teachers_own_context_does_not_shift_its_scores() -> None:
    """Scores are on the student's positions by now; the context only says what the teacher saw."""
    plain = row(scored(0, "a"), scored(1, "a")).inputs(outputs(5))
    seen = row(scored(0, "a", contexts={"a": (7,) * 40}), scored(1, "a")).inputs(outputs(5))
    assert seen.teacher_logprobs["a"].tolist() == plain.teacher_logprobs["a"].tolist()


# ---- what is compared at the head --------------------------------------------------------------------------------


def hidden(i: int, size: int = 3):
    """Row ``k`` of sequence ``i`` is filled with ``10 i + k``."""
    values = 10.0 * i + torch.arange(COUNTS[i], dtype=torch.float32)
    return raw_of(values[:, None].expand(-1, size))


def support(i: int, width: int) -> SupportScores:
    n = COUNTS[i]
    ids = (10 * i + np.arange(n * width).reshape(n, width)).astype(np.int32)
    return SupportScores(ids, -ids.astype(np.float32) - 1, -0.5 - np.arange(n, dtype=np.float32))


def test_a_full_target_speaks_about_the_covered_tokens() -> None:
    heads = {"a": Head(torch.ones(4, 3)), "b": Head(torch.ones(4, 5))}
    made = row(
        scored(0, "a", details={"a": hidden(0)}),
        scored(1, "b", details={"b": hidden(1, 5)}),
        scored(2, "a", "b", details={"a": hidden(2), "b": hidden(2, 5)}),
        loss=FULL,
        heads=heads,
    )
    assert made.target_names == ["a", "b"]
    a, b = made.targets
    assert isinstance(a, FullTarget) and (a.divergence, a.jsd_beta, a.head) == ("jsd", 0.3, heads["a"])
    assert a.rows_m.tolist() == [0, 1, 5] and a.rows_m.dtype == torch.int64
    assert a.hidden_mH.tolist() == [[0.0] * 3, [1.0] * 3, [20.0] * 3]
    assert b.head is heads["b"] and b.rows_m.tolist() == [2, 3, 4, 5]
    assert b.hidden_mH[:, 0].tolist() == [10.0, 11.0, 12.0, 20.0] and b.hidden_mH.shape == (4, 5)
    x = made.inputs(outputs(6, torch.arange(6.0), 10 + torch.arange(6.0)))
    assert x.divergences["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert x.divergences["b"].tolist() == [10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("add_tail", [True, False])
def test_a_support_target_is_filled_to_the_widest_set(add_tail) -> None:
    loss = Loss(PLAIN, dataclasses.replace(TOPK.divergence, add_tail=add_tail))
    made = row(
        scored(0, "a", details={"a": support(0, 2)}), scored(1), scored(2, "a", details={"a": support(2, 3)}), loss=loss
    )
    (target,) = made.targets
    assert isinstance(target, SupportTarget) and (target.divergence, target.jsd_beta) == ("forward_kl", 0.3)
    assert target.rows_m.tolist() == [0, 1, 5]
    assert target.ids_mK.tolist() == [[0, 1, -1], [2, 3, -1], [20, 21, 22]] and target.ids_mK.dtype == torch.int64
    none = float("-inf")
    assert target.logprobs_mK.tolist() == [[-1, -2, none], [-3, -4, none], [-21, -22, -23]]
    assert (target.tail_m.tolist() if add_tail else target.tail_m) == ([-0.5, -1.5, -0.5] if add_tail else None)


@pytest.mark.parametrize("loss", [SAMPLED, Loss(PLAIN)])
def test_nothing_is_compared_at_the_head_unless_the_loss_says_so(loss) -> None:
    made = row(scored(0, "a", details={"a": hidden(0)}), loss=loss)
    assert made.targets == [] and made.target_names == []


def test_a_row_that_a_teacher_does_not_cover_at_all() -> None:
    """Of two teachers one is absent here, and its divergence 0."""
    made = row(scored(0, "a", details={"a": hidden(0)}), scored(1), loss=FULL, heads={"a": Head(torch.ones(4, 3))})
    assert made.target_names == ["a"]
    nobody = row(scored(0), scored(1), loss=FULL)
    assert nobody.targets == [] and nobody.inputs(outputs(5)).divergence_weights == {}


@pytest.mark.parametrize("loss", [FULL, TOPK, SAMPLED])
def test_idle_items_need_no_details_and_count_for_nothing(loss) -> None:
    """An item of weight 0 keeps a rank in step; nobody fetched its teacher's details."""
    details = {"a": hidden(0) if loss is FULL else support(0, 2)}
    items = [TrainItem(scored(0, "a", details=details), 1.0), TrainItem(scored(1, "a"), 0.0)]
    made = RowTensors(items, loss, {"a": Head(torch.ones(4, 3))}, CPU)
    if loss is not SAMPLED:
        assert made.targets[0].rows_m.tolist() == [0, 1]
    assert made.token_weights.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    idle = RowTensors([TrainItem(scored(1, "a"), 0.0)], loss, {}, CPU)
    assert idle.targets == []
    losses, _ = loss(idle.inputs(outputs(3)))
    assert torch.isfinite(losses).all() and (losses * idle.token_weights).sum() == 0


@pytest.mark.parametrize(("loss", "what"), [(FULL, "hidden states"), (TOPK, "top-k scores")])
@pytest.mark.parametrize("found", [None, "other"])
def test_details_that_were_not_fetched_are_noticed(loss, what, found) -> None:
    other = {"a": support(0, 2) if loss is FULL else hidden(0)} if found else {}
    with pytest.raises(AssertionError, match=what):
        row(scored(0, "a", details=other), loss=loss, heads={"a": Head(torch.ones(4, 3))})
