"""Policies for the games, and what they come to."""

import random


def play(env, names):
    """Play actions by name; return the sum of rewards and the last turn's flags and info."""
    total, terminated, truncated, info = 0.0, False, False, {}
    for name in names:
        assert not (terminated or truncated)
        _, reward, terminated, truncated, info = env.step(f"<answer>{name}</answer>")
        total += reward
    return total, terminated, truncated, info


def play_at_random(env, seed):
    """Play to the end, one turn in ten without a valid action; return whether the game was solved."""
    chance = random.Random(seed)
    names = [*env.action_lookup.values()]
    env.reset(seed=seed)
    for turn in range(1, env.max_steps + 1):
        text = "hm" if chance.random() < 0.1 else f"<answer>{chance.choice(names)}</answer>"
        _, reward, terminated, truncated, info = env.step(text)
        assert isinstance(reward, float)
        assert info["metrics"]["action_is_valid"] == (text != "hm")
        if terminated or truncated:
            assert terminated or turn == env.max_steps
            return info["metrics"]["success"]
    raise AssertionError("max_steps did not end the episode")


def fewest_turns(begin, names):
    """The length of a shortest solution, found by playing alone: ``begin()`` gives the game at its beginning.

    Every sequence of actions is tried in order of length, except behind a state that a shorter one reached.
    """
    seen, layer = {begin().render()}, [[]]
    for turns in range(1, 100):
        following = []
        for way in layer:
            for name in names:
                env = begin()
                _, terminated, _, info = play(env, [*way, name])
                if info["metrics"]["success"]:
                    return turns
                if not terminated and env.render() not in seen:
                    seen.add(env.render())
                    following.append([*way, name])
        layer = following
    raise AssertionError("no solution")
