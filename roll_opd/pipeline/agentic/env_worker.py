"""The process around environments: it makes them, plays them, and checks what they return. Imports no torch.

An environment is anybody's code. What leaves this process has been checked, or is an
:class:`~roll_opd.errors.EnvironmentFailedError`:

================  ====================================================================================================
observation       text that can be encoded
reward            a finite number of any numeric type; becomes a ``float``
flags             booleans, NumPy's too
``info``          a mapping (or None). Text, finite numbers, booleans, and lists and mappings of those pass, as plain
                  Python values; NumPy's scalars are converted; anything else is dropped, and the log says so once. A
                  key whose value is None is not there
``metrics``       in ``info``, as ``metrics_agg_mode``: a mapping. ``success`` and ``action_is_valid`` are booleans, for
                  which 0 and 1 stand too. A mode that is not known is dropped, and the mean is taken
an exception      the episode has failed, with type, message and the innermost line; the log has the traceback
errors of ours    go through as themselves: a `ConfigError` would come again in every episode, so it stops the run. But
                  what cannot be started in a step (`LaunchError`) could be before, and costs the episode alone
================  ====================================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

import numpy as np

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.environments.base import Opening, Outcome, TextEnvironment
from roll_opd.environments.registry import make_environment
from roll_opd.environments.tools import wrap_with_tools
from roll_opd.errors import EnvironmentFailedError, LaunchError, RollOPDError
from roll_opd.pipeline.agentic.env_metrics import MODES
from roll_opd.utils.logging import configure_logging, log_file_path

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE = 500
"""Characters of an environment's own message that are passed on."""


class UnusableAnswerError(EnvironmentFailedError):
    """An environment returned what cannot be used."""


