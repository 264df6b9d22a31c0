"""The training signal of a run in one line, for the log and the summary."""

from __future__ import annotations

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.estimator_checks import normalisation_of
from roll_opd.configs.pipeline_config import PipelineConfig


def formula(config: PipelineConfig) -> str:
    """Write the signal in force with its coefficients and where the student's log-probabilities come from."""
    args = config.opd_args
    direct = args.objective == "direct" and bool(config.teachers)
    term = _divergence if direct else _score
    terms = _combined(config, [f"{_coef(config, name)} * {term(config, name)}" for name in config.teachers])
    joins_reward = config.mode == "mixed_opd" and args.apply_to == "reward"
    reward = _reward_terms(config, f" + {terms}" if joins_reward else "")
    parts = []
    if direct:
        if reward:
            parts.append(f"advantage A_t = {reward}")
        parts.append(f"loss L_t = {'L_policy(A_t) + ' if reward else ''}{terms}")
    else:
        pushes = [reward] if joins_reward else [reward, terms]
        parts.append(f"advantage A_t = {' + '.join(push for push in pushes if push)} on sampled tokens")
    if config.needs_reference and config.use_kl_loss and config.kl_loss_coef > 0:
        parts.append(f"+ {config.kl_loss_coef:g} * {config.kl_loss_type}(student, reference) in the loss")
    if config.entropy_loss_coef > 0:
        parts.append(f"- {config.entropy_loss_coef:g} * entropy(student) in the loss")
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


def _combined(config: PipelineConfig, terms: list[str]) -> str:
    """Several teachers of a sample add up, or are averaged; only those that cover its tag count."""
    if len(terms) < 2:
        return "".join(terms)
    mean = config.opd_args.teacher_weighting == "mean"
    return f"{'mean' if mean else 'sum'} over the teachers of the sample's tag of [{', '.join(terms)}]"


def _reward_terms(config: PipelineConfig, teachers: str) -> str:
    """The reward's advantage; ``teachers`` is what they add to each token's reward, or nothing."""
    if config.mode == "pure_opd":
        return ""
    each_token = teachers
    if config.needs_reference and config.add_token_level_kl:
        each_token += f" - {config.init_kl_coef:g} * {config.kl_penalty}(student, reference)"
    what, discount = _external(config)
    if each_token and not isinstance(config, AgenticConfig):
        what += " at the last token"
    how = [discount]
    how += [f"lambda {config.lambd:g}"] if config.adv_estimator == "gae" else []
    how += ["token rewards whitened"] if config.whiten_rewards else []
    how += ["whitened"] if config.whiten_advantages or config.adv_estimator == "reinforce++" else []
    return f"{config.adv_estimator}({what}{each_token}; {', '.join(how)})"


def _external(config: PipelineConfig) -> tuple[str, str]:
    """The rewards that an estimator starts from, and how it discounts them."""
    estimator, discount = config.adv_estimator, f"discount {config.gamma:g}"
    clip = "" if config.reward_clip is None else f" clipped to +-{config.reward_clip:g}"
    if not isinstance(config, AgenticConfig):
        # Within a prompt, grpo replaces both, and a shift cancels in rloo.
        mean = None if estimator in ("grpo", "rloo") else config.norm_mean_type
        std = None if estimator == "grpo" else config.norm_std_type
        return f"reward{clip}{_over('centred', mean, 'group')}{_over('scaled', std, 'group')}", discount
    of_turns = clip and f" of rewards{clip}"
    step = f"returns of turns at discount {config.step_reward_gamma:g}{of_turns}"
    spec = normalisation_of(config)
    normalised = f"{_over('centred', spec.mean, spec.grouping)}{_over('scaled', spec.std, spec.grouping)}"
    if estimator == "gigpo":
        weights = config.episode_reward_weight, config.step_reward_weight
        parts = f"{weights[0]:g} * episode score{of_turns}{normalised} + {weights[1]:g} * {step}"
        by_state = normalised.replace(spec.grouping, "turns of its state")
        return f"{parts}{by_state}", f"{discount} within the turn"
    if estimator == "step_reinforce":
        return f"{step}{normalised}", f"{discount} within the turn"
    if estimator == "agentic_reinforce":
        return f"rewards of turns{clip}{normalised}", f"{discount} by turn"
    what = "rewards of turns" if estimator == "gae" else "episode score"
    return f"{what}{clip}{normalised}", discount


def _over(verb: str, kind: str | None, grouping: str) -> str:
    where = {"group": grouping, "running": "the run so far"}
    return "" if kind is None else f" {verb} over {where.get(kind, kind)}"


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
    bounds = []
    if config.teachers:
        named = {
            "log-ratio clipped to +-": args.log_ratio_clip if args.support == "sampled" else None,
            "tokens with a log-ratio beyond this left out: ": args.trust_region,
            "most uncertain share of tokens: ": args.entropy_keep,
        }
        bounds += [f"{name}{value:g}" for name, value in named.items() if value is not None]
        if args.position_weight != "none":
            bounds.append(f"{args.position_weight} position weight over {args.position_scale:g} tokens")
        if args.turn_weight != "none":
            bounds.append(f"{args.turn_weight} turn weight over {args.turn_scale:g} turns")
    has_advantages = config.mode != "pure_opd" or args.objective != "direct"
    if config.advantage_clip is not None and has_advantages:
        bounds.append(f"advantage clipped to +-{config.advantage_clip:g}")
    return bounds


def _source(config: PipelineConfig) -> str:
    source = {"train": "trainer", "infer": "engine"}[config.opd_args.student_logprob_source]
    return f"student logprobs from the {source}"
