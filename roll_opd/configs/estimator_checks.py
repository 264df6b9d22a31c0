"""How an agentic run compares the scores of its episodes, and which settings of that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.builder import did_you_mean
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.errors import ConfigError

GROUPINGS = ("batch", "traj_group_id", "tags")
NormType = Literal["batch", "group"]


class Normalisation(NamedTuple):
    """What scores are centred and scaled over; ``group`` is what ``grouping`` names, None leaves a part out."""

    grouping: str
    mean: NormType | None
    std: NormType | None


WITHIN_THE_DRAW = Normalisation("traj_group_id", "group", "group")
"""What ``grpo`` is; and ``gigpo``, where ``reward_normalization`` does not ask for the mean alone."""


def normalisation_of(config: AgenticConfig) -> Normalisation:
    """Resolve ``reward_normalization``: ``method`` over ``grouping``, then the explicit types, which win.

    ``grpo`` and ``gigpo`` compare the episodes of a draw; where nothing is asked for they do what they are named for.
    ``asym_clip`` is ``mean_std``, as in ROLL.
    """
    spec = config.reward_normalization
    over: NormType = "batch" if spec.grouping == "batch" else "group"
    mean = spec.norm_mean_type or (None if spec.method == "identity" else over)
    std = spec.norm_std_type or (over if spec.method in ("mean_std", "asym_clip") else None)
    if mean is None and std is None and config.adv_estimator in ("grpo", "gigpo"):
        return WITHIN_THE_DRAW
    return Normalisation(spec.grouping, mean, std)


def check_estimator(config: PipelineConfig, raw: Mapping[str, Any], warnings: list[str]) -> None:
    """Raise ConfigError for settings of an episode's turns that contradict each other, or that have nothing to act on.

    Args:
        config: resolved.
        raw: what the user wrote, under canonical names.
        warnings: added to.
    """
    _check_turn_weight(config, raw, warnings)
    if not isinstance(config, AgenticConfig):
        return
    if config.ratio_type == "segment" and config.importance_sampling == "seq":
        problem = "'segment' takes the policy ratio over a turn, and importance_sampling 'seq' over the trajectory"
        raise ConfigError("ratio_type", f"{problem}; keep one")
    grouping = config.reward_normalization.grouping
    if grouping not in GROUPINGS:
        problem = f"{grouping!r} names no group of episodes; one of {', '.join(GROUPINGS)}"
        raise ConfigError("reward_normalization.grouping", problem + did_you_mean(grouping, GROUPINGS))
    if config.mode == "pure_opd":
        return
    for key in ("norm_mean_type", "norm_std_type"):
        if getattr(config, key) is not None:
            problem = f"the agentic pipeline compares episodes by reward_normalization; use reward_normalization.{key}"
            raise ConfigError(key, problem)
    _check_comparison(config, raw, warnings)
    lone = lone_episodes(config)
    if lone is not None:
        warnings.append(str(lone))


def _check_comparison(config: AgenticConfig, raw: Mapping[str, Any], warnings: list[str]) -> None:
    """An estimator that compares by itself, and a normalisation that says something else."""
    estimator, spec = config.adv_estimator, normalisation_of(config)
    says = f"mean over {spec.mean or 'nothing'}, std over {spec.std or 'nothing'}, grouping {spec.grouping!r}"
    fix = "adv_estimator: reinforce applies reward_normalization alone"
    if estimator == "grpo" and spec != WITHIN_THE_DRAW:
        problem = f"grpo is method mean_std with grouping traj_group_id, and this asks for {says}"
        raise ConfigError("reward_normalization", f"{problem}; remove it, or {fix}")
    if estimator == "gigpo" and spec not in (WITHIN_THE_DRAW, WITHIN_THE_DRAW._replace(std=None)):
        problem = f"gigpo compares within the draw, and this asks for {says}"
        raise ConfigError("reward_normalization", f"{problem}; use grouping: traj_group_id, method: mean or mean_std")
    if estimator == "rloo" and (spec.mean or spec.std):
        problem = f"rloo compares an episode with the others of its draw by itself, and this asks for {says}"
        raise ConfigError("reward_normalization", f"{problem}; remove it, or {fix}")
    written = raw.get("reward_normalization") or {}
    explicit = config.reward_normalization
    types = explicit.norm_mean_type or explicit.norm_std_type
    if estimator in ("grpo", "gigpo") and written.get("method") == "identity" and types is None:
        problem = f"'identity' does not switch off what {estimator} is: method mean_std within the draw"
        warnings.append(f"reward_normalization.method: {problem} (in ROLL it does: adv_estimator reinforce, here)")


def lone_episodes(config: AgenticConfig) -> ConfigError | None:
    """What is wrong when an estimator compares the episodes of a draw and a draw has one; a launch without teachers
    refuses it."""
    estimator, spec = config.adv_estimator, normalisation_of(config)
    compared = spec.grouping == "traj_group_id" and "group" in (spec.mean, spec.std) and estimator != "step_reinforce"
    if config.mode == "pure_opd" or config.train_env_manager.group_size > 1 or not (compared or estimator == "rloo"):
        return None
    what = estimator if estimator in ("grpo", "rloo", "gigpo") else "reward_normalization.grouping traj_group_id"
    problem = f"1, but {what} compares the episodes of a draw with each other; with one episode its score becomes 0"
    left = "so that nothing is learned" if config.mode == "rl" else "and the teachers alone train the student"
    fix = "use at least 2, or another adv_estimator or grouping"
    return ConfigError("train_env_manager.group_size", f"{problem}, {left}; {fix}")


def _check_turn_weight(config: PipelineConfig, raw: Mapping[str, Any], warnings: list[str]) -> None:
    args = config.opd_args
    if args.turn_weight == "none":
        if config.teachers and "turn_scale" in (raw.get("opd_args") or {}):
            warnings.append("opd_args.turn_scale: has no effect with turn_weight none")
    elif config.pipeline != "agentic" and config.teachers:
        problem = f"{args.turn_weight!r} weighs the turns of an episode, and a response has one"
        raise ConfigError("opd_args.turn_weight", f"{problem}; remove it, or use position_weight")
