"""The resolved plan, as text for people and as a dict for programs. Starts nothing, opens no weights and no data."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from roll_opd.configs.agentic_config import AgenticConfig, EnvManagerConfig
from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.launch_checks import launch_warnings, model_holders, starts_critic, weight_followers
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.memory import DeviceGroup, Footprint, device_groups, footprint, head_bytes, show_size, turn_bytes
from roll_opd.configs.worker_config import WorkerConfig


def plan_as_dict(loaded: LoadedConfig) -> dict[str, Any]:
    """The plan as one JSON-serialisable object."""
    config, names = loaded.config, loaded.yaml_names
    roles = {role: _role(getattr(config, role), names[role]) for role in ("actor_train", "actor_infer")}
    if config.teachers:
        roles["reference"] = _reference(list(config.teachers.values()), names["reference"])
    elif config.reference is not None and config.needs_reference:
        roles["reference"] = _role(config.reference, "reference")
    if config.critic is not None and starts_critic(config):
        roles["critic"] = _role(config.critic, "critic")
    teachers = {
        name: {
            "model": teacher.model_args.model_name_or_path,
            "strategy": _strategy(teacher),
            "devices": list(teacher.device_mapping or []),
            "tags": list(teacher.tag_included),
            "opd_kl_coef": config.teacher_coef(name),
        }
        for name, teacher in config.teachers.items()
    }
    rewards = {
        name: {"worker_cls": reward.worker_cls, "tags": list(reward.tag_included), "world_size": reward.world_size}
        for name, reward in config.rewards.items()
    }
    return {
        "pipeline": config.pipeline,
        "mode": config.mode,
        "roles": roles,
        "teachers": teachers,
        "rewards": rewards,
        "environments": _environments(config) if isinstance(config, AgenticConfig) else {},
        "memory": {path: found and dataclasses.asdict(found) for path, found in _footprints(loaded).items()},
        "sharing": [
            {"devices": list(group.devices), "roles": list(group.roles)}
            for group in device_groups(model_holders(config, names))
        ],
        "warnings": [*loaded.warnings, *launch_warnings(loaded)],
    }


def render_plan_text(loaded: LoadedConfig) -> str:
    """The plan as a table with estimated memory and warnings."""
    config, plan = loaded.config, plan_as_dict(loaded)
    rows: list[tuple[str, ...]] = [("role", "in the YAML", "model", "strategy", "devices", "world_size")]
    for role, entry in plan["roles"].items():
        if role == "reference" and config.teachers:
            continue
        rows.append(_row(role, entry["yaml_name"], getattr(config, role)))
    for name, teacher in config.teachers.items():
        rows.append(_row("reference", loaded.teacher_yaml_name(name), teacher))
    lines = [f"pipeline: {plan['pipeline']}    mode: {plan['mode']}    run: {config.exp_name}", ""]
    lines += _table(rows)
    if config.teachers:
        lines += ["", "teachers:"]
        for name, entry in plan["teachers"].items():
            lines.append(f"  {name}: tags {', '.join(entry['tags']) or '(all)'}, opd_kl_coef {entry['opd_kl_coef']:g}")
    lines += ["", "estimated memory (activations come on top):"] + [f"  {line}" for line in _memory(loaded)]
    if isinstance(config, AgenticConfig):
        lines += ["", "environments:"] + [f"  {line}" for line in _environment_lines(config)]
    else:
        lines += ["", "rewards:" if plan["rewards"] else "rewards: none"]
    for name, entry in plan["rewards"].items():
        lines.append(f"  {name}: {entry['worker_cls']}, tags {', '.join(entry['tags']) or '(all)'}")
    lines += ["", "warnings:" if plan["warnings"] else "warnings: none"]
    for warning in plan["warnings"]:
        lines += textwrap.wrap(warning, 116, initial_indent="  - ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


def _managers(config: AgenticConfig) -> dict[str, EnvManagerConfig]:
    managers = {"train": config.train_env_manager, "validation": config.val_env_manager}
    return {name: manager for name, manager in managers.items() if manager.tags}


def _environments(config: AgenticConfig) -> dict[str, Any]:
    """Each environment in use by its tag, with the groups that it has in each part."""
    return {
        tag: {
            "env_type": env.env_type,
            # A manager of ROLL's that is planned only stands for a mode that does not exist here.
            "mode": env.episode_mode or str(env.env_manager_cls).rpartition(".")[2],
            "max_steps": env.max_steps,
            "max_tokens_per_step": env.max_tokens_per_step,
            "groups": {
                name: dict(zip(manager.tags, manager.num_groups_partition or [], strict=True)).get(tag, 0)
                for name, manager in _managers(config).items()
            },
        }
        for tag, env in config.environments_in_use().items()
    }


def _environment_lines(config: AgenticConfig) -> list[str]:
    """A table of the environments, and a line for training and for validation."""
    found, managers = _environments(config), _managers(config)
    rows: list[tuple[str, ...]] = [("tag", "env_type", "mode", "turns", "tokens of a turn", *managers)]
    for tag, entry in found.items():
        counts = [
            f"{entry['groups'][name]} x {manager.group_size}" if entry["groups"][name] else "-"
            for name, manager in managers.items()
        ]
        limits = (str(entry["max_steps"]), str(entry["max_tokens_per_step"]))
        rows.append((tag, entry["env_type"], entry["mode"], *limits, *counts))
    lines = _table(rows)
    for name, manager in managers.items():
        said = f"{name}: {manager.num_env_groups} groups x {manager.group_size} = {manager.num_envs} at a time in"
        said += f" {manager.num_processes} {'process' if manager.num_processes == 1 else 'processes'}"
        if name == "train":
            said += f"; a step plays {config.groups_per_step} groups, {config.samples_per_step} episodes"
        lines.append(said)
    return lines


def _footprints(loaded: LoadedConfig) -> dict[str, Footprint | None]:
    config, heads = loaded.config, head_bytes(loaded.config)
    return {
        path: footprint(worker, heads if worker is config.actor_train else 0.0)
        for path, worker in model_holders(config, loaded.yaml_names).items()
    }


def _memory(loaded: LoadedConfig) -> list[str]:
    """A table of the roles, and a line for each group of devices."""
    found, roles = _footprints(loaded), model_holders(loaded.config, loaded.yaml_names)
    rows: list[tuple[str, ...]] = [("role", "on each", "weights", "training", "other")]
    for path, worker in roles.items():
        place = "device" if worker.device_mapping is not None else "process"
        rows.append((path, place, *_sizes(found[path])))
    lines = _table(rows)
    for group in device_groups(roles):
        lines += textwrap.wrap(_sharing(group, found, loaded), 114, subsequent_indent="  ")
    return lines


def _sizes(found: Footprint | None) -> tuple[str, str, str]:
    if found is None:
        return "unknown", "", ""
    if not found.total:
        return "none here", "", ""
    other = [f"teachers' heads {show_size(found.heads)}"] if found.heads else []
    other += [f"cache {show_size(found.cache)}"] if found.cache else []
    other += [f"with its cache {found.share:.0%} of the device"] if found.share else []
    other += ["in host memory (offload_policy)"] if found.in_host_memory else []
    return show_size(found.weights), show_size(found.training) if found.training else "-", ", ".join(other) or "-"


def _sharing(group: DeviceGroup, found: Mapping[str, Footprint | None], loaded: LoadedConfig) -> str:
    """One sentence: who is on these devices, and what that takes at once."""
    roles = model_holders(loaded.config, loaded.yaml_names)
    known = {path: size for path in group.roles if (size := found[path]) is not None}
    names, unknown = ", ".join(group.roles), "" if len(known) == len(group.roles) else ", beside what is unknown"
    where = f"device{'s' * (len(group.devices) > 1)} {format_devices(list(group.devices))}: {names}"
    where += " take turns" if len(group.roles) > 1 else ""
    where = where if group.devices else f"without devices: {names}"
    if not known:
        return f"{where}: unknown"
    if not group.devices:
        at_once = sum(size.total * (roles[path].world_size or 1) for path, size in known.items())
        return f"{where}: {show_size(at_once)} together{unknown}"
    turns = turn_bytes(known, loaded.yaml_names["actor_train"], weight_followers(loaded))
    largest = max(turns, key=lambda turn: turns[turn])
    engines = [f"{size.share:.0%} of it ({path})" for path, size in known.items() if size.share]
    said = f"{where}: {show_size(turns[largest])} of each"
    if len(group.roles) > 1:
        said = f"{where}: the largest one takes {show_size(turns[largest])} of each device ({largest})"
    said = " or ".join([said, *engines]) + unknown
    waiting = sum(size.total for size in known.values()) - min(size.total for size in known.values())
    return f"{said}; up to {show_size(waiting)} for each wait in host memory" if len(known) > 1 else said


def _strategy(worker: WorkerConfig) -> str | None:
    return worker.strategy_args.strategy_name if worker.strategy_args else None


def _role(worker: WorkerConfig, yaml_name: str) -> dict[str, Any]:
    return {
        "yaml_name": yaml_name,
        "model": worker.model_args.model_name_or_path,
        "strategy": _strategy(worker),
        "devices": list(worker.device_mapping or []),
        "world_size": worker.world_size,
    }


def _reference(teachers: list[Any], yaml_name: str) -> dict[str, Any]:
    """One teacher as it is; several as one entry: names joined, devices united, processes added up."""
    entry = _role(teachers[0], yaml_name)
    if len(teachers) > 1:
        entry["model"] = ", ".join(dict.fromkeys(str(teacher.model_args.model_name_or_path) for teacher in teachers))
        entry["strategy"] = ", ".join(dict.fromkeys(str(_strategy(teacher)) for teacher in teachers))
        entry["devices"] = sorted({device for teacher in teachers for device in teacher.device_mapping or []})
        entry["world_size"] = sum(teacher.world_size or 1 for teacher in teachers)
    return entry


def _row(role: str, yaml_name: str, worker: WorkerConfig) -> tuple[str, ...]:
    devices = format_devices(worker.device_mapping) if worker.device_mapping is not None else "cpu"
    model = str(worker.model_args.model_name_or_path)
    return (role, yaml_name, model, str(_strategy(worker)), devices, str(worker.world_size))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
