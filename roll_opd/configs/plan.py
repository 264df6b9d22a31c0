"""The resolved plan, as text for people and as a dict for programs. Starts nothing, opens no weights and no data."""

from __future__ import annotations

import textwrap
from typing import Any

from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.launch_checks import launched_roles, starts_critic
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.memory import memory_per_device
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
        "warnings": list(loaded.warnings),
    }


def render_plan_text(loaded: LoadedConfig) -> str:
    """The plan as a table with estimated memory and warnings."""
    config, names, plan = loaded.config, loaded.yaml_names, plan_as_dict(loaded)
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
    lines += ["", "estimated memory:"] + [
        f"  {path}: {memory_per_device(worker, path)}" for path, worker in launched_roles(config, names).items()
    ]
    lines += ["", "rewards:" if plan["rewards"] else "rewards: none"]
    for name, entry in plan["rewards"].items():
        lines.append(f"  {name}: {entry['worker_cls']}, tags {', '.join(entry['tags']) or '(all)'}")
    lines += ["", "warnings:" if plan["warnings"] else "warnings: none"]
    for warning in plan["warnings"]:
        lines += textwrap.wrap(warning, 116, initial_indent="  - ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


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
