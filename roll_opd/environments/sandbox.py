"""Runs a short Python program that a model wrote, shut in.

What a program gets is a bare interpreter: the standard library and nothing installed, no environment variables, an
empty working directory that vanishes with it, no standard input. What holds for it, with the isolation on:

- no network, not even loopback of the machine;
- of the file system it sees the interpreter and the system's libraries, read-only, and ``/dev/null``;
- it sees and signals no process but its own, and all of them end with it;
- it is no user of this machine and has no capability;
- CPU time, address space, size and number of its files, and number of processes are limited; so is what is read of its
  output, and at the deadline it is killed.

Two ways lead there, and the first that works is taken: ``bwrap`` (bubblewrap 0.8 or newer) where it is on the path, and
Linux namespaces of our own making, which need a kernel that lets users have them (5.12 or newer). Root, who needs no
such leave, makes its own: the program then becomes another user, which ``bwrap`` cannot give and without which nothing
limits its processes. Where no way works there is an error, not a program that runs unprotected.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from roll_opd.errors import LaunchError

Isolation = Literal["auto", "none"]
_Method = Literal["bwrap", "namespaces", "none"]

_MIB = 1024 * 1024
_DISK_MB = 16
_MAX_FILES = 64
_MAX_PROCESSES = 8
"""Processes and threads of one program."""
_UIDS = range(61184, 65520)
"""Users that no account has (systemd hands them out for a service's life); one is drawn for a program where we are
root, because the limit on processes does not bind root, and counts by user."""
_START_S = 10.0
"""What making the sandbox may take before the program's time begins to count, on a machine under load."""
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class PythonResult:
    """What became of a program.

    Attributes:
        stdout: what it printed, cut at the limit.
        error: None for a program that ended well; else what it wrote to standard error (a traceback), or in one line
            how it ended.
        timed_out: it ran into its deadline.
    """

    stdout: str
    error: str | None
    timed_out: bool = False


def run_python(
    code: str,
    timeout_s: float,
    memory_mb: int = 512,
    max_output: int = 10_000,
    isolation: Isolation = "auto",
) -> PythonResult:
    """Run a program to its end, its deadline or its limit. Blocks; may be called from several threads.

    Args:
        code: the program.
        timeout_s: seconds until it is killed.
        memory_mb: address space of each of its processes, in MiB.
        max_output: bytes of standard output; a program that prints more is ended. Of standard error too.
        isolation: ``none`` keeps the limits and the deadline and nothing else: the program is then a process of this
            user's, with all rights and the network.

    Raises:
        LaunchError: the sandbox cannot be made here; see :func:`require_isolation`.
    """
    method = "none" if isolation == "none" else require_isolation()
    return _run(method, code, timeout_s, memory_mb, max_output)


@functools.cache
def require_isolation() -> Literal["bwrap", "namespaces"]:
    """Find out, once in a process, how programs are shut in on this machine.

    Raises:
        LaunchError: no way works, with the reason of each and the fix.
    """
    reasons = []
    methods: list[Literal["bwrap", "namespaces"]] = ["namespaces"]
    if os.geteuid() != 0:
        if shutil.which("bwrap"):
            methods.insert(0, "bwrap")
        else:
            reasons.append("bwrap is not on the path")
    for method in methods:
        try:
            result = _run(method, "print(6 * 7)", 10.0, 512, 1000)
            if result == PythonResult("42\n", None):
                return method
            reasons.append(f"{method}: {result.error}")
        except LaunchError as error:
            reasons.append(str(error))
    raise LaunchError(
        f"Python programs of a model cannot be isolated on this machine ({'; '.join(reasons)}). Install bubblewrap "
        "(`apt-get install bubblewrap`) and run as a user who may make user namespaces; or, as root in a container, "
        "give the container the capability SYS_ADMIN. `isolation: none` in the tool's tool_args runs them unprotected"
    )


def _run(method: _Method, code: str, timeout_s: float, memory_mb: int, max_output: int) -> PythonResult:
    with (
        tempfile.TemporaryDirectory(prefix="roll-opd-python-", ignore_cleanup_errors=True) as folder,
        # A file and not a pipe: there is nothing to feed while the program runs.
        tempfile.TemporaryFile() as program,
    ):
        program.write(code.encode("utf-8", errors="replace"))
        program.seek(0)
        status, their_status = os.pipe()
        with open(status, "rb") as status_file:
            try:
                process = subprocess.Popen(
                    _command(method, folder, their_status, timeout_s, memory_mb),
                    stdin=program,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env={},
                    pass_fds=[their_status],
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(f"{method}: {error}") from error
            finally:
                os.close(their_status)
            with process:
                return _attend(process, status_file, method, timeout_s, max_output)


def _command(method: _Method, folder: str, status: int, timeout_s: float, memory_mb: int) -> list[str]:
    # A virtual environment's interpreter is a link; what it needs lies around the one that it was made from.
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    prefix = Path(python).parent.parent
    libraries = [prefix / "lib", prefix / "lib64", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    visible = [path for path in dict.fromkeys(map(str, libraries)) if os.path.exists(path)] + [python, "/dev/null"]
    child = Path(__file__).with_name("_sandbox_child.py")
    user = random.SystemRandom().choice(_UIDS) if method == "namespaces" and os.geteuid() == 0 else None
    spec = {
        "namespaces": method == "namespaces",
        "visible": visible,
        "root": folder,
        "disk_bytes": _DISK_MB * _MIB,
        "directory": folder if method == "none" else "/tmp",
        "uid": user,
        "limits": {
            "RLIMIT_CPU": math.ceil(timeout_s) + 1,
            "RLIMIT_AS": memory_mb * _MIB,
            "RLIMIT_FSIZE": _DISK_MB * _MIB,
            "RLIMIT_NOFILE": _MAX_FILES,
            "RLIMIT_NPROC": _MAX_PROCESSES,
            "RLIMIT_CORE": 0,
        },
        "status": status,
        # -u: what was printed before a deadline is an answer too.
        "command": [python, "-I", "-S", "-B", "-u", "-"],
    }
    if method != "bwrap":
        return [python, "-I", "-S", "-B", str(child), json.dumps(spec)]
    command = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-user", "--disable-userns", "--die-with-parent"]
    for path in visible:
        command += ["--dev-bind" if path == "/dev/null" else "--ro-bind", path, path]
    command += ["--perms", "1777", "--size", str(_DISK_MB * _MIB), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*command, "--", python, "-I", "-S", "-B", "-c", child.read_text(encoding="utf-8"), json.dumps(spec)]


def _attend(
    process: subprocess.Popen[bytes], status: IO[bytes], method: _Method, timeout_s: float, max_output: int
) -> PythonResult:
    assert process.stdout is not None and process.stderr is not None
    out, err, said = bytearray(), bytearray(), bytearray()
    deadline = time.monotonic() + _START_S
    timed_out = flooded = False
    try:
        with selectors.DefaultSelector() as selector:
            for stream, text in ((process.stdout, out), (process.stderr, err), (status, said)):
                selector.register(stream, selectors.EVENT_READ, text)
            while selector.get_map() and not flooded:
                # Asked before reading: what a program that has ended left in its pipes is then read to the end.
                # Without isolation, children that it left behind may hold them open.
                ended = _has_ended(process)
                timed_out = time.monotonic() >= deadline
                if timed_out:
                    break
                events = selector.select(0 if ended else min(0.1, deadline - time.monotonic()))
                if ended and not events:
                    break
                for key, _ in events:
                    data = os.read(key.fd, _READ_BYTES)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is said:
                        deadline = time.monotonic() + timeout_s
                    key.data.extend(data)
                flooded = max(len(out), len(err)) > max_output
    finally:
        # The group: the sandbox's outer processes, whose end takes the namespace along. Before the leader is reaped,
        # because after that its number may be another's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if said != b"ready":
        reason = err.decode("utf-8", errors="replace").strip()[-300:]
        raise LaunchError(f"{method}: {reason or f'not ready after {_START_S:g} s'}")
    stdout, stderr = (text[:max_output].decode("utf-8", errors="replace") for text in (out, err))
    stderr = stderr.strip()
    if timed_out:
        return PythonResult(stdout, f"the program was stopped after {timeout_s:g} seconds", timed_out=True)
    if flooded:
        return PythonResult(stdout, f"the program was stopped: it wrote more than {max_output} bytes")
    if code == 0:
        return PythonResult(stdout, None)
    if not stderr:
        number = -code if code < 0 else code - 128
        stderr = f"the program ended with exit code {code}"
        if number in {s.value for s in signal.Signals}:
            stderr = f"the program was ended by {signal.Signals(number).name}"
    return PythonResult(stdout, stderr)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended, without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
