"""The settings of each backend: what `strategy_args.strategy_config` may hold, typed and checked like any other block."""

from __future__ import annotations

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
    """
    cls = SETTINGS[strategy.strategy_name]
    return (builder or Builder()).build(cls, strategy.strategy_config, f"{path}.strategy_config")
