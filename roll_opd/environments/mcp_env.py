"""An environment whose actions are calls of the tools of an MCP server.

The server is a process of its own, spoken to over its standard input and output::

    student's text ── <tool_call>{"name": …, "arguments": {…}}</tool_call> ──► server
    observation    ◄──────────────────────── text of the answer ───────────────┘
    reward, end    ◄── score_tool's answer, after each turn
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gymnasium

from roll_opd.errors import ConfigError

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_EXAMPLE = '<tool_call>\n{"name": <name of the tool>, "arguments": <object of its arguments>}\n</tool_call>'


class MCPEnv(gymnasium.Env[str, str]):
    """Plays with the tools of an MCP server.

    Every call in a turn is made, in order, and what the server answers is the observation; calls inside the thinking
    (before ``</think>``) are not. A call that is no JSON, or of a tool that is not there, is answered by what is wrong
    with it. So is a turn without a call, unless ``answer_pattern`` is found in it: that ends the episode.

    Args:
        command: the server's program and its arguments.
        env_instruction: the rules, in front of the list of tools.
        prompt: first observation, where no ``reset_tool`` gives it.
        reset_tool: called with ``{"seed": seed}`` at the start of an episode; its text is the first observation.
        score_tool: called after each turn; its text must be JSON, ``{"reward": number, "done": bool, "success":
            bool}``, the last two optional. A tool with an argument ``answer`` gets the answer that ended the episode,
            else null. Null: every reward is 0, and only an answer ends the episode. Neither this nor ``reset_tool`` is
            shown to the student, nor called for it.
        answer_pattern: regular expression for an answer; its first group, or all of it, is the answer.
        format_penalty: added to the reward of a turn with a malformed call or without any; usually negative.
        call_timeout: seconds for each call, and for the start of the server; beyond, it is ended.
        server_env: environment variables of the server, beside the few that it inherits (``PATH``, ``HOME`` and such).

    Raises:
        ConfigError: the MCP SDK is not installed.
        ValueError: an argument that cannot work, by name.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env_instruction: str = "",
        prompt: str = "",
        reset_tool: str | None = None,
        score_tool: str | None = None,
        answer_pattern: str | None = None,
        format_penalty: float = 0.0,
        call_timeout: float = 30.0,
        server_env: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "custom_envs",
                f"an environment of an MCP server needs its SDK ({error}); install it with `pip install mcp`",
            ) from error
        if isinstance(command, str) or not command:
            raise ValueError(f"command must be a list of the server's program and its arguments, not {command!r}")
        if shutil.which(command[0]) is None:
            raise ValueError(f"command: there is no program {command[0]!r}")
        if not call_timeout > 0:
            raise ValueError(f"call_timeout must be positive, not {call_timeout}")
        self._command = [str(part) for part in command]
        self._rules = env_instruction
        self._prompt = prompt
        self._reset_tool, self._score_tool = reset_tool, score_tool
        try:
            self._answer = None if answer_pattern is None else re.compile(answer_pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"answer_pattern {answer_pattern!r} is no regular expression: {error}") from error
        self._format_penalty = float(format_penalty)
        self._timeout = float(call_timeout)
        self._server_env = dict(server_env or {})
        self._server: _Server | None = None
        self._tools: dict[str, Any] = {}
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of ``seed``, on a new server where there is none or the last one has failed.

        Raises:
            ValueError: the server has no tool of the name ``reset_tool`` or ``score_tool``.
            ConnectionError: it cannot be started, or went away.
            TimeoutError: it did not answer in time.
        """
        if self._server is None or not self._server.alive:
            self.close()
            self._server = _Server(self._command, self._server_env, self._timeout)
            self._tools = {tool.name: tool for tool in self._server.tools}
            for setting, name in (("reset_tool", self._reset_tool), ("score_tool", self._score_tool)):
                if name is not None and name not in self._tools:
                    raise ValueError(
                        f"{setting}: the server has no tool {name!r}; it has {', '.join(self._tools) or 'none'}"
                    )
        observation = self._prompt
        if self._reset_tool is not None:
            observation = self._own_call(self._reset_tool, {} if seed is None else {"seed": seed})
        self._over = False
        return observation, {"env_instruction": self._instruction()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Make the calls of the student's text.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or was never begun.
            ConnectionError: the server went away.
            TimeoutError: it did not answer in time, and was ended.
            ValueError: what ``score_tool`` returned is not what it must be.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset before the next step")
        said = action.rpartition("</think>")[2]
        calls = _CALL.findall(said)
        results = [self._call(text) for text in calls]
        answer = None if calls else self._found_answer(said)
        valid = answer is not None or (bool(calls) and all(result.well_formed for result in results))
        observation = "\n".join(result.text for result in results)
        if not calls and answer is None:
            observation = f"There is no tool call in your turn. Write it as\n{_EXAMPLE}"

        penalty = 0.0 if valid else self._format_penalty
        metrics: dict[str, Any] = {
            "action_is_valid": valid,
            "tool_calls": len(calls),
            "tool_errors": sum(result.failed for result in results),
            "format_penalty": penalty,
        }
        reward, done = 0.0, answer is not None
        if self._score_tool is not None:
            reward, scored_done, metrics["success"] = self._score(answer)
            done = done or scored_done
        self._over = done
        info = {
            "metrics": metrics,
            "metrics_agg_mode": {"tool_calls": "sum", "tool_errors": "sum", "success": "last"},
            "action_content": answer if answer is not None else "\n".join(call.strip() for call in calls),
            "use_tool": bool(calls),
        }
        return observation, reward + penalty, done, False, info

    def close(self) -> None:
        """End the server, and wait until it has ended."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _instruction(self) -> str:
        """The rules, and the tools that the student may call."""
        shown = [self._tools[name] for name in self._shown()]
        tools = [{"name": t.name, "description": t.description or "", "parameters": t.input_schema} for t in shown]
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        listed = f"You have these tools:\n<tools>\n{lines}\n</tools>\nTo call one, write\n{_EXAMPLE}"
        return f"{self._rules}\n{listed}" if self._rules else listed

    def _found_answer(self, text: str) -> str | None:
        match = self._answer.search(text) if self._answer is not None else None
        return None if match is None else (match[1] or "" if match.re.groups else match[0]).strip()

    def _call(self, text: str) -> _Result:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as error:
            return _malformed(f"This tool call is no valid JSON ({error}). Write it as\n{_EXAMPLE}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return _malformed(f"This tool call is no object with the name of a tool. Write it as\n{_EXAMPLE}")
        name, arguments = call["name"], call.get("arguments", {})
        if not isinstance(arguments, dict):
            return _malformed(f"The arguments of {name} must be an object. Write the call as\n{_EXAMPLE}")
        if name not in self._shown():
            return _malformed(f"There is no tool {name!r}; there are {', '.join(self._shown())}.")
        return self._live_server().call(name, arguments)

    def _shown(self) -> list[str]:
        """Names of the tools that the student may call."""
        return [name for name in self._tools if name not in (self._reset_tool, self._score_tool)]

    def _own_call(self, name: str, arguments: dict[str, Any]) -> str:
        result = self._live_server().call(name, arguments)
        if result.failed:
            raise ValueError(f"the server's tool {name!r} failed: {result.text}")
        return result.text

    def _score(self, answer: str | None) -> tuple[float, bool, bool]:
        assert self._score_tool is not None
        takes_answer = "answer" in self._tools[self._score_tool].input_schema.get("properties", {})
        text = self._own_call(self._score_tool, {"answer": answer} if takes_answer else {})
        try:
            score = json.loads(text)
            reward, done, success = score["reward"], score.get("done", False), score.get("success", False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self._score_tool} must return JSON with a reward, not {text!r}") from error
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise ValueError(f"the reward of {self._score_tool} must be a number, not {reward!r}")
        if not (isinstance(done, bool) and isinstance(success, bool)):
            raise ValueError(
                f"done and success of {self._score_tool} must be true or false, not {done!r} and {success!r}"
            )
        return float(reward), done, success

    def _live_server(self) -> _Server:
        assert self._server is not None, "reset starts the server"
        return self._server


@dataclass(frozen=True)
class _Result:
    """What came of a call.

    Attributes:
        text: for the student.
        well_formed: the call named a tool, with arguments that its server takes.
        failed: there is no answer, or it is an error.
    """

    text: str
    well_formed: bool = True
    failed: bool = False


def _malformed(text: str) -> _Result:
    return _Result(text, well_formed=False, failed=True)


class _Server:
    """A server process and its client, whose event loop runs in a thread of its own.

    The client must be left by the task that entered it, so one task holds it open for as long as the server is wanted,
    and the calls are tasks beside it.

    Raises:
        ConnectionError: the server does not start.
        TimeoutError: it does not answer within ``timeout`` seconds; it is ended.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], timeout: float) -> None:
        self._name = command[0]
        self._timeout = timeout
        self._client: Any = None
        self._listed: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        self._loop = asyncio.new_event_loop()
        self._holder = self._loop.create_task(self._hold(list(command), dict(env)))
        self._thread = threading.Thread(target=self._run, name="mcp-client", daemon=True)
        self._thread.start()
        try:
            self.tools = self._listed.result(timeout)
        except TimeoutError:
            self.close()
            raise TimeoutError(f"MCP server {self._name!r} did not start within {timeout:g} s") from None

    @property
    def alive(self) -> bool:
        """Whether calls can be made; a server that has died is known by its next call alone."""
        return not self._holder.done()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.wait([self._holder]))
        if not self._listed.done():
            reason = "ended" if self._holder.cancelled() else _innermost(self._holder.exception())
            self._listed.set_exception(ConnectionError(f"MCP server {self._name!r} does not start: {reason}"))
        calls = asyncio.all_tasks(self._loop)
        for call in calls:
            call.cancel()
        self._loop.run_until_complete(asyncio.gather(*calls, return_exceptions=True))
        self._loop.close()

    async def _hold(self, command: list[str], env: dict[str, str]) -> None:
        from mcp import Client
        from mcp.client.stdio import StdioServerParameters

        program, *arguments = ending_with_us(command)
        server = StdioServerParameters(command=program, args=arguments, env=env)
        async with Client(server) as self._client:
            page = await self._client.list_tools()
            tools = list(page.tools)
            while page.next_cursor:
                page = await self._client.list_tools(cursor=page.next_cursor)
                tools += page.tools
            self._listed.set_result(tools)
            await self._loop.create_future()  # until close cancels this task

    def call(self, name: str, arguments: dict[str, Any]) -> _Result:
        """Call a tool.

        Raises:
            ConnectionError: the server has gone.
            TimeoutError: it did not answer in time; it is ended.
        """
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS

        gone = f"MCP server {self._name!r} has gone"
        if not self.alive:
            raise ConnectionError(gone)
        try:
            work = self._client.call_tool(name, arguments)
            result = asyncio.run_coroutine_threadsafe(work, self._loop).result(self._timeout)
        except TimeoutError:
            self.close()
            raise TimeoutError(
                f"MCP server {self._name!r} did not answer {name!r} within {self._timeout:g} s"
            ) from None
        except concurrent.futures.CancelledError:
            raise ConnectionError(gone) from None
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                return _Result(str(error), well_formed=error.code != INVALID_PARAMS, failed=True)
            self.close()
            raise ConnectionError(gone) from error
        parts = [block.text if block.type == "text" else f"[{block.type}]" for block in result.content]
        return _Result("\n".join(parts), failed=bool(result.is_error))

    def close(self) -> None:
        """End the process: its input is closed; after two seconds it is killed, with its children."""
        with suppress(RuntimeError):  # the loop has closed: the client is gone already
            self._loop.call_soon_threadsafe(self._holder.cancel)
        self._thread.join()


def ending_with_us(command: Sequence[str]) -> list[str]:
    """The command, started such that the kernel kills it when this process ends in whatever way.

    A server ends by itself when its input is closed, but not while it hangs. Linux only; elsewhere, the command.
    """
    if sys.platform != "linux":
        return list(command)
    launch = (
        "import ctypes, os, sys\n"
        "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL
        "if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])"  # else it is too late to be told
    )
    return [sys.executable, "-I", "-S", "-c", launch, str(os.getpid()), *command]


def _innermost(error: BaseException | None) -> BaseException | None:
    """The cause in the groups that the client's task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
