"""One-letter typos in the keys of a YAML file, and the keys that the loader checks."""

from __future__ import annotations

import copy
import dataclasses
import random
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs import AgenticConfig, PipelineConfig, RLVRConfig, TeacherConfig
from roll_opd.configs.backends import SETTINGS
from roll_opd.configs.builder import field_types
from roll_opd.configs.roles import STUDENT_ROLES, is_single_teacher
from roll_opd.configs.roll_compat import HANDED_ON, roll_keys, spellings

Path = tuple[Any, ...]


def checked_keys(raw: Mapping[str, Any], launcher: str) -> Iterator[tuple[Path, set[str]]]:
    """Paths of the keys of ``raw`` that a class of ours (or ROLL's) defines, each with all keys known beside it.

    Names that the user chooses (teachers, rewards, tags, domains) are nobody's typo, nor are keys that are handed on as
    they are, except the usual words among them.
    """
    agentic = launcher == "agentic" or raw.get("pure_opd_pipeline_type") == "agentic"
    cls: type[PipelineConfig] = AgenticConfig if agentic else RLVRConfig
    top = {**raw}
    for student, actor in STUDENT_ROLES.items():
        if student in top:
            yield (student,), known_beside(cls)
            yield from _inside(field_types(cls)[actor], top.pop(student), (student,))
    teacher = top.pop("teacher", None)
    if teacher:
        yield ("teacher",), known_beside(cls)
        teachers = {(): teacher} if is_single_teacher(teacher) else {(name,): one for name, one in teacher.items()}
        for name, one in teachers.items():
            yield from _inside(TeacherConfig, one, ("teacher", *name))
    yield from _inside(cls, top, ())


def known_beside(cls: type) -> set[str]:
    """Every key that may stand at the place of ``cls``."""
    return {*field_types(cls), *roll_keys(cls), *spellings(cls)} | {*STUDENT_ROLES, "teacher", "hydra", "defaults"}


def _inside(hint: Any, raw: Any, path: Path) -> Iterator[tuple[Path, set[str]]]:
    options = [hint, *typing.get_args(hint)]
    cls = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if typing.get_origin(hint) is dict and cls is not None and isinstance(raw, Mapping):
        for name, one in raw.items():
            yield from _inside(cls, one, (*path, name))
        return
    if cls is None or not isinstance(raw, Mapping):
        return
    types, theirs = field_types(typing.cast(type, cls)), roll_keys(typing.cast(type, cls))
    for key, value in raw.items():
        if not path and key not in types and key not in theirs:
            # A variable of the file, or `defaults`: whoever reads it misses it.
            yield (key,), known_beside(typing.cast(type, cls))
        else:
            yield (*path, key), known_beside(typing.cast(type, cls))
            if key in types:
                yield from _inside(types[key], value, (*path, key))
            if key == "strategy_config" and raw.get("strategy_name") in SETTINGS:
                yield from _inside(SETTINGS[raw["strategy_name"]], value, (*path, key))
            words = HANDED_ON.get(key, set(theirs[key].inner) if key in theirs else set())
            if isinstance(value, Mapping):
                yield from (((*path, key, inner), set(words)) for inner in value if inner in words)


def misspell(word: str, known: set[str], random_: random.Random) -> str | None:
    """``word`` with a letter missing, doubled, or two neighbours swapped; None when every attempt is a known word."""
    for _ in range(20):
        i = random_.randrange(len(word))
        typo = random_.choice(
            [word[:i] + word[i + 1 :], word[: i + 1] + word[i:], word[:i] + word[i : i + 2][::-1] + word[i + 2 :]]
        )
        if typo and typo != word and typo not in known:
            return typo
    return None


def renamed(raw: Mapping[str, Any], path: Path, typo: str) -> dict[str, Any]:
    """A copy of ``raw`` in which the key at ``path`` is called ``typo``."""
    result = copy.deepcopy(dict(raw))
    node: Any = result
    for part in path[:-1]:
        node = node[part]
    node[typo] = node.pop(path[-1])
    return result
