"""What loads and plans, but does not run in this version. The launcher asks before it starts anything.

Nothing that changes a result may be ignored: a setting is read, refused at launch, or named in the launch's warning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.checks import roles_of
from roll_opd.configs.data_args import DataArguments
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig
from roll_opd.errors import ConfigError

# Whoever makes a strategy or a value run adds it here, and its refusal disappears.
RUNNABLE_STRATEGIES: dict[str, tuple[str, ...]] = {
    "actor_train": ("fsdp2_train", "megatron_train"),
    "actor_infer": ("vllm", "hf_infer"),
    "teacher": ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm", "remote"),
    "reference": ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm", "remote"),
    "critic": ("fsdp2_train",),
}
RUNNABLE_PIPELINES = ("rlvr",)
# Fields of the pipeline that must keep their default until someone implements them.
NOT_YET = [
    "async_generation_ratio",
    "dataset_filter",
    "use_policy_loss_type",
    "rl_loss_coef",
    "postive_loss_coef",
    "use_topr_neg_loss_coef",
    "use_topr_loss",
    "use_reward_scaling",
    "use_reward_norm",
    "add_len_reward",
    "difficulty_loss_weight",
    "length_loss_weight",
    "rollout_dump_dir",
    "mask_type",
]
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
# Of these, what a strategy reads after all; the critic's reads no adapter.
ADAPTERS = ("lora_target", "adapter_name_or_path", "additional_target", "freeze_module_prefix")
READ_MODEL: dict[str, tuple[str, ...]] = {
    "fsdp2_train": ("model_config_kwargs", *ADAPTERS),
    "fsdp2_infer": ("model_config_kwargs", "adapter_name_or_path"),
    "hf_infer": ("model_config_kwargs",),
    "vllm": ("model_config_kwargs",),
}
NOT_YET_GENERATING = ["min_p", "repetition_penalty", "ignore_eos", "include_stop_str_in_output"]
# For roles that hold a model; a reward's class is read.
NOT_YET_WORKER = ["worker_cls"]
# Each could change a verdict.
NOT_YET_REWARD = [
    "response_length_penalty_coef",
    "reward_type",
    "format_pattern",
    "code_url",
    "use_local",
    "judge_prompt",
    "judge_model_type",
    "judge_model_name",
    "judge_api_url",
    "judge_api_key",
]
# Settings that only affect speed or memory and that nothing reads yet; whoever reads one removes it here.
UNREAD_PIPELINE = ["val_batch_size"]
# The same for roles that do not train, for the student's generator, and for strategies that compute in a way of their
# own.
UNREAD_UNTRAINED = ["use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train"]
UNREAD_UNSCORED = ["use_dynamic_batching_in_infer", "max_tokens_per_microbatch_in_infer", "use_sequence_packing"]
UNREAD_BY: dict[str, list[str]] = {
    "vllm": [*UNREAD_UNSCORED, "logits_in_fp32", "model_args.attn_implementation"],
    "remote": [*UNREAD_UNSCORED, "logits_in_fp32", "model_args.attn_implementation"],
    "megatron_train": ["logits_in_fp32", "model_args.attn_implementation", "model_args.disable_gradient_checkpointing"],
    "megatron_infer": ["logits_in_fp32", "model_args.attn_implementation"],
}
UNREAD_DATA = ["preprocessing_num_workers"]
_SUFFIX = "is not run by this version yet"
# How ROLL writes a dtype in `strategy_config`.
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def readers(key: str) -> list[str]:
    """The strategies that read a setting of ``model_args`` that others refuse."""
    return [strategy for strategy, keys in READ_MODEL.items() if key in keys]


def starts_critic(config: PipelineConfig) -> bool:
    """Whether a launch runs the critic: it is configured, and the estimator of the advantage asks for its values."""
    return config.critic is not None and config.adv_estimator == "gae"


def launched_roles(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, WorkerConfig]:
    """The roles that hold a model and are started, by path.

    Settings of a critic whose values nothing asks for, or of a reference that nothing is compared with, have no effect.
    """
    started = {"critic": starts_critic(config), "reference": config.needs_reference}
    return {path: worker for path, worker in roles_of(config, names).items() if started.get(path, True)}


def model_holders(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, WorkerConfig]:
    """Everything that a launch starts and that holds a model, by path: the roles, and the base model, which runs as the
    first teacher does."""
    roles = launched_roles(config, names)
    if config.opd_args.base_model is not None and config.teachers:
        like = next(iter(config.teachers.values()))
        model = dataclasses.replace(like.model_args, model_name_or_path=config.opd_args.base_model)
        roles["opd_args.base_model"] = dataclasses.replace(like, model_args=model)
    return roles


def weight_followers(loaded: LoadedConfig) -> list[str]:
    """Paths of the roles that get the student's weights at each step."""
    moving = [name for name, t in loaded.config.teachers.items() if t.teacher_args.self_teacher in ("ema", "live")]
    return [loaded.yaml_names["actor_infer"], *(loaded.teacher_yaml_name(name) for name in moving)]


