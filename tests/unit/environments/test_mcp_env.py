"""A game on an MCP server, played through the adapter."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from roll_opd.environments.mcp_env import MCPEnv
from roll_opd.errors import ConfigError

SERVER = [sys.executable, str(Path(__file__).with_name("guess_server.py"))]


@pytest.fixture(scope="module")
def env() -> Iterator[MCPEnv]:
    """One environment for all tests: a server takes a second to start, and `reset` replaces one that has gone."""
    pytest.importorskip("mcp", reason="the MCP SDK is not installed")
    game = MCPEnv(
        SERVER,
        env_instruction="Guess.",
        reset_tool="new_game",
        score_tool="score",
        answer_pattern="<answer>(.*?)</answer>",
        format_penalty=-0.1,
        call_timeout=60,
    )
    yield game
    game.close()


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def process_of_server(env: MCPEnv) -> int:
    return int(env.step(call("pid"))[0])


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_bisection_guesses_the_number(env: MCPEnv):
    for seed in range(5):
        observation, info = env.reset(seed=seed)
        assert observation == "Guess my number between 1 and 100."
        low, high, done, turns = 1, 100, False, 0
        while not done:
            middle, turns = (low + high) // 2, turns + 1
            observation, reward, done, truncated, info = env.step(call("guess", n=middle))
            low, high = (middle + 1, high) if observation == "higher" else (low, middle - 1)
            assert info["metrics"]["success"] is done and info["use_tool"] and not truncated
        assert (observation, reward) == ("correct", 1.0) and turns <= 7
        assert random.Random(seed).randint(1, 100) == middle
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(call("guess", n=1))


def test_random_play_goes_on(env: MCPEnv):
    env.reset(seed=0)
    number, dice = random.Random(0).randint(1, 100), random.Random(1)
    for guess in dice.sample(sorted(set(range(1, 101)) - {number}), 20):
        observation, reward, done, _, info = env.step(call("guess", n=guess))
        assert observation == ("higher" if number > guess else "lower")
        assert (reward, done, info["metrics"]["action_is_valid"]) == (0.0, False, True)


def test_the_instruction_shows_the_students_tools_alone(env: MCPEnv):
    instruction = env.reset(seed=0)[1]["env_instruction"]
    listed = instruction.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    tools = {tool["name"]: tool for tool in map(json.loads, listed)}
    assert set(tools) == {"guess", "pid", "hang"}
    assert tools["guess"]["parameters"]["properties"]["n"]["type"] == "integer"
    assert instruction.startswith("Guess.\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<tool_call>{guess 5}</tool_call>", "no valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "no valid JSON"),
        ("<tool_call>[1]</tool_call>", "no object with the name of a tool"),
        ('<tool_call>{"name": "guess", "arguments": "5"}</tool_call>', "arguments of guess must be an object"),
        (call("new_game", seed=0), "no tool 'new_game'"),
        (call("fly"), "there are guess, pid, hang"),
        ("I guess 5", "no tool call"),
        ('<tool_call>{"name": "guess", "arguments": {"n": 5}}', "no tool call"),
        (f"<think>{call('guess', n=5)}</think>well", "no tool call"),
    ],
)
def test_a_malformed_turn_is_told_what_is_wrong(env: MCPEnv, text: str, told: str):
    env.reset(seed=0)
    observation, reward, done, _, info = env.step(text)
    assert told in observation
    assert (reward, done, info["metrics"]["action_is_valid"]) == (-0.1, False, False)


def test_the_server_judges_the_arguments(env: MCPEnv):
    env.reset(seed=0)
    observation, reward, done, _, info = env.step(call("guess", n="five"))
    assert "valid integer" in observation and (reward, done) == (0.0, False)
    assert info["metrics"]["tool_errors"] == 1


def test_several_calls_of_a_turn_are_made_in_order(env: MCPEnv):
    env.reset(seed=0)
    number = random.Random(0).randint(1, 100)
    turn = env.step(f"{call('guess', n=number)} or {call('fly')} or {call('guess', n=101)}")
    assert turn[0].splitlines()[0] == "correct" and turn[0].splitlines()[-1] == "lower"
    assert turn[4]["metrics"] == {
        "action_is_valid": False,
        "tool_calls": 3,
        "tool_errors": 1,
        "format_penalty": -0.1,
        "success": False,
    }


def test_an_answer_ends_the_episode(env: MCPEnv):
    env.reset(seed=0)
    observation, reward, done, _, info = env.step("<answer> 42 </answer>")
    assert (observation, reward, done, info["action_content"]) == ("", 0.0, True, "42")
    assert info["metrics"]["action_is_valid"] and not info["use_tool"]


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("fine", "must return JSON with a reward"),
        ("[1]", "must return JSON with a reward"),
        ('{"done": true}', "must return JSON with a reward"),
        ('{"reward": "1"}', "must be a number"),
        ('{"reward": 1, "done": 1}', "true or false"),
    ],
)
def test_a_score_that_is_none(env: MCPEnv, monkeypatch: pytest.MonkeyPatch, score: str, reason: str):
    env.reset(seed=0)
    monkeypatch.setattr(env, "_own_call", lambda name, arguments: score)
    with pytest.raises(ValueError, match=reason):
        env.step("<answer>1</answer>")


def test_a_server_that_dies_or_hangs_fails_at_once_and_leaves_nothing(env: MCPEnv, monkeypatch: pytest.MonkeyPatch):
    env.reset(seed=0)
    dead = process_of_server(env)
    os.kill(dead, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="gone"):
        env.step(call("guess", n=5))
    assert time.monotonic() - began < 30

    env.reset(seed=0)
    hung = process_of_server(env)
    assert hung != dead
    monkeypatch.setattr(env._server, "_timeout", 0.2)
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.2)
    with pytest.raises(TimeoutError, match=r"'hang' within 0\.2 s"):
        env.step(call("hang"))
    assert has_ended(dead) and has_ended(hung)


def test_a_server_that_does_not_start(env: MCPEnv):
    with pytest.raises(ConnectionError, match="does not start"):
        MCPEnv([sys.executable, "-c", "pass"]).reset()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_server_that_hangs_ends_with_our_process():
    parent = (
        f"import os, subprocess, sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from roll_opd.environments.mcp_env import ending_with_us\n"
        "server = subprocess.Popen(ending_with_us(['sleep', '100']), stdin=subprocess.PIPE)\n"
        "while open(f'/proc/{server.pid}/comm').read() != 'sleep\\n': pass\n"
        "print(server.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    pid = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60).stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # whoever inherits an orphan may be slow to reap it
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    pytest.fail("the server outlived us")


def test_close_ends_the_server_even_of_an_episode_that_could_not_begin(env: MCPEnv, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(env, "_score_tool", "points")
    env.close()
    with pytest.raises(ValueError, match="score_tool: the server has no tool 'points'; it has new_game"):
        env.reset(seed=0)
    assert env._server is not None
    pid = int(env._server.call("pid", {}).text)
    env.close()
    assert has_ended(pid)


@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="the MCP SDK is not installed")
def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="command must be a list"):
        MCPEnv("python server.py")
    with pytest.raises(ValueError, match="no program '/nowhere/server'"):
        MCPEnv(["/nowhere/server"])
    with pytest.raises(ValueError, match="call_timeout"):
        MCPEnv(SERVER, call_timeout=0)
    with pytest.raises(ValueError, match="answer_pattern"):
        MCPEnv(SERVER, answer_pattern="(")


def test_without_the_sdk_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match="pip install mcp"):
        MCPEnv(SERVER)
