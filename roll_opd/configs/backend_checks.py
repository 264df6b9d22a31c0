"""Rules about a role's backend that no single setting knows: what a backend can do for a role, and which sizes fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.backends.remote import RemoteSettings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.builder import field_types
from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.role_checks import readers
from roll_opd.configs.roles import teacher_key
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig
from roll_opd.errors import ConfigError

# Who can hold the student's weights as they are after each step, and who can mix them into its own.
FOLLOWERS: dict[str, tuple[str, ...]] = {
    "live": ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm"),
    "ema": ("hf_infer", "fsdp2_infer"),
}
GENERATORS = ("hf_infer", "vllm")
# Log-probabilities of a position that a vLLM server gives when it was started without `--max-logprobs`.
SERVER_MAX_LOGPROBS = 20
# Below, vLLM rounds to greedy sampling or raises the temperature; above, it refuses the request.
VLLM_TEMPERATURES = (0.01, 2.0)


def check_backends(
    config: PipelineConfig, roles: Mapping[str, WorkerConfig], names: Mapping[str, str], warnings: list[str]
) -> None:
    """Raise ConfigError for what cannot work; add to ``warnings`` what has no effect or looks wrong.

    Args:
        config: resolved.
        roles: every role that holds a model, by its path in the YAML.
        names: ``LoadedConfig.yaml_names``.
        warnings: is added to.
    """
    for path, worker in roles.items():
        assert worker.strategy_args is not None
        if worker.strategy_args.strategy_name not in SETTINGS:
            continue
        _check_dynamic_batches(worker, path)
        settings = backend_settings(worker.strategy_args)
        where = f"{path}.strategy_args.strategy_config"
        if isinstance(settings, MegatronSettings):
            _check_megatron(settings, worker, where, warnings)
        elif isinstance(settings, RemoteSettings):
            _check_remote(settings, worker, path, where)
        elif isinstance(settings, VLLMSettings):
            _check_engine(settings, worker, where)
            if worker is config.actor_infer:
                _check_sampling_engine(settings, worker, path)
                _check_temperatures(samplings(config, names), path)
            else:
                _check_scoring_engine(settings, worker, where)
    for name, teacher in config.teachers.items():
        _check_teacher(config, teacher, names[teacher_key(name)], warnings)
        _check_self_teacher(config, teacher, names[teacher_key(name)], names["actor_train"])
    _check_base_model(config, names)


def _check_dynamic_batches(worker: WorkerConfig, path: str) -> None:
    for job in ("train", "infer"):
        if getattr(worker, f"use_dynamic_batching_in_{job}") and not getattr(
            worker, f"max_tokens_per_microbatch_in_{job}"
        ):
            problem = "missing: it is the limit by which micro-batches are formed"
            fix = f"set it, or use_dynamic_batching_in_{job}: false"
            raise ConfigError(f"{path}.max_tokens_per_microbatch_in_{job}", f"{problem}; {fix}")


def _check_megatron(settings: MegatronSettings, worker: WorkerConfig, where: str, warnings: list[str]) -> None:
    pipeline, ranks = settings.pipeline_model_parallel_size, worker.world_size or 1
    if settings.virtual_pipeline_model_parallel_size is not None and pipeline == 1:
        problem = "interleaves the stages of a pipeline, and pipeline_model_parallel_size is 1"
        raise ConfigError(f"{where}.virtual_pipeline_model_parallel_size", f"{problem}; remove it")
    if ranks // pipeline % settings.expert_model_parallel_size:
        problem = (
            f"{settings.expert_model_parallel_size} does not divide the {ranks // pipeline} ranks that hold a layer"
        )
        fix = f"({ranks} ranks / pipeline_model_parallel_size {pipeline}); use a divisor of them"
        raise ConfigError(f"{where}.expert_model_parallel_size", f"{problem} {fix}")
    for key in ("recompute_method", "recompute_num_layers"):
        if getattr(settings, key) is not None and settings.recompute_granularity != "full":
            raise ConfigError(f"{where}.{key}", "says which layers recompute_granularity: full recomputes; remove it")
    assert worker.strategy_args is not None
    if worker.strategy_args.strategy_config.get("sequence_parallel") and not settings.sequence_parallel:
        warnings.append(f"{where}.sequence_parallel: no effect, because tensor_model_parallel_size is 1")


def _check_remote(settings: RemoteSettings, worker: WorkerConfig, path: str, where: str) -> None:
    if settings.base_url is None:
        problem = "missing: it is the address of the running vLLM server, such as http://10.0.0.7:8000"
        raise ConfigError(f"{where}.base_url", problem)
    if worker.device_mapping is not None:
        problem = "a remote model has its devices elsewhere; remove it (world_size counts the processes that ask)"
        raise ConfigError(f"{path}.device_mapping", problem)


def _check_engine(settings: VLLMSettings, worker: WorkerConfig, where: str) -> None:
    for key in settings.engine_args:
        if key in field_types(VLLMSettings):
            raise ConfigError(f"{where}.engine_args.{key}", f"is a setting of its own: write {where}.{key}")
    if settings.pipeline_parallel_size > 1 and worker.device_mapping is None:
        problem = "vLLM has no pipeline parallelism on CPUs, and this role has no device_mapping"
        raise ConfigError(f"{where}.pipeline_parallel_size", f"{problem}; use 1")


def samplings(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, GeneratingArguments]:
    """How samples are made in training and, where it differs, in validation, by path in the YAML."""
    found = {f"{names['actor_infer']}.generating_args": config.actor_infer.generating_args}
    if config.validation is not None:
        found["validation.generating_args"] = config.validation.generating_args
    if isinstance(config, AgenticConfig) and config.val_env_manager.tags:
        held_out = config.val_env_manager.generating_args
        if held_out != config.actor_infer.generating_args:
            found["val_env_manager.generating_args"] = held_out
    return {path: sampling for path, sampling in found.items() if sampling is not None}


def _check_temperatures(sampled: Mapping[str, GeneratingArguments], path: str) -> None:
    """Refuse temperatures at which the engine of the role ``path`` cannot sample."""
    low, high = VLLM_TEMPERATURES
    for field, sampling in sampled.items():
        if not sampling.do_sample or not sampling.temperature:
            continue
        if not low <= sampling.temperature <= high:
            problem = f"vLLM, on which {path} runs, samples at temperatures from {low} to {high}, got"
            raise ConfigError(f"{field}.temperature", f"{problem} {sampling.temperature}; use one of them, or hf_infer")


def _check_sampling_engine(settings: VLLMSettings, worker: WorkerConfig, path: str) -> None:
    if settings.enable_chunked_prefill and worker.device_mapping is None:
        problem = "on CPUs vLLM cannot sample with seeds from prompts that it cuts"
        raise ConfigError(f"{path}.strategy_args.strategy_config.enable_chunked_prefill", f"{problem}; remove it")


def _check_scoring_engine(settings: VLLMSettings, worker: WorkerConfig, where: str) -> None:
    """An engine that gets no weight update must load its weights; one that is asked several times a step keeps them."""
    follows = isinstance(worker, TeacherConfig) and worker.teacher_args.self_teacher == "live"
    if settings.load_format == "dummy" and not follows:
        problem = "'dummy' starts with random weights, and no update brings others to a model that only scores"
        raise ConfigError(f"{where}.load_format", f"{problem}; use auto")
    if settings.sleep_level == 2:
        problem = "2 forgets the weights, and a model that scores comes back without an update that brings others"
        raise ConfigError(f"{where}.sleep_level", f"{problem}; use 1")


def _check_teacher(config: PipelineConfig, teacher: TeacherConfig, path: str, warnings: list[str]) -> None:
    assert teacher.strategy_args is not None
    strategy, field = teacher.strategy_args.strategy_name, f"{path}.strategy_args.strategy_name"
    kind = teacher.teacher_args.self_teacher
    if kind in FOLLOWERS and strategy not in FOLLOWERS[kind]:
        problem = f"{strategy!r} cannot follow the student, as teacher_args.self_teacher: {kind} asks"
        raise ConfigError(field, f"{problem}; use {_either(FOLLOWERS[kind])}")
    if config.validation is not None and config.validation.teacher_accuracy:
        if strategy not in GENERATORS:
            problem = f"needs teachers that generate, and {path} runs on {strategy!r}"
            fix = f"use {_either(GENERATORS)} there, or set it to false"
            raise ConfigError("validation.teacher_accuracy", f"{problem}; {fix}")
        if strategy == "vllm":
            _check_temperatures({"validation.generating_args": config.validation.generating_args}, path)
    if kind is not None and strategy == "remote":
        problem = "the server holds a model of its own, which nobody can say to be the student"
        raise ConfigError(field, f"{problem}, as teacher_args.self_teacher: {kind} does; use {_either(GENERATORS)}")
    args = config.opd_args
    many = args.objective == "direct" and args.support == "teacher_topk" and args.top_k > SERVER_MAX_LOGPROBS
    if strategy == "remote" and many:
        warnings.append(
            f"opd_args.top_k: the server of {path} must have been started with --max-logprobs {args.top_k} or more "
            f"(vLLM's default is {SERVER_MAX_LOGPROBS})"
        )


def _check_self_teacher(config: PipelineConfig, teacher: TeacherConfig, path: str, student: str) -> None:
    """A teacher that is the student needs what the student's model is made of."""
    kind, model = teacher.teacher_args.self_teacher, config.actor_train.model_args
    if kind is None:
        return
    assert teacher.strategy_args is not None
    strategy = teacher.strategy_args.strategy_name
    if kind == "ema" and model.adapter_name_or_path is not None:
        problem = f"the average would start without the adapter that {student} starts from"
        fix = "use live, or frozen on fsdp2_infer, or merge the adapter into the model"
        raise ConfigError(f"{path}.teacher_args.self_teacher", f"'ema': {problem}; {fix}")
    needed = ["model_config_kwargs", *(["adapter_name_or_path"] if kind == "frozen" else [])]
    for key in needed:
        if getattr(model, key) and strategy not in readers(key):
            able = [name for name in readers(key) if not name.endswith("_train")]
            problem = f"{strategy!r} does not read {student}.model_args.{key}, without which this is not the student"
            raise ConfigError(f"{path}.strategy_args.strategy_name", f"{problem}; use {_either(able)}")


def _either(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _check_base_model(config: PipelineConfig, names: Mapping[str, str]) -> None:
    """The base model of an extrapolation runs as the first teacher does."""
    if config.opd_args.base_model is None or not config.teachers:
        return
    name, teacher = next(iter(config.teachers.items()))
    assert teacher.strategy_args is not None
    if teacher.strategy_args.strategy_name == "remote":
        problem = f"runs as the first teacher does, and the server of {names[teacher_key(name)]} holds another model"
        raise ConfigError("opd_args.base_model", f"{problem}; put a teacher that runs here first, or remove it")