def launch_blockers(loaded: LoadedConfig) -> list[ConfigError]:
    """Everything in ``loaded`` that this version cannot run, each with the nearest value that it can."""
    config, names = loaded.config, loaded.yaml_names
    found = [ConfigError(path, f"{reason}; planned only") for path, reason in loaded.planned.items()]
    if config.pipeline not in RUNNABLE_PIPELINES:
        field = "pure_opd_pipeline_type" if config.is_pure_opd else "pipeline"
        found.append(ConfigError(field, f"{config.pipeline!r} {_SUFFIX}; use rlvr"))
    found += _strategies(loaded)
    found += _changed(config, NOT_YET, "")
    for path, worker in launched_roles(config, names).items():
        found += _changed(worker, NOT_YET_WORKER, path)
        found += _model(config, worker, path)
        found += _backend(config, worker, path)
    found += _changed(config.actor_infer.generating_args, NOT_YET_GENERATING, f"{names['actor_infer']}.generating_args")
    if config.validation is not None:
        found += _changed(config.validation.generating_args, NOT_YET_GENERATING, "validation.generating_args")
    for path, data in _data_blocks(config, names).items():
        if path == "validation.data_args" and data.domain_interleave_probs:
            problem = "validation takes its prompts as they stand and would ignore this; remove it"
            found.append(ConfigError(f"{path}.domain_interleave_probs", problem))
    for name, reward in config.rewards.items():
        found += _changed(reward, NOT_YET_REWARD, f"rewards.{name}")
        if reward.response_filter_config.type != "no_filter" and config.mode != "pure_opd":
            found.append(ConfigError(f"rewards.{name}.response_filter_config", f"{_SUFFIX}; remove it"))
        if reward.device_mapping is not None:
            problem = f"a reward on GPUs {_SUFFIX}; remove it: rewards run in world_size CPU processes"
            found.append(ConfigError(f"rewards.{name}.device_mapping", problem))
    return found


def launch_warnings(loaded: LoadedConfig) -> list[str]:
    """What the user should know of a launch: a critic without a use, and settings that this version does not read.

    Those settings, in one line, only affect speed or memory: what would change a result is refused by
    :func:`launch_blockers`.
    """
    config, names = loaded.config, loaded.yaml_names
    warnings = _critic_warnings(config)
    unread = _changed(config, UNREAD_PIPELINE, "")
    for path, worker in launched_roles(config, names).items():
        unread += _unread(config, worker, path)
    for path, data in _data_blocks(config, names).items():
        unread += _changed(data, UNREAD_DATA, path)
    if unread:
        fields = ", ".join(error.field for error in unread)
        warnings.append(f"settings for speed or memory that this version does not read: {fields}")
    return warnings


