"""From trajectories to the tensors of one packed row that a loss is computed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roll_opd.algorithms.chunked_head import FullTarget, Head, HeadOutputs, SupportTarget
from roll_opd.algorithms.loss import DivergenceLoss, Loss, LossInputs
from roll_opd.distributed.strategy.base import TokenScores, TrainItem
from roll_opd.distributed.strategy.packed_model import tensor_of
from roll_opd.trajectory import REFERENCE, FloatArray, PackedBatch, RawTensor, SupportScores, Trajectory


class SampledTokenModel(Protocol):
    """A model that is asked about the sampled tokens of a packed row; see :class:`PackedModel`."""

    def token_logprobs(
        self, batch: PackedBatch, divergences: Sequence[FullTarget | SupportTarget]
    ) -> tuple[HeadOutputs, NDArray[np.int64]]:
        """Return log-probability, entropy and divergences of the sampled tokens, and their positions."""
        ...


def row_loss(
    model: SampledTokenModel,
    items: Sequence[TrainItem],
    loss: Loss,
    teacher_heads: Mapping[str, Head],
    device: torch.device,
    said: list[TokenScores] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a packed row's share of the loss, and per-token quantities of those tokens that count.

    The quantities are those of ``loss``, and ``entropy`` and ``tokens``, which is 1 for each. What the forward pass
    says of each trajectory is added to ``said``, unless that is None.
    """
    row = RowTensors(items, loss, teacher_heads, device)
    outputs, _ = model.token_logprobs(row.batch, row.targets)
    if said is not None:
        said += row.token_scores(outputs)
    losses, stats = loss(row.inputs(outputs))
    counted = row.token_weights > 0
    stats = {name: values[counted] for name, values in stats.items()}
    stats["entropy"] = outputs.entropy_n.detach()[counted]
    stats["tokens"] = counted[counted].float()
    return (losses * row.token_weights).sum(), stats


