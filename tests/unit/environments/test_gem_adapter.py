"""GEM's games and questions, played through the adapter."""

from __future__ import annotations

import importlib.util
import logging
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
import pytest

from roll_opd.environments.gem_adapter import GEMEnv
from roll_opd.errors import ConfigError

needs_gem = pytest.mark.skipif(importlib.util.find_spec("gem") is None, reason="gem-llm is not installed")

Dice = random.Random
# Names and settings of ROLL's examples, with a random move in the game's own notation.
ROLL_GAMES: dict[str, tuple[dict[str, Any], Callable[[Dice], str]]] = {
    "game:GuessTheNumber-v0": (
        {"min_number": 1, "max_number": 20, "max_turns": 10},
        lambda dice: str(dice.randint(1, 20)),
    ),
    "game:Mastermind-v0": (
        {"code_length": 4, "num_numbers": 6, "max_turns": 10, "duplicate_numbers": False},
        lambda dice: " ".join(map(str, dice.sample(range(1, 7), 4))),
    ),
    "game:Minesweeper-v0": (
        {"rows": 8, "cols": 8, "num_mines": 10, "max_turns": 10},
        lambda dice: f"reveal {dice.randrange(8)} {dice.randrange(8)}",
    ),
    "game:FifteenPuzzle-v0": (
        {"num_rows": 3, "max_turns": 10},
        lambda dice: dice.choice(["up", "down", "left", "right"]),
    ),
    "game:Sudoku-v0": (
        {"clues": 10, "max_turns": 10, "scale": 4},
        lambda dice: " ".join(str(dice.randint(1, 4)) for _ in range(3)),
    ),
    "game:TowerofHanoi-v0": ({"num_disks": 4, "max_turns": 10}, lambda dice: " ".join(dice.sample("ABC", 2))),
}


def boxed(move: object) -> str:
    return f"My move is \\boxed{{{move}}}."


@needs_gem
def test_bisection_guesses_the_number():
    env = GEMEnv("game:GuessTheNumber-v0", **ROLL_GAMES["game:GuessTheNumber-v0"][0])
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        assert "between 1 and 20" in observation and info["suffix"]
        low, high, done, turns = 1, 20, False, 0
        while not done:
            middle, turns = (low + high) // 2, turns + 1
            observation, reward, done, _, info = env.step(boxed(middle))
            low, high = (middle + 1, high) if "higher" in observation else (low, middle - 1)
            assert info["metrics"] == {"success": done}
        assert reward == 1.0 and turns <= 5


@needs_gem
@pytest.mark.parametrize("env_id", ROLL_GAMES)
def test_random_play_of_rolls_games_ends(env_id: str):
    settings, move = ROLL_GAMES[env_id]
    env, dice = GEMEnv(env_id, **settings), Dice(0)
    for seed in range(3):
        env.reset(seed=seed)
        for turn in range(10):
            observation, reward, terminated, truncated, info = env.step(boxed(move(dice)))
            assert isinstance(observation, str) and type(reward) is float and isinstance(info["suffix"], str)
            assert reward >= 0, "GEM did not understand the move"
            assert terminated or turn < 9
            if terminated or truncated:
                break
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step("more")
    env.close()


@needs_gem
def test_a_reward_for_progress_is_no_success():
    env = GEMEnv("game:GuessTheNumber-v0-easy")
    env.reset(seed=0)
    number = env._env.game_number
    for _ in range(4):
        _, reward, terminated, truncated, info = env.step(boxed(number - 1 or 2))
    assert terminated and truncated and reward > 0.8
    assert info["metrics"]["success"] is False


@needs_gem
def test_a_question_is_a_success_when_its_answer_is_right():
    env = GEMEnv("rg:chain_sum")
    for wrong in (0, 1):
        question, _ = env.reset(seed=4)
        right = sum(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d+)", question))
        _, reward, terminated, _, info = env.step(boxed(right + wrong))
        assert terminated and info["metrics"]["success"] is (not wrong)
        assert reward == 1.0 or wrong


@needs_gem
def test_the_same_seed_asks_the_same_question_however_often():
    env = GEMEnv("rg:chain_sum", size=3)
    questions = [env.reset(seed=5)[0] for _ in range(8)]
    assert len(set(questions)) == 1


@needs_gem
def test_an_episode_follows_from_its_seed_whatever_runs_beside_it():
    def play(beside: bool) -> list[str]:
        env, other = GEMEnv("game:Game2048-v0-easy"), GEMEnv("game:Game2048-v0-hard")
        seen = [env.reset(seed=7)[0]]
        for turn in range(20):
            if beside:
                other.reset(seed=turn)
                random.random()
                np.random.random()
            seen.append(str(env.step(boxed(["up", "left", "down", "right"][turn % 4]))[4]["suffix"]))
        return seen

    random.seed(1)
    np.random.seed(1)
    expected = random.getstate(), np.random.get_state()[1].tolist()
    alone = play(beside=False)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected, "GEM drew from our generator"
    assert play(beside=True) == alone


class Draws:
    """Draws twice in a step, with time between for others to draw."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        random.seed(seed)
        np.random.seed(seed)
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        first = random.random(), np.random.random()
        time.sleep(0.005)
        return str((first, random.random(), np.random.random())), 0.0, False, False, {}


@needs_gem
def test_episodes_in_threads_do_not_draw_from_each_others_generators():
    def play(seed: int) -> list[str]:
        env = GEMEnv("game:GuessTheNumber-v0-easy")
        env._env = Draws()
        env.reset(seed=seed)
        return [env.step("")[0] for _ in range(5)]

    alone = [play(seed) for seed in range(4)]
    expected = random.getstate(), np.random.get_state()[1].tolist()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(play, range(4))) == alone
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected


@needs_gem
def test_unknown_names_and_missing_packages(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"did you mean.*game:Mastermind-v0"):
        GEMEnv("game:Mastermindd-v0")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match="nltk"):
        GEMEnv("game:Hangman-v0")


@needs_gem
def test_importing_gem_leaves_the_root_logger_alone(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gem"]:
        monkeypatch.delitem(sys.modules, name)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    GEMEnv("game:Mastermind-v0-easy")
    assert (root.handlers, root.level) == ([], level)


def test_without_gem_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gem", None)
    with pytest.raises(ConfigError, match="pip install gem-llm"):
        GEMEnv("game:GuessTheNumber-v0")
