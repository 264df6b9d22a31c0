"""Sokoban as text: push every box onto a target.

::

    ######      # wall, _ floor         O target          √ box on a target
    #_P_O#      P player                S player on a target
    #_X__#      X box
    ######

Each turn is worth -0.1, a box pushed onto a target 1, one pushed off a target -1, and the last box on its target 10
more, as in gym_sokoban. That ends the episode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from roll_opd.environments.action import ANSWER_PATTERN, CHAT_TOKENS
from roll_opd.environments.grid_game import GridGame, shortest_way

Cell = tuple[int, int]
State = tuple[Cell, frozenset[Cell]]
"""The player and the boxes: what a move changes."""

WALL, FLOOR, TARGET, BOX_ON_TARGET, BOX, PLAYER, PLAYER_ON_TARGET = range(7)
UP, DOWN, LEFT, RIGHT = range(1, 5)  # gym_sokoban's 0 is to do nothing
_STEPS: dict[int, Cell] = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}
_DIRECTIONS = tuple(_STEPS.values())

TURN_REWARD = -0.1
ON_TARGET_REWARD = 1.0
OFF_TARGET_REWARD = -1.0
SOLVED_REWARD = 10.0

_TURN_PROBABILITY = 0.35
_ATTEMPTS = 20


@dataclass(frozen=True)
class Room:
    """A room as it stands.

    Attributes:
        rows: with the walls around.
        columns: with the walls around.
        floor: cells that are no walls, the targets among them.
        targets: cells that boxes belong on.
        boxes: where they are.
        player: where it is.
    """

    rows: int
    columns: int
    floor: frozenset[Cell]
    targets: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell

    @property
    def solved(self) -> bool:
        """Whether every box is on a target."""
        return self.boxes <= self.targets

    def code(self, cell: Cell) -> int:
        """What the cell is drawn as, a key of ``grid_lookup``."""
        on_target = cell in self.targets
        if cell not in self.floor:
            return WALL
        if cell == self.player:
            return PLAYER_ON_TARGET if on_target else PLAYER
        if cell in self.boxes:
            return BOX_ON_TARGET if on_target else BOX
        return TARGET if on_target else FLOOR


class SokobanEnv(GridGame):
    """Sokoban with a new room for every seed. Every room can be solved within ``max_steps`` moves.

    ``reset(options={"room": "#####\\n#PXO#\\n#####"})`` plays a room of one's own, in the symbols of ``GRID_LOOKUP``.

    Args:
        dim_room: rows and columns, the walls around counted.
        max_steps: turns of an episode at most.
        num_boxes: boxes, and targets.
        search_depth: moves that the reverse play may make: a room's shortest solution has no more.
        num_gen_steps: steps of the walk that digs the room; null: 1.7 * (rows + columns).
        grid_lookup: code of a cell → its symbol.
        grid_vocab: symbol → its meaning, for the rules.
        action_lookup: number of an action → its name.
        env_instruction: the rules, in front of the lists of symbols and actions.
        format_penalty: added to the reward of a turn without a valid action.
        action_pattern: where the action is in the student's text.
        special_token_list: removed from the student's text first.
        render_mode: read by ROLL; the observation is always text.

    Raises:
        ValueError: an argument that cannot work, by name. At reset: no room was found, which happens with many boxes in
            a small room.
    """

    GRID_LOOKUP: ClassVar[Mapping[int, str]] = {
        WALL: "#",
        FLOOR: "_",
        TARGET: "O",
        BOX_ON_TARGET: "√",
        BOX: "X",
        PLAYER: "P",
        PLAYER_ON_TARGET: "S",
    }
    GRID_VOCAB: ClassVar[Mapping[str, str]] = {
        "#": "wall",
        "_": "empty",
        "O": "target",
        "√": "box on target",
        "X": "box",
        "P": "player",
        "S": "player on target",
    }
    ACTION_LOOKUP: ClassVar[Mapping[int, str]] = {UP: "Up", DOWN: "Down", LEFT: "Left", RIGHT: "Right"}

    def __init__(
        self,
        dim_room: Sequence[int] = (10, 10),
        max_steps: int = 20,
        num_boxes: int = 4,
        search_depth: int = 300,
        num_gen_steps: int | None = None,
        grid_lookup: Mapping[int, str] | None = None,
        grid_vocab: Mapping[str, str] | None = None,
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
        if len(dim_room) != 2 or min(dim_room) < 3:
            raise ValueError(f"dim_room must be rows and columns, each at least 3 with the walls, not {list(dim_room)}")
        for name, value in (("num_boxes", num_boxes), ("search_depth", search_depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if num_gen_steps is not None and num_gen_steps < 1:
            raise ValueError(f"num_gen_steps must be at least 1, or null, not {num_gen_steps}")
        rows, columns = dim_room
        if (rows - 2) * (columns - 2) < 2 * num_boxes + 1:
            raise ValueError(f"num_boxes={num_boxes} and their targets do not fit into dim_room={list(dim_room)}")
        self.dim_room = (rows, columns)
        self.num_boxes = num_boxes
        self.search_depth = search_depth
        self.num_gen_steps = int(1.7 * (rows + columns)) if num_gen_steps is None else num_gen_steps
        self._room: Room | None = None

    @property
    def room(self) -> Room:
        """The room as it stands."""
        assert self._room is not None, "there is no room before the first reset"
        return self._room

    def _rules(self) -> str:
        return (
            "You are solving the Sokoban puzzle. You are the player and you need to push all boxes to targets. "
            "When you are right next to a box, you can push it by moving in the same direction. "
            "You cannot push a box through a wall or another box, and you cannot pull a box. "
            f"Answer with one action in each turn, in the format <answer>{self.action_lookup[RIGHT]}</answer>."
        )

    def _begin(self, options: Mapping[str, Any]) -> None:
        if "room" in options:
            self._room = parse_room(options["room"])
            return
        moves = min(self.search_depth, self.max_steps)
        self._room = random_room(self.dim_room, self.num_boxes, self.num_gen_steps, moves, self.np_random)

    def _take(self, action: int | None) -> float:
        if action is None:
            return TURN_REWARD
        room = self.room
        player, boxes = _move(room.floor, (room.player, room.boxes), _STEPS[action])
        self._room = Room(room.rows, room.columns, room.floor, room.targets, boxes, player)
        gained = len(boxes & room.targets) - len(room.boxes & room.targets)
        reward = TURN_REWARD + (ON_TARGET_REWARD if gained > 0 else OFF_TARGET_REWARD if gained < 0 else 0.0)
        return reward + SOLVED_REWARD if self.room.solved else reward

    def position(self) -> Cell:
        """Row and column of the player."""
        return self.room.player

    def _solved(self) -> bool:
        return self.room.solved

    def _cells(self) -> Iterable[Iterable[int]]:
        room = self.room
        return [[room.code((row, column)) for column in range(room.columns)] for row in range(room.rows)]


def optimal_actions(env: SokobanEnv) -> list[str]:
    """Names of the actions of a shortest solution of the room as it stands.

    Takes time in proportion to the states that player and boxes can be in: milliseconds with one box, up to half a
    second with four in a room of 10 x 10.

    Raises:
        ValueError: the room cannot be solved any more.
    """
    room = env.room

    def moves(state: State) -> Iterator[tuple[int, State]]:
        for action, direction in _STEPS.items():
            yield action, _move(room.floor, state, direction)

    way = shortest_way((room.player, room.boxes), moves, lambda state: state[1] <= room.targets)
    if way is None:
        raise ValueError("the room cannot be solved from here")
    return [env.action_lookup[action] for action in way]


def parse_room(text: str) -> Room:
    """A room from text in the symbols of ``SokobanEnv.GRID_LOOKUP``.

    Raises:
        ValueError: an unknown symbol, lines of unequal length, not one player, or not as many boxes as targets.
    """
    lines = text.strip().splitlines()
    codes = {symbol: code for code, symbol in SokobanEnv.GRID_LOOKUP.items()}
    cells: dict[int, set[Cell]] = {code: set() for code in codes.values()}
    for row, line in enumerate(lines):
        for column, symbol in enumerate(line):
            if symbol not in codes:
                raise ValueError(f"a room is written in {' '.join(codes)}; {symbol!r} is none of these")
            cells[codes[symbol]].add((row, column))
    players = cells[PLAYER] | cells[PLAYER_ON_TARGET]
    targets = cells[TARGET] | cells[BOX_ON_TARGET] | cells[PLAYER_ON_TARGET]
    boxes = cells[BOX] | cells[BOX_ON_TARGET]
    if len({len(line) for line in lines}) != 1 or len(players) != 1 or not boxes or len(boxes) != len(targets):
        raise ValueError("a room needs lines of equal length, one player, and as many targets as boxes")
    floor = cells[FLOOR] | players | targets | boxes
    return Room(len(lines), len(lines[0]), frozenset(floor), frozenset(targets), frozenset(boxes), players.pop())


def random_room(
    dim_room: tuple[int, int], num_boxes: int, num_gen_steps: int, moves: int, chance: np.random.Generator
) -> Room:
    """A room with a solution of at most ``moves`` moves.

    A room is dug by a random walk and solved by putting the boxes onto their targets. From there it is played in
    reverse, with pulls in place of pushes; what comes out is solved by the same moves forwards. A room is taken if no
    box is on a target any more, else the one of several tries with the most boxes off.

    Raises:
        ValueError: no try had a single box off its target.
    """
    best: Room | None = None
    for _ in range(_ATTEMPTS):
        floor = _dig(*dim_room, num_gen_steps, chance)
        if len(floor) <= num_boxes + 1:
            continue
        cells = sorted(floor)
        targets = frozenset(cells[i] for i in chance.choice(len(cells), num_boxes, replace=False))
        state = _play_in_reverse(floor, targets, moves, chance)
        if state is None:
            continue
        room = Room(*dim_room, floor, targets, state[1], state[0])
        if best is None or len(room.boxes - targets) > len(best.boxes - best.targets):
            best = room
        if not best.boxes & best.targets:
            return best
    if best is None:
        raise ValueError(
            f"found no room with dim_room={list(dim_room)}, num_boxes={num_boxes} and num_gen_steps={num_gen_steps}; "
            "take a larger room, fewer boxes or more steps"
        )
    return best


def _dig(rows: int, columns: int, steps: int, chance: np.random.Generator) -> frozenset[Cell]:
    """Cells that a walk passes, each with up to two of its neighbours; they hang together."""

    def beside(cell: Cell) -> Cell:
        down, right = _DIRECTIONS[chance.integers(4)]
        return inside(cell[0] + down, cell[1] + right)

    def inside(row: int, column: int) -> Cell:
        return min(max(row, 1), rows - 2), min(max(column, 1), columns - 2)

    cell = inside(int(chance.integers(rows)), int(chance.integers(columns)))
    floor = {cell}
    down, right = _DIRECTIONS[chance.integers(4)]
    for _ in range(steps):
        following = inside(cell[0] + down, cell[1] + right)
        if following == cell or chance.random() < _TURN_PROBABILITY:
            down, right = _DIRECTIONS[chance.integers(4)]
        cell = following
        floor |= {cell, beside(cell), beside(cell)}
    return frozenset(floor)


def _play_in_reverse(
    floor: frozenset[Cell], targets: frozenset[Cell], moves: int, chance: np.random.Generator
) -> State | None:
    """Pull boxes off the targets at random, by ``moves`` moves at most; None if none can be pulled.

    Of the arrangements on the way the one with the most boxes off targets is kept, of these the one whose boxes are
    farthest from targets. Then the player walks off with the moves that were left, so that where it begins tells
    nothing.
    """
    boxes, walk = targets, dict.fromkeys(floor - targets, 0)  # where the last push ends is free
    seen = {boxes}
    best: tuple[int, int] = (0, 0)
    start: tuple[Cell, frozenset[Cell], int] | None = None
    while True:
        pulls = []
        for box in sorted(boxes):
            for down, right in _DIRECTIONS:
                stand, end = (box[0] + down, box[1] + right), (box[0] + 2 * down, box[1] + 2 * right)
                after = boxes - {box} | {stand}
                if stand in walk and end in floor - boxes and walk[stand] < moves and after not in seen:
                    pulls.append((end, after, walk[stand] + 1))
        if not pulls:
            break
        player, boxes, cost = pulls[chance.integers(len(pulls))]
        moves -= cost
        seen.add(boxes)
        walk = _distances(floor - boxes, player)
        off = boxes - targets
        score = (len(off), sum(min(abs(r - i) + abs(c - j) for i, j in targets) for r, c in off))
        if score > best:
            best, start = score, (player, boxes, moves)
    if start is None:
        return None
    player, boxes, moves = start
    near = sorted(cell for cell, steps in _distances(floor - boxes, player).items() if steps <= moves)
    return near[chance.integers(len(near))], boxes


def _distances(free: frozenset[Cell], start: Cell) -> dict[Cell, int]:
    """Steps to every cell that can be walked to."""
    steps = {start: 0}
    queue = deque([start])
    while queue:
        row, column = cell = queue.popleft()
        for down, right in _DIRECTIONS:
            following = (row + down, column + right)
            if following in free and following not in steps:
                steps[following] = steps[cell] + 1
                queue.append(following)
    return steps


def _move(floor: frozenset[Cell], state: State, direction: Cell) -> State:
    """Move the player, and the box in front of it; the same state where that is not possible."""
    (row, column), boxes = state
    down, right = direction
    there = (row + down, column + right)
    if there not in floor:
        return state
    if there in boxes:
        behind = (row + 2 * down, column + 2 * right)
        if behind not in floor or behind in boxes:
            return state
        boxes = boxes - {there} | {behind}
    return there, boxes
