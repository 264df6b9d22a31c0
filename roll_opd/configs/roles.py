"""From the YAML's roles to the pipeline's: ``student_train``, ``student_infer``, ``teacher`` become
``actor_train``, ``actor_infer``, ``reference``; and the run's mode, from the launcher and the switches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.builder import did_you_mean, field_types, of_other_pipeline, one_edit_apart
from roll_opd.configs.composition import unset_environment
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.configs.roll_compat import OTHER_PIPELINES, PRIVATE_TRACKERS, ignored_keys
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
RESERVED_NAMES = ("reference", "base_model")
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
    planned: dict[str, str] = field(default_factory=dict)
    """What a plan accepts and a launch cannot do: path to reason."""


def map_roles(user: Mapping[str, Any], launcher: str) -> MappedRoles:
    """Rename the roles of ``user`` (as loaded from YAML) and settle mode and pipeline."""
    if launcher not in LAUNCHERS:
        raise ConfigError(
            "launcher", f"{launcher!r} is not one of: {', '.join(LAUNCHERS)}{did_you_mean(launcher, LAUNCHERS)}"
        )
    for key, advice in _INTERNAL.items():
        if key in user:
            raise ConfigError(key, f"unknown key{'; ' + advice if advice else ''}")
    mapped = MappedRoles({key: value for key, value in user.items() if key not in ("hydra", "defaults")})
    _misspelled_roles(mapped.raw, launcher)
    # A role that is present but null is not configured.
    for role in (*STUDENT_ROLES, *STUDENT_ROLES.values(), "teacher", "reference", "critic"):
        if mapped.raw.get(role, ...) is None or mapped.raw.get(role) == {}:
            del mapped.raw[role]
    pure, mixed = _switches(mapped, launcher)
    if launcher == "agentic" and not pure:
        _rollouts_alone(mapped)
    _student_roles(mapped, pure)
    _teacher_role(mapped, pure, mixed)
    mapped.raw["pipeline"] = _pipeline(mapped.raw, launcher, pure)
    if not pure:
        _critic_of_roll(mapped)
    for role in ("critic", "reference"):
        if role in mapped.raw:
            mapped.yaml_names.setdefault(role, role)
    _what_is_missing_here(mapped)
    return mapped


def _misspelled_roles(raw: Mapping[str, Any], launcher: str) -> None:
    """Report the typo in the name of a role or switch itself, before what follows from its absence."""
    pure = launcher == "onpolicy_distill" or raw.get("is_pure_opd") is True
    needed = [*(STUDENT_ROLES if pure else STUDENT_ROLES.values()), "teacher", "use_opd", "is_pure_opd"]
    for name in (*needed, "pure_opd_pipeline_type"):
        for key in raw:
            if name not in raw and key not in _KNOWN and one_edit_apart(str(key), name):
                raise ConfigError(str(key), f"unknown key; did you mean {name!r}?")
    for key in OTHER_PIPELINES:
        if key in raw and not all(role in raw for role in needed[:2]):
            raise of_other_pipeline(key)


def _rollouts_alone(mapped: MappedRoles) -> None:
    """ROLL has a launcher that samples episodes and trains nothing; its files load for a plan."""
    if "actor_infer" in mapped.raw and "actor_train" not in mapped.raw:
        mapped.raw["actor_train"] = {}
        if mapped.raw.get("adv_estimator") is None:
            mapped.raw["adv_estimator"] = "reinforce"
        mapped.planned["actor_train"] = "is missing, and rollouts without training are planned only"


def _critic_of_roll(mapped: MappedRoles) -> None:
    """ROLL has a critic in every config. It is `reward_pretrain` on nothing when the YAML does not configure it."""
    raw = mapped.raw
    if raw.get("adv_estimator") == "gae" and "critic" not in raw and raw.get("reward_pretrain") is not None:
        raw["critic"] = {}
        mapped.planned["critic"] = "is missing, and adv_estimator gae needs one; without it reward_pretrain is planned"


def _what_is_missing_here(mapped: MappedRoles) -> None:
    """Trackers and environment variables that this machine does not have: a plan goes on without them."""
    trackers = mapped.raw.get("track_with")
    names = [trackers] if isinstance(trackers, str) else trackers
    if isinstance(names, list) and any(name in PRIVATE_TRACKERS for name in names):
        kept = [name for name in names if name not in PRIVATE_TRACKERS] or ["tensorboard"]
        mapped.raw["track_with"] = kept
        private = ", ".join(name for name in names if name in PRIVATE_TRACKERS)
        mapped.warnings.append(f"track_with: {private} is internal to ROLL's makers; {', '.join(kept)} is used")
    for path, name in unset_environment(mapped.raw).items():
        mapped.planned[path] = f"environment variable {name} is not set"
    mapped.warnings += [f"{path}: {reason}" for path, reason in mapped.planned.items()]


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
        if name in RESERVED_NAMES:
            raise ConfigError(f"teacher.{name}", "is the name of another scorer of the run; choose another name")
        if not isinstance(name, str) or not _TEACHER_NAME.fullmatch(name):
            raise ConfigError(
                f"teacher.{name}", "a teacher's name appears in metrics: use letters, digits, '_', '-' and '.'"
            )
    return False
