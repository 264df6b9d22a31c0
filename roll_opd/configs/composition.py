"""From a config path, a name and overrides to a plain dict, with Hydra. One module knows Hydra, this one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from roll_opd.configs.builder import did_you_mean, one_edit_apart
from roll_opd.configs.roll_compat import top_level_names
from roll_opd.errors import ConfigError

_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.\-\[\]]*")
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)[.}\[]")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
_MISSING = re.compile(r"Interpolation key '([^']+)' not found")


def find_config_dir(config_path: str, launcher_dir: Path | None) -> Path:
    """Resolve ``config_path``: absolute, relative to the working directory, to the launcher, or to the folder above it.

    The last makes ``examples/<run>``, as it is typed in the repository's root, work from everywhere.
    """
    given = Path(config_path).expanduser()
    candidates = [given] if given.is_absolute() else [Path.cwd() / given]
    if not given.is_absolute() and launcher_dir is not None:
        candidates += [Path(launcher_dir) / given, Path(launcher_dir).resolve().parent / given]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
    tried = ", ".join(str(candidate) for candidate in candidates)
    if any(candidate.is_file() for candidate in candidates):
        raise ConfigError(
            "--config_path", f"is a file; give its folder, and the file's name as --config_name; tried {tried}"
        )
    raise ConfigError("--config_path", f"no such folder: {config_path!r}; tried {tried}")


@dataclass(frozen=True)
class Composed:
    """A composed config, and which of its top-level keys need not be settings of ours."""

    values: dict[str, Any]
    """The resolved config."""
    variables: frozenset[str]
    """Top-level keys that some interpolation reads: they may be mere variables of the file."""
    included: frozenset[str]
    """Top-level keys that only the files under `defaults:` bring in."""


def compose_config(directory: Path, config_name: str, overrides: Sequence[str]) -> Composed:
    """Compose one YAML file with its defaults and overrides, and resolve its interpolations."""
    name = config_name[: -len(".yaml")] if config_name.endswith(".yaml") else config_name
    if not (directory / f"{name}.yaml").is_file():
        present = ", ".join(sorted(path.stem for path in directory.glob("*.yaml"))) or "none"
        raise ConfigError("--config_name", f"no {name}.yaml in {directory}; configs there: {present}")
    prepared = [prepare_override(override, directory) for override in overrides]
    GlobalHydra.instance().clear()
    plain: Any = {}
    try:
        with _quiet(), initialize_config_dir(config_dir=str(directory), version_base="1.3", job_name="roll_opd"):
            composed = compose(config_name=name, overrides=prepared)
            plain = OmegaConf.to_container(composed, resolve=False)
            written_out = OmegaConf.create(_keep_unset_environment(plain))
            resolved = OmegaConf.to_container(written_out, resolve=True, throw_on_missing=True)
    except InterpolationResolutionError as error:
        raise _unresolved(error, plain, name) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}.yaml", f"cannot be composed: {_compact(error)}") from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(resolved, dict)
    values = {str(key): value for key, value in resolved.items()}
    primary = yaml.safe_load((directory / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    if not isinstance(primary, dict):
        raise ConfigError(f"{name}.yaml", f"expected a mapping of settings at the top, got {type(primary).__name__}")
    own = set(primary)
    own |= {re.split(r"[.=]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides}
    return Composed(values, frozenset(_references(plain)), frozenset(values) - own)


def unset_environment(values: Any, path: str = "") -> dict[str, str]:
    """Settings that still name an environment variable, because it is not set: path to the variable's name.

    A plan does not need a service's key; the run does.
    """
    found: dict[str, str] = {}
    if isinstance(values, Mapping):
        for key, value in values.items():
            found |= unset_environment(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            found |= unset_environment(value, f"{path}[{index}]")
    elif isinstance(values, str) and (named := _ENVIRONMENT.search(values)):
        found[path] = named[1]
    return found


def _keep_unset_environment(value: Any) -> Any:
    """Escape the variables that are not set and have no default, so that resolving leaves them as they are written."""
    if isinstance(value, dict):
        return {key: _keep_unset_environment(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_keep_unset_environment(item) for item in value]
    if isinstance(value, str):
        return _ENVIRONMENT.sub(lambda found: found[0] if found[1] in os.environ else "\\" + found[0], value)
    return value


def _unresolved(error: InterpolationResolutionError, plain: Any, name: str) -> ConfigError:
    """Name the misspelled key when an interpolation finds nothing: it stands elsewhere than the interpolation."""
    missing = _MISSING.search(str(error))
    parts = missing[1].split(".") if missing else []
    if parts and isinstance(plain, Mapping) and parts[0] not in plain:
        for wanted in (parts[0], "defaults"):
            for key in plain:
                if wanted not in plain and key not in top_level_names() and one_edit_apart(str(key), wanted):
                    return ConfigError(str(key), f"unknown key; did you mean {wanted!r}? {error.full_key} needs it")
    around = plain
    for part in parts[:-1]:
        around = around.get(part) if isinstance(around, Mapping) else None
    hint = did_you_mean(parts[-1], around) if parts and isinstance(around, Mapping) else ""
    return ConfigError(error.full_key or name, f"cannot resolve the interpolation: {_first_line(error)}{hint}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Hydra's warning about a missing ``_self_``: ROLL's files lack it, and the order it assumes is right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_self_", category=UserWarning)
        yield


def prepare_override(override: str, directory: Path) -> str:
    """Make ``a.b=c`` work whether or not the file has the key, which is ``++a.b=c`` in Hydra's grammar.

    Overrides that start with ``~`` and those that choose a config group stay as they are. A value that Hydra's grammar
    cannot read, such as ``list(range(0,8))``, or reads as a sweep over several runs, such as ``/tmp/x,y``, is text.
    """
    key, equals, value = override.partition("=")
    if override.startswith("~"):
        return _readable(override)
    if not equals:
        raise ConfigError(override, "not an override; write key=value")
    name = key.lstrip("+")
    if not _PLAIN_KEY.fullmatch(name) or (directory / name).is_dir():
        return _readable(override)
    key = key if key.startswith("+") else f"++{key}"
    if "range(" in value and value[:1] not in "'\"":
        return _quoted(key, value)
    prepared = f"{key}={value}"
    try:
        is_sweep = OverridesParser.create().parse_override(prepared).is_sweep_override()
    except HydraException:
        is_sweep = True
    return _readable(_quoted(key, value)) if is_sweep else prepared


def _quoted(key: str, value: str) -> str:
    # A backslash is an escape in front of a quote only, and stands for itself everywhere else.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"{key}='{escaped}'"


def _readable(override: str) -> str:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(override, f"cannot read this override: {_compact(error)}") from error
    return override


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, str):
        yield from _REFERENCE.findall(value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _compact(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
