"""Strict construction of the dataclasses from plain dicts: every bad key, type or value is an error with its path."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from roll_opd.configs.field_spec import PARSE, RANGE
from roll_opd.configs.roll_compat import (
    HANDED_ON,
    OTHER_PIPELINES,
    PLACEHOLDER,
    ROLL_VARIABLES,
    RollKey,
    backends_with,
    ignored_keys,
    roll_keys,
    spellings,
)
from roll_opd.errors import ConfigError

T = TypeVar("T")
_NUMBER_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# What a YAML may hold at its top beside the fields of the config.
_TOP_LEVEL_WORDS = ("defaults", "hydra", "student_train", "student_infer", "teacher")
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def one_edit_apart(first: str, second: str) -> bool:
    """True for two different words that one inserted, deleted or replaced letter, or one swap of neighbours, unites."""
    if first == second or abs(len(first) - len(second)) > 1:
        return False
    short, long = sorted((first, second), key=len)
    start = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(short) < len(long):
        return short[start:] == long[start + 1 :]
    swapped = short[:start] + short[start : start + 2][::-1] + short[start + 2 :]
    return short[start + 1 :] == long[start + 1 :] or swapped == long


def did_you_mean(word: Any, candidates: Iterable[Any]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest candidate, or an empty string.

    All candidates that are one edit away are named; otherwise the most similar one.
    """
    words = sorted({str(candidate) for candidate in candidates})
    close = [candidate for candidate in words if one_edit_apart(str(word), candidate)]
    close = close or difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


OF_AGENTS = ("custom_envs", "train_env_manager", "val_env_manager")
"""Keys that only the agentic pipeline's config knows, and that tell what its author had in mind."""