class EnvWorker:
    """Hosts environments, one for each open episode. An async actor: no episode waits for another one's call.

    An environment whose episode has come to its end without a fault is reset for the next episode of its tag.

    Args:
        name: of the process in logs.
        log_dir: folder of its log file.
        size: open episodes at most; also how many environments, open or idle, it keeps.
    """

    def __init__(self, name: str, log_dir: str, size: int) -> None:
        configure_logging(log_file=log_file_path(Path(log_dir), name), process=name)
        self._size = size
        self._playing: dict[int, _Hosted] = {}
        self._idle: list[_Hosted] = []
        self._ending: set[asyncio.Future[None]] = set()

    async def ready(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    async def open(self, key: int, tag: str, config: EnvironmentConfig, seed: int) -> Opening:
        """Begin episode ``key``: make an environment of ``tag`` (or take one that is idle) and reset it.

        Raises:
            EnvironmentFailedError: it raised, or returned what cannot be used (:class:`UnusableAnswerError`).
            ConfigError, LaunchError: it cannot be made as the config says, or on this machine.
        """
        hosted = next((h for h in self._idle if h.tag == tag), None)
        if hosted is not None:
            self._idle.remove(hosted)
        else:
            if len(self._playing) + len(self._idle) >= self._size and self._idle:
                self._end(self._idle.pop(0))
            hosted = _Hosted(tag, config)
        self._playing[key] = hosted
        return await self._play(key, hosted.reset, seed)

    async def step(self, key: int, action: str) -> Outcome:
        """Take a turn in episode ``key``; raises as :meth:`open` does."""
        return await self._play(key, self._playing[key].step, action)

    async def close(self, key: int) -> None:
        """End episode ``key``, once a call of it that still runs has come back. One that has failed is closed."""
        if (hosted := self._playing.get(key)) is None:
            return
        await hosted.call(lambda: None)
        if self._playing.pop(key, None) is not None:
            self._idle.append(hosted)

    async def shut_down(self) -> None:
        """Close all environments, each once a call of it that still runs has come back."""
        everything = [*self._playing.values(), *self._idle]
        self._playing, self._idle = {}, []
        for hosted in everything:
            self._end(hosted)
        await asyncio.gather(*self._ending)

    async def _play(self, key: int, call: Callable[..., T], argument: Any) -> T:
        hosted = self._playing[key]
        try:
            return await hosted.call(call, argument)
        except RollOPDError:
            # Nobody knows what state it is in: the next episode of the tag gets a new one.
            if self._playing.pop(key, None) is not None:
                self._end(hosted)
            raise

    def _end(self, hosted: _Hosted) -> None:
        """Have an environment closed in its own thread; only :meth:`shut_down` waits for that."""
        ending = hosted.end()
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class _Hosted:
    """An environment, and the one thread that makes, plays and closes it.

    With a thread of its own it does not hold up others while it waits, its calls come one after the other, and what it
    binds to a thread (a database, an event loop) stays usable.
    """

    def __init__(self, tag: str, config: EnvironmentConfig) -> None:
        self.tag = tag
        self.config = config
        self._environment: TextEnvironment | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"environment-{tag}")
        self._told: set[str] = set()

    def call(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Run ``function`` in the environment's thread, behind what was called before."""
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def end(self) -> asyncio.Future[None]:
        """Close the environment, behind what was called before, and let its thread end."""
        closed = self.call(self._close)
        self._thread.shutdown(wait=False)
        return closed

    # ---- in the environment's thread -----------------------------------------------------------------------------

    def reset(self, seed: int) -> Opening:
        """Make the environment if need be, and begin the episode that ``seed`` stands for."""
        with self._guarded("reset"):
            if self._environment is None:
                self._environment = self._make()
            answer = self._environment.reset(seed=seed)
            if not isinstance(answer, (tuple, list)) or len(answer) != 2:
                raise self._unusable("reset", f"returned {_form_of(answer)}, not an observation and `info`")
            return Opening(self._text("reset", answer[0]), self._plain_info("reset", answer[1]))

    def step(self, action: str) -> Outcome:
        """Take the student's turn."""
        assert self._environment is not None
        with self._guarded("step"):
            began = time.perf_counter()
            answer = self._environment.step(action)
            seconds = time.perf_counter() - began
            if not isinstance(answer, (tuple, list)) or len(answer) != 5:
                what = "not observation, reward, terminated, truncated and `info`"
                raise self._unusable("step", f"returned {_form_of(answer)}, {what}")
            observation, reward, terminated, truncated, info = answer
            for name, flag in (("terminated", terminated), ("truncated", truncated)):
                if not isinstance(flag, (bool, np.bool_)):
                    raise self._unusable("step", f"returned a `{name}` that is {_form_of(flag)}, not a boolean")
            return Outcome(
                self._text("step", observation),
                self._finite(reward),
                bool(terminated),
                bool(truncated),
                self._plain_info("step", info),
                seconds,
            )

    def _make(self) -> TextEnvironment:
        field = f"custom_envs.{self.tag}"
        environment = make_environment(self.config.env_type, self.config.env_config, field)
        if self.config.tool_wrapper is not None:
            environment = wrap_with_tools(environment, self.config.tool_wrapper, f"{field}.tool_wrapper")
        return environment

    def _close(self) -> None:
        if self._environment is None:
            return
        try:
            self._environment.close()
        except (Exception, SystemExit):
            # Policy: ignore. Its episodes are over, whatever it says.
            logger.warning("environment %r cannot be closed", self.tag, exc_info=True)

    @contextlib.contextmanager
    def _guarded(self, call: str) -> Iterator[None]:
        try:
            yield
        except LaunchError as error:
            if call == "reset":
                raise
            # Policy: the episode fails. What starts processes has started one before; now the machine is too busy.
            logger.warning("environment %r failed in %s", self.tag, call, exc_info=True)
            raise EnvironmentFailedError(self.tag, f"{call}: {error}") from error
        except RollOPDError:
            raise
        except (Exception, SystemExit) as error:
            # Policy: the episode fails, whatever it was. SystemExit is what an `exit()` in it would end the actor with.
            logger.warning("environment %r failed in %s", self.tag, call, exc_info=True)
            raise EnvironmentFailedError(self.tag, f"{call} raised {_describe(error)}") from error

    # ---- checks --------------------------------------------------------------------------------------------------

    def _unusable(self, call: str, problem: str) -> UnusableAnswerError:
        return UnusableAnswerError(self.tag, f"{call} {problem}")

    def _text(self, call: str, observation: Any) -> str:
        if not isinstance(observation, str):
            raise self._unusable(call, f"returned an observation that is {_form_of(observation)}, not a string")
        if not _is_encodable(observation):
            raise self._unusable(call, "returned an observation with half of a surrogate pair, which is no text")
        return str.__str__(observation)

    def _finite(self, reward: Any) -> float:
        if not isinstance(reward, SupportsFloat):
            raise self._unusable("step", f"returned a reward that is {_form_of(reward)}, not a number")
        try:
            number = float(reward)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._unusable("step", f"returned a reward that is no finite number: {error}") from error
        if not math.isfinite(number):
            raise self._unusable("step", f"returned a reward of {number}")
        return number

    def _plain_info(self, call: str, info: Any) -> dict[str, Any]:
        if info is None:
            return {}
        if not isinstance(info, Mapping):
            raise self._unusable(call, f"returned an `info` that is {_form_of(info)}, not a mapping")
        given = {key: value for key, value in info.items() if value is not None}
        for key in ("metrics", "metrics_agg_mode"):
            if not isinstance(given.get(key, {}), Mapping):
                raise self._unusable(call, f"returned an `info` whose `{key}` is {_form_of(given[key])}, not a mapping")
        if "metrics" in given:
            given["metrics"] = {**given["metrics"], **self._flags(call, given["metrics"])}
        dropped: dict[str, str] = {}
        kept: dict[str, Any] = _plain(given, "", dropped)
        modes = kept.get("metrics_agg_mode", {})
        for name in [name for name, mode in modes.items() if mode not in list(MODES)]:
            dropped[f"metrics_agg_mode.{name}"] = f"none of {', '.join(MODES)}"
            del modes[name]
        for path in sorted(dropped.keys() - self._told):
            logger.warning("environment %r: `info` of %s: %s is %s; left out", self.tag, call, path, dropped[path])
        self._told.update(dropped)
        return kept

    def _flags(self, call: str, metrics: Mapping[Any, Any]) -> dict[str, bool | None]:
        """The metrics that the pipeline reads as booleans."""
        flags: dict[str, bool | None] = {}
        for name in ("success", "action_is_valid"):
            value = metrics.get(name)
            value = value.item() if isinstance(value, np.generic) else value
            if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
                given = value if isinstance(value, (int, float)) else _form_of(value)
                raise self._unusable(call, f"returned an `info` whose `metrics.{name}` is {given}, not a boolean")
            if name in metrics:
                flags[name] = None if value is None else bool(value)
        return flags


_DROPPED = object()


def _plain(value: Any, path: str, dropped: dict[str, str]) -> Any:
    """``value`` in types of Python's own; notes in ``dropped`` what is left out, and what it was.

    Subclasses of plain types become those, because the driver may not have the module that defines them.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= sys.float_info.max:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and _is_encodable(value):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{path}[]", dropped) for item in value]
        return [item for item in items if item is not _DROPPED]
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        for key in value:
            if not isinstance(key, str):
                dropped[f"{prefix}{key!r}"] = "under a key that is no string"
        entries = {str(k): _plain(v, f"{prefix}{k}", dropped) for k, v in value.items() if isinstance(k, str)}
        return {key: entry for key, entry in entries.items() if entry is not _DROPPED}
    dropped[path] = _form_of(value)
    return _DROPPED


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _form_of(value: Any) -> str:
    """What ``value`` is, for messages; never the value itself, which may be long."""
    if value is None:
        return "None"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "a number beyond all floats"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _describe(error: BaseException) -> str:
    """Type, message and innermost line of an exception, in one line."""
    message = " ".join(str(error).split())[:MAX_MESSAGE]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    return f"{type(error).__name__}{f': {message}' if message else ''} ({where})"
