"""What a step asks of the student's trainer: log-probabilities before the update, and the update."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult, TokenScores, TrainItem
from roll_opd.errors import TrainingError
from roll_opd.pipeline.batching import micro_batches, mini_batch_size, mini_batches, rank_shares, undeal
from roll_opd.pipeline.needs import needs_old_logprobs, needs_teacher_logprobs
from roll_opd.pipeline.workers import DetailsKey
from roll_opd.trajectory import DetailsRef, Trajectory, TrajectoryId, check_per_token

logger = logging.getLogger(__name__)

COMPONENTS = ("policy_loss", "divergence_loss", "kl_loss")
"""Parts of the loss that are reported one by one, as means over the sampled tokens."""


class Student:
    """The trainer's cluster, as the loop sees it.

    Args:
        config: a checked config.
        cluster: its processes.
        score_again: has the teachers score trajectories once more.
    """

    def __init__(
        self,
        config: PipelineConfig,
        cluster: Cluster,
        score_again: Callable[[Sequence[Trajectory]], list[Trajectory]],
    ) -> None:
        self.config, self.cluster, self._score_again = config, cluster, score_again
        self.loss = loss_of(config)
        self._needs_old = needs_old_logprobs(config)
        # Whether the update's forward pass has to say what was not asked for before.
        self._tell = not (self._needs_old and needs_teacher_logprobs(config))

    def with_old_logprobs(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Add the log-probabilities of the old policy, from where the config says; or leave them to :meth:`train`."""
        if self.config.opd_args.student_logprob_source == "infer":
            return [dataclasses.replace(t, old_logprobs=t.infer_logprobs) for t in trajectories]
        return self.scored(trajectories) if self._needs_old else trajectories

    def scored(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Add ``old_logprobs`` and entropies from a trainer forward."""
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in trajectories]
        shares = rank_shares(requests, self.cluster.layout.dp_size)
        results: list[ScoreResult] = undeal(self.cluster.call_shares("score", [(share,) for share in shares]))
        out = []
        for trajectory, request, result in zip(trajectories, requests, results, strict=True):
            assert result.checksum == request.checksum, f"scores of {result.id} for {trajectory.id}"
            assert result.logprobs is not None
            check_per_token("old_logprobs", result.logprobs, trajectory)
            out.append(dataclasses.replace(trajectory, old_logprobs=result.logprobs, entropies=result.entropies))
        return out

    def train(self, trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
        """Update the student on the batch.

        Returns:
            The trajectories, with the log-probabilities that only the update has told, and the metrics of the optimizer
            steps, averaged.
        """
        config, cluster = self.config, self.cluster
        seen: set[TrajectoryId] = set()
        for trajectory in trajectories:
            assert trajectory.id not in seen, f"trajectory {trajectory.id} twice in one batch"
            seen.add(trajectory.id)
        ranks = cluster.layout.dp_size
        size = mini_batch_size(config.actor_train, ranks)
        limit = config.response_length or 1
        updates: list[dict[str, float]] = []
        steps = [
            micro_batches(mini_batch, config.actor_train, ranks, config.loss_agg_mode, limit)
            for mini_batch in mini_batches(trajectories, size)
        ]
        if self.details_wanted:
            self._fetch_details(steps)
        said: dict[TrajectoryId, TokenScores] = {}
        for epoch in range(config.ppo_epochs):
            tell = self._tell and epoch == 0
            for shares in steps:
                answers = cluster.call_shares("train_step", [(s, self.loss, tell) for s in shares])
                updates.append(_update_metrics([metrics for metrics, _ in answers]))
                said |= {scores.id: scores for _, told in answers for scores in told}
        if self.details_wanted:
            cluster.call_all("fetch_details", {})  # lets go of them
        metrics = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
        if self._tell:
            trajectories = [_completed(t, said[t.id]) for t in trajectories]
        return trajectories, metrics | {"train/num_updates": float(len(updates))}

    @property
    def details_wanted(self) -> bool:
        """Whether the loss needs more of a teacher than the sampled token's log-probability."""
        return self.loss.divergence is not None and self.loss.divergence.support != "sampled"

    def _fetch_details(self, steps: list[list[list[list[TrainItem]]]]) -> None:
        """Have each rank get the teachers' top-k tables or hidden states that its items need; score lost ones again."""
        needed: list[dict[DetailsKey, DetailsRef]] = [{} for _ in range(self.cluster.layout.dp_size)]
        by_id: dict[TrajectoryId, Trajectory] = {}
        for ranks in steps:
            for refs, rows in zip(needed, ranks, strict=True):
                for item in (item for row in rows for item in row if item.token_weight > 0):
                    trajectory = by_id[item.trajectory.id] = item.trajectory
                    for name in trajectory.divergence_weights:
                        refs[trajectory.id, name] = trajectory.teacher_scores[name].details
        for _ in range(2):
            # Every rank fetches for itself, so each may miss something else than its data-parallel peers.
            calls = [(needed[dp],) for dp in self.cluster.layout.dp_ranks]
            answers: list[list[DetailsKey]] = self.cluster.call_each("fetch_details", calls)
            lost = {key for keys in answers for key in keys}
            if not lost:
                return
            logger.warning("%d teacher scores were lost with the node that held them; scoring again", len(lost))
            names = sorted({name for name, _ in lost})
            again = {t.id: t for t in self._score_again([by_id[name] for name in names])}
            for refs in needed:
                for key in lost & set(refs):
                    refs[key] = again[key[0]].teacher_scores[key[1]].details
        raise TrainingError(f"{len(lost)} teacher scores were lost twice; the object store may be too small")

    def set_teacher_head(self, teacher: str, head: Any) -> None:
        """Give every rank a teacher's output projection, which turns its hidden states into distributions.

        Args:
            teacher: its name.
            head: reference of a :class:`~roll_opd.distributed.strategy.base.HeadWeights`.
        """
        self.cluster.call_all("set_teacher_head", teacher, head)


def _completed(trajectory: Trajectory, said: TokenScores) -> Trajectory:
    """Add what is not known yet of what the update's forward pass said."""
    scores = dict(trajectory.teacher_scores)
    for name, score in scores.items():
        if score.logprobs is None:
            check_per_token(f"logprobs of teacher {name}", said.teachers[name], trajectory)
            scores[name] = dataclasses.replace(score, logprobs=said.teachers[name])
    if trajectory.old_logprobs is None:
        check_per_token("old_logprobs", said.logprobs, trajectory)
        trajectory = dataclasses.replace(trajectory, old_logprobs=said.logprobs, entropies=said.entropies)
    return dataclasses.replace(trajectory, teacher_scores=scores)


def loss_of(config: PipelineConfig) -> Loss:
    """The per-token loss that a config describes."""
    args = config.opd_args
    low, high = (config.pg_clip_low, config.pg_clip_high) if config.use_pg_clip_range else (config.pg_clip,) * 2
    by_turn = isinstance(config, AgenticConfig) and config.ratio_type == "segment"
    ratio: Literal["token", "seq", "turn"] = "turn" if by_turn else config.importance_sampling
    divergence = DivergenceLoss(args.divergence, args.support, args.jsd_beta, args.add_tail, args.log_ratio_clip)
    return Loss(
        # The dual clip's bound is ROLL's 1 + 2 * pg_clip.
        policy=PolicyLoss(low, high, 1.0 + 2.0 * config.pg_clip if config.dual_clip_loss else None, ratio),
        divergence=divergence if config.teachers and args.objective == "direct" else None,
        entropy_coef=config.entropy_loss_coef,
        kl_coef=config.kl_loss_coef if config.needs_reference and config.use_kl_loss else 0.0,
        kl_kind="mse" if config.kl_loss_type == "k2" else "k3",
    )


def _update_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of one optimizer step; sums are global already, maxima are not."""
    first = ranks[0]
    tokens = max(first["sum/tokens"], 1.0)
    return {
        "train/loss": first["loss"],
        "train/grad_norm": first["grad_norm"],
        "train/lr": first["lr"],
        "train/entropy": first["sum/entropy"] / tokens,
        "train/ratio": first["sum/ratio"] / tokens,
        "train/ratio_max": max(r["max/ratio"] for r in ranks),
        "train/clip_fraction": first["sum/clipped"] / tokens,
        "train/old_minus_new_logprob": first["sum/old_minus_new"] / tokens,
    } | {f"train/{name}": first[f"sum/{name}"] / tokens for name in COMPONENTS if f"sum/{name}" in first}