def of_other_pipeline(key: str) -> ConfigError:
    """The error for a key of a pipeline that ROLL has and we do not."""
    problem = f"belongs to ROLL's pipeline for {OTHER_PIPELINES[key]}, which roll_opd does not have"
    return ConfigError(key, f"{problem}; it runs on-policy distillation, RLVR and agents")


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """Resolved annotations of a dataclass, by field name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


class Builder:
    """Builds one config. Collects the keys of ROLL that have no effect here in ``ignored``.

    Args:
        aliases: internal path prefix to the path that the user wrote, for messages.
        variables: top-level keys that exist to be interpolated elsewhere; they are not settings.
        included: top-level keys that come from files under ``defaults:``.
    """

    def __init__(
        self,
        aliases: Mapping[str, str] | None = None,
        variables: frozenset[str] = frozenset(),
        included: frozenset[str] = frozenset(),
    ) -> None:
        self.aliases = dict(aliases or {})
        self.variables = variables
        self.included = included
        self.ignored: list[str] = []
        self.tolerated: list[str] = []
        # What a plan accepts and a launch cannot do: path to reason. Each path is among ``ignored`` as well.
        self.planned: dict[str, str] = {}

    def shown(self, path: str) -> str:
        """The path as the user wrote it."""
        for prefix in sorted(self.aliases, key=len, reverse=True):
            if path == prefix or path.startswith(prefix + "."):
                return self.aliases[prefix] + path[len(prefix) :]
        return path

    def build(self, cls: type[T], raw: Any, path: str = "") -> T:
        """Build dataclass ``cls`` from ``raw``; every problem is a ConfigError with the full path."""
        if not isinstance(raw, Mapping):
            raise ConfigError(self.shown(path), f"expected a mapping of settings, got {_describe(raw)}")
        hints = field_types(typing.cast(Any, cls))
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        other_names = spellings(cls)
        values: dict[str, Any] = {}
        for spelled, value in raw.items():
            where = f"{path}.{spelled}" if path else str(spelled)
            key = other_names.get(spelled, spelled)
            if key != spelled and key in raw:
                raise ConfigError(self.shown(where), f"is another spelling of {key!r}, which is given too; keep one")
            if key not in fields:
                self._unknown(cls, key, value, where, at_top=not path)
                continue
            if value is None and not _accepts_none(hints[key]):
                # `key: ~` in ROLL's files means "not set".
                continue
            if isinstance(value, str) and PLACEHOLDER.fullmatch(value) and hints[key] in (int, float):
                self.ignored.append(self.shown(where))
                self.planned[self.shown(where)] = f"{value!r} stands where a number belongs"
                continue
            values[key] = self._field(fields[key], hints[key], value, where)
        return cls(**values)

    def _field(self, field: dataclasses.Field[Any], hint: Any, value: Any, path: str) -> Any:
        parse = field.metadata.get(PARSE)
        if parse is not None:
            value = parse(value, self.shown(path))
        value = self._value(hint, value, path)
        if field.name in HANDED_ON and isinstance(value, Mapping):
            self._near_misses(field.name, value, path)
        bounds = field.metadata.get(RANGE)
        if bounds is not None and value is not None:
            problem = bounds.problem(value)
            if problem:
                raise ConfigError(self.shown(path), problem)
        return value

    def _near_misses(self, name: str, value: Mapping[Any, Any], path: str) -> None:
        """Refuse misspelled keys in a block whose other keys are its recipient's business."""
        words = HANDED_ON[name]
        for key in value:
            close = [word for word in sorted(words) if one_edit_apart(str(key), word)]
            if key not in words and close:
                raise ConfigError(self.shown(f"{path}.{key}"), f"unknown key{did_you_mean(key, close)}")

    def _unknown(self, cls: type, key: Any, value: Any, path: str, at_top: bool) -> None:
        known = roll_keys(cls)
        if key in ignored_keys(cls):
            self._known_to_roll(known[key], value, path)
        elif at_top and key in ROLL_VARIABLES - self.variables - self.included:
            self.ignored.append(self.shown(path))
        elif at_top and key in self.included - self.variables:
            # A shared file of variables may bring in more of them than this config reads.
            self.tolerated.append(self.shown(path))
        elif cls.__name__ == "CheckpointArguments" and not any(one_edit_apart(str(key), name) for name in known):
            # ROLL hands checkpoint_config to storage backends, which take keys of their own.
            self.tolerated.append(self.shown(path))
        elif at_top and key in OTHER_PIPELINES:
            raise of_other_pipeline(key)
        elif at_top and key in OF_AGENTS:
            problem = "belongs to the agentic pipeline: set pure_opd_pipeline_type: agentic"
            raise ConfigError(key, f"{problem}, or start it with start_agentic_pipeline.py")
        elif not (at_top and key in self.variables):
            candidates = {*field_types(cls), *ignored_keys(cls), *spellings(cls)}
            if at_top:
                candidates |= {*self.variables, *self.included, *ROLL_VARIABLES, *_TOP_LEVEL_WORDS}
            hint = did_you_mean(key, candidates) or _elsewhere(cls, key)
            raise ConfigError(self.shown(path), f"unknown key{hint}")

    def _known_to_roll(self, known: RollKey, value: Any, path: str) -> None:
        self.ignored.append(self.shown(path))
        if known.asks(value):
            self.planned[self.shown(path)] = known.note
        if known.inner and isinstance(value, Mapping):
            for key in value:
                if key not in known.inner:
                    raise ConfigError(self.shown(f"{path}.{key}"), f"unknown key{did_you_mean(key, known.inner)}")

    def _value(self, hint: Any, value: Any, path: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._union(arguments, value, path)
        if origin is Literal:
            if not any(value == option and type(value) is type(option) for option in arguments):
                options = ", ".join(str(option) for option in arguments)
                raise ConfigError(
                    self.shown(path), f"{value!r} is not one of: {options}{did_you_mean(value, arguments)}"
                )
            return value
        if origin is list:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(self.shown(path), f"expected a list, got {_describe(value)}")
            return [self._value(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
        if origin is dict:
            if not isinstance(value, Mapping):
                raise ConfigError(self.shown(path), f"expected a mapping, got {_describe(value)}")
            return {key: self._value(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
        if dataclasses.is_dataclass(hint):
            return self.build(typing.cast(type, hint), value, path)
        return self._scalar(hint, value, path)

    def _union(self, options: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None and type(None) in options:
            return None
        options = tuple(option for option in options if option is not type(None))
        if len(options) == 1:
            return self._value(options[0], value, path)
        for option in options:
            if type(value) is option:
                return value
        expected = " or ".join(_TYPE_NAMES.get(option, str(option)) for option in options)
        raise ConfigError(self.shown(path), f"expected {expected}, got {_describe(value)}")

    def _scalar(self, expected: type, value: Any, path: str) -> Any:
        if expected is float:
            number = _as_float(value)
            if number is not None and not math.isfinite(number):
                raise ConfigError(self.shown(path), f"must be a finite number, got {value!r}")
            if number is not None:
                return number
        elif type(value) is expected:
            return value
        advice = "; write it in quotes" if expected is str and isinstance(value, (bool, int, float)) else ""
        raise ConfigError(self.shown(path), f"expected {_TYPE_NAMES[expected]}, got {_describe(value)}{advice}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    # YAML 1.1 reads 5e-7 (no dot) as text.
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value.strip()):
        return float(value)
    return None


def _accepts_none(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, list(value)[:4])) or '(none)'}"
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return f"{value!r} ({names.get(type(value), type(value).__name__)})"


def _elsewhere(cls: type, key: Any) -> str:
    """Point at the nested block that knows the key, for settings written one level too high; or at another backend."""
    for name, hint in field_types(cls).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option) and key in field_types(typing.cast(type, option)):
                return f"; it belongs under '{name}': {name}.{key}"
    if "engine_args" in field_types(cls):
        return f"; if it is an argument of the engine itself, it belongs under 'engine_args': engine_args.{key}"
    if cls.__name__.endswith("Settings") and backends_with(key):
        return f"; it is a setting of {' and '.join(backends_with(key))}; remove it, or choose that strategy_name"
    return ""
