"""Episodes in the training signal: segments are joined to one stream of sampled tokens, and what comes out is split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roll_opd.algorithms.agent_advantages import AgentAdvantageSettings, Episode, agent_advantages
from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.estimator_checks import normalisation_of
from roll_opd.pipeline.metrics import episodes_of
from roll_opd.trajectory import Trajectory


def agent_settings(config: AgenticConfig) -> AgentAdvantageSettings:
    """What the config says about rewards of episodes."""
    normalisation = normalisation_of(config)
    # These two compare by themselves, and the checks at load have seen that nothing else is asked of them.
    by_itself = config.adv_estimator in ("grpo", "rloo")
    return AgentAdvantageSettings(
        estimator=config.adv_estimator,
        gamma=config.gamma,
        lambd=config.lambd,
        whiten_advantages=config.whiten_advantages,
        whiten_rewards=config.whiten_rewards,
        reward_clip=config.reward_clip,
        norm_mean_type=None if by_itself else normalisation.mean,
        norm_std_type=None if by_itself else normalisation.std,
        grouping=normalisation.grouping,
        step_gamma=config.step_reward_gamma,
        episode_weight=config.episode_reward_weight,
        step_weight=config.step_reward_weight,
    )


def episode_advantages(
    settings: AgentAdvantageSettings,
    trajectories: Sequence[Trajectory],
    penalties: Sequence[Tensor] | None,
    values: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    """:func:`~roll_opd.algorithms.agent_advantages.agent_advantages` of trajectories that are segments of episodes.

    Args:
        settings: how.
        trajectories: in any order, all segments of each episode among them.
        penalties: ``[n]`` of each trajectory.
        values: ``[n]`` of each trajectory, with a critic.

    Returns:
        Advantages and returns ``[n]`` of each trajectory, in the order given, and metrics.
    """
    place = {t.id: i for i, t in enumerate(trajectories)}
    groups = episodes_of(trajectories)
    order = [[place[t.id] for t in segments] for segments in groups]

    def joined(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [torch.cat([tensors[i] for i in places]) for places in order]

    def split(streams: Sequence[Tensor]) -> list[Tensor]:
        parts: dict[int, Tensor] = {}
        for places, stream in zip(order, streams, strict=True):
            parts.update(zip(places, stream.split([trajectories[i].response_length for i in places]), strict=True))
        return [parts[i] for i in range(len(trajectories))]

    episodes = [_episode(segments) for segments in groups]
    advantages, returns, metrics = agent_advantages(settings, episodes, joined(penalties), joined(values))
    return split(advantages), None if returns is None else split(returns), metrics


def _episode(segments: Sequence[Trajectory]) -> Episode:
    first = segments[0]
    turns = [turn for t in segments for turn in t.turns]
    # A segment that got lost would take its rewards along, and a turn out of place the order of discounts.
    assert [turn.index for turn in turns] == list(range(len(turns))), f"episode {first.id} is not whole"
    for t in segments:
        assert t.reward == first.reward, f"segments of episode {first.id} differ in their reward"
        assert all(t.response_mask[turn.start : turn.end].all() for turn in t.turns), f"turns of {t.id} off its mask"
    return Episode(
        draw=first.id.draw,
        tag=first.tag,
        score=first.reward,
        rewards=[turn.reward for turn in turns],
        lengths=[length for t in segments for length in t.turn_lengths],
        states=[turn.state for turn in turns],
    )
