"""Distillation settings whose gradient is not the one they name are refused here, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from roll_opd.configs.opd_args import Divergence, OPDArguments, Support
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.roles import teacher_key
from roll_opd.errors import ConfigError

P = TypeVar("P", bound=PipelineConfig)
# What an inference engine reports: the sampled token and its own top-k, never a whole row or somebody else's set.
ENGINE_SUPPORTS = ("sampled", "teacher_topk")


@dataclass(frozen=True)
class Estimator:
    """An objective as the pipeline computes it, after ROLL's ``kl_penalty`` has been read as an alias."""

    objective: str
    divergence: Divergence
    support: Support


def effective_estimator(config: PipelineConfig, explicit_kl_penalty: bool) -> Estimator:
    """Resolve ``opd_args`` and, when the user wrote it, ``kl_penalty``. The latter is only read beside a teacher."""
    args = config.opd_args
    if not explicit_kl_penalty or config.kl_penalty == "kl":
        return Estimator(args.objective, args.divergence, args.support)
    if config.kl_penalty == "k3":
        # As a loss, k3 has the gradient of the forward KL.
        return Estimator(args.objective, "forward_kl", "sampled")
    return Estimator(args.objective, "reverse_kl", "full" if config.kl_penalty == "full" else "sampled")


def check_opd(config: PipelineConfig, raw: Mapping[str, Any], names: Mapping[str, str], warnings: list[str]) -> None:
    """Raise ConfigError for a distillation objective that cannot do what it says."""
    args = config.opd_args
    user = raw.get("opd_args") or {}
    explicit = raw.get("kl_penalty") is not None
    if explicit:
        _check_kl_penalty(config, user)
    _check_objective(args, effective_estimator(config, explicit), user, config.mode, warnings)
    check_logprob_source(config, names)
    _check_teachers(config, effective_estimator(config, explicit), names)
    _check_self_teachers(config, names)
    _check_correction(config, warnings)
    _check_coefficients(config, names, warnings)
    if config.mode == "mixed_opd":
        _check_mixed(config, warnings)


def _check_kl_penalty(config: PipelineConfig, user: Mapping[str, Any]) -> None:
    for key in ("divergence", "support"):
        if user.get(key) is not None:
            problem = f"is ROLL's name for opd_args.divergence and support, and opd_args.{key} is given too; keep one"
            raise ConfigError("kl_penalty", problem)
    penalty, objective = config.kl_penalty, config.opd_args.objective
    if objective == "policy_gradient" and penalty in ("abs", "mse", "k3"):
        reason = "as an advantage it pushes every sampled token down and is not the gradient of a divergence"
        fix = "use 'kl'" if penalty == "abs" else "use 'kl', or opd_args.objective: direct"
        raise ConfigError("kl_penalty", f"{penalty!r} cannot be a policy-gradient score: {reason}; {fix}")
    if objective == "policy_gradient" and penalty == "full":
        reason = "a sum over the vocabulary that is one number per position has zero expected gradient as an advantage"
        raise ConfigError(
            "kl_penalty", f"'full' cannot be a policy-gradient score: {reason}; use 'kl', or opd_args.objective: direct"
        )
    if objective == "direct" and penalty == "kl":
        reason = "the sampled log-ratio has zero expected gradient as a loss"
        raise ConfigError(
            "kl_penalty", f"'kl' cannot be a direct loss: {reason}; use 'mse' (gradient of the reverse KL)"
        )
    if objective == "direct" and penalty == "abs":
        raise ConfigError(
            "kl_penalty", "'abs' as a loss is not the gradient of a divergence; use 'mse', 'k3' or 'full'"
        )


