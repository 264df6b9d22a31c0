"""From the YAML's roles to the pipeline's: ``student_train``, ``student_infer``, ``teacher`` become
``actor_train``, ``actor_infer``, ``reference``; and the run's mode, from the launcher and the switches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.builder import did_you_mean, field_types
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.configs.roll_compat import ignored_keys
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.errors import ConfigError

Launcher = Literal["onpolicy_distill", "rlvr", "agentic"]
LAUNCHERS = ("onpolicy_distill", "rlvr", "agentic")
STUDENT_ROLES = {"student_train": "actor_train", "student_infer": "actor_infer"}
# Names of the canonical config that a YAML may not use: they are results of the mapping.
_INTERNAL = {
    "teachers": "write 'teacher:', with one worker config or a mapping from name to worker config",
    "pipeline": "",
}
_KNOWN = {*field_types(RLVRConfig), *field_types(AgenticConfig), *STUDENT_ROLES, "teacher"}
_TEACHER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass
class MappedRoles:
    """Result of the mapping, still plain dicts."""

    raw: dict[str, Any]
    """The config under canonical names."""
    yaml_names: dict[str, str] = field(default_factory=dict)
    """Canonical role to the name in the YAML."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Canonical path prefix to the path in the YAML, for messages."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know about the mapping."""


def map_roles(user: Mapping[str, Any], launcher: str) -> MappedRoles:
    """Rename the roles of ``user`` (as loaded from YAML) and settle mode and pipeline; see SPEC sections 2 and 4."""
    if launcher not in LAUNCHERS:
        raise ConfigError(
            "launcher", f"{launcher!r} is not one of: {', '.join(LAUNCHERS)}{did_you_mean(launcher, LAUNCHERS)}"
        )
    for key, advice in _INTERNAL.items():
        if key in user:
            raise ConfigError(key, f"unknown key{'; ' + advice if advice else ''}")
    mapped = MappedRoles({key: value for key, value in user.items() if key not in ("hydra", "defaults")})
    # A role that is present but null is not configured.
    for role in (*STUDENT_ROLES, *STUDENT_ROLES.values(), "teacher", "reference", "critic"):
        if mapped.raw.get(role, ...) is None or mapped.raw.get(role) == {}:
            del mapped.raw[role]
    pure, mixed = _switches(mapped, launcher)
    _student_roles(mapped, pure)
    _teacher_role(mapped, pure, mixed)
    mapped.raw["pipeline"] = _pipeline(mapped.raw, launcher, pure)
    for role in ("critic", "reference"):
        if role in mapped.raw:
            mapped.yaml_names.setdefault(role, role)
    return mapped


def _switches(mapped: MappedRoles, launcher: str) -> tuple[bool, bool]:
    pure, mixed = mapped.raw.get("is_pure_opd"), mapped.raw.get("use_opd")
    for key, value in (("is_pure_opd", pure), ("use_opd", mixed)):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(key, f"expected true or false, got {value!r}")
    if launcher == "onpolicy_distill":
        if pure is False:
            mapped.warnings.append("is_pure_opd: false has no effect here: this launcher always runs pure distillation")
        if mixed:
            fix = "remove it, or start the mixed mode with start_rlvr_pipeline.py or start_agentic_pipeline.py"
            raise ConfigError("use_opd", f"true contradicts this launcher, which runs pure distillation; {fix}")
        mapped.raw["is_pure_opd"] = pure = True
    if pure and mixed:
        raise ConfigError("use_opd", "is_pure_opd and use_opd exclude each other; keep one of them")
    return bool(pure), bool(mixed)


def _pipeline(raw: Mapping[str, Any], launcher: str, pure: bool) -> str:
    wanted = raw.get("pure_opd_pipeline_type") or "rlvr"
    if launcher == "onpolicy_distill":
        # A bad value is left to the builder, which lists the valid ones.
        return "agentic" if wanted == "agentic" else "rlvr"
    if pure and raw.get("pure_opd_pipeline_type") not in (None, launcher):
        raise ConfigError("pure_opd_pipeline_type", f"{wanted!r} contradicts the launcher of the {launcher} pipeline")
    return launcher


def _student_roles(mapped: MappedRoles, pure: bool) -> None:
    raw = mapped.raw
    students = [name for name in STUDENT_ROLES if name in raw]
    actors = [name for name in STUDENT_ROLES.values() if name in raw]
    if students and actors:
        keep, drop = ("student_*", actors[0]) if pure else ("actor_*", students[0])
        problem = f"both {students[0]} and {actors[0]} are given, two names of the student; keep the {keep} roles"
        raise ConfigError(drop, problem)
    if students and not pure:
        fix = f"rename it to {STUDENT_ROLES[students[0]]}, or start it with start_onpolicy_distill_pipeline.py"
        raise ConfigError(students[0], f"belongs to pure distillation, which is off here; {fix}")
    for student, actor in STUDENT_ROLES.items():
        name = student if pure else actor
        if name not in raw:
            hint = did_you_mean(name, [key for key in raw if isinstance(raw[key], Mapping) and key not in _KNOWN])
            hint = f"; rename {actor} to {student}" if pure and actor in raw else hint
            raise ConfigError(
                name,
                f"missing role: it configures the student's {'training' if 'train' in name else 'generation'}{hint}",
            )
        raw[actor] = raw.pop(name)
        mapped.yaml_names[actor] = name
        mapped.aliases[actor] = name


def _teacher_role(mapped: MappedRoles, pure: bool, mixed: bool) -> None:
    raw = mapped.raw
    teacher = raw.pop("teacher", None)
    if teacher is None:
        if pure or mixed:
            fix = "add 'teacher:' with model_args.model_name_or_path"
            raise ConfigError(
                "teacher", f"missing role: {'pure' if pure else 'mixed'} distillation needs a teacher; {fix}"
            )
        return
    if not (pure or mixed):
        fix = "set use_opd: true, or start it with start_onpolicy_distill_pipeline.py, or remove the teacher"
        raise ConfigError("teacher", f"a teacher is configured but distillation is off; {fix}")
    if "reference" in raw:
        raise ConfigError("reference", "must not stand beside a teacher, which takes the reference's place; remove it")
    single = is_single_teacher(teacher)
    raw["teachers"] = {"default": teacher} if single else dict(teacher)
    mapped.yaml_names["reference"] = "teacher"
    for name in raw["teachers"]:
        mapped.yaml_names[teacher_key(name)] = "teacher" if single else f"teacher.{name}"
    mapped.aliases["teachers.default" if single else "teachers"] = "teacher"


def teacher_key(name: str) -> str:
    """Key of a teacher among ``yaml_names``."""
    return f"teachers.{name}"


def is_single_teacher(teacher: Any) -> bool:
    """True for one worker config, False for a mapping from name to worker config; anything else is a ConfigError."""
    if isinstance(teacher, list):
        fix = "write a mapping from a name of your choice to each teacher's config"
        raise ConfigError(
            "teacher", f"a list of teachers is not supported, because metrics and routing need names; {fix}"
        )
    if not isinstance(teacher, Mapping):
        raise ConfigError(
            "teacher", f"expected a worker config, or a mapping from name to worker config, got {teacher!r}"
        )
    known = set(field_types(TeacherConfig)) | ignored_keys(TeacherConfig)
    if any(key in known for key in teacher):
        return True
    for name, config in teacher.items():
        looks_like_worker = isinstance(config, Mapping) and any(key in known for key in config)
        if not looks_like_worker:
            typo = did_you_mean(name, known)
            if typo:
                raise ConfigError(f"teacher.{name}", f"unknown key{typo}")
            fix = "each entry of teacher is a name with a config such as {model_args: ..., strategy_args: ...}"
            raise ConfigError(f"teacher.{name}", f"is not a worker config; {fix}")
        if not isinstance(name, str) or not _TEACHER_NAME.fullmatch(name):
            raise ConfigError(
                f"teacher.{name}", "a teacher's name appears in metrics: use letters, digits, '_', '-' and '.'"
            )
    return False