class RowTensors:
    """A packed row and its per-token tensors, ``[n]`` over the sampled tokens in the row's order.

    Args:
        items: the row's trajectories.
        loss: decides what is needed.
        teacher_heads: output projections, for divergences over the whole vocabulary.
        device: where the tensors go.

    Attributes:
        batch: the row.
        token_weights: ``[n]``, each token's weight in the loss.
        targets: what the head must compare the student with; one entry for each name in ``target_names``.
    """

    def __init__(
        self, items: Sequence[TrainItem], loss: Loss, teacher_heads: Mapping[str, Head], device: torch.device
    ) -> None:
        self._items = items
        self.trajectories = [item.trajectory for item in items]
        self.counts = [t.response_length for t in self.trajectories]
        # Tokens of each stretch that shares a policy ratio, where tokens do not have one each.
        self.stretches = (
            [n for t in self.trajectories for n in t.turn_lengths] if loss.policy.ratio == "turn" else self.counts
        )
        self.device = device
        self.batch = PackedBatch.pack(
            [t.tokens for t in self.trajectories], [t.response_mask for t in self.trajectories]
        )
        self.token_weights = self._put(
            np.repeat(np.array([i.token_weight for i in items], dtype=np.float32), self.counts)
        )
        self.teachers = sorted({name for t in self.trajectories for name in t.divergence_weights})
        self.target_names: list[str] = []
        self.targets: list[FullTarget | SupportTarget] = []
        if loss.divergence is not None and loss.divergence.support != "sampled":
            self._announces = not loss.kl_coef and not loss.entropy_coef and self._without_advantages()
            for name in self.teachers:
                target = self._target(name, loss.divergence, teacher_heads, [i.token_weight > 0 for i in items])
                if target is not None:
                    self.target_names.append(name)
                    self.targets.append(target)

    def inputs(self, outputs: HeadOutputs) -> LossInputs:
        """Combine what the model's head gave with what the trajectories carry."""
        divergences = dict(zip(self.target_names, outputs.divergences, strict=True))
        zeros = torch.zeros_like(outputs.logprobs_n)
        return LossInputs(
            logprobs=outputs.logprobs_n,
            entropy=outputs.entropy_n,
            # Where nobody has asked for them before, these are they: the weights have not moved yet.
            old_logprobs=outputs.logprobs_n.detach() if self._unscored else self._of(lambda t: t.old_logprobs),
            advantages=self._of(lambda t: t.advantages),
            policy_weights=self._of(lambda t: t.policy_weights, missing=1.0),
            segments=self._put(np.repeat(np.arange(len(self.stretches)), self.stretches)),
            num_segments=len(self.stretches),
            ref_logprobs=self._scores(REFERENCE) if self._scored_by(REFERENCE) else None,
            teacher_logprobs={name: self._scores(name) for name in self.teachers},
            divergences={name: divergences.get(name, zeros) for name in self.teachers},
            divergence_weights={
                name: self._of(lambda t, name=name: t.divergence_weights.get(name))  # type: ignore[misc]
                for name in self.teachers
            },
        )

    def token_scores(self, outputs: HeadOutputs) -> list[TokenScores]:
        """What the model's head, and the teachers' of whole vocabularies, say of each trajectory."""
        by_teacher = dict(zip(self.target_names, outputs.teacher_logprobs, strict=True))
        columns = [outputs.logprobs_n, outputs.entropy_n, *by_teacher.values()]
        table = torch.stack([c.detach().float() for c in columns]).cpu().numpy()
        parts = np.split(table, np.cumsum(self.counts)[:-1], axis=1)
        scores = []
        for item, t, (logprobs, entropies, *teachers) in zip(self._items, self.trajectories, parts, strict=True):
            # An item that does not count stands in for another, and no teacher was compared with.
            if item.token_weight > 0:
                named = {n: t.spread(v) for n, v in zip(by_teacher, teachers, strict=True) if n in t.divergence_weights}
                scores.append(TokenScores(t.id, t.spread(logprobs), t.spread(entropies), named))
        return scores

    @property
    def _unscored(self) -> bool:
        return all(t.old_logprobs is None for t in self.trajectories)

    def _scored_by(self, name: str) -> bool:
        return any(name in t.teacher_scores for t in self.trajectories)

    def _scores(self, name: str) -> Tensor:
        return self._of(lambda t: t.teacher_scores[name].logprobs if name in t.teacher_scores else None)

    def _of(self, get: Callable[[Trajectory], FloatArray | None], missing: float = 0.0) -> Tensor:
        """Gather a per-token array of every trajectory; ``missing`` stands where a trajectory has none."""
        parts = []
        for trajectory, count in zip(self.trajectories, self.counts, strict=True):
            values = get(trajectory)
            parts.append(np.full(count, missing, np.float32) if values is None else trajectory.sampled(values))
        return self._put(np.concatenate(parts).astype(np.float32))

    def _without_advantages(self) -> bool:
        """Whether no policy gradient reaches a token that counts: the loss is then known to be divergences alone."""
        return not bool(self._of(lambda t: t.advantages)[self.token_weights > 0].any())

    def _weights(self, teacher: str, rows: Tensor) -> Tensor | None:
        """What the divergence of each covered token weighs in the loss; None when the head cannot make use of it."""
        if not self._announces:
            return None
        return (self.token_weights * self._of(lambda t: t.divergence_weights.get(teacher)))[rows]

    def _target(
        self, teacher: str, spec: DivergenceLoss, heads: Mapping[str, Head], counted: Sequence[bool]
    ) -> FullTarget | SupportTarget | None:
        """What ``teacher`` says about the tokens that it covers; None when it covers none of this row."""
        starts = np.cumsum([0, *self.counts])
        covered = [i for i, t in enumerate(self.trajectories) if counted[i] and teacher in t.divergence_weights]
        if not covered:
            return None
        rows = self._put(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in covered]))
        weights = self._weights(teacher, rows)
        details = [self.trajectories[i].teacher_scores[teacher].details for i in covered]
        if spec.support == "full":
            assert all(isinstance(d, RawTensor) for d in details), "hidden states were not fetched"
            hidden = torch.cat([tensor_of(d, self.device) for d in details])
            return FullTarget(spec.divergence, hidden, heads[teacher], spec.jsd_beta, rows, weights)
        assert all(isinstance(d, SupportScores) for d in details), "top-k scores were not fetched"
        widest = max(d.ids.shape[1] for d in details)

        def padded(array: np.ndarray[Any, Any], fill: float) -> np.ndarray[Any, Any]:
            return np.pad(array, ((0, 0), (0, widest - array.shape[1])), constant_values=fill)

        ids = np.concatenate([padded(d.ids, -1) for d in details]).astype(np.int64)
        logprobs = np.concatenate([padded(d.logprobs, -np.inf) for d in details])
        tail = self._put(np.concatenate([d.tail for d in details])) if spec.add_tail else None
        return SupportTarget(spec.divergence, self._put(ids), self._put(logprobs), tail, spec.jsd_beta, rows, weights)

    def _put(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
