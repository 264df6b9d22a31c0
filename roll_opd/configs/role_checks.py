"""What a role's strategy does not run, or does not read; asked at launch, for each role that is started.

Nothing that changes a result may be ignored: a setting is read, refused at launch, or named in the launch's warning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig
from roll_opd.errors import ConfigError

# Fields that must keep their default, until someone implements them or where no strategy of READ_MODEL runs the role.
NOT_YET_MODEL = [
    "lora_target",
    "adapter_name_or_path",
    "freeze_module_prefix",
    "moe_aux_loss_coef",
    "ulysses_size",
    "model_config_kwargs",
    "tokenizer_name_or_path",
    "chat_template",
    "additional_target",
]
# Of these, what a strategy reads after all.
ADAPTERS = ("lora_target", "adapter_name_or_path", "additional_target", "freeze_module_prefix")
READ_MODEL: dict[str, tuple[str, ...]] = {
    "fsdp2_train": ("model_config_kwargs", *ADAPTERS),
    "fsdp2_infer": ("model_config_kwargs", "adapter_name_or_path"),
    "hf_infer": ("model_config_kwargs",),
    "vllm": ("model_config_kwargs",),
}
# For roles that hold a model; a reward's class is read.
NOT_YET_WORKER = ["worker_cls"]
# Settings that only affect speed or memory and are not read: by roles that do not train, by the student's generator,
# and by strategies that compute in a way of their own.
UNREAD_UNTRAINED = ["use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train"]
UNREAD_UNSCORED = ["use_dynamic_batching_in_infer", "max_tokens_per_microbatch_in_infer", "use_sequence_packing"]
UNREAD_BY: dict[str, list[str]] = {
    "vllm": [*UNREAD_UNSCORED, "logits_in_fp32", "model_args.attn_implementation"],
    "remote": [*UNREAD_UNSCORED, "logits_in_fp32", "model_args.attn_implementation"],
    "megatron_train": ["logits_in_fp32", "model_args.attn_implementation", "model_args.disable_gradient_checkpointing"],
    "megatron_infer": ["logits_in_fp32", "model_args.attn_implementation"],
}
# What only a process that holds a model reads.
OF_MODELS = [
    "model_args",
    "training_args",
    "data_args",
    "strategy_args",
    "infer_batch_size",
    "logits_in_fp32",
    "use_sequence_packing",
    "sequence_packing_args",
    "use_dynamic_batching_in_train",
    "max_tokens_per_microbatch_in_train",
    "use_dynamic_batching_in_infer",
    "max_tokens_per_microbatch_in_infer",
    "cpu_threads",
    "backend_timeout",
]
NOT_YET_RUN = "is not run by this version yet"
# How ROLL writes a dtype in `strategy_config`.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def readers(key: str) -> list[str]:
    """The strategies that read a setting of ``model_args`` that others refuse."""
    return [strategy for strategy, keys in READ_MODEL.items() if key in keys]


def role_blockers(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
    """Everything of a role that its strategy cannot run, each with the nearest value that it can."""
    return [*changed(worker, NOT_YET_WORKER, path), *_model(config, worker, path), *_backend(config, worker, path)]


def role_unread(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
    """The settings of a role that it does not read."""
    assert worker.strategy_args is not None
    strategy = worker.strategy_args.strategy_name
    keys = list(UNREAD_BY.get(strategy, []))
    if not strategy.endswith("_train"):
        keys += UNREAD_UNTRAINED
    if worker is config.actor_infer:
        # Adapters are merged into the weights that it gets.
        keys += [*UNREAD_UNSCORED, *(f"model_args.{key}" for key in ADAPTERS)]
        keys += ["infer_batch_size"] if strategy == "vllm" else []
    keys = list(dict.fromkeys(keys))
    found = changed(worker, [key for key in keys if "." not in key], path)
    in_model = [key.removeprefix("model_args.") for key in keys if "." in key]
    return found + changed(worker.model_args, in_model, f"{path}.model_args")


def _model(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
    """Refuse what the role's strategy would leave out of its model."""
    assert worker.strategy_args is not None
    strategy = worker.strategy_args.strategy_name
    read = {*READ_MODEL.get(strategy, ()), *(ADAPTERS if worker is config.actor_infer else ())}
    found = changed(worker.model_args, [key for key in NOT_YET_MODEL if key not in read], f"{path}.model_args")
    jobs = ("_train",) if strategy.endswith("_train") else ("_infer", "vllm")
    for i, error in enumerate(found):
        key = error.field.rpartition(".")[2]
        able = [name for name, keys in READ_MODEL.items() if key in keys and name.endswith(jobs)]
        if able:
            problem = f"{strategy} does not run this setting; use strategy_name {' or '.join(able)}, or remove it"
            found[i] = ConfigError(error.field, problem)
    return found + (_adapters(worker.model_args, path) if strategy.startswith("fsdp2") else [])


