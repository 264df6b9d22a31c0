"""From the ``env_type`` of the YAML to an environment. Nothing is imported but what that one needs.

==========================================  ===========================================================================
``frozen_lake``, ``sokoban``, ``math``, …   the environments of this package
``gym:<id>``                                an environment registered with Gymnasium
``gem:<id>``, ``game:…``, ``rg:…``, …       one of GEM's; its own kinds need no ``gem:``
``package.module.Class``                    a class with Gymnasium's interface; ``package.module:Class`` is the same
==========================================  ===========================================================================

ROLL's names and class paths mean ours where we have the environment, and are refused with an alternative where not.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from roll_opd.environments.base import TextEnvironment
from roll_opd.errors import ConfigError

_HERE = "roll_opd.environments"

# Short names, ROLL's where it has the environment.
_SHIPPED = {
    "frozen_lake": f"{_HERE}.frozen_lake.FrozenLakeEnv",
    "sokoban": f"{_HERE}.sokoban.SokobanEnv",
    "math": f"{_HERE}.math_env.MathEnv",
    "mcp": f"{_HERE}.mcp_env.MCPEnv",
}
_ALIASES = {"roll_math": "math"}

_ADAPTERS = {"gym": f"{_HERE}.gym_adapter.GymTextEnv", "gem": f"{_HERE}.gem_adapter.GEMEnv"}
_GEM_KINDS = ("game", "math", "rg", "code", "qa", "language", "logic", "eval")

_OWN_CLASS = "name the import path of a class of your own"
_OWN_SERVICE = f"it needs a service of its own; {_OWN_CLASS}, or talk to it as an MCP server with `mcp`"
_ONLY_IN_ROLL = {
    "webshop": _OWN_SERVICE,
    "sokoban_sandbox": "use `sokoban`",
    "sokoban_native_env": "use `sokoban`",
    "sokoban_tool_call": "use `sokoban`, or a tool server with `mcp`",
    "sokoban_mcp": "use `mcp`, with the command of a Sokoban server",
    "deepeyes": f"it shows images, and students here read text; {_OWN_CLASS}",
    "rock_tb_native_env": _OWN_SERVICE,
    "openreward_env": _OWN_SERVICE,
    "atropos_env": _OWN_SERVICE,
    "roll_code": f"use GEM's (`code:CodeContest`, …), or {_OWN_CLASS}",
    "roll_qa": f"use GEM's (`qa:NaturalQuestions`, …), or {_OWN_CLASS}",
}
_ROLL_ROOM = re.compile(r"roll(_opd)?\.pipeline\.agentic\.env\.")
_ROLL_CLASSES = {"FrozenLakeEnv": "frozen_lake", "SokobanEnv": "sokoban", "MathEnv": "math"}

_CLASS_PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[.:]([A-Za-z_]\w*)")
_METHODS = ("reset", "step", "close")
_PIP_NAMES = {"gem": "gem-llm"}


@dataclass(frozen=True)
class _Place:
    """Where an environment's class is, and the arguments that its ``env_type`` gives it."""

    module: str
    name: str
    arguments: tuple[str, ...] = ()


def known_environments() -> list[str]:
    """The short names, sorted."""
    return sorted({*_SHIPPED, *_ALIASES})


def check_env_type(env_type: str, field: str) -> None:
    """Refuse an ``env_type`` that cannot stand for an environment, without importing anything.

    Args:
        env_type: as in the YAML.
        field: full path of the setting, for the message.

    Raises:
        ConfigError: neither a known name nor a class path, or an environment that only ROLL has.
    """
    _locate(env_type, field)


def resolve_environment(env_type: str, field: str) -> Callable[..., TextEnvironment]:
    """What makes the environment: called with ``env_config``, it returns one.

    Args:
        env_type: as in the YAML.
        field: full path of the setting, for the message.

    Raises:
        ConfigError: as for :func:`check_env_type`; or the module or class does not exist, a package that it needs is
            not installed, or the class lacks a method of Gymnasium's interface.
    """
    place = _locate(env_type, field)
    try:
        module = importlib.import_module(place.module)
    except ModuleNotFoundError as error:
        missing = error.name or place.module
        if place.module == missing or place.module.startswith(f"{missing}."):
            hint = "if it lies in the current folder, put PYTHONPATH=. in front of the command"
            raise ConfigError(field, f"{env_type!r}: there is no module {missing!r}; {hint}") from error
        raise _missing_package(field, env_type, missing) from error
    found = getattr(module, place.name, None)
    if found is None:
        others = [name for name, value in vars(module).items() if _is_environment(value)]
        raise ConfigError(field, f"{place.module!r} has no class {place.name!r}{_did_you_mean(place.name, others)}")
    if not _is_environment(found):
        wanted = ", ".join(_METHODS)
        raise ConfigError(field, f"{env_type!r} is not an environment: a class with the methods {wanted} is needed")
    return functools.partial(found, *place.arguments) if place.arguments else found


