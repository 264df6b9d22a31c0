"""The training signal: what every sampled token of a batch is pushed by, and how hard.

::

    rewards ──► clip, normalise, group baseline ──► token rewards ──► returns ──► whitening ──► A_RL ──┐
                                                        ▲                                              ▼
    reference ──► KL penalty ───────────────────────────┤             apply_to: reward            A_t = A_RL + A_teacher
    teachers ──► d ──► score * weights ─────────────────┴──────────────────────────────────────────────┘
                  └──► divergence weights (objective: direct)         apply_to: advantage

Pure distillation is this without the upper line, plain RLVR without the lower one. Weights of the teacher's term are
its coefficient, its schedule and the stabilisers; they never touch ``A_RL``, and whitening never touches them unless
``apply_to: reward`` asks for it. The math is in :mod:`roll_opd.algorithms`; the upper line of episodes of several turns
is in :mod:`roll_opd.pipeline.agent_signal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roll_opd.algorithms.advantages import AdvantageSettings, final_advantages, rl_advantages
from roll_opd.algorithms.agent_advantages import AgentAdvantageSettings
from roll_opd.algorithms.corrections import correction_weights, filter_mask
from roll_opd.algorithms.divergences import policy_gradient_score
from roll_opd.algorithms.kl import AdaptiveKLController, FixedKLController, KLController, kl_estimate
from roll_opd.algorithms.reward_shaping import RunningMoments, difficulty_mask, error_max_len_mask, max_len_mask
from roll_opd.algorithms.stabilisers import (
    entropy_gate,
    extrapolated_log_ratio,
    position_weight,
    scheduled_coef,
    trust_region_gate,
    turn_weight,
)
from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.errors import TrainingError
from roll_opd.pipeline.agent_signal import agent_settings, episode_advantages
from roll_opd.pipeline.trajectory_stream import MOST_UNGRADED
from roll_opd.trajectory import BASE_MODEL, REFERENCE, Trajectory


class Signal:
    """Adds advantages, policy weights and divergence weights to trajectories.

    Args:
        config: a checked config.

    Attributes:
        uses_rewards: whether training must wait for the batch's rewards.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.uses_rewards = config.mode != "pure_opd"
        self._settings = agent_settings(config) if isinstance(config, AgenticConfig) else _settings(config)
        self._running = RunningMoments()
        self._kl: KLController = (
            FixedKLController(config.init_kl_coef)
            if config.target_kl is None or not (config.needs_reference and config.add_token_level_kl)
            else AdaptiveKLController(config.init_kl_coef, config.target_kl, config.kl_horizon)
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"running": self._running.state(), "kl": self._kl.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self._running.load(state["running"])
        self._kl.load(state["kl"])

    def __call__(self, trajectories: Sequence[Trajectory], step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Return the trajectories, ready to be trained on, and what there is to report.

        Args:
            trajectories: with scores, ``old_logprobs`` unless the update will tell them (see
                :mod:`~roll_opd.pipeline.needs`), and (unless distillation is pure) rewards.
            step: for schedules.

        Raises:
            TrainingError: most of a batch that trains on rewards has none.
        """
        metrics: dict[str, float] = {}
        teacher_terms, divergence_weights = self._teacher_terms(trajectories, step, metrics)
        keep = self._kept(trajectories, metrics)
        advantages = [torch.zeros(t.response_length) for t in trajectories]
        returns: list[Tensor] | None = None
        to_reward = self.uses_rewards and bool(self.config.teachers) and self.config.opd_args.apply_to == "reward"
        if self.uses_rewards:
            penalties = self._penalties(trajectories, teacher_terms if to_reward else None, metrics)
            advantages, returns = self._rl_advantages(trajectories, penalties, keep, metrics)
        advantages, clipped = final_advantages(
            advantages, None if to_reward else teacher_terms, self.config.advantage_clip
        )
        metrics |= {f"opd/{name}": value for name, value in clipped.items()}
        policy_weights = self._policy_weights(trajectories, metrics)
        out = []
        for i, t in enumerate(trajectories):
            out.append(
                replace(
                    t,
                    advantages=t.spread(advantages[i].numpy()),
                    returns=None if returns is None else t.spread(returns[i].numpy()),
                    trained=keep[i],
                    policy_weights=t.spread(policy_weights[i].numpy()),
                    divergence_weights={n: t.spread(weight.numpy()) for n, weight in divergence_weights[i].items()},
                )
            )
        return out, metrics

    # ---- the teachers --------------------------------------------------------------------------------------------

    def _teacher_terms(
        self, trajectories: Sequence[Trajectory], step: int, metrics: dict[str, float]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return ``sum_i w_i A_i`` of every token, and for ``objective: direct`` each teacher's weights instead."""
        args = self.config.opd_args
        if not self.config.teachers:
            return [torch.zeros(t.response_length) for t in trajectories], [{} for _ in trajectories]
        schedule = scheduled_coef(args.coef_schedule, 1.0, args.coef_end, step, self.config.max_steps)
        metrics["opd/coef_factor"] = schedule
        gates = self._shared_weights(trajectories)
        direct = args.objective == "direct"
        terms: list[Tensor] = []
        weights: list[dict[str, Tensor]] = []
        kept = []
        for t, gate in zip(trajectories, gates, strict=True):
            names = t.teachers
            share = 1.0 / len(names) if names and args.teacher_weighting == "mean" else 1.0
            term = torch.zeros(t.response_length)
            by_teacher: dict[str, Tensor] = {}
            for name in names:
                weight = gate * (self.config.teacher_coef(name) * share * schedule)
                if direct and args.trust_region is None:
                    by_teacher[name] = weight
                    continue
                d = self._log_ratio(t, name)
                if args.trust_region is not None:
                    inside = trust_region_gate(d, args.trust_region)
                    kept.append(inside)
                    weight = weight * inside
                if direct:
                    by_teacher[name] = weight
                else:
                    clipped = d if args.log_ratio_clip is None else d.clamp(-args.log_ratio_clip, args.log_ratio_clip)
                    term = term + weight * policy_gradient_score(args.divergence, clipped, args.jsd_beta)
            terms.append(term)
            weights.append(by_teacher)
        if kept:
            metrics["opd/trust_region_kept"] = float(torch.cat(kept).mean())
        return terms, weights

    def _log_ratio(self, t: Trajectory, name: str) -> Tensor:
        """``d_t`` against one teacher, ``[n]``; with a base model, against the extrapolated one."""
        assert t.old_logprobs is not None
        student, teacher = _sampled(t, t.old_logprobs), _sampled(t, t.said_by(name))
        if self.config.opd_args.base_model is None:
            return student - teacher
        base = _sampled(t, t.said_by(BASE_MODEL))
        return extrapolated_log_ratio(student, teacher, base, self.config.opd_args.extrapolation)

    def _shared_weights(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """Stabilisers that do not depend on the teacher, ``[n]`` each."""
        args = self.config.opd_args
        kind, scale = args.position_weight, args.position_scale
        weights = [torch.cat([position_weight(n, kind, scale) for n in t.turn_lengths]) for t in trajectories]
        if args.turn_weight != "none":
            for i, t in enumerate(trajectories):
                turn_of = torch.tensor([turn.index for turn in t.turns] or [0]).repeat_interleave(
                    torch.tensor(t.turn_lengths)
                )
                weights[i] = weights[i] * turn_weight(turn_of, args.turn_weight, args.turn_scale)
        if args.entropy_keep is not None:
            entropies = []
            for t in trajectories:
                assert t.entropies is not None, "the entropy gate needs the trainer's entropies"
                entropies.append(_sampled(t, t.entropies))
            weights = [w * g for w, g in zip(weights, entropy_gate(entropies, args.entropy_keep), strict=True)]
        return weights

    # ---- the rewards ---------------------------------------------------------------------------------------------

    def _penalties(
        self, trajectories: Sequence[Trajectory], teacher_terms: list[Tensor] | None, metrics: dict[str, float]
    ) -> list[Tensor] | None:
        """What is subtracted from each token's reward: KL to the reference, or the teachers' log-ratios."""
        if teacher_terms is not None:
            return [-term for term in teacher_terms]
        if not self.config.add_token_level_kl:
            return None
        kls = []
        for t in trajectories:
            assert t.old_logprobs is not None
            reference = _sampled(t, t.said_by(REFERENCE))
            kls.append(kl_estimate(self.config.kl_penalty, _sampled(t, t.old_logprobs), reference))
        coef = self._kl.coef
        mean = float(torch.cat(kls).double().mean())
        self._kl.update(mean, len({t.id[:2] for t in trajectories}))
        metrics |= {"rl/kl_to_reference": mean, "rl/kl_coef": coef}
        return [coef * kl for kl in kls]

    def _rl_advantages(
        self,
        trajectories: Sequence[Trajectory],
        penalties: list[Tensor] | None,
        keep: list[bool],
        metrics: dict[str, float],
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        ungraded = sum(t.reward is None for t in trajectories) / len(trajectories)
        if ungraded > MOST_UNGRADED:
            raise TrainingError(
                f"{ungraded:.0%} of the batch has no reward, and training on the rest would teach something else; "
                f"the log names the grader that failed"
            )
        values = [_sampled(t, t.values) for t in trajectories if t.values is not None] or None
        if isinstance(self._settings, AgentAdvantageSettings):
            advantages, returns, extra = episode_advantages(self._settings, trajectories, penalties, values)
        else:
            advantages, returns, extra = rl_advantages(
                self._settings,
                rewards=[t.reward for t in trajectories],
                groups=[t.id.draw for t in trajectories],
                episodes=_numbered([t.id[:2] for t in trajectories]),
                lengths=[t.response_length for t in trajectories],
                penalties=penalties,
                values=values,
                masked=[not k for k in keep],
                running=self._running,
            )
        metrics |= {f"rl/{name}": value for name, value in extra.items()}
        return advantages, returns

    # ---- weights of the policy loss ------------------------------------------------------------------------------

    def _kept(self, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> list[bool]:
        """False for trajectories that a mask takes out of the whole loss, the teachers' part included."""
        config = self.config
        kept = [True] * len(trajectories)
        if not isinstance(config, RLVRConfig):
            return kept
        masks = []
        scores = [t.reward for t in trajectories]
        if config.max_len_mask:
            masks.append(max_len_mask([t.finish_reason == "length" for t in trajectories]))
        if config.error_max_len_clip and self.uses_rewards:
            lengths = [t.response_length for t in trajectories]
            masks.append(error_max_len_mask(scores, lengths, config.error_max_len_threshold))
        if config.difficulty_mask and self.uses_rewards:
            low, high = config.difficulty_low_threshold, config.difficulty_high_threshold
            masks.append(difficulty_mask(scores, [t.id.draw for t in trajectories], low, high))
        for mask in masks:
            kept = [k and m for k, m in zip(kept, mask, strict=True)]
        if masks:
            metrics["rl/masked_trajectories"] = kept.count(False) / len(kept)
        return kept

    def _policy_weights(self, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> list[Tensor]:
        """The correction of the train/infer mismatch, ``[n]`` each; 1 without one."""
        weights = [torch.ones(t.response_length) for t in trajectories]
        correction = self.config.train_infer_correction
        filters = [f for f in correction.filters if f.enabled]
        if not self.config.corrects_mismatch:
            return weights
        counts = [t.response_length for t in trajectories]
        old = torch.cat([_sampled(t, t.old_logprobs) for t in trajectories])
        infer = torch.cat([_sampled(t, t.infer_logprobs) for t in trajectories])
        sequences = _spans(counts)
        turns = _spans([n for t in trajectories for n in t.turn_lengths])
        factor = torch.ones_like(old)
        if correction.is_weight.enabled:
            kind, upper = correction.is_weight.weight_type, correction.is_weight.upper_bound
            factor = correction_weights(kind, old, infer, *(turns if kind == "segment" else sequences), upper=upper)
            metrics["mismatch/correction_mean"] = float(factor.mean())
            metrics["mismatch/correction_min"] = float(factor.min())
        for spec in filters:
            passed = filter_mask(
                spec.agg_type,
                old,
                infer,
                *(turns if spec.agg_type == "segment" else sequences),
                ratio=(spec.ratio_low, spec.ratio_high) if spec.ratio_enabled else None,
                diff=(spec.diff_low, spec.diff_high) if spec.diff_enabled else None,
            )
            factor = factor * passed
        metrics["mismatch/correction_dropped"] = float((factor == 0).float().mean())
        return [w * f for w, f in zip(weights, factor.split(counts), strict=True)]


def _settings(config: PipelineConfig) -> AdvantageSettings:
    return AdvantageSettings(
        estimator=config.adv_estimator,
        gamma=config.gamma,
        lambd=config.lambd,
        whiten_advantages=config.whiten_advantages,
        whiten_rewards=config.whiten_rewards,
        reward_clip=config.reward_clip,
        norm_mean_type=config.norm_mean_type,
        norm_std_type=config.norm_std_type,
    )


def _spans(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """Number of the span that each token belongs to, and the number of spans."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), len(lengths)


def _sampled(t: Trajectory, values: np.ndarray[Any, Any] | None) -> Tensor:
    assert values is not None
    return torch.from_numpy(np.array(t.sampled(values)))


def _numbered(names: Sequence[Any]) -> list[int]:
    """Number distinct names in the order in which they come."""
    number: dict[Any, int] = {}
    return [number.setdefault(name, len(number)) for name in names]
