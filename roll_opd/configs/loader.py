"""From a YAML file or a dict to a checked, immutable config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.backends import check_backend_settings
from roll_opd.configs.builder import Builder
from roll_opd.configs.checks import check_config
from roll_opd.configs.composition import compose_config, find_config_dir
from roll_opd.configs.masking import without_secrets
from roll_opd.configs.opd_checks import with_alias_resolved
from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.configs.resolve import resolve
from roll_opd.configs.roles import map_roles, teacher_key
from roll_opd.errors import ConfigError

_CLASSES: dict[str, type[PipelineConfig]] = {"rlvr": RLVRConfig, "agentic": AgenticConfig}


@dataclass(frozen=True)
class LoadedConfig:
    """A config with what its user should be told."""

    config: PipelineConfig
    """The canonical config."""
    warnings: list[str] = field(default_factory=list)
    """One sentence each, for the log and the plan."""
    yaml_names: dict[str, str] = field(default_factory=dict)
    """Canonical role, or `teachers.<name>`, to its path in the YAML."""
    planned: dict[str, str] = field(default_factory=dict)
    """What a plan accepts and a launch cannot do: path to reason."""

    def teacher_yaml_name(self, name: str) -> str:
        """Path of the teacher ``name`` in the YAML: ``teacher`` when it is one worker config, else ``teacher.<name>``.

        Args:
            name: a key of ``config.teachers``.
        """
        return self.yaml_names[teacher_key(name)]


def load_config(
    launcher: str,
    config_path: str,
    config_name: str,
    overrides: Sequence[str] = (),
    launcher_dir: Path | None = None,
) -> LoadedConfig:
    """Load a YAML file with Hydra and build the config of ``launcher`` from it.

    Args:
        launcher: ``onpolicy_distill`` (forces pure distillation), ``rlvr`` or ``agentic``.
        config_path: folder; absolute, relative to the working directory, or to ``launcher_dir``.
        config_name: file name in that folder, with or without ``.yaml``.
        overrides: Hydra overrides; a plain ``key=value`` works for absent keys too.
        launcher_dir: folder of the launcher script.

    Raises:
        ConfigError: with the field's full path, for anything that cannot work.
    """
    directory = find_config_dir(config_path, launcher_dir)
    composed = compose_config(directory, config_name, overrides)
    return _build(composed.values, launcher, composed.variables, composed.included)


def build_config(raw: Mapping[str, Any], launcher: str) -> LoadedConfig:
    """Build a config from plain values, without Hydra; for Python users and tests."""
    return _build(raw, launcher, frozenset(), frozenset())


def _build(raw: Mapping[str, Any], launcher: str, variables: frozenset[str], included: frozenset[str]) -> LoadedConfig:
    mapped = map_roles(raw, launcher)
    warnings = list(mapped.warnings)
    builder = Builder(mapped.aliases, variables, included)
    config = builder.build(_CLASSES[mapped.raw["pipeline"]], mapped.raw)
    check_backend_settings(config, builder)
    if builder.ignored:
        warnings.append(f"settings of ROLL without effect here: {', '.join(builder.ignored)}")
    if builder.tolerated:
        warnings.append(f"unknown settings without effect: {', '.join(builder.tolerated)}")
    config = resolve(config, mapped.raw, mapped.yaml_names, warnings)
    check_config(config, mapped.raw, mapped.yaml_names, warnings)
    config = with_alias_resolved(config, mapped.raw)
    return LoadedConfig(config, warnings, mapped.yaml_names, {**mapped.planned, **builder.planned})


def config_to_dict(config: PipelineConfig) -> dict[str, Any]:
    """Canonical config as plain values; `config_from_dict` is the exact inverse."""
    return config.to_dict()


def config_to_json(config: PipelineConfig) -> str:
    """Canonical config as JSON text, exact and with its secrets; `config_for_checkpoint_json` is the one to keep."""
    return json.dumps(config_to_dict(config), indent=2, ensure_ascii=False)


def config_without_secrets(config: PipelineConfig) -> dict[str, Any]:
    """`config_to_dict` with keys, tokens and passwords masked, for everything that leaves the process."""
    masked = without_secrets(config_to_dict(config))
    assert isinstance(masked, dict)
    return masked


def config_for_checkpoint_json(config: PipelineConfig) -> str:
    """`config_without_secrets` as JSON text, as it is saved beside every checkpoint."""
    return json.dumps(config_without_secrets(config), indent=2, ensure_ascii=False)


def config_from_dict(values: Mapping[str, Any]) -> PipelineConfig:
    """Rebuild a config from `config_to_dict`. Values were checked when the config was first loaded."""
    pipeline = values.get("pipeline")
    if pipeline not in _CLASSES:
        raise ConfigError("pipeline", f"{pipeline!r} is not one of: {', '.join(_CLASSES)}")
    return _CLASSES[pipeline].from_dict(dict(values))
