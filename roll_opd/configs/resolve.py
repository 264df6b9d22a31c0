"""What follows from other settings: fallbacks for paths and lengths, worker counts, and what pure mode forces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.agentic_resolve import resolve_agentic, share_sampling
from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.roles import teacher_key
from roll_opd.configs.strategy_args import StrategyArguments, StrategyName
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig
from roll_opd.errors import ConfigError

P = TypeVar("P", bound=PipelineConfig)
W = TypeVar("W", bound=WorkerConfig)

DEFAULT_RESPONSE_LENGTH = 1024
# Field, the value pure distillation needs, and why.
FORCED_IN_PURE_MODE: tuple[tuple[str, Any, str], ...] = (
    ("adv_estimator", "reinforce", "the advantage is the teacher's log-ratio"),
    ("gamma", 0.0, "each token answers for itself"),
    ("critic", None, "there is no return to predict"),
    ("critic_warmup", 0, "there is no critic"),
    ("use_kl_loss", False, "there is no reference beside the teacher"),
    ("kl_loss_coef", 0.0, "there is no reference beside the teacher"),
    ("add_token_level_kl", False, "there is no reference beside the teacher"),
    ("init_kl_coef", 0.0, "there is no reference beside the teacher"),
    ("target_kl", None, "there is no reference beside the teacher"),
    ("whiten_advantages", False, "it would cancel opd_kl_coef and amplify noise once student and teacher agree"),
    ("whiten_rewards", False, "it would cancel opd_kl_coef and amplify noise once student and teacher agree"),
)


def resolve(config: P, raw: Mapping[str, Any], names: Mapping[str, str], warnings: list[str]) -> P:
    """Return ``config`` with everything filled in; ``raw`` tells what the user set, ``warnings`` is added to."""
    if isinstance(config, AgenticConfig):
        config = share_sampling(config, names, warnings)
    config = _lengths(config, raw, names)
    config = _model_paths(config, names)
    if config.is_pure_opd:
        config = _force_pure(config, raw, warnings)
    config = _generation(config, names, warnings)
    if isinstance(config, AgenticConfig):
        config = resolve_agentic(config, raw)
    teachers = {
        name: _worker(teacher, f"teacher-{name}" if len(config.teachers) > 1 else "teacher", "hf_infer", path, warnings)
        for name, teacher in config.teachers.items()
        for path in (names[teacher_key(name)],)
    }
    rewards = {
        name: _worker(reward, f"reward-{name}", None, f"rewards.{name}", warnings)
        for name, reward in config.rewards.items()
    }
    train_name, infer_name = names["actor_train"], names["actor_infer"]
    config = replace(
        config,
        actor_train=_worker(config.actor_train, train_name, "fsdp2_train", train_name, warnings),
        actor_infer=_worker(config.actor_infer, infer_name, "hf_infer", infer_name, warnings),
        teachers=teachers,
        rewards=rewards,
    )
    if config.reference is not None:
        config = replace(config, reference=_worker(config.reference, "reference", "hf_infer", "reference", warnings))
    if config.critic is not None:
        config = replace(config, critic=_worker(config.critic, "critic", "fsdp2_train", "critic", warnings))
    limit = config.sequence_length
    return replace(
        config,
        actor_train=_row_limits(config.actor_train, limit),
        actor_infer=_row_limits(config.actor_infer, limit),
        teachers={name: _row_limits(teacher, limit) for name, teacher in config.teachers.items()},
        reference=config.reference and _row_limits(config.reference, limit),
        critic=config.critic and _row_limits(config.critic, limit),
    )


def _row_limits(worker: W, sequence_length: int | None) -> W:
    """Fill the limits of packed rows that the user left to the pipeline."""
    packing = worker.sequence_packing_args
    if not worker.use_sequence_packing:
        return worker
    packing = replace(
        packing,
        max_packed_sequence_length_forward=packing.max_packed_sequence_length_forward or sequence_length,
        max_packed_sequence_length_train=packing.max_packed_sequence_length_train or sequence_length,
    )
    return replace(worker, sequence_packing_args=packing)


def _lengths(config: P, raw: Mapping[str, Any], names: Mapping[str, str]) -> P:
    prompt, response, total = config.prompt_length, config.response_length, config.sequence_length
    if response is None and total is not None and config.pipeline == "agentic":
        # An episode interleaves turns: only its whole length is bounded.
        response = total
    elif response is None and total is not None:
        if total <= prompt:
            raise ConfigError("sequence_length", f"{total} leaves no room for a response after prompt_length {prompt}")
        response = total - prompt
    if response is None:
        given = config.actor_infer.generating_args
        response = (given.max_new_tokens if given else None) or DEFAULT_RESPONSE_LENGTH
    return replace(config, response_length=response, sequence_length=total or prompt + response)


def _model_paths(config: P, names: Mapping[str, str]) -> P:
    """Each role without a path falls back on its own; a teacher's explicit or missing path is never replaced."""
    train, infer = config.actor_train, config.actor_infer
    train_path, infer_path = train.model_args.model_name_or_path, infer.model_args.model_name_or_path
    fallback = config.pretrain or train_path or infer_path
    if fallback is None:
        path = f"{names['actor_train']}.model_args.model_name_or_path"
        raise ConfigError(path, "no model: set it here, or set 'pretrain' for both roles of the student")
    config = replace(config, actor_train=_with_model(train, fallback), actor_infer=_with_model(infer, fallback))
    student = config.actor_train.model_args
    teachers = {n: _as_student(t, student, names[teacher_key(n)]) for n, t in config.teachers.items()}
    config = replace(config, teachers=teachers)
    for name, teacher in config.teachers.items():
        if not teacher.model_args.model_name_or_path:
            path = f"{names[teacher_key(name)]}.model_args.model_name_or_path"
            raise ConfigError(
                path, "a teacher needs a model of its own; 'pretrain' is the student's and is never used for it"
            )
    if config.reference is not None:
        config = replace(config, reference=_with_model(config.reference, fallback))
    if config.critic is not None:
        config = replace(config, critic=_with_model(config.critic, config.reward_pretrain or fallback))
    return config


