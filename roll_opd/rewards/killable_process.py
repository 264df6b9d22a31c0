"""One child process that speaks lines and can be killed at any moment.

The process and its socket pair are made without an event loop and belong to none; each wait uses the running one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 16


class KillableProcess:
    """One process, our end of its channel, and what has been read from it.

    Args:
        command: what to run. Its standard input is the other end of the channel, for both directions; its standard
            output goes nowhere.

    Raises:
        OSError: the process or the channel cannot be made.
    """

    def __init__(self, command: list[str]) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        # The child finds our modules (and a user's own rewards) where we did, wherever it is started from. Maths needs
        # no threads and no GPU.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",  # with -m the working directory would come first
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with theirs:
            # A session of its own: Ctrl-C in the terminal is the parent's business, and killpg takes grandchildren too.
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True, env=env
            )
        self.ready = False
        self.pending = False
        """A request was sent whose reply has not been read."""
        self._owner = threading.current_thread()
        self._buffer = bytearray()

    def usable(self) -> bool:
        """Whether the child is alive and, if it is ready, silent, as it must be before a request."""
        if not self._owner.is_alive():
            return False  # PR_SET_PDEATHSIG counts the thread that started the child as its parent
        if self.pending or (self.ready and self._buffer):
            return False
        try:
            return bool(self.channel.recv(1, socket.MSG_PEEK)) and not self.ready
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    async def request(self, data: bytes, timeout: float) -> bytes | None:
        """Send one line and return the child's next one; see :meth:`read_line` for what else comes back."""
        deadline = time.monotonic() + timeout
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.sock_sendall(self.channel, data), timeout)
        except TimeoutError:
            return None
        except (BrokenPipeError, ConnectionResetError):
            return b""  # it died between two items
        return await self.read_line(deadline - time.monotonic())

    async def read_line(self, timeout: float) -> bytes | None:
        """The next line, without its end; ``b""`` when the child is gone, ``None`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            await self._wait_readable(remaining)
            try:
                # Tried after a deadline too: when this loop itself was held up, the reply is there and counts.
                data = self.channel.recv(_READ_BYTES)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return None
                continue
            except ConnectionResetError:
                return b""
            if not data or len(self._buffer) > _MAX_LINE_BYTES:
                return b""
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line

    def kill(self) -> None:
        """SIGKILL the child and everything it started. Only sends: the caller reaps."""
        # Before any poll(): a reaped pid may belong to somebody else.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def _wait_readable(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        descriptor = self.channel.fileno()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(descriptor, wake)
        try:
            await asyncio.wait([readable], timeout=max(timeout, 0.0))
        finally:
            loop.remove_reader(descriptor)
