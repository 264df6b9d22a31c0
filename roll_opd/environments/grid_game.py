"""What games on a grid have in common: the rules as text, the turn, and its report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import gymnasium

from roll_opd.environments.action import ActionParser

State = TypeVar("State", bound=Hashable)

_AGGREGATION = {
    "action_is_effective": "mean",
    "action_is_valid": "mean",
    "success": "last",
    "format_penalty": "mean",
}


class GridGame(gymnasium.Env[str, str], ABC):
    """A game whose observation is its grid as text, and whose actions are named.

    A turn without a valid action moves nothing, counts as a turn, and is worth ``format_penalty`` more. After
    ``max_steps`` turns the episode is cut off.

    Args:
        max_steps: turns of an episode at most.
        grid_lookup: code of a cell → its symbol; the codes are those of ``GRID_LOOKUP``.
        grid_vocab: symbol → its meaning, for the rules; None: the usual meanings of the cells.
        action_lookup: number of an action → its name; the numbers are those of ``ACTION_LOOKUP``.
        env_instruction: the rules, in front of the lists of symbols and actions; None: the game's own.
        format_penalty: added to the reward of a turn without a valid action; usually negative.
        action_pattern: where the action is in the student's text (:class:`~roll_opd.environments.action.ActionParser`).
        special_token_list: removed from the student's text first.

    Raises:
        ValueError: an argument that cannot work, by name.
    """

    GRID_LOOKUP: ClassVar[Mapping[int, str]]
    GRID_VOCAB: ClassVar[Mapping[str, str]]
    ACTION_LOOKUP: ClassVar[Mapping[int, str]]

    def __init__(
        self,
        *,
        max_steps: int,
        grid_lookup: Mapping[int, str] | None,
        grid_vocab: Mapping[str, str] | None,
        action_lookup: Mapping[int, str] | None,
        env_instruction: str | None,
        format_penalty: float,
        action_pattern: str,
        special_token_list: Sequence[str] | None,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {max_steps}")
        self.max_steps = max_steps
        self.grid_lookup = checked_lookup("grid_lookup", grid_lookup, self.GRID_LOOKUP)
        meanings = {self.grid_lookup[code]: self.GRID_VOCAB[symbol] for code, symbol in self.GRID_LOOKUP.items()}
        self.grid_vocab = meanings if grid_vocab is None else dict(grid_vocab)
        self.action_lookup = checked_lookup("action_lookup", action_lookup, self.ACTION_LOOKUP)
        self.env_instruction = env_instruction
        self.format_penalty = float(format_penalty)
        self._parser = ActionParser(action_pattern, self.action_lookup, special_token_list)
        self._turn = 0
        self._over = True

    @abstractmethod
    def _rules(self) -> str:
        """The game's own rules, without the lists of symbols and actions."""

    @abstractmethod
    def _begin(self, options: Mapping[str, Any]) -> None:
        """Set up the episode; all chance comes from ``self.np_random``."""

    @abstractmethod
    def _take(self, action: int | None) -> float:
        """Take an action, or let the turn pass; return its reward."""

    @abstractmethod
    def position(self) -> Hashable:
        """Row and column of the player."""

    @abstractmethod
    def _solved(self) -> bool: ...

    def _lost(self) -> bool:
        """Whether the game is over without success."""
        return False

    @abstractmethod
    def _cells(self) -> Iterable[Iterable[int]]:
        """Codes of the cells, row by row."""

    def render(self) -> str:  # type: ignore[override]  # Gymnasium's frames are pictures, ours is text
        """The grid, a line a row."""
        return "\n".join("".join(self.grid_lookup[code] for code in row) for row in self._cells())

    def instruction(self) -> str:
        """The rules, with the symbols and the actions; nothing, where the rules of one's own are an empty text."""
        if self.env_instruction == "":
            return ""
        symbols = ", ".join(f"{symbol}: {meaning}" for symbol, meaning in self.grid_vocab.items())
        rules = self._rules() if self.env_instruction is None else self.env_instruction
        return (
            f"{rules}\nThe meaning of each symbol in the state is:\n{symbols}"
            f"\nYour available actions are:\n{', '.join(self.action_lookup.values())}"
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of ``seed``; without one, the next of the generator that the last seed began."""
        super().reset(seed=seed)
        self._begin(options or {})
        self._turn, self._over = 0, False
        observation = self.render()
        return observation, {"env_instruction": self.instruction(), "state": observation}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action that the text names.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or was never begun.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset before the next step")
        self._turn += 1
        parsed = self._parser.parse(action)
        valid = parsed.action is not None
        penalty = 0.0 if valid else self.format_penalty
        before = self.position()
        reward = self._take(parsed.action) + penalty
        effective = self.position() != before

        success = self._solved()
        terminated = success or self._lost()
        truncated = not terminated and self._turn >= self.max_steps
        self._over = terminated or truncated
        observation = self.render()
        if not valid:
            described = "you did not give a valid action"
        elif effective:
            described = f"you moved {parsed.content}, which is effective"
        else:
            described = f"you tried to move {parsed.content}, which is not effective"
        info = {
            "metrics": {
                "action_is_effective": effective,
                "action_is_valid": valid,
                "success": success,
                "format_penalty": penalty,
            },
            "metrics_agg_mode": dict(_AGGREGATION),
            "action_content": parsed.content,
            "action_desc": f"At turn {self._turn}, {described}.",
            "state": observation,
        }
        return observation, reward, terminated, truncated, info


def checked_lookup(argument: str, given: Mapping[int, str] | None, default: Mapping[int, str]) -> dict[int, str]:
    """A table of the user's in place of ours; keys may be numbers as text, as JSON has them.

    Raises:
        ValueError: its keys are not those of ``default``.
    """
    if given is None:
        return dict(default)
    table = {str(key): name for key, name in given.items()}
    if set(table) != {str(key) for key in default}:
        raise ValueError(f"{argument} must have the keys of {dict(default)}, not {', '.join(table)}")
    return {key: str(table[str(key)]) for key in default}


def shortest_way(
    start: State, moves: Callable[[State], Iterable[tuple[int, State]]], arrived: Callable[[State], bool]
) -> list[int] | None:
    """Actions of a shortest way from ``start`` to a state that counts as ``arrived``; None where there is none.

    Args:
        start: first state.
        moves: the actions that a state allows, each with the state behind it.
        arrived: whether a state is a goal.
    """
    behind: dict[State, tuple[int, State] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if arrived(state):
            way = []
            while (step := behind[state]) is not None:
                action, state = step
                way.append(action)
            return way[::-1]
        for action, following in moves(state):
            if following not in behind:
                behind[following] = (action, state)
                queue.append(following)
    return None
