"""Tools around a scripted environment. Programs here are harmless and run without isolation, which is tested apart."""

import time

import pytest

from roll_opd.configs.environment_config import ToolConfig, ToolWrapperArguments, ToolWrapperConfig
from roll_opd.environments.tools import PythonCodeTool, ToolAnswer, ToolEnvironment, find_program, wrap_with_tools
from roll_opd.errors import ConfigError

FIELD = "custom_envs.Math.tool_wrapper"


class Echo:
    """An environment that ends at `stop` and notes what reached it."""

    def __init__(self):
        self.actions = []
        self.closed = False

    def reset(self, *, seed=None, options=None):
        return f"question {seed}", {"env_instruction": "The rules.", "ground_truth": "42"}

    def step(self, action):
        self.actions.append(action)
        info = {"metrics": {"success": True}, "metrics_agg_mode": {"success": "last"}}
        return "heard", 1.0, action == "stop", False, info

    def close(self):
        self.closed = True


class Adder:
    """Answers `add a b`; fails on anything that is no number."""

    def instructions(self):
        return "Write add a b."

    def call(self, action):
        if not action.startswith("add "):
            return None
        try:
            return ToolAnswer(str(sum(map(int, action.split()[1:]))), True, action)
        except ValueError:
            return ToolAnswer("not a number", False, action)


@pytest.mark.parametrize(
    ("action", "program"),
    [
        ("so ```python\nprint(1)\n``` and ```python\nprint(2)\n```", "print(1)"),
        ("<python>print(1)</python>", "print(1)"),
        ("<code>\nif 1:\n  print(1)\n</code>", "if 1:\n  print(1)"),
        ("```\npython\nprint(1)```", "print(1)"),
        ("``` python3\nprint(1)```", "print(1)"),
        ("<python>```python\nprint(1)\n```</python>", "print(1)"),
        ("```python\nprint(1)```<python>2</python>", "print(1)"),
        ("```python\nprint(1)", None),
        ("```pythonic\nprint(1)```", None),
        ("```\nprint(1)\n```", None),
        (r"the answer is \boxed{4}", None),
        ("", None),
    ],
)
def test_find_program(action, program):
    assert find_program(action) == program


def test_find_program_takes_linear_time():
    started = time.monotonic()
    assert find_program("```python<python>" * 50_000) == "<python>"
    assert find_program("<python> <code> " * 50_000) is None
    assert time.monotonic() - started < 10


def test_python_answers():
    tool = PythonCodeTool(isolation="none", timeout=10)
    assert tool.call("no program") is None
    assert tool.call("```python\nprint(6 * 7)\n```") == ToolAnswer("Code execution result: 42", True, "print(6 * 7)")
    silent = tool.call("<python>6 * 7</python>")
    assert (silent.observation, silent.success) == ("Code execution result: the program printed nothing", False)
    failed = tool.call("<python>print('a')\nx</python>")
    assert failed.observation.startswith("Code execution result: a\nTraceback")
    assert failed.observation.endswith("NameError: name 'x' is not defined")
    assert not failed.success
    brief = PythonCodeTool(isolation="none", timeout=10, keep_error_last_line=True).call("<python>x</python>")
    assert brief.observation == "Code execution result: NameError: name 'x' is not defined"


def test_an_episode_with_tools():
    inner = Echo()
    env = ToolEnvironment(inner, [Adder()], ToolWrapperArguments(tool_reward=0.1, tool_success_reward=0.5))
    for seed in (7, 8):  # counters begin anew
        observation, info = env.reset(seed=seed)
        assert observation == f"question {seed}"
        assert info == {"env_instruction": "The rules.\n\nWrite add a b.", "ground_truth": "42"}

        observation, reward, terminated, truncated, info = env.step("add 40 2")
        assert (observation, reward, terminated, truncated) == ("42", 0.6, False, False)
        assert info == {
            "use_tool": True,
            "action_content": "add 40 2",
            "metrics": {"action_is_valid": True, "tool_use_counter": 1, "tool_success_counter": 1},
            "metrics_agg_mode": {"tool_use_counter": "last", "tool_success_counter": "last"},
        }
        assert env.step("add x")[:2] == ("not a number", 0.1)

        observation, reward, terminated, truncated, info = env.step("stop")
        assert (observation, reward, terminated, truncated) == ("heard", 1.0, True, False)
        assert "use_tool" not in info
        assert info["metrics"] == {"success": True, "tool_use_counter": 2, "tool_success_counter": 1}
        assert info["metrics_agg_mode"]["success"] == "last"
    assert inner.actions == ["stop", "stop"]
    env.close()
    assert inner.closed


