"""What the teacher's opinion is turned into: an advantage, a reward, or a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_opd.configs.field_spec import ranged

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Support = Literal["sampled", "teacher_topk", "student_topk", "union_topk", "full"]


@dataclass(frozen=True)
class OPDArguments:
    """The distillation objective. Combinations whose gradient is not the one they name are refused at load."""

    objective: Literal["policy_gradient", "direct"] = "policy_gradient"
    """`policy_gradient`: the teacher's score is the advantage of the sampled token. `direct`: the divergence is the
    loss and is back-propagated."""
    divergence: Divergence = "reverse_kl"
    """Divergence between student and teacher at each position; reverse KL is the mode-seeking one that OPD uses."""
    support: Support = "sampled"
    """Tokens the divergence is taken over: the sampled one, a top-k set, or the whole vocabulary."""
    top_k: int = ranged(32, ge=1)
    """Size of the set for the `*_topk` supports."""
    add_tail: bool = True
    """The mass outside a top-k set becomes one more bucket, so that the value is never negative."""
    jsd_beta: float = ranged(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence, which fades to 0 towards either end."""
    log_ratio_clip: float | None = ranged(None, gt=0)
    """Bound on the absolute log-ratio of a token, in nats; null: no bound."""
    apply_to: Literal["advantage", "reward"] = "advantage"
    """Mixed mode: the teacher's term joins the finished advantage, or the token's reward before the estimator."""
    student_logprob_source: Literal["train", "infer"] = "train"
    """Log-probabilities of the old policy: a trainer forward, or what the sampling engine reported."""
    teacher_weighting: Literal["sum", "mean"] = "sum"
    """How several teachers of one sample combine; `mean` divides by the number that matched."""
    uncovered: Literal["error", "skip", "reward_only"] = "error"
    """What happens to a tag that no teacher covers; `reward_only` needs an external reward."""
    trust_region: float | None = ranged(None, gt=0)
    """Leave tokens out of the teacher's term whose absolute log-ratio is above this, in nats; null: none."""
    entropy_keep: float | None = ranged(None, gt=0, le=1)
    """Share of a batch's tokens that the teacher's term keeps: those where the student is least sure; null: all."""
    position_weight: Literal["none", "linear", "exponential", "prefix"] = "none"
    """How the teacher's term fades with the position in the response (in an episode: in the turn); `prefix` keeps the
    first tokens alone."""
    position_scale: float = ranged(256.0, gt=0)
    """Tokens over which `position_weight` fades (exponential: to 1/e; linear: to 0; prefix: how many are kept)."""
    turn_weight: Literal["none", "linear", "exponential", "prefix"] = "none"
    """Agentic: how the teacher's term fades with the turn of the episode; `prefix` keeps the first turns alone."""
    turn_scale: float = ranged(8.0, gt=0)
    """Turns over which `turn_weight` fades, as `position_scale` says for tokens."""
    coef_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How every teacher's coefficient moves over the run, from itself to `coef_end` times itself."""
    coef_end: float = ranged(0.0, ge=0)
    """Factor on the coefficients at the end of the run, for schedules other than `constant`."""
    base_model: str | None = None
    """Model that the teacher was made from, for reward extrapolation; null: off. It runs as the first teacher does, but
    without its adapter."""
    extrapolation: float = ranged(1.0, gt=0)
    """Factor on what the teacher learned beyond `base_model`; 1 is plain distillation, above 1 goes beyond it."""