def _unread(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
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
    found = _changed(worker, [key for key in keys if "." not in key], path)
    in_model = [key.removeprefix("model_args.") for key in keys if "." in key]
    return found + _changed(worker.model_args, in_model, f"{path}.model_args")


def _critic_warnings(config: PipelineConfig) -> list[str]:
    if starts_critic(config):
        if config.critic_warmup < config.max_steps:
            return []
        problem = f"{config.critic_warmup} steps of warm-up, and max_steps is {config.max_steps}"
        return [f"critic_warmup: {problem}: the student is never trained"]
    idle = [error.field for error in _changed(config, ["critic", "critic_warmup", "value_clip"], "")]
    if not idle:
        return []
    problem = f"adv_estimator {config.adv_estimator} asks for no values, and no critic is started"
    return [f"{', '.join(idle)}: no effect, because {problem}"]


def _data_blocks(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, DataArguments]:
    blocks = {f"{names['actor_train']}.data_args": config.actor_train.data_args}
    blocks["validation.data_args"] = config.validation.data_args if config.validation else None
    return {path: data for path, data in blocks.items() if data is not None}


def _model(config: PipelineConfig, worker: WorkerConfig, path: str) -> list[ConfigError]:
    """Refuse what the role's strategy would leave out of its model."""
    assert worker.strategy_args is not None
    strategy = worker.strategy_args.strategy_name
    critic = worker is config.critic
    read = {*READ_MODEL.get(strategy, ()), *(ADAPTERS if worker is config.actor_infer else ())}
    read -= {*(ADAPTERS if critic else ())}
    found = _changed(worker.model_args, [key for key in NOT_YET_MODEL if key not in read], f"{path}.model_args")
    jobs = ("_train",) if strategy.endswith("_train") else ("_infer", "vllm")
    for i, error in enumerate(found):
        key = error.field.rpartition(".")[2]
        able = [name for name, keys in READ_MODEL.items() if key in keys and name.endswith(jobs)]
        if able and not critic:
            problem = f"{strategy} does not run this setting; use strategy_name {' or '.join(able)}, or remove it"
            found[i] = ConfigError(error.field, problem)
    return found + _adapters(config.actor_train.model_args, path) if worker is config.actor_train else found


def _adapters(model: ModelArguments, path: str) -> list[ConfigError]:
    """Refuse what cannot go with an adapter that is trained, or without one."""
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
        problem = f"training in 'fp16' needs loss scaling, which {_SUFFIX}; use bf16 or fp32"
        found.append(ConfigError(f"{path}.model_args.dtype", problem))
    if strategy == "hf_infer" and worker.num_gpus_per_worker > 1:
        problem = f"a model over several devices {_SUFFIX} with hf_infer; use 1, or fsdp2_infer or vllm"
        found.append(ConfigError(f"{path}.num_gpus_per_worker", problem))
    settings = backend_settings(worker.strategy_args) if strategy in SETTINGS else None
    if isinstance(settings, MegatronSettings) and settings.context_parallel_size > 1:
        problem = f"more than 1 {_SUFFIX}; for long sequences use tensor_model_parallel_size and sequence_parallel"
        found.append(ConfigError(f"{where}.context_parallel_size", problem))
    if isinstance(settings, VLLMSettings):
        longest, what = _longest_sequence(config, worker)
        if settings.max_model_len is not None and settings.max_model_len < longest:
            problem = f"{settings.max_model_len} is less than the {longest} tokens of {what}"
            found.append(ConfigError(f"{where}.max_model_len", f"{problem}; raise it, or remove it"))
    return found


def _longest_sequence(config: PipelineConfig, worker: WorkerConfig) -> tuple[int, str]:
    """Tokens that an engine must have room for, and what they are."""
    whole, response = config.sequence_length or 0, config.response_length or 0
    if config.pipeline == "rlvr":
        whole = config.prompt_length + response
    if isinstance(worker, TeacherConfig) and worker.teacher_args.context_template is not None:
        context = worker.teacher_args.context_length or 2 * config.prompt_length
        return context + response, "the teacher's prompt and a response"
    return whole, "prompt_length + response_length" if config.pipeline == "rlvr" else "sequence_length"


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


def _strategies(loaded: LoadedConfig) -> list[ConfigError]:
    config, names = loaded.config, loaded.yaml_names
    jobs = {names["actor_train"]: "actor_train", names["actor_infer"]: "actor_infer"}
    found = []
    for path, worker in launched_roles(config, names).items():
        runnable = RUNNABLE_STRATEGIES[jobs.get(path, path if path in RUNNABLE_STRATEGIES else "teacher")]
        assert worker.strategy_args is not None
        strategy = worker.strategy_args.strategy_name
        if strategy not in runnable:
            field = f"{path}.strategy_args.strategy_name"
            found.append(ConfigError(field, f"{strategy!r} {_SUFFIX}; use {' or '.join(runnable)}"))
    return found


def _changed(block: Any, keys: list[str], path: str) -> list[ConfigError]:
    """Refuse the fields among ``keys`` that differ from their defaults."""
    defaults = RLVRConfig() if isinstance(block, PipelineConfig) else type(block)()
    present = {field.name for field in dataclasses.fields(block)}
    found = []
    for key in keys:
        if key in present and getattr(block, key) != getattr(defaults, key, None):
            field = f"{path}.{key}" if path else key
            found.append(ConfigError(field, f"this setting {_SUFFIX}; {_use(getattr(defaults, key))}"))
    return found


def _use(default: Any) -> str:
    """Advise a default in YAML's spelling."""
    if isinstance(default, str):
        return f"use {default}"
    if default is None or isinstance(default, (bool, int, float)):
        return f"use {json.dumps(default)}"
    return "remove it"
