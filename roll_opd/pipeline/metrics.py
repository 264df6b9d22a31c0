"""What a batch of trajectories says about itself, as flat ``name -> number`` dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from roll_opd.trajectory import Trajectory

POSITION_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384)
"""Lower bounds, in response tokens, of the buckets by which the reverse KL is reported."""


def reverse_kl(trajectories: Iterable[Trajectory], teacher: str | None, source: str = "old_logprobs") -> float:
    """Mean over sampled tokens of ``student - teacher`` log-probability; NaN without any.

    Args:
        trajectories: scored ones; those the teacher did not score are passed over.
        teacher: its name; None: every teacher that scored a trajectory, each token counted once for each.
        source: which of the student's log-probabilities: ``old_logprobs`` or ``infer_logprobs``.
    """
    parts = [_log_ratio(t, name, source) for t in trajectories for name in t.teachers if teacher in (None, name)]
    return _mean(parts)


def opd_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Reverse KL by teacher, tag and position; log-probabilities; advantages. Needs ``old_logprobs``."""
    metrics: dict[str, float] = {}
    names = sorted({name for t in trajectories for name in t.teachers})
    every: list[np.ndarray] = []
    by_tag: dict[str, list[np.ndarray]] = {}
    by_bucket: dict[int, list[np.ndarray]] = {}
    teacher_logprobs: list[np.ndarray] = []
    for name in names:
        for t in trajectories:
            if name not in t.teacher_scores:
                continue
            d = _log_ratio(t, name, "old_logprobs")
            every.append(d)
            teacher_logprobs.append(t.teacher_scores[name].logprobs[t.response_mask])
            by_tag.setdefault(t.tag or "untagged", []).append(d)
            buckets = np.searchsorted(POSITION_BUCKETS, np.arange(len(d)), side="right") - 1
            for bucket in np.unique(buckets):
                by_bucket.setdefault(int(bucket), []).append(d[buckets == bucket])
        metrics[f"opd/reverse_kl/teacher/{name}"] = reverse_kl(trajectories, name)
    if every:
        metrics["opd/reverse_kl"] = _mean(every)
        metrics["opd/teacher_logprob"] = _mean(teacher_logprobs)
    metrics["opd/student_logprob"] = _mean(_sampled(trajectories, "old_logprobs"))
    metrics |= {f"opd/reverse_kl/tag/{tag}": _mean(parts) for tag, parts in sorted(by_tag.items())}
    for bucket, parts in sorted(by_bucket.items()):
        low = POSITION_BUCKETS[bucket]
        high = POSITION_BUCKETS[bucket + 1] if bucket + 1 < len(POSITION_BUCKETS) else None
        metrics[f"opd/reverse_kl/position/{low}-{'' if high is None else high - 1}"] = _mean(parts)
    advantages = np.concatenate(_sampled(trajectories, "advantages"))
    metrics["opd/advantage_mean"] = float(advantages.mean(dtype=np.float64))
    metrics["opd/advantage_std"] = float(advantages.std(dtype=np.float64))
    metrics["opd/advantage_absmax"] = float(np.abs(advantages).max())
    return metrics


def rollout_metrics(trajectories: Sequence[Trajectory], version: int) -> dict[str, float]:
    """Lengths, truncation, staleness, train/infer mismatch, rewards."""
    lengths = np.array([t.response_length for t in trajectories])
    stale = version - np.concatenate([t.weight_version[t.response_mask] for t in trajectories])
    metrics = {
        "rollout/num_trajectories": float(len(trajectories)),
        "rollout/response_tokens": float(lengths.sum()),
        "rollout/response_length": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/truncated": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "rollout/sampled_mass": float(np.nanmean([t.sampled_mass for t in trajectories])),
        "staleness/mean": float(stale.mean()),
        "staleness/max": float(stale.max()),
    }
    if trajectories[0].old_logprobs is not None:
        difference = np.concatenate(_sampled(trajectories, "old_logprobs")) - np.concatenate(
            _sampled(trajectories, "infer_logprobs")
        )
        metrics["mismatch/abs_logprob_diff"] = float(np.abs(difference).mean(dtype=np.float64))
        metrics["mismatch/abs_logprob_diff_max"] = float(np.abs(difference).max())
        # k3 estimate of KL(engine || trainer) on the engine's samples: never negative, low variance.
        metrics["mismatch/kl"] = float((np.expm1(difference.astype(np.float64)) - difference).mean())
    return metrics | reward_metrics(trajectories, "reward")


def reward_metrics(trajectories: Sequence[Trajectory], prefix: str) -> dict[str, float]:
    """Mean reward and accuracy over the graded trajectories, overall and by tag; nothing if none was graded."""
    metrics: dict[str, float] = {}
    graded = [t for t in trajectories if t.reward is not None]
    if graded:
        metrics[f"{prefix}/mean"] = float(np.mean([t.reward for t in graded if t.reward is not None]))
        metrics[f"{prefix}/graded"] = len(graded) / len(trajectories)
    judged = [t for t in graded if t.correct is not None]
    if judged:
        metrics[f"{prefix}/accuracy"] = float(np.mean([bool(t.correct) for t in judged]))
        for tag in sorted({t.tag for t in judged}):
            metrics[f"{prefix}/accuracy/tag/{tag or 'untagged'}"] = float(
                np.mean([bool(t.correct) for t in judged if t.tag == tag])
            )
    return metrics


def _log_ratio(t: Trajectory, teacher: str, source: str) -> np.ndarray:
    return (getattr(t, source) - t.teacher_scores[teacher].logprobs)[t.response_mask]


def _sampled(trajectories: Iterable[Trajectory], name: str) -> list[np.ndarray]:
    return [getattr(t, name)[t.response_mask] for t in trajectories]


def _mean(parts: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean(dtype=np.float64)) if parts else float("nan")
