"""Tools that stand between the student and its environment.

An action that calls a tool is answered by it, and the episode goes on; any other is the environment's
(:class:`ToolEnvironment`). A tool of your own is a class with the two methods of :class:`Tool`, named by its import
path as ``tool_id``; its ``tool_args`` are the arguments of the class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

from roll_opd.configs.environment_config import ToolConfig, ToolWrapperArguments, ToolWrapperConfig
from roll_opd.environments.base import TextEnvironment
from roll_opd.environments.sandbox import Isolation, require_isolation, run_python
from roll_opd.errors import ConfigError


@dataclass(frozen=True)
class ToolAnswer:
    """What a call of a tool gave.

    Attributes:
        observation: what the student sees next.
        success: whether the call did what it was meant to.
        content: the call that was found in the action, for histories and pages.
    """

    observation: str
    success: bool
    content: str = ""


class Tool(Protocol):
    """Something that answers actions which call it."""

    def instructions(self) -> str:
        """How to call it, for the student."""
        ...

    def call(self, action: str) -> ToolAnswer | None:
        """Answer the call in the action; None where there is none. A call that fails is an answer too."""
        ...


class PythonCodeTool:
    r"""A Python calculator: runs the first complete program of an action and answers with what it printed.

    A program stands in a fenced block ``python``, or between ``<python>`` and ``</python>``, or ``<code>`` and
    ``</code>``. It runs in the sandbox of :mod:`roll_opd.environments.sandbox`, with the standard library alone.

    Args:
        timeout: seconds for a program.
        keep_error_last_line: of a traceback, show the last line only.
        isolation: ``auto`` shuts programs in, and refuses to start where the machine does not allow it. ``none`` runs
            them as this user, with the limits on time and memory alone.
        memory_mb: address space of a program, in MiB.
        max_output: bytes of output that are shown.
        tool_instruction: takes the place of our instructions.
        sandbox_type: a setting of ROLL's, where ``none`` means no sandbox. It is read and not followed: programs are
            isolated all the same, unless ``isolation: none`` asks for what it says.

    Raises:
        ValueError: a setting that cannot be.
        LaunchError: programs cannot be isolated on this machine.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        keep_error_last_line: bool = False,
        isolation: Isolation = "auto",
        memory_mb: int = 512,
        max_output: int = 10_000,
        tool_instruction: str | None = None,
        sandbox_type: str | None = None,
    ) -> None:
        del sandbox_type
        for name, value, low in (
            ("timeout", timeout, 0.1),
            ("memory_mb", memory_mb, 32),
            ("max_output", max_output, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least {low}, got {value!r}")
        if isolation not in ("auto", "none"):
            raise ValueError(f"isolation must be 'auto' or 'none', got {isolation!r}")
        if isolation == "auto":
            require_isolation()
        self._timeout = timeout
        self._keep_error_last_line = keep_error_last_line
        self._isolation = isolation
        self._memory_mb = int(memory_mb)
        self._max_output = int(max_output)
        self._instruction = tool_instruction or _PYTHON_INSTRUCTION.format(timeout=timeout)

    def instructions(self) -> str:
        """How to write a program."""
        return self._instruction

    def call(self, action: str) -> ToolAnswer | None:
        """Run the first program of the action."""
        code = find_program(action)
        if code is None:
            return None
        result = run_python(code, self._timeout, self._memory_mb, self._max_output, self._isolation)
        shown = result.stdout.strip("\n")
        if result.error is not None:
            error = result.error.splitlines()[-1] if self._keep_error_last_line else result.error
            shown = f"{shown}\n{error}".lstrip("\n")
        # As in ROLL, a program that prints nothing has not calculated anything for its writer.
        success = result.error is None and bool(shown)
        return ToolAnswer(f"Code execution result: {shown or 'the program printed nothing'}", success, code)


_PYTHON_INSTRUCTION = (
    "You can run Python code. Write a complete program in a block that begins with ```python and ends with ```, or "
    "between <python> and </python>, and print what you want to know. Its output is shown to you in the next message, "
    "after 'Code execution result:'. The standard library is available; there are no files and no network, and a "
    "program may run for {timeout:g} seconds. When you know the answer, give it without any code."
)

# Opening and closing mark of a program. Not one expression: with a lazy middle, many openings that nothing closes take
# time that grows with their square.
_MARKS = (
    (re.compile(r"```\s*python3?\b"), "```"),
    (re.compile("<python>"), "</python>"),
    (re.compile("<code>"), "</code>"),
)


def find_program(action: str) -> str | None:
    """The program in an action that is complete first, without its marks; None where no program is complete."""
    found: list[tuple[int, str]] = []
    for opening, closing in _MARKS:
        if match := opening.search(action):
            end = action.find(closing, match.end())
            if end >= 0:
                found.append((end, action[match.end() : end].strip("\n")))
    return min(found)[1] if found else None


class ToolEnvironment:
    """An environment whose student has tools.

    A tool's answer is the next observation, with ``use_tool: True`` in ``info``; the environment does not learn of the
    turn. Metrics ``tool_use_counter`` and ``tool_success_counter`` count over the episode, as in ROLL. The tools'
    instructions are added to the environment's ``env_instruction``.

    Args:
        env: the environment.
        tools: asked in this order; the first that finds its call answers.
        settings: what a call is worth, and how many there may be.
    """

    def __init__(self, env: TextEnvironment, tools: Sequence[Tool], settings: ToolWrapperArguments) -> None:
        self._env = env
        self._tools = list(tools)
        self._settings = settings
        self._uses = 0
        self._successes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode of the environment's, with no tool used yet."""
        self._uses = self._successes = 0
        observation, info = self._env.reset(seed=seed, options=options)
        info = info or {}
        rules = [str(info.get("env_instruction") or "")]
        if self._settings.max_tool_uses:
            rules += [tool.instructions() for tool in self._tools]
        return observation, {**info, "env_instruction": "\n\n".join(rule for rule in rules if rule)}

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Hand the action to the tool that it calls, or to the environment."""
        if self._uses < self._settings.max_tool_uses:
            for tool in self._tools:
                answer = tool.call(action)
                if answer is not None:
                    return self._answered(answer)
        observation, reward, terminated, truncated, info = self._env.step(action)
        return observation, reward, terminated, truncated, self._counted(info or {})

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _answered(self, answer: ToolAnswer) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._uses += 1
        self._successes += answer.success
        reward = self._settings.tool_reward + self._settings.tool_success_reward * answer.success
        observation = answer.observation
        if self._uses == self._settings.max_tool_uses:
            observation += "\n\nNo further call of a tool is possible. Give your final answer now."
        info = {"use_tool": True, "action_content": answer.content, "metrics": {"action_is_valid": True}}
        return observation, reward, False, False, self._counted(info)

    def _counted(self, info: dict[str, Any]) -> dict[str, Any]:
        counters = {"tool_use_counter": self._uses, "tool_success_counter": self._successes}
        return {
            **info,
            "metrics": {**(info.get("metrics") or {}), **counters},
            "metrics_agg_mode": {**(info.get("metrics_agg_mode") or {}), **dict.fromkeys(counters, "last")},
        }


_TOOLS: dict[str, type[Tool]] = {"python_code": PythonCodeTool}


def wrap_with_tools(env: TextEnvironment, config: ToolWrapperConfig, field: str) -> TextEnvironment:
    """Put the tools of a configuration around an environment; without tools, the environment itself.

    Args:
        env: the environment.
        config: its ``tool_wrapper``.
        field: full path of that setting, for messages.

    Raises:
        ConfigError: a tool that does not exist (with the nearest name), or arguments that it does not take.
        LaunchError: a tool that this machine cannot run.
    """
    tools = [_make_tool(tool, f"{field}.tool_configs[{i}]") for i, tool in enumerate(config.tool_configs)]
    return ToolEnvironment(env, tools, config.wrapper_args) if tools else env


def _make_tool(config: ToolConfig, field: str) -> Tool:
    tool_class = _TOOLS.get(config.tool_id) or _import_tool(config.tool_id, f"{field}.tool_id")
    parameters = inspect.signature(tool_class).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in config.tool_args:
            if name not in parameters:
                raise ConfigError(
                    f"{field}.tool_args.{name}",
                    f"{config.tool_id!r} has no such setting{_nearest(name, list(parameters))}",
                )
    try:
        return tool_class(**config.tool_args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}.tool_args", f"{config.tool_id!r} does not take them: {error}") from error


def _import_tool(path: str, field: str) -> type[Tool]:
    module_name, _, class_name = path.rpartition(".")
    if not module_name or module_name.startswith("."):
        raise ConfigError(
            field, f"there is no tool {path!r}{_nearest(path, list(_TOOLS))}; or name a class, package.module.ClassName"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise ConfigError(field, f"{path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and callable(getattr(found, "call", None)) and hasattr(found, "instructions")):
        raise ConfigError(field, f"{path!r} is not a class with the methods instructions() and call(action)")
    return found


def _nearest(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
