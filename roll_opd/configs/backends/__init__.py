"""The settings of each backend: what `strategy_args.strategy_config` may hold, typed and checked like any other block.

They are built when a config is loaded, for their errors and warnings (:func:`check_backend_settings`), and again by
whoever needs one (:func:`backend_settings`): the config itself keeps what the user wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs.backends.fsdp2 import FSDP2Settings
from roll_opd.configs.backends.hf import HFSettings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.backends.remote import RemoteSettings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.builder import Builder
from roll_opd.configs.strategy_args import StrategyArguments

SETTINGS: dict[str, type] = {
    "hf_infer": HFSettings,
    "fsdp2_train": FSDP2Settings,
    "fsdp2_infer": FSDP2Settings,
    "megatron_train": MegatronSettings,
    "megatron_infer": MegatronSettings,
    "vllm": VLLMSettings,
    "remote": RemoteSettings,
}


def backend_settings(strategy: StrategyArguments, path: str = "strategy_args", builder: Builder | None = None) -> Any:
    """Build the settings of the backend that ``strategy`` names.

    Args:
        strategy: names the backend and holds its raw settings.
        path: of ``strategy`` in the YAML, for messages.
        builder: collects keys of ROLL that have no effect; a fresh one if left out.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or outside its range.
        KeyError: a backend that is planned only.
    """
    cls = SETTINGS[strategy.strategy_name]
    return (builder or Builder()).build(cls, strategy.strategy_config, f"{path}.strategy_config")


def check_backend_settings(config: Any, builder: Builder) -> None:
    """Check `strategy_config` of every role in ``config``.

    Args:
        config: a dataclass that ``builder`` has built.
        builder: takes the keys of ROLL that have no effect, and knows how the user calls each role.

    Raises:
        ConfigError: see :func:`backend_settings`.
    """
    for path, strategy in _strategies(config, ""):
        if strategy.strategy_name in SETTINGS:
            backend_settings(strategy, path, builder)


def _strategies(block: Any, path: str) -> Iterator[tuple[str, StrategyArguments]]:
    if isinstance(block, StrategyArguments):
        yield path, block
    elif isinstance(block, Mapping):
        for key, inner in block.items():
            yield from _strategies(inner, f"{path}.{key}")
    elif dataclasses.is_dataclass(block):
        for field in dataclasses.fields(block):
            yield from _strategies(getattr(block, field.name), f"{path}.{field.name}" if path else field.name)
