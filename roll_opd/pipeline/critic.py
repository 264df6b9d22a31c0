"""What a step asks of the critic: values before the signal, an update after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.pipeline.batching import micro_batches, mini_batch_size, mini_batches, rank_shares, undeal
from roll_opd.trajectory import FloatArray, Trajectory, check_per_token


class Critic:
    """The critic's cluster, as the loop sees it.

    Args:
        config: a checked config with a critic.
        cluster: its processes.
    """

    def __init__(self, config: PipelineConfig, cluster: Cluster) -> None:
        assert config.critic is not None
        self.config, self.worker, self.cluster = config, config.critic, cluster

    def with_values(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Add the value before each sampled token, under the weights before the update."""
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in trajectories]
        shares = rank_shares(requests, len(self.cluster))
        values: list[FloatArray] = undeal(self.cluster.call_each("values", [(share,) for share in shares]))
        for trajectory, each in zip(trajectories, values, strict=True):
            check_per_token("values", each, trajectory)
        return [dataclasses.replace(t, values=v) for t, v in zip(trajectories, values, strict=True)]

    def train(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Fit the returns of a batch; return the metrics of the optimizer steps, averaged, and of the old values.

        The loss of an optimizer step is the mean over its sampled tokens, whatever ``loss_agg_mode`` says about the
        student's: a value is wanted at every token alike.
        """
        ranks = len(self.cluster)
        steps = [
            micro_batches(mini_batch, self.worker, ranks, "token-mean", 1)
            for mini_batch in mini_batches(trajectories, mini_batch_size(self.worker, ranks))
        ]
        updates = []
        for _ in range(self.config.ppo_epochs):
            for step in steps:
                calls = [(rows, self.config.value_clip) for rows in step]
                # Sums are global already: every rank gives the same ones.
                updates.append(self.cluster.call_each("train_step", calls)[0])
        metrics = {
            "critic/loss": float(np.mean([u["loss"] for u in updates])),
            "critic/grad_norm": float(np.mean([u["grad_norm"] for u in updates])),
            "critic/lr": float(np.mean([u["lr"] for u in updates])),
            "critic/clip_fraction": float(np.mean([u["sum/clipped"] / max(u["sum/tokens"], 1.0) for u in updates])),
        }
        return metrics | value_metrics(trajectories)


def value_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How well the values that a batch was sampled with predict its returns.

    ``critic/explained_variance = 1 - Var(R - V) / Var(R)`` over the sampled tokens of graded trajectories that no mask
    took out: 1 is perfect, 0 no better than a constant. It is left out where all returns are equal.
    """
    metrics = {"critic/value_mean": float(np.mean(_joined(trajectories, "values")))}
    graded = [t for t in trajectories if t.reward is not None and t.trained]
    if graded:
        values, returns = _joined(graded, "values"), _joined(graded, "returns")
        variance = float(returns.var())
        if variance > 0:
            metrics["critic/explained_variance"] = 1.0 - float((returns - values).var()) / variance
    return metrics


def _joined(trajectories: Sequence[Trajectory], name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([t.sampled(getattr(t, name)) for t in trajectories]).astype(np.float64)