def make_environment(env_type: str, env_config: Mapping[str, Any], field: str) -> TextEnvironment:
    """Make an environment.

    Args:
        env_type: as in the YAML.
        env_config: arguments of its class.
        field: full path of its entry, ``custom_envs.<tag>``, for the message.

    Raises:
        ConfigError: as for :func:`resolve_environment`; or an argument is unknown, missing, or cannot work.
    """
    make = resolve_environment(env_type, f"{field}.env_type")
    _check_arguments(make, env_type, env_config, f"{field}.env_config")
    try:
        return make(**env_config)
    except ModuleNotFoundError as error:
        raise _missing_package(f"{field}.env_type", env_type, error.name or str(error)) from error
    except ConfigError as error:  # the class does not know under which tag it was named
        raise ConfigError(field, error.problem) from error
    except (TypeError, ValueError) as error:  # what Python's own functions raise for an argument that cannot work
        raise ConfigError(f"{field}.env_config", str(error)) from error


def _locate(env_type: str, field: str) -> _Place:
    name = _ALIASES.get(env_type, env_type)
    if name in _SHIPPED:
        return _place(_SHIPPED[name])
    if name in _ONLY_IN_ROLL:
        raise ConfigError(field, f"{env_type!r} is an environment of ROLL that is not here; {_ONLY_IN_ROLL[name]}")
    if _ROLL_ROOM.match(name):
        return _place(_SHIPPED[_own_name_of(name, field)])
    kind, _, identifier = name.partition(":")
    if kind in _ADAPTERS or kind in _GEM_KINDS:
        if not identifier:
            raise ConfigError(field, f"{env_type!r} lacks the environment's id; write {kind}:<id>")
        adapter = kind if kind in _ADAPTERS else "gem"
        return _place(_ADAPTERS[adapter], identifier if kind in _ADAPTERS else name)
    if "." in name and _CLASS_PATH.fullmatch(name):
        return _place(name)
    near = difflib.get_close_matches(kind.lower(), [*known_environments(), *_ADAPTERS, *_GEM_KINDS], n=1)
    hint = ""
    if near:
        hint = f"did you mean {near[0] if near[0] in known_environments() else f'{near[0]}:{identifier}'!r}? "
    raise ConfigError(
        field,
        f"there is no environment {env_type!r}; {hint}known are {', '.join(known_environments())}, gym:<id>, gem:<id>, "
        "GEM's own ids (game:…), and import paths of classes",
    )


def _own_name_of(path: str, field: str) -> str:
    """Our short name for a class path of ROLL."""
    cls = re.split(r"[.:]", path)[-1]
    if cls not in _ROLL_CLASSES:
        raise ConfigError(
            field,
            f"{path!r} is an environment of ROLL that is not here; known are {', '.join(known_environments())}, or "
            f"{_OWN_CLASS}",
        )
    return _ROLL_CLASSES[cls]


def _place(path: str, *arguments: str) -> _Place:
    match = _CLASS_PATH.fullmatch(path)
    assert match is not None, path
    return _Place(match[1], match[2], arguments)


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, type)
        and not inspect.isabstract(value)
        and all(callable(getattr(value, method, None)) for method in _METHODS)
    )


def _check_arguments(make: Callable[..., Any], env_type: str, env_config: Mapping[str, Any], field: str) -> None:
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = [p.name for p in named]
    for argument in env_config:
        if argument not in accepted:
            near = difflib.get_close_matches(argument, accepted, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{field}.{argument}",
                f"{env_type!r} has no such argument; {hint}it takes {', '.join(accepted) or 'none'}",
            )
    missing = [p.name for p in named if p.default is p.empty and p.name not in env_config]
    if missing:
        raise ConfigError(f"{field}.{missing[0]}", f"{env_type!r} cannot do without this argument")


def _missing_package(field: str, env_type: str, missing: str) -> ConfigError:
    package = _PIP_NAMES.get(missing.partition(".")[0], missing)
    return ConfigError(field, f"{env_type!r} needs the package {package!r}, which is not installed")


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(wrong, known, n=1)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; it has {', '.join(known)}" if known else ""
