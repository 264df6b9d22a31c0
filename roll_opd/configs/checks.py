"""Rules that span several fields. A rule about one field stands beside the field; see ``field_spec``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from roll_opd.configs.agentic_checks import check_agentic
from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.backend_checks import check_backends, samplings
from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.builder import did_you_mean
from roll_opd.configs.estimator_checks import check_estimator
from roll_opd.configs.idle_settings import idle_warnings
from roll_opd.configs.opd_checks import check_logprob_source, check_opd
from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.configs.role_checks import changed
from roll_opd.configs.roles import teacher_key
from roll_opd.configs.worker_config import RewardFilterArguments, WorkerConfig
from roll_opd.errors import ConfigError

TRAIN_STRATEGIES = ("fsdp2_train", "megatron_train")
GENERATE_STRATEGIES = ("vllm", "hf_infer", "sglang")
AGENTIC_ESTIMATORS = ("gigpo", "step_reinforce", "agentic_reinforce")
# Arguments of `query_filter_config` and their defaults, by type: those of `algorithms.reward_shaping`.
FILTER_ARGS: dict[str, dict[str, float]] = {
    "no_filter": {},
    "mean_filter": {"threshold_down": -1.0, "threshold_up": math.inf},
    "std_filter": {"std_threshold": -1.0},
}
SCORE_STRATEGIES = ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm", "remote")


def check_config(config: PipelineConfig, raw: Mapping[str, Any], names: Mapping[str, str], warnings: list[str]) -> None:
    """Raise ConfigError for what cannot work; add to ``warnings`` what looks wrong but may run."""
    _check_strategies(config, names, warnings)
    check_backends(config, roles_of(config, names), names, warnings)
    _check_schedules(config, names, warnings)
    _check_lengths(config, names, warnings)
    _check_sampling(config, names)
    _check_data(config, names, warnings)
    _check_rewards(config)
    _check_bounds(config, warnings)
    if isinstance(config, AgenticConfig):
        check_agentic(config, raw, names, warnings)
    _check_groups(config, warnings)
    _check_unused(config, names, warnings)
    _check_batches(config, names, warnings)
    _check_devices(config, names, warnings)
    if config.teachers:
        check_opd(config, raw, names, warnings)
    else:
        # The source of the old policy's log-probabilities is the one setting of distillation that any run has.
        check_logprob_source(config, names)
        args = {f"opd_args.{key}": value for key, value in (raw.get("opd_args") or {}).items()}
        args = {**args, "opd_args.student_logprob_source": None, "opd_kl_coef": raw.get("opd_kl_coef")}
        idle = [key for key, value in args.items() if value is not None]
        if idle:
            warnings.append(f"{', '.join(idle)}: no effect, because no teacher is configured")
    if config.adv_estimator == "gae" and config.critic is None:
        raise ConfigError("adv_estimator", "gae needs a critic; add 'critic:', or use reinforce, grpo or rloo")
    check_estimator(config, raw, warnings)
    if config.pipeline == "rlvr" and config.adv_estimator in AGENTIC_ESTIMATORS:
        problem = f"{config.adv_estimator!r} credits the steps of an episode, and a response has one"
        raise ConfigError("adv_estimator", f"{problem}; use reinforce, reinforce++, grpo, rloo or gae")
    wants = [key for key, on in (("add_token_level_kl", config.add_token_level_kl),
                                 ("use_kl_loss", config.use_kl_loss and config.kl_loss_coef > 0)) if on]  # fmt: skip
    if config.mode == "rl" and wants and config.reference is None:
        raise ConfigError(wants[0], "needs a reference; add 'reference:' (a worker config), or remove it")
    if (
        config.needs_reference
        and config.add_token_level_kl
        and config.target_kl is not None
        and not config.init_kl_coef
    ):
        problem = "is 0, from which a coefficient that adapts to target_kl never moves"
        raise ConfigError("init_kl_coef", f"{problem}; start above 0, or remove target_kl")
    if config.needs_reference and config.kl_penalty == "full" and config.add_token_level_kl:
        problem = "'full' is a sum over the vocabulary, and a reference reports the sampled token"
        raise ConfigError("kl_penalty", f"{problem}; use kl, abs, mse or k3")
    warnings += idle_warnings(config, raw)


def roles_of(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, WorkerConfig]:
    """Every role that holds a model, by its path in the YAML."""
    roles: dict[str, WorkerConfig] = {
        names["actor_train"]: config.actor_train,
        names["actor_infer"]: config.actor_infer,
        **{names[teacher_key(name)]: teacher for name, teacher in config.teachers.items()},
    }
    if config.reference is not None:
        roles["reference"] = config.reference
    if config.critic is not None:
        roles["critic"] = config.critic
    return roles


def data_parallel_size(worker: WorkerConfig, path: str) -> int:
    """Ranks of a trainer that see different samples; ConfigError when the parallel sizes do not divide its devices."""
    strategy = worker.strategy_args
    assert strategy is not None
    ranks = worker.world_size or 1
    settings = backend_settings(strategy)
    if isinstance(settings, MegatronSettings):
        shared = settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size
        shared *= settings.context_parallel_size
        what = "tensor x pipeline x context parallel size"
    else:
        shared, what = worker.model_args.ulysses_size, "ulysses_size"
    if ranks % shared:
        where = f"{path}.device_mapping" if worker.device_mapping is not None else f"{path}.world_size"
        raise ConfigError(where, f"{ranks} ranks do not divide by {shared} ({what})")
    return ranks // shared


def _check_schedules(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    for path, worker in {names["actor_train"]: config.actor_train, "critic": config.critic}.items():
        if worker is None or worker.training_args.lr_scheduler_type != "constant":
            continue
        for key in ("warmup_steps", "warmup_ratio"):
            length = getattr(worker.training_args, key)
            if length > 0:
                warnings.append(
                    f"{path}.training_args.lr_scheduler_type: 'constant' has no warm-up, so {key} {length:g} has no "
                    f"effect; constant_with_warmup has one"
                )


def _check_strategies(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    allowed = {
        names["actor_train"]: ("train", TRAIN_STRATEGIES),
        names["actor_infer"]: ("generate", GENERATE_STRATEGIES),
    }
    allowed["critic"] = ("train", TRAIN_STRATEGIES)
    for path, worker in roles_of(config, names).items():
        assert worker.strategy_args is not None
        strategy = worker.strategy_args.strategy_name
        job, options = allowed.get(path, ("score", SCORE_STRATEGIES))
        if strategy not in options:
            problem = f"{strategy!r} cannot {job}; use one of: {', '.join(options)}"
            raise ConfigError(f"{path}.strategy_args.strategy_name", problem)
        if strategy == "sglang":
            warnings.append(
                f"{path}.strategy_args.strategy_name: sglang is planned only; a launch needs vllm or hf_infer"
            )
        if strategy.startswith(("fsdp2", "megatron")):
            data_parallel_size(worker, path)


def _check_lengths(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    assert config.response_length is not None and config.sequence_length is not None
    total = config.prompt_length + config.response_length
    if config.pipeline == "rlvr" and total > config.sequence_length:
        problem = (
            f"{config.sequence_length} is less than prompt_length + response_length = {total}; raise it or leave it out"
        )
        raise ConfigError("sequence_length", problem)
    for path, args in samplings(config, names).items():
        assert args.max_new_tokens is not None
        if args.max_new_tokens > config.response_length:
            problem = f"{args.max_new_tokens} is more than response_length; {config.response_length} is the bound"
            warnings.append(f"{path}.max_new_tokens: {problem}")


def _check_sampling(config: PipelineConfig, names: Mapping[str, str]) -> None:
    args, path = config.actor_infer.generating_args, f"{names['actor_infer']}.generating_args"
    assert args is not None
    if args.temperature <= 0:
        raise ConfigError(
            f"{path}.temperature", f"must be > 0, got {args.temperature!r}: training needs samples, not the argmax"
        )
    if not args.do_sample:
        raise ConfigError(f"{path}.do_sample", "must be true: training needs samples, not the argmax")
    for path, args in samplings(config, names).items():
        if args.top_k < 0:
            raise ConfigError(f"{path}.top_k", f"must be >= 0 (0 and -1 keep all tokens), got {args.top_k}")


def _check_data(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    path = f"{names['actor_train']}.data_args"
    data = config.actor_train.data_args
    if config.pipeline == "rlvr" and (data is None or not data.file_name):
        raise ConfigError(f"{path}.file_name", "no training prompts; name at least one data file")
    probs = data.domain_interleave_probs if data else None
    if probs:
        field = f"{path}.domain_interleave_probs"
        for domain, share in probs.items():
            if share < 0:
                raise ConfigError(f"{field}.{domain}", f"must be >= 0, got {share}")
        if abs(sum(probs.values()) - 1) > 1e-3:
            if not sum(probs.values()):
                raise ConfigError(field, "all shares are 0; give at least one domain a share")
            warnings.append(f"{field}: the shares add up to {sum(probs.values()):g}, not 1; they are scaled")


def _check_rewards(config: PipelineConfig) -> None:
    for name, reward in config.rewards.items():
        if not reward.worker_cls:
            raise ConfigError(f"rewards.{name}.worker_cls", "missing: it names the class that grades the responses")
        _check_filter(reward.query_filter_config, f"rewards.{name}.query_filter_config.filter_args")
    if config.mode != "pure_opd" and config.pipeline == "rlvr" and not config.rewards:
        raise ConfigError("rewards", "missing: without pure distillation the RLVR pipeline trains on rewards")


def _check_filter(spec: RewardFilterArguments, path: str) -> None:
    known = FILTER_ARGS[spec.type]
    for key, value in spec.filter_args.items():
        if key not in known:
            problem = f"{spec.type} takes {' and '.join(known) or 'no arguments'}{did_you_mean(key, known)}"
            raise ConfigError(f"{path}.{key}", f"unknown key: {problem}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ConfigError(f"{path}.{key}", f"expected a number, got {value!r}")
    if spec.type == "mean_filter":
        bounds = {**known, **spec.filter_args}
        _check_order(path, "threshold_down", bounds["threshold_down"], "threshold_up", bounds["threshold_up"])


def _check_order(path: str, low: str, lowest: float, high: str, highest: float) -> None:
    """Refuse bounds between which nothing lies; ``path`` is empty at the top level."""
    if lowest >= highest:
        problem = f"{lowest:g} is not below {high} ({highest:g}), and nothing would be left to train on"
        raise ConfigError(f"{path}.{low}" if path else low, f"{problem}; lower this or raise {high}")


def _check_bounds(config: PipelineConfig, warnings: list[str]) -> None:
    """What is kept for training by two bounds."""
    if isinstance(config, RLVRConfig) and config.difficulty_mask and config.mode != "pure_opd":
        lowest, highest = config.difficulty_low_threshold, config.difficulty_high_threshold
        _check_order("", "difficulty_low_threshold", lowest, "difficulty_high_threshold", highest)
    for i, spec in enumerate(config.train_infer_correction.filters):
        path = f"train_infer_correction.filters[{i}]"
        if not spec.enabled:
            continue
        if not (spec.ratio_enabled or spec.diff_enabled):
            warnings.append(f"{path}: no effect, because it tests nothing; set ratio_enabled or diff_enabled")
            continue
        for test in ("ratio", "diff"):
            low, high = f"{test}_low", f"{test}_high"
            if getattr(spec, f"{test}_enabled"):
                _check_order(path, low, getattr(spec, low), high, getattr(spec, high))
                continue
            for error in changed(spec, [low, high], path):
                warnings.append(f"{error.field}: no effect, because {test}_enabled is off")


def _check_groups(config: PipelineConfig, warnings: list[str]) -> None:
    """With one sample a prompt, what compares the samples of a prompt leaves nothing of the reward."""
    if config.mode == "pure_opd" or config.pipeline != "rlvr" or config.num_return_sequences_in_group > 1:
        return
    norms = [key for key in ("norm_mean_type", "norm_std_type") if getattr(config, key) == "group"]
    if config.adv_estimator in ("grpo", "rloo"):
        what, result, other = str(config.adv_estimator), "its advantage is always 0", "adv_estimator: reinforce"
    elif norms:
        what, result, other = f"{norms[0]} group", "every reward becomes 0", f"{' and '.join(norms)}: batch"
    else:
        return
    field, fix = "num_return_sequences_in_group", f"use at least 2, or {other}"
    problem = f"1, but {what} compares samples of one prompt with each other; with one sample {result}"
    if config.mode == "rl":
        raise ConfigError(field, f"{problem}; {fix}")
    warnings.append(f"{field}: {problem}, and the teachers alone train the student; {fix}")


def _check_unused(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    """Settings that load and have no effect: a file of ROLL may keep them, its user should know."""
    named = [key for key in ("global_template", "tag_to_template") if getattr(config, key)]
    blocks = {f"{path}.data_args": worker.data_args for path, worker in roles_of(config, names).items()}
    blocks["validation.data_args"] = config.validation.data_args if config.validation else None
    blocks |= {f"rewards.{name}.data_args": reward.data_args for name, reward in config.rewards.items()}
    named += [f"{path}.template" for path, data in blocks.items() if data and data.template not in (None, "native")]
    if named:
        warnings.append(f"the tokenizer's own chat template is used, whatever these name: {', '.join(named)}")
    if config.mode == "pure_opd":
        for name, reward in config.rewards.items():
            for key in ("query_filter_config", "response_filter_config"):
                if getattr(reward, key).type != "no_filter":
                    warnings.append(f"rewards.{name}.{key}: has no effect, rewards never filter in pure distillation")


def _check_batches(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    path, worker = names["actor_train"], config.actor_train
    training = worker.training_args
    dp = data_parallel_size(worker, path)
    mini_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * dp
    samples = config.samples_per_step
    if config.pipeline == "rlvr" and samples % mini_batch:
        parts = f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} x {dp}"
        problem = (
            f"an optimizer step takes {mini_batch} samples (per_device_train_batch_size x gradient_accumulation_steps "
            f"x data-parallel ranks = {parts}), but a rollout has {samples} (rollout_batch_size x "
            f"num_return_sequences_in_group); the last optimizer step of each rollout is smaller"
        )
        warnings.append(f"{path}.training_args: {problem}")


def _check_devices(config: PipelineConfig, names: Mapping[str, str], warnings: list[str]) -> None:
    available = config.num_nodes * config.num_gpus_per_node
    roles = {**roles_of(config, names), **{f"rewards.{name}": reward for name, reward in config.rewards.items()}}
    for path, worker in roles.items():
        if worker.device_mapping is not None and max(worker.device_mapping) >= available:
            problem = (
                f"device {max(worker.device_mapping)} lies outside num_nodes x num_gpus_per_node = {config.num_nodes} "
                f"x {config.num_gpus_per_node} = {available} devices; the live cluster decides at launch"
            )
            warnings.append(f"{path}.device_mapping: {problem}")