def _check_objective(
    args: OPDArguments, estimator: Estimator, user: Mapping[str, Any], mode: str, warnings: list[str]
) -> None:
    if estimator.objective == "policy_gradient" and estimator.support != "sampled":
        reason = "a sum over a set of tokens that is one number per position has zero expected gradient as an advantage"
        problem = f"{estimator.support!r} does not go with objective 'policy_gradient': {reason}"
        raise ConfigError("opd_args.support", f"{problem}; use support: sampled, or objective: direct")
    if estimator.objective == "direct" and args.apply_to == "reward":
        problem = "'reward' does not go with objective 'direct', whose divergence is a loss of its own"
        raise ConfigError("opd_args.apply_to", f"{problem}; use objective: policy_gradient, or remove apply_to")
    if estimator.objective == "direct" and estimator.support == "sampled" and estimator.divergence == "jsd":
        problem = "'jsd' on the sampled token alone has no unbiased direct loss here"
        raise ConfigError(
            "opd_args.divergence", f"{problem}; use support: full or union_topk, or objective: policy_gradient"
        )
    if mode == "pure_opd" and args.uncovered == "reward_only":
        problem = "'reward_only' needs an external reward in the signal, and pure distillation has none"
        raise ConfigError("opd_args.uncovered", f"{problem}; use error or skip")
    if mode == "pure_opd" and args.apply_to == "reward":
        warnings.append("opd_args.apply_to: 'reward' and 'advantage' are the same in pure distillation (discount 0)")
    if args.entropy_keep is not None and args.student_logprob_source == "infer":
        problem = "needs the student's entropies, which a trainer forward gives and the sampling engine does not"
        raise ConfigError("opd_args.entropy_keep", f"{problem}; use student_logprob_source: train")
    _check_extrapolation(args, estimator)
    idle = [
        ("position_scale", args.position_weight == "none", "position_weight none"),
        ("coef_end", args.coef_schedule == "constant", "coef_schedule constant"),
        ("log_ratio_clip", estimator.support != "sampled", f"support {estimator.support}"),
    ]
    for key, without_effect, where in idle:
        if key in user and without_effect:
            warnings.append(f"opd_args.{key}: has no effect with {where}")
    if "jsd_beta" in user and estimator.divergence != "jsd":
        warnings.append(f"opd_args.jsd_beta: has no effect with divergence {estimator.divergence}")
    for key in ("top_k", "add_tail"):
        if key in user and not estimator.support.endswith("topk"):
            warnings.append(f"opd_args.{key}: has no effect with support {estimator.support}")


def _check_extrapolation(args: OPDArguments, estimator: Estimator) -> None:
    if args.base_model is None:
        if args.extrapolation != 1.0:
            problem = f"{args.extrapolation:g} goes beyond the teacher, away from the model it was made from"
            raise ConfigError("opd_args.extrapolation", f"{problem}; name that model in opd_args.base_model")
        return
    if estimator != Estimator("policy_gradient", "reverse_kl", "sampled"):
        problem = "reward extrapolation is a log-ratio of the sampled token"
        fix = "use objective: policy_gradient, divergence: reverse_kl, support: sampled, or remove base_model"
        raise ConfigError("opd_args.base_model", f"{problem}; {fix}")
    if args.extrapolation == 1.0:
        problem = "is loaded for nothing with extrapolation 1, where it drops out of the log-ratio"
        raise ConfigError("opd_args.base_model", f"{problem}; set opd_args.extrapolation above 1, or remove it")


def _check_correction(config: PipelineConfig, warnings: list[str]) -> None:
    """The correction of the train/infer mismatch weighs the policy loss, which a direct divergence is no part of."""
    if not config.train_infer_correction.enabled or config.opd_args.objective != "direct":
        return
    if config.mode == "pure_opd":
        problem = "weighs the policy loss, which is zero in pure distillation with opd_args.objective 'direct'"
        raise ConfigError("train_infer_correction", f"{problem}; use objective: policy_gradient, or switch it off")
    problem = "weighs the reward's part alone: the divergence of opd_args.objective 'direct' is a loss of its own"
    warnings.append(f"train_infer_correction: {problem}")


