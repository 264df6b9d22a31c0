"""FrozenLake as text: cross the ice to the goal, and do not fall into a hole.

::

    P__O      P player         X player in a hole
    _O__      _ ice            √ player on the goal
    ___G      O hole, G goal

The game is Gymnasium's; start and goal lie anywhere, as in ROLL. Reaching the goal is worth 1 and ends the episode, a
hole ends it with 0, and so is every other turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import DOWN, LEFT, RIGHT, UP
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv as Lake
from gymnasium.utils import seeding

from roll_opd.environments.action import ANSWER_PATTERN, CHAT_TOKENS
from roll_opd.environments.grid_game import GridGame, shortest_way

Cell = tuple[int, int]

PLAYER_IN_HOLE, PLAYER_ON_GOAL = 4, 5
_STEPS: dict[int, Cell] = {LEFT: (0, -1), DOWN: (1, 0), RIGHT: (0, 1), UP: (-1, 0)}


class FrozenLakeEnv(GridGame):
    """FrozenLake with a new map for every seed.

    ``reset(options={"map": ["SF", "HG"]})`` plays a map of one's own, in Gymnasium's letters.

    Args:
        size: rows and columns of the map.
        p: probability that a cell is ice.
        is_slippery: whether the player moves where it wants to in a third of its moves only, and to either side in
            the others.
        map_seed: plays the map of this seed in every episode; null: a new map for every seed.
        max_steps: turns of an episode at most.
        grid_lookup: code of a cell → its symbol.
        grid_vocab: symbol → its meaning, for the rules.
        map_lookup: letter of Gymnasium's map → code of the cell.
        action_lookup: number of an action → its name.
        env_instruction: the rules, in front of the lists of symbols and actions.
        format_penalty: reward of a turn without a valid action.
        action_pattern: where the action is in the student's text.
        special_token_list: removed from the student's text first.
        render_mode: read by ROLL; the observation is always text.

    Raises:
        ValueError: an argument that cannot work, by name.
    """

    GRID_LOOKUP: ClassVar[Mapping[int, str]] = {
        0: "P",
        1: "_",
        2: "O",
        3: "G",
        PLAYER_IN_HOLE: "X",
        PLAYER_ON_GOAL: "√",
    }
    GRID_VOCAB: ClassVar[Mapping[str, str]] = {
        "P": "player",
        "_": "empty",
        "O": "hole",
        "G": "goal",
        "X": "player in hole",
        "√": "player on goal",
    }
    ACTION_LOOKUP: ClassVar[Mapping[int, str]] = {LEFT: "Left", DOWN: "Down", RIGHT: "Right", UP: "Up"}
    MAP_LOOKUP: ClassVar[Mapping[str, int]] = {"P": 0, "F": 1, "H": 2, "G": 3}

    def __init__(
        self,
        size: int = 4,
        p: float = 0.8,
        is_slippery: bool = True,
        map_seed: int | None = None,
        max_steps: int = 20,
        grid_lookup: Mapping[int, str] | None = None,
        grid_vocab: Mapping[str, str] | None = None,
        map_lookup: Mapping[str | bytes, int] | None = None,
        action_lookup: Mapping[int, str] | None = None,
        env_instruction: str | None = None,
        format_penalty: float = 0.0,
        action_pattern: str = ANSWER_PATTERN,
        special_token_list: Sequence[str] | None = CHAT_TOKENS,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            max_steps=max_steps,
            grid_lookup=grid_lookup,
            grid_vocab=grid_vocab,
            action_lookup=action_lookup,
            env_instruction=env_instruction,
            format_penalty=format_penalty,
            action_pattern=action_pattern,
            special_token_list=special_token_list,
        )
        if size < 2:
            raise ValueError(f"size must be at least 2, for a start and a goal, not {size}")
        if not 0 <= p <= 1:
            raise ValueError(f"p is the probability of ice, between 0 and 1, not {p}")
        self.size = size
        self.p = p
        self.is_slippery = is_slippery
        self.map_seed = map_seed
        self.map_lookup = self._checked_map_lookup(map_lookup)
        self.lake: Lake | None = None

    def _checked_map_lookup(self, given: Mapping[str | bytes, int] | None) -> dict[str, int]:
        table = {k.decode() if isinstance(k, bytes) else k: v for k, v in (given or self.MAP_LOOKUP).items()}
        if set(table) != set(self.MAP_LOOKUP) or not set(table.values()) <= set(self.grid_lookup):
            raise ValueError(f"map_lookup must give each of {', '.join(self.MAP_LOOKUP)} a code of grid_lookup")
        return table

    def _rules(self) -> str:
        slips = "The ice is slippery: you may move in a direction that you did not intend. " if self.is_slippery else ""
        return (
            "You are solving the FrozenLake puzzle. Avoid the holes and go to the goal. "
            f"{slips}Answer with one action in each turn, in the format <answer>{self.action_lookup[RIGHT]}</answer>."
        )

    def _begin(self, options: Mapping[str, Any]) -> None:
        tiles = options.get("map")
        if tiles is None:
            chance = self.np_random if self.map_seed is None else seeding.np_random(self.map_seed)[0]
            tiles = random_map(self.size, self.p, chance)
        self.lake = Lake(desc=list(tiles), is_slippery=self.is_slippery)
        self.lake.np_random = self.np_random  # slips follow the seed too, and are independent of the map
        self.lake.reset()

    def _take(self, action: int | None) -> float:
        assert self.lake is not None
        return 0.0 if action is None else float(self.lake.step(action)[1])

    def position(self) -> Cell:
        """Row and column of the player."""
        assert self.lake is not None, "there is no player before the first reset"
        row, column = divmod(int(self.lake.s), self.lake.ncol)
        return row, column

    def tiles(self) -> list[str]:
        """The map in Gymnasium's letters, a string a row."""
        assert self.lake is not None, "there is no map before the first reset"
        return ["".join(letter.decode() for letter in row) for row in np.asarray(self.lake.desc).tolist()]

    def _under_player(self) -> str:
        row, column = self.position()
        return self.tiles()[row][column]

    def _solved(self) -> bool:
        return self._under_player() == "G"

    def _lost(self) -> bool:
        return self._under_player() == "H"

    def _cells(self) -> Iterable[Iterable[int]]:
        codes = [[self.map_lookup["F" if letter == "S" else letter] for letter in row] for row in self.tiles()]
        row, column = self.position()
        here = {"H": PLAYER_IN_HOLE, "G": PLAYER_ON_GOAL}
        codes[row][column] = here.get(self._under_player(), self.map_lookup["P"])
        return codes


