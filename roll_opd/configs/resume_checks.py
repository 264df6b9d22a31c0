"""What changed between a checkpoint's config and the one that resumes it, and which changes a continuation survives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs.checks import data_parallel_size
from roll_opd.configs.loader import config_for_checkpoint_json, config_from_dict
from roll_opd.configs.masking import MASK
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.roll_compat import split_names
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.errors import ConfigError

# Settings beside the training itself: how long (unless a schedule is stretched to it), how it is watched, where things
# lie, on what machines.
FREE = split_names("""
    max_steps save_steps eval_steps logging_steps max_ckpt_to_keep output_dir logging_dir checkpoint_config exp_name
    track_with tracker_kwargs html_samples resume_from_checkpoint rollout_dump_dir ray_args num_nodes num_gpus_per_node
    preflight rpc_timeout model_update_buffer_size_mb model_update_transport system_envs val_batch_size
    render_save_dir
""")
# The same for the settings of a role.
FREE_IN_ROLES = split_names("""
    name device_mapping world_size num_gpus_per_worker cpu_threads backend_timeout system_envs
""")
FREE_INSIDE_ROLES = "training_args.save_hf_model"
# The same for an environment, and for the workers of those that train.
FREE_IN_ENVIRONMENTS = split_names("reset_timeout step_timeout max_env_step_concurrent use_thread_lock")
FREE_IN_ENV_MANAGER = split_names("max_env_num_per_worker max_traj_per_env")
# Changes that make the rest of the run another experiment, which a user may want. Any other setting of the pipeline is
# part of the update or of the order of the data: a continuation with it would be neither run.
WARNED = split_names("""
    actor_infer teachers reference rewards validation reward sequence_length pretrain reward_pretrain global_template
    tag_to_template val_env_manager env_monitor
""")
# The trained role: which of its blocks belong to the update, and what in them does not.
REFUSED_IN_ACTOR_TRAIN = ("training_args", "data_args", "model_args", "strategy_args.strategy_name")
WARNED_IN_ACTOR_TRAIN = (
    "data_args.dataset_dir",
    "data_args.preprocessing_num_workers",
    "model_args.attn_implementation",
    "model_args.disable_gradient_checkpointing",
    "model_args.trust_remote_code",
)
_NAMED_ROLES = ("teachers", "rewards")
_ROLES = ("actor_train", "actor_infer", "reference", "critic", "train_env_manager", *_NAMED_ROLES)
_ABSENT = object()


def changed_fields(saved: Mapping[str, Any], config: PipelineConfig) -> list[str]:
    """Dotted canonical paths whose values differ; masked secrets equal anything.

    Args:
        saved: what a checkpoint holds, as ``config_for_checkpoint_json`` wrote it. What it lacks has its default.
        config: the config of this run.

    Raises:
        ConfigError: ``saved`` is not a config.
    """
    return [".".join(parts) for parts in _changes(saved, config)]


def resume_conflicts(
    saved: Mapping[str, Any], config: PipelineConfig, yaml_names: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Sort :func:`changed_fields` into those that forbid to continue and those that the user should know about.

    Args:
        saved: see :func:`changed_fields`.
        config: the config of this run.
        yaml_names: ``LoadedConfig.yaml_names``; paths are reported as the YAML spells them. None: canonical paths.

    Returns:
        The refused paths and the warned ones. Changes that do not touch the training are in neither.

    Raises:
        ConfigError: ``saved`` is not a config.
    """
    refused: list[str] = []
    warned: list[str] = []
    for parts in _changes(saved, config):
        path, verdict = ".".join(parts), _verdict(*parts)
        if path in ("actor_train.world_size", "actor_train.device_mapping") and _ranks(_read(saved)) != _ranks(config):
            # Other ranks without other batch sizes: an optimizer step takes another number of samples.
            verdict = "warned"
        if path == "max_steps" and _spread_over_the_run(config):
            # The rest of the run follows other schedules than its beginning did.
            verdict = "warned"
        if verdict != "free":
            (refused if verdict == "refused" else warned).append(_shown(path, yaml_names or {}))
    return refused, warned


def _read(saved: Mapping[str, Any]) -> PipelineConfig:
    try:
        return config_from_dict(saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"the checkpoint's run_config.json is not a config of this version: {type(error).__name__}: {error}"
        raise ConfigError("resume_from_checkpoint", problem) from error


def _plain(config: PipelineConfig) -> dict[str, Any]:
    """As JSON reads it back: keys are text, tuples are lists, secrets are masked."""
    values: dict[str, Any] = json.loads(config_for_checkpoint_json(config))
    return values


def _changes(saved: Mapping[str, Any], config: PipelineConfig) -> Iterator[tuple[str, ...]]:
    return _differences(_plain(_read(saved)), _plain(config), ())


def _differences(old: Any, new: Any, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths as their parts: a tag, or a teacher's name, may have dots in it."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), (*parts, key))
    elif old != new and old != MASK and new != MASK:
        yield parts


def _verdict(top: str, *rest: str) -> str:
    inside = rest[1:] if top in _NAMED_ROLES else rest
    free_in_role = bool(inside) and (inside[0] in FREE_IN_ROLES or ".".join(inside) == FREE_INSIDE_ROLES)
    if top in FREE or (top in _ROLES and free_in_role):
        return "free"
    if top == "custom_envs" and rest[1:] and rest[1] in FREE_IN_ENVIRONMENTS:
        return "free"
    if top == "train_env_manager" and rest and rest[0] in FREE_IN_ENV_MANAGER:
        return "free"
    # Where they are left open, both follow actor_infer's sampling.
    follows = (top == "train_env_manager" and rest[:1] == ("generating_args",)) or rest[1:] == ("max_tokens_per_step",)
    if top in WARNED or follows:
        return "warned"
    if top == "actor_train":
        within = ".".join(rest)
        belongs = _starts(within, REFUSED_IN_ACTOR_TRAIN) and not _starts(within, WARNED_IN_ACTOR_TRAIN)
        return "refused" if belongs else "warned"
    return "refused"


def _spread_over_the_run(config: PipelineConfig) -> bool:
    """Whether a schedule is stretched to the length of the run."""
    if config.teachers and config.opd_args.coef_schedule != "constant":
        return True
    trained = [config.actor_train, *([config.critic] if config.critic and config.adv_estimator == "gae" else [])]
    return any(_stretches(worker.training_args) for worker in trained)


def _stretches(training: TrainingArguments) -> bool:
    kind = training.lr_scheduler_type
    share = kind == "constant_with_warmup" and training.warmup_steps == 0 and training.warmup_ratio > 0
    return share or kind not in ("constant", "constant_with_warmup")


def _starts(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _ranks(config: PipelineConfig) -> int:
    return data_parallel_size(config.actor_train, "actor_train")


def _shown(path: str, yaml_names: Mapping[str, str]) -> str:
    for canonical in sorted(yaml_names, key=len, reverse=True):
        if path == canonical or path.startswith(canonical + "."):
            return yaml_names[canonical] + path[len(canonical) :]
    # A teacher that only the checkpoint has.
    return path.replace("teachers", "teacher", 1) if yaml_names and path.startswith("teachers") else path
