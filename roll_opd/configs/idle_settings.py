"""Settings that load, agree with all others, and change nothing in this config: their user should know.

What pure distillation forces is reported by :mod:`roll_opd.configs.resolve`, settings of ``opd_args`` by
:mod:`roll_opd.configs.opd_checks`, the critic's by :mod:`roll_opd.configs.launch_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.resolve import FORCED_IN_PURE_MODE

# Configs are Any below: some fields belong to one pipeline, and a rule is asked only where its field is.
Condition = Callable[[Any], bool]


class Idle(NamedTuple):
    """A rule: where the settings ``fields`` (names, separated by spaces) have no effect, and why."""

    fields: str
    when: Condition
    why: str


def _pure_direct(c: Any) -> bool:
    return bool(c.mode == "pure_opd" and c.opd_args.objective == "direct")


def _trains_on_rewards(c: Any) -> bool:
    return bool(c.mode != "pure_opd" and c.pipeline == "rlvr")


def _without_filter(c: Any) -> bool:
    return all(reward.query_filter_config.type == "no_filter" for reward in c.rewards.values())


_ONE = "num_return_sequences_in_group is 1, and a prompt with one score is always kept"


def _agentic(c: Any) -> bool:
    return bool(c.pipeline == "agentic")


# The first rule of a field that holds gives the reason.
RULES = (
    # Episodes.
    Idle("rewards validation num_return_sequences_in_group", _agentic,
         "environments reward, val_env_manager validates, and train_env_manager.group_size counts the samples"),
    Idle("reward_normalization episode_reward_weight step_reward_weight step_reward_gamma",
         lambda c: c.mode == "pure_opd", "rewards only monitor in pure distillation"),
    Idle("episode_reward_weight step_reward_weight", lambda c: c.adv_estimator != "gigpo",
         "only adv_estimator gigpo has them"),
    Idle("step_reward_gamma", lambda c: c.adv_estimator not in ("gigpo", "step_reinforce"),
         "only adv_estimator gigpo and step_reinforce discount the steps"),
    Idle("ratio_type", _pure_direct, "pure distillation with objective direct has no policy loss"),
    # The policy loss.
    Idle("advantage_clip pg_clip use_pg_clip_range pg_clip_low pg_clip_high dual_clip_loss importance_sampling",
         _pure_direct, "pure distillation with objective direct has no policy loss"),
    Idle("pg_clip", lambda c: c.use_pg_clip_range and not c.dual_clip_loss, "use_pg_clip_range is on"),
    Idle("pg_clip_low pg_clip_high", lambda c: not c.use_pg_clip_range, "use_pg_clip_range is off"),
    Idle("train_infer_correction", lambda c: c.train_infer_correction.enabled and not c.corrects_mismatch,
         "with opd_args.student_logprob_source infer there is no difference to correct"),
    Idle("lambd", lambda c: c.adv_estimator != "gae", "only adv_estimator gae has one"),
    # Distances to a reference.
    Idle("use_kl_loss kl_loss_type", lambda c: c.use_kl_loss and c.kl_loss_coef == 0, "kl_loss_coef is 0"),
    Idle("kl_loss_coef kl_loss_type", lambda c: not c.use_kl_loss, "use_kl_loss is off"),
    Idle("init_kl_coef target_kl kl_horizon", lambda c: bool(c.teachers), "a teacher is in the reference's place"),
    Idle("init_kl_coef target_kl kl_horizon kl_penalty", lambda c: c.mode == "rl" and not c.add_token_level_kl,
         "add_token_level_kl is off"),
    Idle("kl_horizon", lambda c: c.target_kl is None, "target_kl is not set"),
    Idle("reference", lambda c: c.mode == "rl" and not c.needs_reference,
         "not started, because neither add_token_level_kl nor use_kl_loss asks for it"),
    # Rewards and masks.
    Idle("reward_clip norm_mean_type norm_std_type difficulty_mask difficulty_low_threshold difficulty_high_threshold "
         "error_max_len_clip error_max_len_threshold is_use_additional_prompts max_additional_running_prompts",
         lambda c: c.mode == "pure_opd", "rewards only monitor in pure distillation"),
    Idle("norm_mean_type norm_std_type", lambda c: _trains_on_rewards(c) and c.adv_estimator == "grpo",
         "grpo normalises itself"),
    # Every kind of mean is one number for all samples of a prompt.
    Idle("norm_mean_type", lambda c: _trains_on_rewards(c) and c.adv_estimator == "rloo", "a shift cancels in rloo"),
    Idle("difficulty_low_threshold difficulty_high_threshold", lambda c: not c.difficulty_mask,
         "difficulty_mask is off"),
    Idle("difficulty_mask difficulty_low_threshold difficulty_high_threshold",
         lambda c: c.num_return_sequences_in_group == 1, _ONE),
    Idle("error_max_len_clip", lambda c: c.error_max_len_threshold > c.response_length,
         "error_max_len_threshold is above response_length"),
    Idle("error_max_len_threshold", lambda c: not c.error_max_len_clip, "error_max_len_clip is off"),
    Idle("is_use_additional_prompts max_additional_running_prompts", _without_filter, "no reward filters prompts"),
    Idle("max_additional_running_prompts", lambda c: not c.is_use_additional_prompts,
         "is_use_additional_prompts is off"),
)  # fmt: skip


def idle_settings(config: PipelineConfig, raw: Mapping[str, Any]) -> dict[str, str]:
    """Settings that the user wrote and that change nothing, each with the reason, in the order of the YAML.

    What says "off" (null, false, a coefficient of 0) is no setting without effect: it asks for none.

    Args:
        config: resolved, so that fields hold what the mode forces.
        raw: what the user wrote, under canonical names.
    """
    forced = {name for name, *_ in FORCED_IN_PURE_MODE} if config.is_pure_opd else set()
    found: dict[str, str] = {}
    for key, value in raw.items():
        if key == "rewards" and _trains_on_rewards(config) and config.num_return_sequences_in_group == 1:
            found |= {
                f"rewards.{name}.query_filter_config": _ONE
                for name, reward in config.rewards.items()
                if reward.query_filter_config.type != "no_filter"
            }
        if key in forced or not hasattr(config, key) or _is_off(key, value):
            continue
        why = next((rule.why for rule in RULES if key in rule.fields.split() and rule.when(config)), None)
        if why is not None:
            found[key] = why
    return found


def idle_warnings(config: PipelineConfig, raw: Mapping[str, Any]) -> list[str]:
    """:func:`idle_settings` as one line, or nothing."""
    found = idle_settings(config, raw)
    if not found:
        return []
    return ["settings without effect here: " + ", ".join(f"{key} ({why})" for key, why in found.items())]


def _is_off(key: str, value: Any) -> bool:
    return value is None or value is False or (key.endswith("_coef") and value == 0)
