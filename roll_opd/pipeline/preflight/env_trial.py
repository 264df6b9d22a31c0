"""Makes and resets each environment once, in a process of its own, which can be killed when it hangs.

``python -m roll_opd.pipeline.preflight.env_trial`` is that process. Its standard input is a socket for both directions:
YAML to it (JSON has no whole numbers as keys), JSON from it, a line each::

    child   {"ready": true}
    parent  {tag: FrozenLake, config: {...}, seed: 1, log_dir: /tmp/...}
    child   {"observation": "...", "info": {...}}   or   {"field": "...", "problem": "..."}   or   {"reason": "..."}
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import yaml

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.builder import Builder
from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.environments.base import Opening
from roll_opd.environments.registry import check_env_type
from roll_opd.errors import ConfigError, EnvironmentFailedError, RollOPDError
from roll_opd.pipeline.agentic.env_worker import EnvWorker
from roll_opd.rewards.killable_process import KillableProcess

START_SECONDS = 60.0
"""Time for the process to start; the environment's own reset_timeout begins behind it."""
LONGEST = 500_000
"""Characters of an observation that are passed on."""

Opened = Opening | ConfigError | EnvironmentFailedError
"""What became of a trial."""


def open_environments(config: AgenticConfig) -> dict[str, Opened]:
    """Try all environments that a run uses, side by side, with the seed of the run."""

    async def trials(log_dir: str) -> list[Opened]:
        return await asyncio.gather(*(_try(tag, env, config, log_dir) for tag, env in used.items()))

    used = config.environments_in_use()
    with tempfile.TemporaryDirectory(prefix="roll_opd-environments-") as log_dir:
        return dict(zip(used, asyncio.run(trials(log_dir)), strict=True))


async def _try(tag: str, env: EnvironmentConfig, config: AgenticConfig, log_dir: str) -> Opened:
    try:
        check_env_type(env.env_type, f"custom_envs.{tag}.env_type")
    except ConfigError as error:
        return error
    manager = config.train_env_manager if tag in config.train_env_manager.tags else config.val_env_manager
    request = {
        "tag": tag,
        "config": dataclasses.asdict(env),
        "seed": config.seed % 2**31,
        "system_envs": {**config.system_envs, **manager.system_envs},
        "log_dir": log_dir,
    }
    # The end of the line is the end of the request: only double quotes write a text's line breaks as escapes.
    line = yaml.safe_dump(request, default_flow_style=True, default_style='"', width=sys.maxsize).encode()
    process = KillableProcess([sys.executable, "-m", __name__])
    try:
        if not await process.read_line(START_SECONDS):
            return EnvironmentFailedError(tag, f"no process for it could be started within {START_SECONDS:.0f} s")
        answer = await process.request(line, env.reset_timeout)
    finally:
        process.kill()
        process.process.wait()
        process.channel.close()
    if answer is None:
        return EnvironmentFailedError(tag, f"took longer than reset_timeout ({env.reset_timeout:g} s) to begin")
    if not answer:
        return EnvironmentFailedError(tag, f"its process ended with exit code {process.process.returncode}")
    return _read(json.loads(answer), tag)


def _read(answer: Mapping[str, Any], tag: str) -> Opened:
    if "problem" in answer:
        return ConfigError(answer["field"], answer["problem"])
    if "reason" in answer:
        return EnvironmentFailedError(tag, answer["reason"])
    return Opening(answer["observation"], answer["info"])


def answer_to(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make and reset the environment of ``request``; the answer as in the module's docstring."""
    worker = EnvWorker("env-trial", request["log_dir"], 1)
    env = Builder().build(EnvironmentConfig, request["config"])
    try:
        opening = asyncio.run(worker.open(0, request["tag"], env, request["seed"]))
    except ConfigError as error:
        return {"field": error.field, "problem": error.problem}
    except EnvironmentFailedError as error:
        return {"reason": error.reason}
    except RollOPDError as error:
        return {"reason": str(error)}
    if len(opening.observation) > LONGEST:
        return {"reason": f"its first observation has {len(opening.observation)} characters, which no context holds"}
    return {"observation": opening.observation, "info": dict(opening.info)}


def _main() -> None:
    channel = socket.socket(fileno=os.dup(0))
    channel.sendall(b'{"ready": true}\n')
    with channel.makefile("r", encoding="utf-8") as lines:
        request = yaml.safe_load(lines.readline())
    os.environ.update({key: str(value) for key, value in request["system_envs"].items()})
    # In ASCII, so that a line is a line.
    channel.sendall(json.dumps(answer_to(request)).encode() + b"\n")
    # Threads and processes of the environment must not hold this one up.
    os._exit(0)


if __name__ == "__main__":
    _main()
