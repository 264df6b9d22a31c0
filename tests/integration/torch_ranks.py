"""Processes that play the ranks of a strategy, without Ray: started once a session, used by test after test.

To import torch, transformers and Megatron-core takes a rank longer than most tests. A *job* is a function in a file of
tests; :meth:`TorchRanks.run` has it called on each of ``world_size`` ranks within a fresh process group.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import ModuleType
from typing import Any

KEY = b"ranks of one test session"


class TorchRanks:
    """Rank processes, started when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._groups = 0

    def run(self, world_size: int, job: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``job`` with ``args`` on every rank; return what each gave.

        Raises:
            AssertionError: a rank raised, died or did not answer in time; the message holds its traceback.
        """
        self._start(world_size)
        self._groups += 1
        store = str(self.folder / f"store{self._groups}")
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world_size])}
        for connection, rank in waiting.items():
            # The file comes first: what follows may be of types that it defines.
            connection.send((job.__code__.co_filename, job.__module__))
            connection.send((job.__name__, store, rank, world_size, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            problem = f"ranks {sorted(waiting.values())} did not answer within {timeout} s"
            for connection in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection)
                rank, problem = waiting.pop(connection), ""
                try:
                    failed, answers[rank] = connection.recv()
                except EOFError:
                    failed, answers[rank] = True, "the process died"
                if failed:
                    problem = f"rank {rank}: {answers[rank]}"
                    break
            if problem:
                # The others may wait for this rank in a collective; later tests get new processes.
                self.stop()
                raise AssertionError(problem)
        return [answers[rank] for rank in range(world_size)]

    def _start(self, count: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        new = range(len(self._processes), count)
        if not new:
            return
        with Listener(str(self.folder / f"ranks{self._groups}"), "AF_UNIX", authkey=KEY) as listener:
            for _ in new:
                command = [sys.executable, __file__, str(listener.address)]
                self._processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            self._connections += [listener.accept() for _ in new]

    def stop(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._connections, self._processes = [], []


def _serve(connection: Connection) -> None:
    """Do one job after the other, until the other side hangs up."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            file, module = connection.recv()
            _load(file, module)
            name, store, rank, world_size, args = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            answer = False, getattr(sys.modules[module], name)(*args)
        except Exception:  # noqa: BLE001 - the test is told, whatever it is
            answer = True, traceback.format_exc()
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(answer)


def _load(file: str, name: str) -> None:
    """Import a file of tests under the name that it has on the other side."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        # pytest names the file by its folders, which are no packages.
        for depth, letter in enumerate(name):
            if letter == ".":
                sys.modules.setdefault(name[:depth], ModuleType(name[:depth]))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    _serve(Client(sys.argv[1], "AF_UNIX", authkey=KEY))
