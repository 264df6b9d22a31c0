"""What loads and plans, but does not run in this version. The launcher asks before it starts anything.

Nothing that changes a result may be ignored: a setting is read, refused at launch, or named in the launch's warning.
"""

from __future__ import annotations

from collections.abc import Mapping

from roll_opd.configs.agentic_config import AgenticConfig, EnvManagerConfig
from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.checks import roles_of
from roll_opd.configs.data_args import DataArguments
from roll_opd.configs.estimator_checks import lone_episodes
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.misplaced import misplaced
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.role_checks import NOT_YET_RUN, OF_MODELS, changed, role_blockers, role_unread
from roll_opd.configs.transports import transports
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.errors import ConfigError

# Whoever makes a strategy or a value run adds it here, and its refusal disappears.
RUNNABLE_STRATEGIES: dict[str, tuple[str, ...]] = {
    "actor_train": ("fsdp2_train", "megatron_train"),
    "actor_infer": ("vllm", "hf_infer"),
    "teacher": ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm", "remote"),
    "reference": ("hf_infer", "fsdp2_infer", "megatron_infer", "vllm", "remote"),
    "critic": ("fsdp2_train",),
}
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
# Fields of the agentic pipeline, of its environments' workers, and of an environment, likewise.
NOT_YET_AGENTIC = ["reward", "use_token_reward"]
NOT_YET_ENV_MANAGER = ["llm_proxy", "group_size_redundancy", "group_filter_cls", "worker_cls"]
NOT_YET_ENVIRONMENT = ["agent_runner_cls"]
NOT_YET_GENERATING = ["min_p", "repetition_penalty", "include_stop_str_in_output"]
# A turn that goes on behind its end is no turn.
NOT_IN_TURNS = ["ignore_eos"]
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
# Environments have deadlines of their own, in their entry of custom_envs.
UNREAD_AGENTIC = ["env_monitor"]
# What environments do not read of a role's settings; those not named here they do.
UNREAD_ENV_MANAGER = [*OF_MODELS, "device_mapping", "num_gpus_per_worker", "world_size"]
UNREAD_DATA = ["preprocessing_num_workers"]


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
    """Everything that a launch starts and that holds a model, by path: the roles, and the base model."""
    roles = launched_roles(config, names)
    if config.base_scorer is not None:
        roles["opd_args.base_model"] = config.base_scorer
    return roles


def weight_followers(loaded: LoadedConfig) -> list[str]:
    """Paths of the roles that get the student's weights at each step."""
    moving = [name for name, t in loaded.config.teachers.items() if t.teacher_args.self_teacher in ("ema", "live")]
    return [loaded.yaml_names["actor_infer"], *(loaded.teacher_yaml_name(name) for name in moving)]


def launch_blockers(loaded: LoadedConfig) -> list[ConfigError]:
    """Everything in ``loaded`` that this version cannot run, each with the nearest value that it can."""
    config, names = loaded.config, loaded.yaml_names
    found = [ConfigError(path, f"{reason}; planned only") for path, reason in loaded.planned.items()]
    found += _strategies(loaded)
    found += changed(config, NOT_YET, "")
    if isinstance(config, AgenticConfig):
        found += _agentic(config)
    for path, worker in launched_roles(config, names).items():
        found += role_blockers(config, worker, path)
    found += _forgetful_engine(config, names)
    found += _transport(loaded)
    found += changed(config.actor_infer.generating_args, NOT_YET_GENERATING, f"{names['actor_infer']}.generating_args")
    if config.validation is not None:
        found += changed(config.validation.generating_args, NOT_YET_GENERATING, "validation.generating_args")
    for path, data in _data_blocks(config, names).items():
        if path == "validation.data_args" and data.domain_interleave_probs:
            problem = "validation takes its prompts as they stand and would ignore this; remove it"
            found.append(ConfigError(f"{path}.domain_interleave_probs", problem))
    for name, reward in config.rewards.items():
        found += changed(reward, NOT_YET_REWARD, f"rewards.{name}")
        if reward.response_filter_config.type != "no_filter" and config.mode != "pure_opd":
            found.append(ConfigError(f"rewards.{name}.response_filter_config", f"{NOT_YET_RUN}; remove it"))
        if reward.device_mapping is not None:
            problem = f"a reward on GPUs {NOT_YET_RUN}; remove it: rewards run in world_size CPU processes"
            found.append(ConfigError(f"rewards.{name}.device_mapping", problem))
    return found


