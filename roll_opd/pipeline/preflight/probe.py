"""What only the loaded models can tell: a few samples, scored twice by each teacher and once by the trainer.

Nothing here touches the run that follows: the samples belong to a stream of their own, so their seeds and the ids that
derive from it are not those of training, and no model changes its state by being asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from roll_opd.datasets.prompts import Prompt
from roll_opd.pipeline.preflight.finding import Finding
from roll_opd.trajectory import BASE_MODEL, REFERENCE, Trajectory

STREAM = "probe"
"""Part of the samples' ids, from which their seeds derive."""
NUM_PROMPTS = 4
MAX_NEW_TOKENS = 32
LOOK_AHEAD = 256
"""Draws among which a prompt for each scorer is looked for."""

REPEAT = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""Largest difference, in nats, between two scores of the same token that passes, by the scorer's dtype."""
HOPELESS = 100.0
"""Times :data:`REPEAT` from which two scores are no rounding: dropout, other weights, or other tokens."""
NO_SIGNAL = 1e-5
"""Mean |log-ratio| in nats up to which a teacher says what the student says."""
NOISE_SHARE = 0.1
"""Share of the mean |log-ratio| that the noise floor may have."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What is known of a scorer without asking it: its place in the YAML and its dtype."""

    field: str
    dtype: str


def pick_prompts(prompts: Sequence[Prompt], covers: Sequence[Sequence[str]]) -> list[Prompt]:
    """Choose :data:`NUM_PROMPTS` prompts, more if that is what it takes: one for each of ``covers``, then the first.

    Args:
        prompts: the first draws.
        covers: ``tag_included`` of each scorer.
    """
    chosen: list[int] = []
    for tags in covers:
        if any(not tags or prompts[i].row.tag in tags for i in chosen):
            continue
        chosen += [i for i, p in enumerate(prompts) if i not in chosen and (not tags or p.row.tag in tags)][:1]
    chosen += [i for i in range(len(prompts)) if i not in chosen][: max(0, NUM_PROMPTS - len(chosen))]
    return [prompts[i] for i in sorted(chosen)]


@dataclasses.dataclass(frozen=True)
class NoiseFloor:
    """Difference between the student's two engines on the same tokens, in nats.

    Attributes:
        mean: mean of |trainer - engine| over the sampled tokens.
        max: its largest.
        tokens: how many they are.
    """

    mean: float
    max: float
    tokens: int


def noise_floor(trajectories: Sequence[Trajectory]) -> NoiseFloor:
    """Compare ``old_logprobs`` (a trainer forward) with ``infer_logprobs`` (the engine that sampled)."""
    gaps = np.concatenate([np.abs(t.sampled(_old(t)) - t.sampled(t.infer_logprobs)) for t in trajectories])
    return NoiseFloor(float(gaps.mean()), float(gaps.max()), len(gaps))


def repeat_gap(first: Sequence[Trajectory], again: Sequence[Trajectory], scorer: str) -> float | None:
    """Largest |difference| in nats between two scores of the same tokens; None where ``scorer`` saw none."""
    gaps = [
        np.abs(a.sampled(a.said_by(scorer)) - b.sampled(b.said_by(scorer))).max()
        for a, b in zip(first, again, strict=True)
        if scorer in a.teacher_scores
    ]
    return float(max(gaps)) if gaps else None


def log_ratio(trajectories: Sequence[Trajectory], scorer: str) -> float | None:
    """Mean |teacher - student| in nats over the sampled tokens that ``scorer`` saw; None without any."""
    gaps: list[NDArray[np.float32]] = [
        np.abs(t.sampled(t.said_by(scorer)) - t.sampled(_old(t))) for t in trajectories if scorer in t.teacher_scores
    ]
    return float(np.concatenate(gaps).mean()) if gaps else None


def _old(trajectory: Trajectory) -> NDArray[np.float32]:
    assert trajectory.old_logprobs is not None, "the probe scores with the trainer first"
    return trajectory.old_logprobs


def judge(
    first: Sequence[Trajectory],
    again: Sequence[Trajectory],
    scorers: Mapping[str, Scorer],
    *,
    pure: bool,
    extrapolates: bool = False,
) -> Iterator[Finding]:
    """Turn the probe's samples into findings.

    Args:
        first: sampled, scored by teachers and, as ``old_logprobs``, by the trainer.
        again: the same, scored by the teachers once more.
        scorers: name -> what is known of each.
        pure: the teachers are the only signal.
        extrapolates: a base model makes a signal even of a teacher that equals the student.
    """
    for name, scorer in scorers.items():
        gap = repeat_gap(first, again, name)
        if gap is None:
            yield Finding("skipped", scorer.field, f"repeated scores: no prompt of the probe is {name!r}'s")
        else:
            yield _repeat(name, scorer, gap)
    ratios = {
        name: ratio
        for name in scorers
        if name not in (REFERENCE, BASE_MODEL) and (ratio := log_ratio(first, name)) is not None
    }
    silent = [name for name, ratio in ratios.items() if ratio <= NO_SIGNAL]
    for name in silent if not extrapolates else ():
        yield _silent(name, scorers[name], ratios[name], stops=pure and len(silent) == len(ratios))
    floor = noise_floor(first)
    told = f"trainer and engine differ by {floor.mean:.2g} nats a token on average, {floor.max:.2g} at most"
    loud = {name: ratio for name, ratio in ratios.items() if name not in silent and floor.mean > NOISE_SHARE * ratio}
    if loud:
        name = min(loud, key=lambda n: loud[n])
        problem = f"{told}, more than a tenth of the {loud[name]:.2g} nats between teacher {name!r} and student"
        fix = "keep opd_args.student_logprob_source: train, and give the student's two roles one dtype"
        yield Finding("warning", "probe/noise_floor", f"{problem}; {fix}")
    else:
        against = [f"{ratio:.2g} to {name!r}" for name, ratio in ratios.items()]
        yield Finding("ok", "probe/noise_floor", told + (f"; log-ratio {', '.join(against)}" if against else ""))


def _repeat(name: str, scorer: Scorer, gap: float) -> Finding:
    limit = REPEAT[scorer.dtype]
    told = f"{name!r} scored the same tokens twice, {gap:.2g} nats apart at most"
    if gap <= limit:
        return Finding("ok", scorer.field, told)
    wrong = f"{told}; {limit:g} is the limit in {scorer.dtype}"
    if gap <= HOPELESS * limit:
        return Finding("warning", scorer.field, f"{wrong}, so a resumed run will not repeat exactly")
    fix = "use a backend and a model that give the same score for the same tokens"
    return Finding("error", scorer.field, f"{wrong}, and this is no rounding; {fix}")


def _silent(name: str, scorer: Scorer, ratio: float, stops: bool) -> Finding:
    told = f"teacher {name!r} gives the student's own probabilities (mean |log-ratio| {ratio:.2g} nats on the probe)"
    if not stops:
        return Finding("warning", scorer.field, f"{told}; its term has no effect until the student moves")
    fix = "name another model, or set preflight: off for a control run"
    return Finding("error", scorer.field, f"{told}: the teacher equals the student and the signal is zero; {fix}")