def _adapters(model: ModelArguments, path: str) -> list[ConfigError]:
    """Refuse what cannot go with an adapter, or without one."""
    with_adapter = model.lora_target is not None or model.adapter_name_or_path is not None
    if not with_adapter and model.additional_target is not None:
        problem = "is trained beside an adapter, and there is none; set lora_target too, or remove it"
        return [ConfigError(f"{path}.model_args.additional_target", problem)]
    if with_adapter and model.lora_dropout > 0:
        problem = "old and new log-probabilities must be those of one function, which dropout is not; use 0"
        return [ConfigError(f"{path}.model_args.lora_dropout", problem)]
    return []


def _backend(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
    """Refuse what the role's strategy cannot do."""
    assert worker.strategy_args is not None
    strategy, where = worker.strategy_args.strategy_name, f"{path}.strategy_args.strategy_config"
    found = [
        ConfigError(f"{where}.{key}", f"{value!r} contradicts {other}: {decides!r}, which decides; make them agree")
        for key, value, other, decides in _said_twice(config, worker, path)
        if value is not None and value != decides
    ]
    if strategy.endswith("_train") and worker.model_args.dtype == "fp16":
        problem = f"training in 'fp16' needs loss scaling, which {NOT_YET_RUN}; use bf16 or fp32"
        found.append(ConfigError(f"{path}.model_args.dtype", problem))
    if strategy == "hf_infer" and worker.num_gpus_per_worker > 1:
        problem = f"a model over several devices {NOT_YET_RUN} with hf_infer; use 1, or fsdp2_infer or vllm"
        found.append(ConfigError(f"{path}.num_gpus_per_worker", problem))
    settings = backend_settings(worker.strategy_args) if strategy in SETTINGS else None
    if isinstance(settings, MegatronSettings):
        interleaved = settings.virtual_pipeline_model_parallel_size is not None
        if interleaved and settings.pipeline_model_parallel_size < 3:
            # Of two stages each follows the other, and Megatron-core takes one's row lengths for the other's.
            problem = f"with a pipeline_model_parallel_size below 3, this setting {NOT_YET_RUN}; remove it"
            found.append(ConfigError(f"{where}.virtual_pipeline_model_parallel_size", problem))
        if settings.context_parallel_size > 1:
            problem = (
                f"more than 1 {NOT_YET_RUN}; for long sequences use tensor_model_parallel_size and sequence_parallel"
            )
            found.append(ConfigError(f"{where}.context_parallel_size", problem))
    if isinstance(settings, VLLMSettings):
        longest, what = _longest_sequence(config, worker)
        if settings.max_model_len is not None and settings.max_model_len < longest:
            problem = f"{settings.max_model_len} is less than the {longest} tokens of {what}"
            found.append(ConfigError(f"{where}.max_model_len", f"{problem}; raise it, or remove it"))
    return found


def _longest_sequence(config: PipelineConfig, worker: WorkerConfig) -> tuple[int, str]:
    """Tokens that an engine must have room for, and what they are."""
    rlvr = config.pipeline == "rlvr"
    if isinstance(worker, TeacherConfig) and worker.teacher_args.context_template is not None:
        return config.longest_view(worker), f"the teacher's prompt and {'a response' if rlvr else 'an episode'}"
    if rlvr:
        return config.prompt_length + (config.response_length or 0), "prompt_length + response_length"
    return config.sequence_length or 0, "sequence_length"


def _said_twice(config: PipelineConfig, worker: WorkerConfig, path: str) -> Iterator[tuple[str, Any, str, Any]]:
    """Settings that ROLL's backends have beside one that decides here: key, value, the other one's path and value."""
    assert worker.strategy_args is not None
    given, dtype = worker.strategy_args.strategy_config, worker.model_args.dtype
    if worker.strategy_args.strategy_name.endswith("_train"):
        yield "max_grad_norm", given.get("max_grad_norm"), "max_grad_norm", config.max_grad_norm
    param = given.get("param_dtype")
    yield "param_dtype", _DTYPES.get(str(param), param), f"{path}.model_args.dtype", dtype
    for name in ("bf16", "fp16"):
        if given.get(name) is True:
            yield name, name, f"{path}.model_args.dtype", dtype


def changed(block: Any, keys: list[str], path: str) -> list[ConfigError]:
    """Refuse the fields among ``keys`` that differ from their defaults."""
    defaults = type(block)()
    present = {field.name for field in dataclasses.fields(block)}
    found = []
    for key in keys:
        if key in present and getattr(block, key) != getattr(defaults, key, None):
            field = f"{path}.{key}" if path else key
            found.append(ConfigError(field, f"this setting {NOT_YET_RUN}; {_use(getattr(defaults, key))}"))
    return found


def _use(default: Any) -> str:
    """Advise a default in YAML's spelling."""
    if isinstance(default, str):
        return f"use {default}"
    if default is None or isinstance(default, (bool, int, float)):
        return f"use {json.dumps(default)}"
    return "remove it"