class Mute(Echo):
    """Tells nothing in `info`."""

    def reset(self, *, seed=None, options=None):
        return "question", None

    def step(self, action):
        return "heard", 1.0, False, False, None if action == "no info" else {"metrics": None, "metrics_agg_mode": None}


def test_an_environment_that_tells_nothing():
    env = ToolEnvironment(Mute(), [Adder()], ToolWrapperArguments())
    assert env.reset(seed=0)[1] == {"env_instruction": "Write add a b."}
    for action in ("no info", "no metrics"):
        assert env.step(action)[4]["metrics"] == {"tool_use_counter": 0, "tool_success_counter": 0}


def test_calls_are_limited():
    inner = Echo()
    env = ToolEnvironment(inner, [Adder()], ToolWrapperArguments(max_tool_uses=2))
    env.reset(seed=0)
    assert env.step("add 1")[0] == "1"
    assert env.step("add 2")[0] == "2\n\nNo further call of a tool is possible. Give your final answer now."
    assert env.step("add 3")[0] == "heard"
    assert inner.actions == ["add 3"]


def test_no_calls_means_no_instructions():
    env = ToolEnvironment(Echo(), [Adder()], ToolWrapperArguments(max_tool_uses=0))
    assert env.reset(seed=0)[1]["env_instruction"] == "The rules."
    assert env.step("add 1")[0] == "heard"


def test_wrap_by_configuration(monkeypatch, tmp_path):
    (tmp_path / "my_tools.py").write_text(
        "from roll_opd.environments.tools import ToolAnswer\n"
        "class Shout:\n"
        "    def __init__(self, mark='!'): self.mark = mark\n"
        "    def instructions(self): return 'Say shout.'\n"
        "    def call(self, action): return ToolAnswer(action + self.mark, True) if 'shout' in action else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tools = [
        ToolConfig("python_code", {"isolation": "none", "timeout": 5, "sandbox_type": "none"}),
        ToolConfig("my_tools.Shout", {"mark": "?"}),
    ]
    env = wrap_with_tools(Echo(), ToolWrapperConfig(ToolWrapperArguments(), tools), FIELD)
    rules = env.reset(seed=0)[1]["env_instruction"]
    assert "```python" in rules and rules.endswith("Say shout.")
    assert env.step("shout")[0] == "shout?"
    assert env.step("<python>print('shout')</python>")[0] == "Code execution result: shout"
    plain = Echo()
    assert wrap_with_tools(plain, ToolWrapperConfig(), FIELD) is plain


@pytest.mark.parametrize(
    ("tool", "field", "problem"),
    [
        (ToolConfig("pyton_code"), "tool_id", "did you mean 'python_code'"),
        (ToolConfig("no_such_package.Tool"), "tool_id", "No module named"),
        (ToolConfig("roll_opd.environments.tools.find_program"), "tool_id", "not a class"),
        (ToolConfig("python_code", {"time_out": 5}), "tool_args.time_out", "did you mean 'timeout'"),
        (ToolConfig("python_code", {"timeout": -1}), "tool_args", "timeout must be a finite number"),
        (ToolConfig("python_code", {"isolation": "docker"}), "tool_args", "must be 'auto' or 'none'"),
    ],
)
def test_what_cannot_work_is_named(tool, field, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        wrap_with_tools(Echo(), ToolWrapperConfig(tool_configs=[tool]), FIELD)
    assert caught.value.field == f"{FIELD}.tool_configs[0].{field}"
