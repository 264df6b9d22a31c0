"""What follows from other settings in the agentic pipeline: sampling, modes of environments, shares of tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from roll_opd.configs.agentic_config import AgenticConfig, EnvManagerConfig
from roll_opd.configs.environment_config import DEFAULT_STEP_TEMPLATE, EnvironmentConfig
from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.errors import ConfigError

A = TypeVar("A", bound=AgenticConfig)
# ROLL's managers, by the last part of their class path.
MODES = {"TrajEnvManager": "trajectory", "StepEnvManager": "step"}


def share_sampling(config: A, names: Mapping[str, str], warnings: list[str]) -> A:
    """Settle on one way to sample in training: ``actor_infer``'s settings, else those of ``train_env_manager``."""
    infer, train, held_out = (
        block.generating_args for block in (config.actor_infer, config.train_env_manager, config.val_env_manager)
    )
    path = f"{names['actor_infer']}.generating_args"
    if infer is not None and train not in (None, infer):
        warnings.append(f"train_env_manager.generating_args: no effect, because {path} is given, which decides")
    if infer is not None and held_out not in (None, infer):
        problem = f"decides in validation, as the more specific one, where ROLL takes {path}"
        warnings.append(f"val_env_manager.generating_args: {problem}")
    sampling = infer or train or GeneratingArguments()
    return replace(
        config,
        actor_infer=replace(config.actor_infer, generating_args=sampling),
        val_env_manager=replace(config.val_env_manager, generating_args=held_out or sampling),
    )


def resolve_agentic(config: A, raw: Mapping[str, Any]) -> A:
    """Fill in what ``config`` leaves open, once the sampling of ``actor_infer`` is complete.

    Rewards and validation of the RLVR pipeline are taken out: environments reward, and ``val_env_manager`` validates.
    """
    sampling = config.actor_infer.generating_args
    assert sampling is not None and sampling.max_new_tokens is not None
    held_out = config.val_env_manager.generating_args
    assert held_out is not None
    limit = held_out.max_new_tokens or config.response_length
    held_out = replace(held_out, max_new_tokens=limit, num_return_sequences=1)
    given = raw.get("custom_envs") or {}
    return replace(
        config,
        num_return_sequences_in_group=1,
        rewards={},
        validation=None,
        custom_envs={
            tag: _environment(tag, env, given[tag], sampling.max_new_tokens) for tag, env in config.custom_envs.items()
        },
        train_env_manager=_manager(replace(config.train_env_manager, generating_args=sampling)),
        val_env_manager=_manager(replace(config.val_env_manager, generating_args=held_out)),
    )


def known_mode(env: EnvironmentConfig) -> str | None:
    """The mode that ``env_manager_cls`` stands for; None where it is not set, or stands for none of ours."""
    return MODES.get((env.env_manager_cls or "").rpartition(".")[2])


def _environment(tag: str, env: EnvironmentConfig, given: Mapping[str, Any], limit: int) -> EnvironmentConfig:
    mode = known_mode(env)
    if mode is not None and env.episode_mode not in (None, mode):
        problem = f"{env.episode_mode!r} contradicts env_manager_cls: {env.env_manager_cls} ({mode})"
        raise ConfigError(f"custom_envs.{tag}.episode_mode", f"{problem}; remove one of the two")
    if env.env_manager_cls is None:
        mode = env.episode_mode or "trajectory"
    if mode == "step" and given.get("agent_template") is None:
        env = replace(env, agent_template=DEFAULT_STEP_TEMPLATE)
    return replace(env, episode_mode=mode, max_tokens_per_step=env.max_tokens_per_step or limit)  # type: ignore[arg-type]


def _manager(manager: EnvManagerConfig) -> EnvManagerConfig:
    """Share the groups out over the tags, the first ones getting what is left over."""
    if manager.num_groups_partition is not None or not manager.tags:
        return manager
    each, more = divmod(manager.num_env_groups, len(manager.tags))
    return replace(manager, num_groups_partition=[each + (i < more) for i in range(len(manager.tags))])
