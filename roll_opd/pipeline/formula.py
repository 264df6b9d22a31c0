"""The training signal of a run in one line, for the log and the summary."""

from __future__ import annotations

from roll_opd.configs.pipeline_config import PipelineConfig


def formula(config: PipelineConfig) -> str:
    """Write the signal in force with its coefficients and where the student's log-probabilities come from."""
    args = config.opd_args
    reward = _reward_terms(config)
    parts = []
    if args.objective == "direct" and config.teachers:
        if reward:
            parts.append(f"advantage A_t = {reward}")
        divergences = " + ".join(f"{_coef(config, name)} * {_divergence(config, name)}" for name in config.teachers)
        parts.append(f"loss L_t = {'L_policy(A_t) + ' if reward else ''}{_combined(config, divergences)}")
    else:
        terms = " + ".join(f"{_coef(config, name)} * {_score(config, name)}" for name in config.teachers)
        terms = _combined(config, terms)
        if config.mode == "mixed_opd" and args.apply_to == "reward":
            reward = f"{config.adv_estimator}(reward at the last token + {terms}; discount {config.gamma:g})"
            terms = ""
        parts.append(f"advantage A_t = {' + '.join(t for t in (reward, terms) if t)} on sampled tokens")
    if config.needs_reference and config.use_kl_loss:
        parts.append(f"+ {config.kl_loss_coef:g} * {config.kl_loss_type}(student, reference) in the loss")
    return "; ".join(
        [
            f"{config.mode}: {parts[0]}",
            *parts[1:],
            *_self_teachers(config),
            *_bounds(config),
            _source(config),
            config.loss_agg_mode,
        ]
    )


def _coef(config: PipelineConfig, teacher: str) -> str:
    coef = f"{config.teacher_coef(teacher):g}"
    args = config.opd_args
    return coef if args.coef_schedule == "constant" else f"{coef}*{args.coef_schedule}(1 to {args.coef_end:g})"


def _combined(config: PipelineConfig, terms: str) -> str:
    """Several teachers of a sample add up, or are averaged; only those that cover its tag count."""
    if len(config.teachers) < 2:
        return terms
    mean = config.opd_args.teacher_weighting == "mean"
    return f"{'mean' if mean else 'sum'} over the teachers of the sample's tag of [{terms.replace(' + ', ', ')}]"


def _reward_terms(config: PipelineConfig) -> str:
    if config.mode == "pure_opd":
        return ""
    penalty = f" - {config.init_kl_coef:g} * {config.kl_penalty}(student, reference)"
    kl = penalty if config.needs_reference and config.add_token_level_kl else ""
    whitened = ", whitened" if config.whiten_advantages or config.adv_estimator == "reinforce++" else ""
    return f"{config.adv_estimator}(reward{kl}; discount {config.gamma:g}{whitened})"


def _score(config: PipelineConfig, teacher: str) -> str:
    """The score of a sampled token; see :mod:`roll_opd.algorithms.divergences`."""
    args = config.opd_args
    log_ratio = f"(logprob_{teacher} - logprob_student)"
    if args.base_model is not None:
        log_ratio = f"({args.extrapolation:g} * (logprob_{teacher} - logprob_base) - (logprob_student - logprob_base))"
    if args.divergence == "forward_kl":
        return f"(exp{log_ratio} - 1)"
    if args.divergence == "jsd":
        beta = args.jsd_beta
        return f"{1 - beta:g} log({beta:g} exp{log_ratio} + {1 - beta:g})"
    return log_ratio


def _divergence(config: PipelineConfig, teacher: str) -> str:
    args = config.opd_args
    if args.support == "sampled":
        estimate = "k2" if args.divergence == "reverse_kl" else "k3"
        return f"{args.divergence}(student, {teacher}) by {estimate} on sampled tokens"
    over = "the full vocabulary" if args.support == "full" else f"{args.support} {args.top_k}"
    tail = "" if args.support == "full" else (" and a tail" if args.add_tail else " without a tail")
    return f"{args.divergence}(student, {teacher}) over {over}{tail}"


def _self_teachers(config: PipelineConfig) -> list[str]:
    """Which teachers are the student, and which see another prompt."""
    lines = []
    for name, teacher in config.teachers.items():
        args = teacher.teacher_args
        what = [f"is the student ({args.self_teacher})"] if args.self_teacher else []
        what += ["sees context_template"] if args.context_template else []
        if what:
            lines.append(f"{name} {' and '.join(what)}")
    return lines


def _bounds(config: PipelineConfig) -> list[str]:
    args = config.opd_args
    named = {
        "log-ratio clipped to +-": args.log_ratio_clip,
        "tokens with a log-ratio beyond this left out: ": args.trust_region,
        "most uncertain share of tokens: ": args.entropy_keep,
        "advantage clipped to +-": config.advantage_clip,
    }
    bounds = [f"{name}{value:g}" for name, value in named.items() if value is not None]
    if args.position_weight != "none":
        bounds.append(f"{args.position_weight} position weight over {args.position_scale:g} tokens")
    return bounds if config.teachers else []


def _source(config: PipelineConfig) -> str:
    source = {"train": "trainer", "infer": "engine"}[config.opd_args.student_logprob_source]
    return f"student logprobs from the {source}"