def _check_coefficients(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    """A schedule multiplies a coefficient, so that 0 stays 0 for the whole run."""
    own = {f"{names[teacher_key(name)]}.opd_kl_coef": t.opd_kl_coef for name, t in config.teachers.items()}
    if config.opd_kl_coef is not None and None not in own.values():
        warnings.append(f"opd_kl_coef: no effect, because every teacher has its own ({', '.join(own)})")
    if any(config.teacher_coef(name) for name in config.teachers):
        return
    field = "opd_kl_coef" if None in own.values() else next(iter(own))
    problem = "0, as is that of every other teacher" if len(own) > 1 else "0"
    if config.mode == "pure_opd":
        raise ConfigError(field, f"{problem}: nothing would train the student; set it above 0")
    warnings.append(f"{field}: {problem}: rewards alone train the student, and teachers only monitor")


def _check_mixed(config: PipelineConfig, warnings: list[str]) -> None:
    """Rules of the mixed mode: what takes the reference's place, and what the discount does to the teacher's term."""
    for key, on in (("use_kl_loss", config.use_kl_loss and config.kl_loss_coef > 0),
                    ("add_token_level_kl", config.add_token_level_kl)):  # fmt: skip
        if on:
            problem = "needs a reference, whose place the teacher has taken"
            raise ConfigError(key, f"{problem}; remove it: the teacher's term is opd_kl_coef's")
    if config.opd_args.apply_to != "reward":
        return
    if config.gamma > 0:
        warnings.append(
            f"opd_args.apply_to: 'reward' sums the teacher's log-ratio over the rest of the {_summed_over(config)} "
            f"(gamma {config.gamma:g}), so its weight against the reward grows with length"
        )
    if config.whiten_advantages or config.whiten_rewards or config.adv_estimator == "reinforce++":
        warnings.append(
            "opd_args.apply_to: 'reward' lets whitening rescale the teacher's term; rl/penalty_scale says by how much"
        )


def _summed_over(config: PipelineConfig) -> str:
    """What a token's return reaches to the end of."""
    if config.pipeline == "rlvr":
        return "response"
    return "turn" if config.adv_estimator in ("step_reinforce", "gigpo") else "episode"


def _check_self_teachers(config: PipelineConfig, names: Mapping[str, str]) -> None:
    for name, teacher in config.teachers.items():
        path, args = f"{names[teacher_key(name)]}.teacher_args", teacher.teacher_args
        if args.self_teacher is None or args.context_template is not None:
            continue
        if args.self_teacher == "live":
            problem = "'live' without a context_template is the student itself, and its signal zero"
            raise ConfigError(f"{path}.self_teacher", f"{problem}; give it a context_template")
        if config.mode == "pure_opd":
            problem = f"'{args.self_teacher}' without a context_template only pulls the student back to where it was"
            raise ConfigError(f"{path}.self_teacher", f"{problem}; give it a context_template")


def with_alias_resolved(config: P, raw: Mapping[str, Any]) -> P:
    """Write ROLL's ``kl_penalty``, where it stands for the objective, into ``opd_args``."""
    if not config.teachers:
        # Only where the old policy's log-probabilities come from has a meaning without a teacher.
        source = config.opd_args.student_logprob_source
        return replace(config, opd_args=OPDArguments(student_logprob_source=source))
    estimator = effective_estimator(config, raw.get("kl_penalty") is not None)
    args = replace(config.opd_args, divergence=estimator.divergence, support=estimator.support)
    # Said once: two names of one thing must not look like two different runs to a resume.
    return replace(config, opd_args=args, kl_penalty="kl")


def check_logprob_source(config: PipelineConfig, names: Mapping[str, str]) -> None:
    """Refuse the engine's log-probabilities where they are not those of the untruncated policy."""
    sampling = config.actor_infer.generating_args
    assert sampling is not None
    if config.opd_args.student_logprob_source == "infer" and not sampling.is_untruncated:
        path = f"{names['actor_infer']}.generating_args"
        problem = (
            f"'infer' takes the engine's own log-probabilities, which {path} makes those of a different distribution"
        )
        fix = "set temperature 1, top_p 1, top_k 0 and no other filter there, or student_logprob_source: train"
        raise ConfigError("opd_args.student_logprob_source", f"{problem}; {fix}")


def _check_teachers(config: PipelineConfig, estimator: Estimator, names: Mapping[str, str]) -> None:
    for name, teacher in config.teachers.items():
        assert teacher.strategy_args is not None
        strategy = teacher.strategy_args.strategy_name
        if strategy in ("vllm", "remote") and estimator.support not in ENGINE_SUPPORTS:
            path = f"{names[teacher_key(name)]}.strategy_args.strategy_name"
            problem = f"{strategy!r} reports {' and '.join(ENGINE_SUPPORTS)} only, but it needs {estimator.support}"
            raise ConfigError(
                path, f"{problem}; use hf_infer, fsdp2_infer or megatron_infer, or another opd_args.support"
            )
