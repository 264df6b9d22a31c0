"""The child of :mod:`roll_opd.rewards.process_pool`: ``python -m roll_opd.rewards._child SPEC``.

It imports one function by its dotted name and calls it for every line it is sent. Standard input is a socket pair, so
the one descriptor carries both directions, JSON lines each way::

    child   {"ready": true}   or   {"fatal": "why the function cannot be used"}
    parent  {"seq": 7, "arguments": {"response": "...", "ground_truth": "72"}}
    child   {"seq": 7, "value": ..., "last": false}   or   {"seq": 7, "error": "ValueError: ...", "last": false}

``last`` says that the child leaves after this reply and wants to be replaced, because it has grown too much.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

EXIT_OUT_OF_MEMORY = 71
"""Exit code that tells the parent why; a message would need the memory that there is not."""

_PR_SET_PDEATHSIG = 1
_MIB = 1024 * 1024
_MAX_ERROR_CHARS = 500


def main(spec: dict[str, Any], channel: socket.socket) -> int:
    """Serve until the parent closes its end.

    Args:
        channel: our end; it stays open when this returns. The parent kills a child whose end has closed, so one that
            closed it before leaving would lose its exit code.
        spec: ``target`` (dotted name), ``memory_mb``, ``parent`` (its pid), ``warm_up`` (arguments of a first call made
            before the child is ready, or null).

    Returns:
        The exit code.
    """
    _die_with_parent(spec["parent"])
    limit = spec["memory_mb"] * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = _load(spec["target"])
        if spec["warm_up"] is not None:
            function(**spec["warm_up"])
    except MemoryError:
        return EXIT_OUT_OF_MEMORY
    except Exception as error:  # noqa: BLE001
        # Policy: stop. Whatever keeps the function from working at all is the parent's to report, as a failed launch.
        _send(channel, {"fatal": _describe(error)})
        return 1
    _silence_stderr()
    _send(channel, {"ready": True})
    return _serve(channel, function, grown=limit // 2)


def _serve(channel: socket.socket, function: Callable[..., Any], grown: int) -> int:
    with channel.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            try:
                outcome = {"value": function(**request["arguments"])}
                json.dumps(outcome)  # a value that is no JSON is a fault of this item too
            except MemoryError:
                # Half-built caches of a library may be left behind: the next item deserves a fresh process.
                return EXIT_OUT_OF_MEMORY
            except Exception as error:  # noqa: BLE001
                # Policy: drop and count. Any fault of grading is this item's; the process is sound and goes on.
                outcome = {"error": _describe(error)}
            # Libraries keep caches and swallow MemoryError into a wrong verdict, so leave long before the limit.
            last = _address_space_bytes() > grown
            _send(channel, {"seq": request["seq"], **outcome, "last": last})
            if last:
                break
    return 0


def _die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, which works even while a library holds the interpreter."""
    if sys.platform != "linux":
        return  # elsewhere the closed channel ends this process, once the item in hand is done
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the request took effect
        os._exit(1)


def _take_channel() -> socket.socket:
    """Move the channel to a descriptor of its own, so that no print or read of a library touches it."""
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return channel


def _silence_stderr() -> None:
    """After start-up all faults travel over the channel; parsers fed by a model would only fill the run's log."""
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _load(target: str) -> Callable[..., Any]:
    module_name, _, name = target.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    return function


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:  # no Linux: grow until the limit answers
        return 0


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode("ascii") + b"\n")


if __name__ == "__main__":
    # The interpreter's own clean-up may take long after a hostile item; there is nothing here to clean.
    _channel = _take_channel()
    os._exit(main(json.loads(sys.argv[1]), _channel))
