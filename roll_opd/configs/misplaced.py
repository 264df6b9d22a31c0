"""Settings of a role that change nothing where they stand: blocks that other roles read, and what waits for a switch.

What a role's strategy does not read is in :mod:`roll_opd.configs.role_checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.role_checks import OF_MODELS
from roll_opd.configs.worker_config import RewardConfig, TeacherConfig, WorkerConfig

# Of what every role has, a reward reads the others: it holds no model, and its processes compute in one thread.
UNREAD_REWARD = [*OF_MODELS, "generating_args"]
# Of this a warning at load says that it has no effect, wherever it stands.
TOLD_AT_LOAD = ["template"]
# What is left of the trainer's `data_args` where environments bring the prompts: read, or named by another warning.
OF_EPISODES = [*TOLD_AT_LOAD, "file_name", "enable_thinking", "preprocessing_num_workers"]


def misplaced(config: PipelineConfig, roles: Mapping[str, WorkerConfig], names: Mapping[str, str]) -> dict[str, str]:
    """Return the path of each such setting that is not at its default, and why it changes nothing.

    Args:
        config: resolved.
        roles: those that hold a model and are started, by path.
        names: ``LoadedConfig.yaml_names``.
    """
    train, infer = names["actor_train"], names["actor_infer"]
    episodes = config.pipeline == "agentic"
    held_out = "val_env_manager" if episodes else "validation"
    prompts = "environments bring the prompts" if episodes else f"prompts are {train}'s and validation's"
    readers = {
        "generating_args": ([infer], f"{infer} and {held_out} say how to sample"),
        "data_args": ([train], prompts),
        "training_args": ([train, "critic"], f"{train} and a critic are trained, no other role"),
    }
    found: dict[str, str] = {}
    for path, worker in roles.items():
        for key, (paths, why) in readers.items():
            if path not in paths:
                found |= dict.fromkeys(_written(getattr(worker, key), f"{path}.{key}", TOLD_AT_LOAD), why)
        found |= _waiting(worker, path)
    if episodes:
        of_prompts = _written(config.actor_train.data_args, f"{train}.data_args", OF_EPISODES)
        found |= dict.fromkeys(of_prompts, prompts)
    for name, reward in config.rewards.items():
        found |= dict.fromkeys(_of_reward(reward, f"rewards.{name}"), "a reward holds no model")
    return found


def _of_reward(reward: RewardConfig, path: str) -> Iterator[str]:
    for key in UNREAD_REWARD:
        value = getattr(reward, key)
        if key == "strategy_args" and value is not None:
            yield f"{path}.{key}"
        elif dataclasses.is_dataclass(value):
            yield from _written(value, f"{path}.{key}", TOLD_AT_LOAD)
        elif value != getattr(RewardConfig(), key):
            yield f"{path}.{key}"


def _waiting(worker: WorkerConfig, path: str) -> dict[str, str]:
    """What is in force only with another setting that is off."""
    found: dict[str, str] = {}
    if not worker.use_sequence_packing:
        limits = _written(worker.sequence_packing_args, f"{path}.sequence_packing_args")
        found |= dict.fromkeys(limits, "use_sequence_packing is off")
    for job in ("train", "infer"):
        limit, switch = f"max_tokens_per_microbatch_in_{job}", f"use_dynamic_batching_in_{job}"
        if getattr(worker, limit) and not getattr(worker, switch):
            found[f"{path}.{limit}"] = f"{switch} is off"
    model = worker.model_args
    if model.lora_target is None or model.adapter_name_or_path is not None:
        has_own = "the adapter of adapter_name_or_path has its own"
        why = "lora_target is not set" if model.adapter_name_or_path is None else has_own
        shape = [key for key in ("lora_rank", "lora_alpha") if getattr(model, key) != getattr(type(model)(), key)]
        found |= {f"{path}.model_args.{key}": why for key in shape}
    if isinstance(worker, TeacherConfig):
        args, defaults = worker.teacher_args, type(worker.teacher_args)()
        if args.self_teacher != "ema" and args.ema_decay != defaults.ema_decay:
            found[f"{path}.teacher_args.ema_decay"] = "self_teacher is not ema"
        if args.context_template is None and args.context_length is not None:
            found[f"{path}.teacher_args.context_length"] = "context_template is not set"
    return found


def _written(block: Any, path: str, but: list[str] | None = None) -> Iterator[str]:
    """Paths of the fields of ``block`` that differ from their defaults, those of blocks in it one by one.

    Args:
        block: a dataclass; None has no fields.
        path: of the block.
        but: fields to leave out.
    """
    if block is None:
        return
    defaults = type(block)()
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in (but or []):
            continue
        if dataclasses.is_dataclass(value):
            yield from _written(value, f"{path}.{field.name}")
        elif value != getattr(defaults, field.name):
            yield f"{path}.{field.name}"
