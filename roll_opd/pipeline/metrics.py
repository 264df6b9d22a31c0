"""What a batch of trajectories says about itself, as flat ``name -> number`` dictionaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from roll_opd.trajectory import Trajectory, TrajectoryId, Turn

POSITION_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384)
"""Lower bounds, in response tokens, of the buckets by which the reverse KL is reported."""
FEWEST_TURNS = 8
"""Turns from which on a tag without any valid action is worth a warning."""
UNTAGGED = "untagged"
"""What stands for an empty tag in the names of metrics."""


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
            teacher_logprobs.append(t.said_by(name)[t.response_mask])
            by_tag.setdefault(t.tag or UNTAGGED, []).append(d)
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
    """Lengths, truncation, staleness, train/infer mismatch, rewards; of episodes also what is measured of those."""
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
    metrics |= reward_metrics(trajectories, "reward")
    if any(t.turns for t in trajectories):
        metrics |= episode_metrics(trajectories, "episode") | environment_metrics(trajectories)
    return metrics


def episodes_of(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    """Put the segments of each episode together, in order; a single response is an episode of one segment.

    An id that comes again begins another episode: several teachers may answer the same prompt in validation.
    """
    groups: dict[tuple[str, int, int, int], list[Trajectory]] = {}
    times: Counter[TrajectoryId] = Counter()
    for t in trajectories:
        groups.setdefault((t.id.stream, t.id.draw, t.id.sample, times[t.id]), []).append(t)
        times[t.id] += 1
    return [sorted(group, key=lambda t: t.id.segment) for group in groups.values()]


def reward_metrics(trajectories: Sequence[Trajectory], prefix: str) -> dict[str, float]:
    """Mean reward and accuracy over the graded episodes, overall and by tag; nothing if none was graded."""
    metrics: dict[str, float] = {}
    episodes = [segments[0] for segments in episodes_of(trajectories)]
    graded = [t for t in episodes if t.reward is not None]
    if graded:
        metrics[f"{prefix}/mean"] = float(np.mean([t.reward for t in graded if t.reward is not None]))
        metrics[f"{prefix}/graded"] = len(graded) / len(episodes)
    judged = [t for t in graded if t.correct is not None]
    if judged:
        by_tag = _by_tag((t.tag, bool(t.correct)) for t in judged)
        metrics |= _overall_and_by_tag(f"{prefix}/accuracy", by_tag)
    return metrics


def episode_metrics(trajectories: Sequence[Trajectory], prefix: str) -> dict[str, float]:
    """Success, score, turns, segments and valid actions of episodes in environments, each counted once.

    A figure that no episode gives (success without verdicts, valid actions where no environment tells) is left out.
    """
    episodes = episodes_of(trajectories)
    turns = [turn for t in trajectories for turn in t.turns]
    success = _by_tag((segments[0].tag, segments[0].correct) for segments in episodes)
    scores = _by_tag((segments[0].tag, segments[0].reward) for segments in episodes)
    valid = _by_tag((t.tag, turn.is_valid) for t in trajectories for turn in t.turns)
    metrics = {
        f"{prefix}/num_episodes": float(len(episodes)),
        f"{prefix}/turns": len(turns) / len(episodes),
        f"{prefix}/segments": len(trajectories) / len(episodes),
    }
    if turns:
        metrics[f"{prefix}/tokens_per_turn"] = sum(t.response_length for t in trajectories if t.turns) / len(turns)
    return (
        metrics
        | _overall_and_by_tag(f"{prefix}/success_rate", success)
        | _overall_and_by_tag(f"{prefix}/score", scores)
        | _overall_and_by_tag(f"{prefix}/valid_action_rate", valid)
    )


def environment_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What environments themselves measured, ``env/<tag>/<name>``: means over the episodes that have the figure.

    Reads ``extras["env_metrics"]`` (name -> number, of the whole episode) of each episode's first segment.
    """
    values: dict[str, list[float]] = {}
    for first, *_ in episodes_of(trajectories):
        for name, value in first.extras.get("env_metrics", {}).items():
            values.setdefault(f"env/{first.tag or UNTAGGED}/{name}", []).append(float(value))
    return {name: float(np.mean(values[name])) for name in sorted(values)}


def invalid_action_reports(
    trajectories: Sequence[Trajectory], decode: Callable[[list[int]], str]
) -> dict[str, str | None]:
    """Tell which environments never understood the student.

    Args:
        trajectories: a batch's.
        decode: token ids to text.

    Returns:
        tag -> a warning with samples of what the student wrote, or None where an action was valid. Tags with fewer than
        :data:`FEWEST_TURNS` turns, and those whose environment does not tell, are left out.
    """
    turns: dict[str, list[tuple[Trajectory, Turn]]] = {}
    for t in trajectories:
        for turn in t.turns:
            if turn.is_valid is not None:
                turns.setdefault(t.tag, []).append((t, turn))
    reports: dict[str, str | None] = {}
    for tag, judged in turns.items():
        if any(turn.is_valid for _, turn in judged):
            reports[tag] = None
        elif len(judged) >= FEWEST_TURNS:
            texts = dict.fromkeys(decode(t.tokens[turn.start : turn.end].tolist()) for t, turn in judged)
            samples = "; ".join(repr(text if len(text) <= 160 else text[:157] + "...") for text in list(texts)[:3])
            reports[tag] = (
                f"{tag or UNTAGGED}: the environment understood 0 of {len(judged)} actions (0%). Does the prompt ask "
                f"for the form that the environment's action pattern looks for? The student wrote {samples}"
            )
    return reports


def _by_tag(values: Iterable[tuple[str, float | None]]) -> dict[str, list[float]]:
    """Sort values by tag; those that are None are left out."""
    by_tag: dict[str, list[float]] = {}
    for tag, value in values:
        if value is not None:
            by_tag.setdefault(tag or UNTAGGED, []).append(float(value))
    return by_tag


def _overall_and_by_tag(name: str, by_tag: dict[str, list[float]]) -> dict[str, float]:
    """Means: of all values under ``name``, and under ``name/tag/<tag>``; nothing without values."""
    if not by_tag:
        return {}
    every = [value for values in by_tag.values() for value in values]
    return {name: float(np.mean(every))} | {f"{name}/tag/{tag}": float(np.mean(by_tag[tag])) for tag in sorted(by_tag)}


def _log_ratio(t: Trajectory, teacher: str, source: str) -> np.ndarray:
    return (getattr(t, source) - t.said_by(teacher))[t.response_mask]


def _sampled(trajectories: Iterable[Trajectory], name: str) -> list[np.ndarray]:
    return [getattr(t, name)[t.response_mask] for t in trajectories]


def _mean(parts: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean(dtype=np.float64)) if parts else float("nan")
