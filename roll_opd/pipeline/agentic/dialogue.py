"""What the student is told in each turn: system message, rules, observation, tool answers, history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.environments.base import Opening, Outcome

Message = dict[str, str]


@dataclass(frozen=True)
class Played:
    """A turn that is over, as a history shows it."""

    observation: str
    action: str
    reward: float


class Dialogue:
    """Writes the messages of one episode.

    Args:
        config: of the environment.
        opening: what its reset returned.
        max_tokens: of a turn.
    """

    def __init__(self, config: EnvironmentConfig, opening: Opening, max_tokens: int) -> None:
        self.config = config
        self.max_tokens = max_tokens
        self.instruction = str(opening.info.get("env_instruction") or "")
        self._suffix = str(opening.info.get("suffix") or "")
        self._opening = opening

    @property
    def stepwise(self) -> bool:
        """Whether each turn has a prompt of its own."""
        return self.config.episode_mode == "step"

    def first(self) -> list[Message]:
        """The messages of the first turn."""
        if self.stepwise:
            return self._step(self._opening.observation, [])
        text = self._user(self._opening.observation, self._suffix, 0)
        return [
            *self._system(),
            {"role": "user", "content": f"{self.instruction}\n{text}" if self.instruction else text},
        ]

    def following(self, outcome: Outcome, played: Sequence[Played]) -> list[Message]:
        """The messages of the next turn: what is added to the conversation or, in ``step`` mode, the whole prompt."""
        if self.stepwise:
            return self._step(outcome.observation, played)
        if outcome.info.get("use_tool"):
            return [{"role": "tool", "content": outcome.observation}]
        suffix = str(outcome.info.get("suffix") or "")
        return [{"role": "user", "content": self._user(outcome.observation, suffix, len(played))}]

    def _system(self) -> list[Message]:
        template = self.config.agent_system_template
        return [] if template is None else [{"role": "system", "content": template}]

    def _user(self, observation: str, suffix: str, turns: int) -> str:
        return self.config.agent_template.format(
            observation=observation,
            suffix=suffix,
            turn_idx=turns + 1,
            actions_left=self.config.max_steps - turns,
            max_response_length=self.max_tokens,
        )

    def _step(self, observation: str, played: Sequence[Played]) -> list[Message]:
        shown = played[-self.config.history_length :] if self.config.history_length else []
        first = len(played) - len(shown) + 1
        history = ", ".join(
            f"(step: {first + i}, observation: {p.observation}, action: {p.action}, reward: {p.reward:g})"
            for i, p in enumerate(shown)
        )
        text = self.config.agent_template.format(
            env_instruction=self.instruction,
            history=history,
            history_length=len(shown),
            step_count=len(played),
            current_step=len(played) + 1,
            current_observation=observation,
            max_response_length=self.max_tokens,
        )
        return [*self._system(), {"role": "user", "content": text}]


def context_fields(opening: Opening, first: str, tag: str) -> dict[str, Any]:
    """What a teacher's ``context_template`` can name.

    Args:
        opening: what the reset returned; text and numbers of its ``info`` are fields.
        first: the first user message that the student sees.
        tag: of the environment.
    """
    given = {name: value for name, value in opening.info.items() if isinstance(value, (str, int, float))}
    return {**given, "prompt": first, "observation": opening.observation, "tag": tag}