def launch_warnings(loaded: LoadedConfig) -> list[str]:
    """What the user should know of a launch: a critic without a use, and settings that nothing reads, in two lines.

    Those that this version does not read yet only affect speed or memory: what would change a result is refused by
    :func:`launch_blockers`. The others are read of another role, or with another setting.
    """
    config, names = loaded.config, loaded.yaml_names
    warnings = _critic_warnings(config)
    unread = changed(config, UNREAD_PIPELINE if config.pipeline == "rlvr" else UNREAD_AGENTIC, "")
    for path, manager in _env_managers(config).items():
        unread += changed(manager, UNREAD_ENV_MANAGER, path)
    for path, worker in launched_roles(config, names).items():
        unread += role_unread(config, worker, path)
    for path, data in _data_blocks(config, names).items():
        unread += changed(data, UNREAD_DATA, path)
    fields = [error.field for error in unread]
    if fields:
        warnings.append(f"settings for speed or memory that this version does not read: {', '.join(fields)}")
    elsewhere = misplaced(config, launched_roles(config, names), names)
    told = [f"{path} ({why})" for path, why in elsewhere.items() if path not in fields]
    if told:
        warnings.append(f"settings without effect where they stand: {', '.join(told)}")
    return warnings


def _agentic(config: AgenticConfig) -> list[ConfigError]:
    found = changed(config, NOT_YET_AGENTIC, "")
    for path, manager in _env_managers(config).items():
        found += changed(manager, NOT_YET_ENV_MANAGER, path)
        if manager.generating_args != config.actor_infer.generating_args:
            found += changed(manager.generating_args, NOT_YET_GENERATING, f"{path}.generating_args")
        found += changed(manager.generating_args, NOT_IN_TURNS, f"{path}.generating_args")
    for tag, env in config.environments_in_use().items():
        path = f"custom_envs.{tag}"
        if env.episode_mode is None:
            problem = f"{env.env_manager_cls} {NOT_YET_RUN}; use null, and episode_mode: trajectory or step"
            found.append(ConfigError(f"{path}.env_manager_cls", problem))
        found += changed(env, NOT_YET_ENVIRONMENT, path)
    lone = lone_episodes(config)
    if lone is not None and config.mode == "rl":
        found.append(lone)
    return found


def _env_managers(config: PipelineConfig) -> dict[str, EnvManagerConfig]:
    """The workers of environments that are started, by path."""
    if not isinstance(config, AgenticConfig):
        return {}
    managers = {"train_env_manager": config.train_env_manager, "val_env_manager": config.val_env_manager}
    return {path: manager for path, manager in managers.items() if manager.tags}


def _critic_warnings(config: PipelineConfig) -> list[str]:
    if starts_critic(config):
        if config.critic_warmup < config.max_steps:
            return []
        problem = f"{config.critic_warmup} steps of warm-up, and max_steps is {config.max_steps}"
        return [f"critic_warmup: {problem}: the student is never trained"]
    idle = [error.field for error in changed(config, ["critic", "critic_warmup", "value_clip"], "")]
    if not idle:
        return []
    problem = f"adv_estimator {config.adv_estimator} asks for no values, and no critic is started"
    return [f"{', '.join(idle)}: no effect, because {problem}"]


def _data_blocks(config: PipelineConfig, names: Mapping[str, str]) -> dict[str, DataArguments]:
    blocks = {f"{names['actor_train']}.data_args": config.actor_train.data_args}
    blocks["validation.data_args"] = config.validation.data_args if config.validation else None
    return {path: data for path, data in blocks.items() if data is not None}


def _forgetful_engine(config: PipelineConfig, names: Mapping[str, str]) -> list[ConfigError]:
    """An engine that leaves its weights behind may be asked again before the next update brings them."""
    infer = config.actor_infer
    assert infer.strategy_args is not None
    settings = backend_settings(infer.strategy_args) if infer.strategy_args.strategy_name in SETTINGS else None
    if not isinstance(settings, VLLMSettings) or settings.sleep_level == 1:
        return []
    mine = set(infer.device_mapping or ())
    others = [
        p for p, w in launched_roles(config, names).items() if w is not infer and mine & set(w.device_mapping or ())
    ]
    if not others:
        return []
    problem = (
        f"2 forgets the weights whenever {', '.join(others)} takes the devices, also before the student samples on"
    )
    field = f"{names['actor_infer']}.strategy_args.strategy_config.sleep_level"
    return [ConfigError(field, f"{problem} with them, which {NOT_YET_RUN}; use 1")]


def _transport(loaded: LoadedConfig) -> list[ConfigError]:
    """Weights that cannot travel as they are told to."""
    config, names = loaded.config, loaded.yaml_names
    asked = config.model_update_transport
    roles = roles_of(config, names)
    for path in weight_followers(loaded):
        problems = transports(config.actor_train, roles[path])
        if asked != "auto" and problems[asked]:
            problem = f"{asked} cannot carry weights from {names['actor_train']} to {path}: {problems[asked]}"
            return [ConfigError("model_update_transport", f"{problem}; use auto")]
    return []


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
            found.append(ConfigError(field, f"{strategy!r} {NOT_YET_RUN}; use {' or '.join(runnable)}"))
    return found
