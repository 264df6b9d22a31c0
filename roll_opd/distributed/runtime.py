"""Ray's start and end, and errors that cross it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import ray
from ray._private import ray_constants
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from roll_opd.configs.base_config import RayArguments
from roll_opd.errors import ConfigError, LaunchError, RollOPDError, WorkerDiedError, WorkerError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def ray_session(args: RayArguments) -> Iterator[None]:
    """Start Ray (or join a running cluster) and leave nothing behind, whatever ends the block.

    Raises:
        LaunchError: Ray does not start, or the cluster at ``ray_args.address`` does not answer.
        ConfigError: a port that was asked for is taken.
    """
    _start(args)
    try:
        yield
    finally:
        ray.shutdown()


def _start(args: RayArguments) -> None:
    # Telemetry and colour belong to neither a laptop nor a log file.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Ray announces that a local cluster asks for a token; that is as it should be, and no news to the user.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if args.address is not None:
        options["address"] = args.address
    else:
        if args.dashboard_port is not None:
            _check_port_free(args.node_ip, args.dashboard_port)
            options["dashboard_port"] = args.dashboard_port
        if args.node_ip == LOOPBACK:
            # Ray replaces a loopback address by the machine's own and then listens on every interface, except where it
            # forbids clusters, as it does on a desktop. That is what a run on one machine wants.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False
        options |= {
            # Not left out: Ray would otherwise follow a RAY_ADDRESS that some shell still has.
            "address": "local",
            "include_dashboard": args.include_dashboard,
            "dashboard_host": args.node_ip,
            "_node_ip_address": args.node_ip,
            "num_cpus": args.num_cpus,
        }
        if args.object_store_memory_mb is not None:
            options["object_store_memory"] = args.object_store_memory_mb << 20
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"no Ray cluster answers at {args.address!r}" if args.address else "Ray did not start"
        raise LaunchError(f"ray_args: {what}: {str(error).strip().splitlines()[0]}") from error


def _check_port_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                "ray_args.dashboard_port",
                f"{host}:{port} cannot be used ({error.strerror}); choose a free port, or leave it unset",
            ) from error


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into :class:`SystemExit`, so that ``finally`` blocks run as they do after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # A second signal must not interrupt the clean-up that the first one started.
        for s in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
        raise SystemExit(128 + number)

    old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def get(refs: Any, timeout: float | None = None, what: str = "a worker") -> Any:
    """``ray.get``, with errors meant for the user raised as themselves.

    Args:
        refs: one reference or a list of them.
        timeout: seconds to wait.
        what: who is asked, for messages.

    Raises:
        RollOPDError: the worker raised one.
        WorkerDiedError: the worker process died.
        WorkerError: it cannot be reached, or gave no answer in time; or a process died that it needs a result of.
    """
    try:
        return ray.get(refs, timeout=timeout)
    except RayTaskError as error:
        cause = _cause(error)
        if isinstance(cause, RayError):
            raise WorkerError(f"{what}: a process died that it needs a result of; {_details(cause)}") from error
        raise user_error(error) from error
    except GetTimeoutError as error:
        raise WorkerError(f"{what} gave no answer within {timeout:.0f} s (rpc_timeout)") from error
    except RayError as error:
        if isinstance(error, ActorUnavailableError):
            raise WorkerError(f"{what}: a process cannot be reached; {_details(error)}") from error
        if isinstance(error, RayActorError):
            raise WorkerDiedError(f"{what}: a process died; {_details(error)}") from error
        raise WorkerError(f"{what}: an object was lost; {_details(error)}") from error


def user_error(error: RayTaskError) -> BaseException:
    """Return the user-facing cause of ``error``, or ``error`` itself."""
    cause = _cause(error)
    return cause if isinstance(cause, RollOPDError) else error


def _cause(error: RayTaskError) -> BaseException:
    """What went wrong at first: a task whose argument is the result of another one fails as that one did."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    return cause


def _details(error: RayError) -> str:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    return f"its log is in logging_dir. Ray says: {reason}"
