"""Rules of the agentic pipeline: tags, groups, templates, lengths of a turn, and who scores which environment."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs.agentic_config import AgenticConfig, EnvManagerConfig
from roll_opd.configs.agentic_resolve import MODES
from roll_opd.configs.builder import did_you_mean
from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.configs.roles import teacher_key
from roll_opd.errors import ConfigError

# What a template may name, by mode, each with a value of its kind.
TEMPLATE_FIELDS: dict[str, dict[str, str | int]] = {
    "trajectory": {"observation": "x", "turn_idx": 1, "actions_left": 1, "max_response_length": 1, "suffix": "x"},
    "step": {
        "env_instruction": "x",
        "history": "x",
        "history_length": 1,
        "step_count": 1,
        "current_step": 1,
        "current_observation": "x",
        "max_response_length": 1,
    },
}
SHOWS_STATE = {"trajectory": "observation", "step": "current_observation"}


Names = Mapping[str, str]


def check_agentic(config: AgenticConfig, raw: Mapping[str, Any], names: Names, warnings: list[str]) -> None:
    """Raise ConfigError for what cannot work; add to ``warnings`` what looks wrong but may run."""
    for tag, env in config.custom_envs.items():
        if not env.env_type:
            raise ConfigError(f"custom_envs.{tag}.env_type", "missing: it names the environment, such as frozen_lake")
    if not config.train_env_manager.tags:
        raise ConfigError("train_env_manager.tags", "empty; name the keys of custom_envs that the student plays")
    for name in ("train_env_manager", "val_env_manager"):
        _check_manager(name, getattr(config, name), config)
    _check_batch(config, raw, warnings)
    for tag, env in config.environments_in_use().items():
        path = f"custom_envs.{tag}"
        _check_template(env, path)
        _check_limits(env, path, config, names, warnings)
    _check_validation_turns(config, raw, warnings)
    _check_teachers(config, names, warnings)
    data = config.actor_train.data_args
    if data is not None and data.file_name:
        problem = "no effect: environments bring the prompts"
        warnings.append(f"{names['actor_train']}.data_args.file_name: {problem}")


def _check_manager(name: str, manager: EnvManagerConfig, config: AgenticConfig) -> None:
    for tag in manager.tags:
        if tag not in config.custom_envs:
            known = f"those are {', '.join(config.custom_envs)}" if config.custom_envs else "it is empty"
            problem = f"{tag!r} is no key of custom_envs{did_you_mean(tag, config.custom_envs) or f'; {known}'}"
            raise ConfigError(f"{name}.tags", problem)
        if manager.tags.count(tag) > 1:
            problem = f"{tag!r} comes twice; name it once, and set its share in num_groups_partition"
            raise ConfigError(f"{name}.tags", problem)
    shares, tags = manager.num_groups_partition, manager.tags
    if shares is None or not tags:
        return
    field = f"{name}.num_groups_partition"
    if len(shares) != len(tags):
        problem = f"{len(shares)} numbers for {len(tags)} tags ({', '.join(tags)}); give one for each, or remove it"
        raise ConfigError(field, problem)
    if len(tags) > manager.num_env_groups:
        problem = f"{manager.num_env_groups} groups for {len(tags)} tags; use at least as many groups as tags"
        raise ConfigError(f"{name}.num_env_groups", problem)
    for tag, share in zip(tags, shares, strict=True):
        if share < 1:
            problem = f"{share} groups of {tag!r}, which would never be played; use at least 1, or remove the tag"
            raise ConfigError(field, problem)
    if sum(shares) != manager.num_env_groups:
        problem = f"{' + '.join(map(str, shares))} = {sum(shares)} groups, but num_env_groups is"
        raise ConfigError(field, f"{problem} {manager.num_env_groups}; make them agree, or remove num_groups_partition")


def _check_batch(config: AgenticConfig, raw: Mapping[str, Any], warnings: list[str]) -> None:
    train, val, episodes = config.train_env_manager, config.val_env_manager, config.rollout_batch_size
    if episodes % train.group_size:
        lower = episodes // train.group_size * train.group_size
        either = " or ".join(str(size) for size in (lower, lower + train.group_size) if size)
        problem = f"{episodes} episodes do not divide into groups of {train.group_size} (train_env_manager.group_size)"
        raise ConfigError("rollout_batch_size", f"{problem}; use {either}, or another group_size")
    needed = -(-episodes // train.num_envs)
    if 0 <= train.max_traj_per_env < needed:
        problem = f"{train.max_traj_per_env} episodes of each of {train.num_envs} environments are fewer than"
        fix = f"use {needed} or -1, or more num_env_groups"
        raise ConfigError("train_env_manager.max_traj_per_env", f"{problem} rollout_batch_size = {episodes}; {fix}")
    if 0 <= val.max_traj_per_env < 1:
        raise ConfigError("val_env_manager.max_traj_per_env", "0 would leave no episode to validate on; use -1")
    if config.groups_per_step < train.num_env_groups:
        idle = train.num_env_groups - config.groups_per_step
        problem = f"{train.num_env_groups} groups at the same time, of which a step of {episodes} episodes uses"
        warnings.append(f"train_env_manager.num_env_groups: {problem} {config.groups_per_step}; {idle} are idle")
    if config.batch_adjust_mode in ("delete", "random_sample"):
        problem = "no effect: nothing is left out, and what does not divide is a smaller last optimizer step"
        warnings.append(f"batch_adjust_mode: {problem}")
    if val.tags and raw.get("val_batch_size") is not None and config.val_batch_size != val.num_envs:
        problem = f"no effect: validation plays val_env_manager.num_env_groups x group_size = {val.num_envs} episodes"
        warnings.append(f"val_batch_size: {problem}")


def _check_template(env: EnvironmentConfig, path: str) -> None:
    """A template names what there is, and shows the state."""
    mode = env.episode_mode
    if mode is None:
        return
    field, known = f"{path}.agent_template", TEMPLATE_FIELDS[mode]
    there = f"in {mode} mode a template may name {', '.join(known)}"
    try:
        named = list(_fields(env.agent_template))
        for name in named:
            if name not in known:
                hint = did_you_mean(name, known)
                braces = "" if hint else "; a brace that is no field is written twice: {{ and }}"
                raise ConfigError(field, f"unknown field {{{name}}}{hint}; {there}{braces}")
        env.agent_template.format(**known)
    except ValueError as error:
        problem = f"{error}; a brace that is no field is written twice: {{{{ and }}}}; {there}"
        raise ConfigError(field, problem) from error
    if SHOWS_STATE[mode] not in named:
        others = [other for other in MODES.values() if other != mode and SHOWS_STATE[other] in named]
        fix = f", or set episode_mode: {others[0]}" if others else ""
        problem = f"lacks {{{SHOWS_STATE[mode]}}}, so the student would not see its environment"
        raise ConfigError(field, f"{problem}; add it{fix}")


def _fields(template: str) -> Iterator[str]:
    """Names between single braces, with what follows them up to a conversion or format."""
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is not None:
            yield name
        if spec:
            yield from _fields(spec)


def _check_limits(env: EnvironmentConfig, path: str, config: AgenticConfig, names: Names, warnings: list[str]) -> None:
    sampling, turn, whole = config.actor_infer.generating_args, env.max_tokens_per_step, config.sequence_length
    assert sampling is not None and sampling.max_new_tokens is not None and turn is not None and whole is not None
    # What was left open is never above max_new_tokens, and a turn only gets the room that is left.
    if turn > sampling.max_new_tokens:
        problem = f"{turn} is more than {names['actor_infer']}.generating_args.max_new_tokens, and"
        warnings.append(f"{path}.max_tokens_per_step: {problem} {sampling.max_new_tokens} is the bound")
    if turn > max(whole, sampling.max_new_tokens):
        problem = f"a turn of {turn} tokens does not fit sequence_length = {whole}, which bounds the whole episode"
        raise ConfigError(f"{path}.max_tokens_per_step", f"{problem}; lower it, or raise sequence_length")
    hook = env.on_context_full
    if hook != "stop" and ("." not in hook or not all(part.isidentifier() for part in hook.split("."))):
        problem = f"{hook!r} is neither 'stop' nor the import path of a function (package.module.function)"
        raise ConfigError(f"{path}.on_context_full", f"{problem}{did_you_mean(hook, ['stop'])}")
    if env.episode_mode == "step":
        for key in ("on_rewrite", "on_context_full"):
            if getattr(env, key) != getattr(EnvironmentConfig(), key):
                warnings.append(f"{path}.{key}: no effect in step mode, where each turn has a prompt of its own")


def _check_validation_turns(config: AgenticConfig, raw: Mapping[str, Any], warnings: list[str]) -> None:
    """A limit of a turn that was left open is that of training, in validation too."""
    wanted = ((raw.get("val_env_manager") or {}).get("generating_args") or {}).get("max_new_tokens")
    if wanted is None:
        return
    for tag in config.val_env_manager.tags:
        limit = config.custom_envs[tag].max_tokens_per_step
        left_open = raw["custom_envs"][tag].get("max_tokens_per_step") is None
        if left_open and limit is not None and wanted > limit:
            problem = f"{wanted} is more than a turn of training has, and {limit} is the bound"
            fix = f"set custom_envs.{tag}.max_tokens_per_step to have more in validation"
            warnings.append(f"val_env_manager.generating_args.max_new_tokens: {problem}; {fix}")


def _check_teachers(config: AgenticConfig, names: Names, warnings: list[str]) -> None:
    """Who scores which environment; tags are known here, so no episode has to be played to tell."""
    used = list(config.environments_in_use())
    for name, teacher in config.teachers.items():
        field, included = f"{names[teacher_key(name)]}.tag_included", teacher.tag_included
        for tag in (tag for tag in included if tag not in used):
            where = "is not among the tags that are played" if tag in config.custom_envs else "is no key of custom_envs"
            hint = did_you_mean(tag, used) or f"; those that are played: {', '.join(used)}"
            warnings.append(f"{field}: {tag!r} {where}, so this teacher scores nothing for it{hint}")
    if not config.teachers or any(not teacher.tag_included for teacher in config.teachers.values()):
        return
    scored = {tag for teacher in config.teachers.values() for tag in teacher.tag_included}
    trained = config.train_env_manager.tags
    missing = [tag for tag in trained if tag not in scored]
    if not missing or config.opd_args.uncovered == "reward_only":
        return
    named = ", ".join(missing)
    fix = "add it to a teacher's tag_included, leave tag_included out to cover every tag, or remove it from"
    if config.opd_args.uncovered == "error" or len(missing) == len(trained):
        raise ConfigError("train_env_manager.tags", f"no teacher scores {named}; {fix} tags")
    warnings.append(f"opd_args.uncovered: no teacher scores {named}, whose episodes are played and skipped")