def _as_student(teacher: TeacherConfig, student: ModelArguments, path: str) -> TeacherConfig:
    """Give a self-teacher the model that the student starts as; one that follows the student cannot be another.

    Of an adapter only one that is ``frozen`` has need: the others get the student's weights with it merged into them.
    """
    kind, given = teacher.teacher_args.self_teacher, teacher.model_args
    if kind is None:
        return teacher
    says = f"teacher_args.self_teacher: {kind}"
    model, adapter = student.model_name_or_path, student.adapter_name_or_path if kind == "frozen" else None
    if given.model_name_or_path not in (None, model):
        problem = f"{given.model_name_or_path!r} is not the student ({model!r}), which {says} says it is"
        raise ConfigError(f"{path}.model_args.model_name_or_path", f"{problem}; remove one of the two")
    if given.adapter_name_or_path not in (None, adapter):
        problem = f"{given.adapter_name_or_path!r} is not what {says} starts with ({adapter or 'no adapter'})"
        raise ConfigError(f"{path}.model_args.adapter_name_or_path", f"{problem}; remove it")
    if kind == "ema" and teacher.model_args.dtype != "fp32":
        problem = f"a moving average in {teacher.model_args.dtype} loses small updates"
        raise ConfigError(f"{path}.model_args.dtype", f"{problem}; use fp32, or self_teacher: live or frozen")
    entries = given.model_config_kwargs or student.model_config_kwargs
    own = replace(given, model_name_or_path=model, adapter_name_or_path=adapter, model_config_kwargs=entries)
    return replace(teacher, model_args=own)


def _with_model(worker: W, fallback: str) -> W:
    if worker.model_args.model_name_or_path:
        return worker
    return replace(worker, model_args=replace(worker.model_args, model_name_or_path=fallback))


def _force_pure(config: P, raw: Mapping[str, Any], warnings: list[str]) -> P:
    for name, value, reason in FORCED_IN_PURE_MODE:
        if raw.get(name) is not None and getattr(config, name) != value:
            shown = "the configured one" if isinstance(raw[name], Mapping) else repr(raw[name])
            warnings.append(f"{name}: pure distillation uses {value!r} in place of {shown}, because {reason}")
    forced = {name: value for name, value, _ in FORCED_IN_PURE_MODE}
    return replace(config, **forced)


def _generation(config: P, names: Mapping[str, str], warnings: list[str]) -> P:
    infer = config.actor_infer
    sampling = infer.generating_args or GeneratingArguments()
    path = f"{names['actor_infer']}.generating_args"
    # An episode asks for one turn at a time.
    group = config.num_return_sequences_in_group if config.pipeline == "rlvr" else 1
    if sampling.num_return_sequences not in (None, group) and config.pipeline == "rlvr":
        problem = f"num_return_sequences_in_group ({group}) decides how many samples a prompt gets"
        warnings.append(f"{path}.num_return_sequences: {sampling.num_return_sequences} has no effect, {problem}")
    limit = sampling.max_new_tokens or config.response_length
    sampling = replace(sampling, max_new_tokens=limit, num_return_sequences=group)
    config = replace(config, actor_infer=replace(infer, generating_args=sampling))
    if config.validation is not None:
        held_out = config.validation.generating_args
        held_out = replace(
            held_out,
            max_new_tokens=held_out.max_new_tokens or config.response_length,
            num_return_sequences=held_out.num_return_sequences or 1,
        )
        config = replace(config, validation=replace(config.validation, generating_args=held_out))
    return config


def gpus_per_worker(worker: WorkerConfig) -> int:
    """Devices of one worker: engines span their tensor and pipeline parallel size, ranks of a model take one each."""
    strategy = worker.strategy_args
    if strategy is None or strategy.strategy_name in ("hf_infer", "sglang"):
        return worker.num_gpus_per_worker
    settings = backend_settings(strategy)
    if isinstance(settings, VLLMSettings):
        return settings.tensor_parallel_size * settings.pipeline_parallel_size
    return 1


def _worker(worker: W, name: str, strategy: StrategyName | None, path: str, warnings: list[str]) -> W:
    if worker.strategy_args is None and strategy is not None:
        worker = replace(worker, strategy_args=StrategyArguments(strategy_name=strategy))
    per_worker = gpus_per_worker(worker)
    world_size = worker.world_size or 1
    if worker.device_mapping is not None:
        count = len(worker.device_mapping)
        if count % per_worker:
            problem = (
                f"{count} devices do not divide into workers of {per_worker} devices (tensor x pipeline parallel size)"
            )
            raise ConfigError(f"{path}.device_mapping", problem)
        world_size = count // per_worker
        if worker.world_size not in (None, world_size):
            warnings.append(f"{path}.world_size: {worker.world_size} has no effect, device_mapping gives {world_size}")
    return replace(worker, name=worker.name or name, world_size=world_size, num_gpus_per_worker=per_worker)
