"""Runs of the real pipeline: real Ray, real engines, the shipped tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torch_ranks import TorchRanks
from vllm_server import VLLMServer

REPO = Path(__file__).parents[2]
LAUNCHER = REPO / "examples" / "start_onpolicy_distill_pipeline.py"
QUICKSTART = REPO / "examples" / "quickstart"
FOLDERS = {"model": "models", "data": "data"}
"""Variables of an example's YAML that name folders beside it."""


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    summary: dict[str, Any]
    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def overrides_for(folder: Path, settings: dict[str, Any], example: Path = QUICKSTART) -> list[str]:
    values: dict[str, Any] = {"output_dir": folder}
    values |= {f"{name}_dir": example / part for name, part in FOLDERS.items() if (example / part).exists()}
    values |= settings
    return [f"{key}={json.dumps(v) if isinstance(v, (dict, list, bool)) else v}" for key, v in values.items()]


@pytest.fixture(scope="session")
def run() -> Callable[..., Finished]:
    """Run an example in this process, with settings given as ``{"max_steps": 3}``; by default the quickstart."""

    def in_process(
        folder: Path,
        *,
        example: Path = QUICKSTART,
        config_name: str = "onpolicy_distill",
        launcher: str = "onpolicy_distill",
        **settings: Any,
    ) -> Finished:
        from roll_opd.configs import launch_blockers, load_config
        from roll_opd.pipeline.launch import run_pipeline

        flat = {key.replace("__", "."): value for key, value in settings.items()}
        loaded = load_config(launcher, str(example), config_name, overrides_for(folder, flat, example), None)
        assert not launch_blockers(loaded)
        summary = run_pipeline(loaded)
        return Finished(json.loads(summary.read_text()), folder)

    return in_process


@pytest.fixture(scope="session")
def ray_nodes() -> Callable[..., AbstractContextManager[str]]:
    """Start a cluster of one node for each number of GPUs, the head first: ``with ray_nodes(0, 4) as address``.

    All nodes are on this machine's loopback. Their GPUs are only counted: nothing checks that they exist.
    """

    @contextmanager
    def start(*gpus: int) -> Iterator[str]:
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        # As in runtime.py: what Ray takes for a desktop keeps the loopback address that it is given.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        cluster = Cluster()
        try:
            for number in gpus:
                # No CPU slots: nothing of ours asks for one, and Ray would start idle processes for them.
                cluster.add_node(num_cpus=0, num_gpus=number, node_ip_address="127.0.0.1", include_dashboard=False)
            yield cluster.address
        finally:
            cluster.shutdown()

    return start


@dataclass
class Launched:
    """A launcher in a process of its own, with everything it starts."""

    process: subprocess.Popen[str]
    log: Path
    seen: dict[int, psutil.Process]

    def watch(self) -> None:
        """Note every descendant that exists now; once it loses its parent it can no longer be found as one."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            self.watch()
            assert self.process.poll() is None, f"ended early:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)

    def finish(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.watch()
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self.process.returncode

    def left_behind(self, seconds: float = 10.0) -> list[str]:
        """Descendants that outlive the launcher by more than ``seconds``."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Start the launcher as a user would: ``launch("max_steps=3", config_path=…)``."""
    started: list[Launched] = []

    def start(*arguments: str, config_path: Path = QUICKSTART, config_name: str = "onpolicy_distill") -> Launched:
        log = tmp_path / f"launch-{len(started)}.log"
        command = [sys.executable, str(LAUNCHER), "--config_path", str(config_path), "--config_name", config_name]
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*command, *arguments],
                stdout=sink,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPO,
                env=os.environ.copy(),
                start_new_session=True,
            )
        started.append(Launched(process, log, {}))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.wait()


@pytest.fixture(scope="session")
def torch_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRanks]:
    """Rank processes for strategies that need several, without Ray."""
    ranks = TorchRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def vllm_server(tiny_models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Serves the quickstart's teacher, its head cut to the tokenizer's 305 ids, for sequences of up to 100 tokens.

    Prompts of more than 64 are computed in parts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("vllm_server")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_models.teacher, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    server = VLLMServer(
        folder / "teacher", folder / "server.log", "--max-model-len", "101", "--max-logprobs", "305",
        "--max-num-batched-tokens", "64", "--enable-tokenizer-info-endpoint",
    )  # fmt: skip
    yield server.start()
    server.kill()
