"""FrozenLake: maps by seed, transitions and rewards by hand, a policy that wins and one that plays at random."""

import gymnasium
import pytest
from players import fewest_turns, play, play_at_random

from roll_opd.environments.frozen_lake import FrozenLakeEnv, optimal_actions

MAP = ["SFH", "FHF", "FFG"]


def on_map(tiles=MAP, **arguments):
    env = FrozenLakeEnv(is_slippery=False, **arguments)
    env.reset(seed=0, options={"map": tiles})
    return env


def test_a_hand_made_map_is_drawn_and_played_as_worked_out():
    env = on_map(format_penalty=-0.25)
    assert env.render() == "P_O\n_O_\n__G"
    turns = [
        ("<answer>Up</answer>", "P_O\n_O_\n__G", 0.0, False, False, True),
        ("I do not know", "P_O\n_O_\n__G", -0.25, False, False, False),
        ("<answer>down</answer>", "__O\nPO_\n__G", 0.0, False, True, True),
        ("<answer>Down</answer>", "__O\n_O_\nP_G", 0.0, False, True, True),
        ("<answer>Right</answer>", "__O\n_O_\n_PG", 0.0, False, True, True),
        ("<answer>Right</answer>", "__O\n_O_\n__√", 1.0, True, True, True),
    ]
    for number, (text, drawn, reward, terminated, effective, valid) in enumerate(turns, start=1):
        *outcome, info = env.step(text)
        assert outcome == [drawn, reward, terminated, False], text
        assert info["metrics"] == {
            "success": terminated,
            "action_is_valid": valid,
            "action_is_effective": effective,
            "format_penalty": 0.0 if valid else -0.25,
        }
        assert set(info["metrics_agg_mode"]) == set(info["metrics"]) and info["metrics_agg_mode"]["success"] == "last"
        assert info["state"] == drawn
        assert info["action_desc"].startswith(f"At turn {number}, ")
    assert info["action_content"] == "Right"
    assert info["action_desc"] == "At turn 6, you moved Right, which is effective."
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("<answer>Right</answer>")


def test_a_hole_ends_the_episode_without_reward():
    env = on_map()
    assert play(env, ["Right", "Down"])[:3] == (0.0, True, False)
    assert env.render() == "__O\n_X_\n__G"
    with pytest.raises(ValueError, match="cannot be reached"):
        optimal_actions(env)


def test_max_steps_cuts_the_episode_and_does_not_hide_success():
    assert play(on_map(max_steps=3), ["Down", "Down", "Right"])[1:3] == (False, True)
    assert play(on_map(max_steps=4), ["Down", "Down", "Right", "Right"])[:3] == (1.0, True, False)


def test_the_rules_name_symbols_actions_and_format():
    env = FrozenLakeEnv(is_slippery=False)
    rules = env.reset(seed=1)[1]["env_instruction"]
    assert "<answer>Right</answer>" in rules and "slippery" not in rules
    assert rules.endswith(
        "\nThe meaning of each symbol in the state is:\nP: player, _: empty, O: hole, G: goal, X: player in hole, "
        "√: player on goal\nYour available actions are:\nLeft, Down, Right, Up"
    )
    assert "slippery" in FrozenLakeEnv().reset(seed=1)[1]["env_instruction"]
    assert FrozenLakeEnv(env_instruction="Go.").reset(seed=1)[1]["env_instruction"].startswith("Go.\nThe meaning")


def test_symbols_letters_and_actions_can_be_renamed():
    env = on_map(
        grid_lookup={"0": "A", "1": ".", "2": "x", "3": "!", "4": "&", "5": "*"},
        map_lookup={b"P": 0, b"F": 1, b"H": 2, b"G": 3},
        action_lookup={0: "west", 1: "south", 2: "east", 3: "north"},
    )
    assert env.render() == "A.x\n.x.\n..!"
    assert "A: player, .: empty" in env.instruction() and "<answer>east</answer>" in env.instruction()
    assert optimal_actions(env) == ["south", "south", "east", "east"]
    assert play(env, optimal_actions(env))[0] == 1.0


def test_a_seed_decides_its_map_alone():
    first, second = FrozenLakeEnv(), FrozenLakeEnv()
    second.reset(seed=999)
    maps = [first.reset(seed=seed)[0] for seed in range(200)]
    assert [second.reset(seed=seed)[0] for seed in reversed(range(200))] == maps[::-1]
    assert len(set(maps)) > 190
    assert len({text.index("P") for text in maps}) > 10, "the start should lie anywhere"
    # A change of the generator changes every seed's episode: it must not go unnoticed.
    assert FrozenLakeEnv(size=5).reset(seed=7)[0] == "_O_P_\nO_O__\n__G__\n_O__O\n_____"


def test_slips_follow_the_seed_and_map_seed_holds_the_map():
    def walk(env, seed):
        env.reset(seed=seed, options={"map": ["FFFFF", "FFFFF", "FFSFF", "FFFFF", "FFFFG"]})
        return [env.step("<answer>Left</answer>")[0] for _ in range(4)]

    assert walk(FrozenLakeEnv(), 5) == walk(FrozenLakeEnv(), 5)
    assert len({tuple(walk(FrozenLakeEnv(), seed)) for seed in range(20)}) > 5
    held = FrozenLakeEnv(map_seed=3)
    assert len({held.reset(seed=seed)[0] for seed in range(20)}) == 1
    assert held.render() == FrozenLakeEnv().reset(seed=3)[0]


def test_a_lake_of_holes_still_has_a_way():
    env = FrozenLakeEnv(size=8, p=0.0, is_slippery=False)
    for seed in range(3):
        env.reset(seed=seed)
        assert len(optimal_actions(env)) == 1


def test_the_scripted_policy_wins_in_the_fewest_turns():
    def begin(seed):
        env.reset(seed=seed)
        return env

    env = FrozenLakeEnv(is_slippery=False)
    for seed in range(50):
        way = optimal_actions(begin(seed))
        assert play(env, way)[:3] == (1.0, True, False)
        if seed < 10:
            assert len(way) == fewest_turns(lambda seed=seed: begin(seed), ["Left", "Down", "Right", "Up"])


@pytest.mark.parametrize("is_slippery", [False, True])
def test_a_random_policy_plays_through_and_wins_seldom(is_slippery):
    env = FrozenLakeEnv(is_slippery=is_slippery)
    assert 0 < sum(play_at_random(env, seed) for seed in range(50)) < 40


def test_slippery_ice_has_no_list_of_actions():
    env = FrozenLakeEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="is_slippery"):
        optimal_actions(env)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 1}, "size"),
        ({"p": 1.5}, "^p "),
        ({"max_steps": 0}, "max_steps"),
        ({"grid_lookup": {0: "P"}}, "grid_lookup"),
        ({"action_lookup": {0: "L", 1: "D"}}, "action_lookup"),
        ({"map_lookup": {"P": 0}}, "map_lookup"),
        ({"map_lookup": {"P": 0, "F": 1, "H": 2, "G": 9}}, "map_lookup"),
        ({"action_pattern": "("}, "action_pattern"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        FrozenLakeEnv(**arguments)
