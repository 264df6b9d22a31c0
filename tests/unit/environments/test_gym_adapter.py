"""Gymnasium's own environments, and small ones of text, played through the adapter."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from roll_opd.environments.gym_adapter import GymTextEnv, without_escapes

NAMES = {0: "Left", 1: "Down", 2: "Right", 3: "Up"}
LAKE: dict[str, Any] = {"action_lookup": NAMES, "is_slippery": False, "render_mode": "ansi"}


def answer(name: str) -> str:
    return f"I think so.<answer>{name}</answer>"


class Echo(gymnasium.Env[str, str]):
    """Answers with the action in capitals; `end` ends it."""

    observation_space = spaces.Text(100)
    action_space: spaces.Space[Any] = spaces.Text(100)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"seed {seed}", {"mask": np.ones(2), "topic": "echo"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return action.upper(), 1.0, action == "end", False, {}


class Bare(Echo):
    """Without spaces, as environments of text often are."""

    observation_space = None  # type: ignore[assignment]
    action_space = None  # type: ignore[assignment]


class Steered(Echo):
    action_space = spaces.Box(-1, 1)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    names = {f"roll_opd_test/{entry.__name__}-v0": entry for entry in (Echo, Bare, Steered)}
    for name, entry in names.items():
        gymnasium.register(name, entry_point=entry)
    yield
    for name in names:
        gymnasium.registry.pop(name)


def test_frozen_lake_is_solved_by_the_way_found_by_hand():
    env = GymTextEnv("FrozenLake-v1", **LAKE)
    observation, info = env.reset(seed=0)
    assert observation == "{red:S}FFF\nFHFH\nFFFH\nHFFG"
    assert "Left, Down, Right, Up" in info["env_instruction"] and "<answer>Left</answer>" in info["env_instruction"]
    way = ["Down", "down", "RIGHT", "Right", "Down", "Right"]
    turns = [env.step(answer(name)) for name in way]
    assert [reward for _, reward, *_ in turns] == [0, 0, 0, 0, 0, 1]
    assert [terminated for _, _, terminated, _, _ in turns] == [False] * 5 + [True]
    assert [turn[4]["metrics"]["success"] for turn in turns] == [False] * 5 + [True]
    assert [turn[4]["state"] for turn in turns] == ["4", "8", "9", "10", "14", "15"]
    assert turns[-1][0] == "  (Right)\nSFFF\nFHFH\nFFFH\nHFF{red:G}"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(answer("Left"))


def test_a_turn_without_an_action_changes_nothing():
    env = GymTextEnv("FrozenLake-v1", format_penalty=-0.5, **LAKE)
    start, info = env.reset(seed=0)
    for text in ("", "Right", answer("Jump"), "<answer>Right"):
        observation, reward, terminated, truncated, after = env.step(text)
        assert (observation, reward, terminated, truncated) == (start, -0.5, False, False)
        assert after["metrics"] == {"action_is_valid": False, "success": False, "format_penalty": -0.5}
        assert after["state"] == info["state"]
    bumped = env.step(answer("Left"))
    assert bumped[0] != start and bumped[4]["state"] == info["state"], (
        "the rendering tells the action, the state does not"
    )


@pytest.mark.parametrize(("env_id", "settings"), [("FrozenLake-v1", LAKE), ("Blackjack-v1", {}), ("Taxi-v4", {})])
def test_random_play_ends_and_gives_plain_values(env_id: str, settings: dict[str, Any]):
    env, again, dice = GymTextEnv(env_id, **settings), GymTextEnv(env_id, **settings), random.Random(0)
    names = list(NAMES.values()) if settings else ["0", "1"]
    for seed in range(5):
        assert env.reset(seed=seed) == again.reset(seed=seed)
        for _ in range(1000):
            text = answer(dice.choice([*names, "nothing"]))
            turn = env.step(text)
            assert turn == again.step(text)
            assert isinstance(turn[0], str) and type(turn[1]) is float
            assert all(isinstance(value, str | int | float | dict) for value in turn[4].values())
            if turn[2] or turn[3]:
                break
        else:
            pytest.fail("the episode did not end")


def test_numbers_are_written_as_json():
    observation, _ = GymTextEnv("Blackjack-v1").reset(seed=1)
    assert observation == "[20, 7, 0]"
    assert GymTextEnv("Taxi-v4").reset(seed=1)[0] == "252"


def test_module_names_are_imported():
    assert GymTextEnv("gymnasium.envs.toy_text:CliffWalking-v1").reset(seed=0)[0] == "36"


@pytest.mark.parametrize(("threshold", "succeeds"), [(None, False), (-13, True), (-12, False)])
def test_success_is_the_sum_of_rewards_where_a_threshold_is_given(threshold: float | None, succeeds: bool):
    env = GymTextEnv("CliffWalking-v1", success_reward=threshold)
    env.reset(seed=0)
    up, right, down = "0", "1", "2"
    turns = [env.step(answer(name)) for name in [up, *[right] * 11, down]]
    assert turns[-1][2] and sum(turn[1] for turn in turns) == -13
    assert [turn[4]["metrics"]["success"] for turn in turns] == [False] * 12 + [succeeds]


def test_a_positive_threshold_counts_as_soon_as_it_is_reached():
    env = GymTextEnv("roll_opd_test/Echo-v0", success_reward=2)
    env.reset()
    assert [env.step("more")[4]["metrics"]["success"] for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize("env_id", ["roll_opd_test/Echo-v0", "roll_opd_test/Bare-v0"])
def test_text_passes_through(env_id: str):
    env = GymTextEnv(env_id)
    assert env.reset(seed=3) == ("seed 3", {"topic": "echo"})
    assert env.step("hello, you<|im_end|>")[0] == "HELLO, YOU"
    observation, reward, terminated, _, info = env.step("end")
    assert (observation, reward, terminated, info["metrics"]["success"]) == ("END", 1.0, True, True)

    picky = GymTextEnv(env_id, action_pattern="say (.*)")
    picky.reset()
    assert picky.step("say hello")[0] == "HELLO"
    assert picky.step("hello")[4]["metrics"]["action_is_valid"] is False


@pytest.mark.parametrize(
    ("env_id", "settings", "reason"),
    [
        ("CartPole-v1", {}, "observations of Box.* cannot be played in text"),
        ("Blackjack-v1", {"render_mode": "ansi"}, "no render_mode 'ansi'"),
        ("roll_opd_test/Steered-v0", {}, "actions of Box"),
        ("roll_opd_test/Echo-v0", {"action_lookup": {0: "a"}}, "action_lookup"),
        ("FrozenLake-v1", {"action_lookup": {0: "Left"}}, "action_lookup"),
        ("no_such_module:FrozenLake-v1", {}, "No module named 'no_such_module'"),
        ("FrozenLace-v1", {}, "Did you mean: `FrozenLake`"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_text_is_refused(env_id: str, settings: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        GymTextEnv(env_id, **settings)


@pytest.mark.parametrize(
    ("coloured", "written"),
    [
        ("plain {text}", "plain {text}"),
        ("\x1b[34;1mB\x1b[0m: |", "{blue:B}: |"),
        ("\x1b[34;1m\x1b[42mR\x1b[0m\x1b[0m:", "{blue green:R}:"),
        ("\x1b[2J\x1b[Hx\x1b[1my\x1b[m", "xy"),
        ("\x1b[101m \x1b[0m\x1b[97mw", "{red: }{white:w}"),
    ],
)
def test_colours_become_words(coloured: str, written: str):
    assert without_escapes(coloured) == written
