"""A small pool of child processes that can be killed while they grade.

Thread or signal deadlines do not stop a library that holds the interpreter inside one long operation (big integers,
a regular expression); SIGKILL does. So every item that needs such a library is one request to a child::

    call() ──waits for──► a free slot ──► its child, once it is ready ──► request ──► reply        slot is free again
                                          (start_timeout, not the       (timeout,  ├► deadline      SIGKILL, new child
                                           item's time)                  the item's) └► child died   new child

An item that kills its child or runs into its deadline is reported and never tried again. Children
(:mod:`roll_opd.rewards.killable_process`) belong to no event loop, so a pool may be made before, inside or outside one,
and may outlive one. Only the queue of free slots is tied to a loop, and it is made on first use in each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roll_opd.errors import LaunchError
from roll_opd.rewards._child import EXIT_OUT_OF_MEMORY
from roll_opd.rewards.killable_process import KillableProcess

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_START_PAUSE_S = 1.0
"""Rest after the n-th failed start, times n: what starves a start (memory, load) often passes."""
_REAP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """What became of one call. ``error`` is ``None`` exactly when the function returned ``value``."""

    value: Any
    error: str | None
    seconds: float
    """From sending the request to the reply or the kill; queueing and start-up are not in it."""


class ProcessPool:
    """Calls one function in child processes, with a deadline and a memory limit for each.

    Nothing starts before the first :meth:`call`. One event loop at a time may use a pool.

    Args:
        target: dotted name of a module-level function; arguments by keyword, all of them and the result JSON-able.
        num_processes: children, hence calls that run at the same time.
        timeout: seconds for one call, from the moment a ready child has it.
        memory_mb: address space of a child in MiB (``RLIMIT_AS``).
        start_timeout: seconds for a child to import the function and run ``warm_up``.
        warm_up: arguments of a call made during start-up, so that lazy imports and caches do not count against the
            first item.
    """

    def __init__(
        self,
        target: str,
        *,
        num_processes: int = 1,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        start_timeout: float = 60.0,
        warm_up: Mapping[str, Any] | None = None,
    ) -> None:
        if num_processes < 1 or timeout <= 0 or memory_mb < 1 or start_timeout <= 0:
            raise ValueError("num_processes, timeout, memory_mb and start_timeout must be positive")
        self._target = target
        self._timeout = timeout
        self._memory_mb = memory_mb
        self._start_timeout = start_timeout
        self._warm_up = dict(warm_up) if warm_up is not None else None
        self._slots = [_Slot() for _ in range(num_processes)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free: asyncio.Queue[_Slot] = asyncio.Queue()
        self._dying: list[subprocess.Popen[bytes]] = []
        self._broken: str | None = None
        self._closed = False
        self._seq = 0

    async def call(self, **arguments: Any) -> Outcome:
        """Run the function once. Its exceptions, its death and its deadline are outcomes, not exceptions.

        Raises:
            LaunchError: no child can be started with this function; every later call raises it too.
            RuntimeError: the pool is closed, or in use by another event loop.
        """
        free = self._bind_to_running_loop()
        slot = await free.get()
        try:
            slot.busy = True
            child = await self._ready_child(slot)
            return await self._exchange(slot, child, arguments)
        finally:
            slot.busy = False
            free.put_nowait(slot)

    def close(self) -> None:
        """Kill all children and wait for their end. Calls in flight end with an error; safe to call twice."""
        self._closed = True
        for slot in self._slots:
            if slot.child is not None:
                self._kill(slot.child)
                if not slot.busy:  # else the call in flight sees the end of the channel and closes it
                    slot.child.channel.close()
                    slot.child = None
        for process in self._dying:
            process.wait(_REAP_TIMEOUT_S)
        self._dying.clear()

    # -- slots and loops ----------------------------------------------------------------------------------------------

    def _bind_to_running_loop(self) -> asyncio.Queue[_Slot]:
        if self._closed:
            raise RuntimeError("the process pool is closed")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            stale = [slot for slot in self._slots if slot.busy]
            if stale and self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("the process pool is in use by another event loop")
            for slot in stale:  # their loop was closed under them: the children hold answers nobody waits for
                slot.busy = False
                self._discard(slot)
            self._loop = loop
            self._free = asyncio.Queue()
            for slot in self._slots:
                self._free.put_nowait(slot)
            for slot in self._slots:  # all start now, not one by one as the items come
                if slot.child is None:
                    slot.child = self._spawn()
        return self._free

    def _discard(self, slot: _Slot) -> None:
        if slot.child is not None:
            self._kill(slot.child)
            slot.child.channel.close()
            slot.child = None

    # -- one item -----------------------------------------------------------------------------------------------------

    async def _exchange(self, slot: _Slot, child: KillableProcess, arguments: dict[str, Any]) -> Outcome:
        self._seq += 1
        seq = self._seq
        request = json.dumps({"seq": seq, "arguments": arguments}).encode("ascii") + b"\n"
        started = time.monotonic()
        child.pending = True
        try:
            line = await child.request(request, self._timeout)
            child.pending = False
        finally:
            if child.pending:  # cancelled: its answer would be taken for the next item's
                self._discard(slot)
        seconds = time.monotonic() - started

        if line is None:
            self._replace(slot)
            return Outcome(None, f"timeout after {self._timeout:g} s", seconds)
        reply = _parse_reply(line, seq)
        if reply is None:
            cause = self._cause_of_death(child)
            self._replace(slot)
            return Outcome(None, f"grader died ({cause})", seconds)
        if reply["last"]:
            logger.debug("a grader of %s has grown and is replaced", self._target)
            self._replace(slot)
        return Outcome(reply.get("value"), reply.get("error"), seconds)

    def _replace(self, slot: _Slot) -> None:
        """Kill the slot's child and begin the next one at once: it starts while the other slots grade."""
        self._discard(slot)
        if not self._closed:
            slot.child = self._spawn()

    def _cause_of_death(self, child: KillableProcess) -> str:
        if self._closed:
            return "the pool was closed"
        child.kill()  # for a child that broke the protocol; one that is dying keeps its own exit status
        code = child.process.wait(_REAP_TIMEOUT_S)
        if code == EXIT_OUT_OF_MEMORY:
            return f"out of memory, limit {self._memory_mb} MiB"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    # -- children -----------------------------------------------------------------------------------------------------

    async def _ready_child(self, slot: _Slot) -> KillableProcess:
        for attempt in range(1, _START_ATTEMPTS + 1):
            if self._broken is not None:
                raise LaunchError(self._broken)
            if slot.child is None or not slot.child.usable():
                self._discard(slot)
                slot.child = self._spawn()
            child = slot.child
            if child.ready:
                return child
            line = await child.read_line(self._start_timeout)
            hello = json.loads(line) if line else {}
            if "ready" in hello:
                child.ready = True
                return child
            if line is None:
                reason = f"not ready after {self._start_timeout:g} s"
            else:
                reason = hello.get("fatal") or f"it died while starting ({self._cause_of_death(child)})"
            self._discard(slot)
            problem = f"the grader {self._target} cannot start: {reason}"
            if "fatal" in hello or attempt == _START_ATTEMPTS:
                self._broken = problem  # the calls that wait need not find out for themselves
                break
            logger.warning("%s; attempt %d of %d", problem, attempt, _START_ATTEMPTS)
            await asyncio.sleep(_START_PAUSE_S * attempt)
        raise LaunchError(self._broken or "")

    def _spawn(self) -> KillableProcess:
        if self._closed:
            raise RuntimeError("the process pool is closed")
        self._dying = [process for process in self._dying if process.poll() is None]
        spec = {
            "target": self._target,
            "memory_mb": self._memory_mb,
            "parent": os.getpid(),
            "warm_up": self._warm_up,
        }
        try:
            return KillableProcess([sys.executable, "-m", "roll_opd.rewards._child", json.dumps(spec)])
        except OSError as error:
            raise LaunchError(f"the grader {self._target} cannot start: {error}") from error

    def _kill(self, child: KillableProcess) -> None:
        child.kill()
        self._dying.append(child.process)


def _parse_reply(line: bytes, seq: int) -> dict[str, Any] | None:
    """The reply to request ``seq``, or ``None`` for anything else: such a child is not to be trusted again."""
    try:
        reply = json.loads(line)
    except ValueError:  # also the empty line of a child that is gone
        return None
    return reply if isinstance(reply, dict) and reply.get("seq") == seq and "last" in reply else None


class _Slot:
    """A place for one child at a time."""

    def __init__(self) -> None:
        self.child: KillableProcess | None = None
        self.busy = False