def random_map(size: int, p: float, chance: np.random.Generator) -> list[str]:
    """A map of Gymnasium's letters whose goal can be reached; start and goal lie anywhere.

    Gymnasium's own generator puts them into opposite corners, where a student that cannot read the map does well.
    """
    while True:  # start and goal are often neighbours, so even a lake of holes needs but some size² / 4 rounds
        tiles = np.where(chance.random((size, size)) < p, "F", "H")
        start, goal = (divmod(int(cell), size) for cell in chance.choice(size * size, 2, replace=False))
        tiles[start], tiles[goal] = "S", "G"
        rows = ["".join(row) for row in tiles.tolist()]
        if _way_to_goal(rows, start) is not None:
            return rows


def optimal_actions(env: FrozenLakeEnv) -> list[str]:
    """Names of the actions of a shortest way from where the player is to the goal.

    Raises:
        ValueError: the ice is slippery, or the player is in a hole.
    """
    if env.is_slippery:
        raise ValueError("on slippery ice no list of actions is sure to lead to the goal; use is_slippery=False")
    way = _way_to_goal(env.tiles(), env.position())
    if way is None:
        raise ValueError("the goal cannot be reached from here")
    return [env.action_lookup[action] for action in way]


def _way_to_goal(tiles: Sequence[str], start: Cell) -> list[int] | None:
    def moves(cell: Cell) -> Iterator[tuple[int, Cell]]:
        if tiles[cell[0]][cell[1]] == "H":
            return
        for action, (down, right) in _STEPS.items():
            row, column = cell[0] + down, cell[1] + right
            if 0 <= row < len(tiles) and 0 <= column < len(tiles[0]) and tiles[row][column] != "H":
                yield action, (row, column)

    return shortest_way(start, moves, lambda cell: tiles[cell[0]][cell[1]] == "G")
