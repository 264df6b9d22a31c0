"""What the driver itself costs: the real pipeline, with workers that answer at once.

Everything is the product's but the models: Ray and its actors, the stream, the pools of teachers and rewards, the
signal, the cutting into micro-batches, metrics, report and weight sync. Wall time of a step is therefore what a step
would take on infinitely fast models, and CPU time is what the driver takes from them on a machine that they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.ceilings.measure import Row, row
from roll_opd.configs import build_config
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.runtime import ray_session
from roll_opd.distributed.strategy.base import (
    GenerateRequest,
    GenerateResult,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
    TokenScores,
    TrainItem,
)
from roll_opd.pipeline import role_clusters
from roll_opd.pipeline.rlvr.rlvr_pipeline import RLVRPipeline
from roll_opd.pipeline.workers import InferWorker, TrainWorker, ready_together
from roll_opd.trajectory import RawTensor, Trajectory

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
TARGET_MS = 2.0
"""Milliseconds a trajectory that the driver may cost."""
RESPONSE = 128
ENGINE_BATCH = 32
"""Responses that an engine finishes at once."""
WARMUP, STEPS = 1, 5
PROFILE = "CEILINGS_PROFILE"
"""Environment variable: a folder for profiles of the driver's threads."""


class IdleInferWorker(InferWorker):
    """Answers at once with numbers of the right shape."""

    async def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, generates: bool, max_length: int
    ) -> None:
        """Load nothing."""
        rng = np.random.default_rng(0)
        self.ids = rng.integers(3, 200, RESPONSE).astype(np.int32)
        self.logprobs = -rng.random(RESPONSE).astype(np.float32)
        self.version = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[list[GenerateResult]]:
        async with contextlib.aclosing(ready_together(self._results(requests))) as batches:
            async for batch in batches:
                yield batch

    async def _results(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """What an engine yields whose batches end together, as all of a fixed length do."""
        versions = np.full(RESPONSE, self.version, dtype=np.int32)
        for number, request in enumerate(requests, start=1):
            yield GenerateResult(request.id, self.ids, self.logprobs, versions, "length", 1.0)
            if number % ENGINE_BATCH == 0:
                await asyncio.sleep(0)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        return [_scores(request) for request in requests]

    async def score_with_details(
        self, requests: Sequence[ScoreRequest], want: ScoreWant
    ) -> tuple[list[ScoreResult], list[Any]]:
        hidden = [np.zeros(RESPONSE * 1024, dtype=np.uint8) for _ in requests]
        details = [RawTensor("bfloat16", (RESPONSE, 512), raw) for raw in hidden]
        return [_scores(request, want.logprobs) for request in requests], details

    async def head(self) -> HeadWeights:
        return HeadWeights(RawTensor("float32", (8, 8), np.zeros(256, dtype=np.uint8)), None, None)

    async def weight_dtype(self) -> str:
        return "float32"

    async def begin_weight_update(self, version: int, mix: float) -> None:
        self.version = version

    async def finish_weight_update(self, version: int) -> Mapping[str, int]:
        return {}


class IdleTrainWorker(TrainWorker):
    """Trains nothing, and reports as if it had."""

    def setup(
        self, yaml_name: str, config: WorkerConfig, student: ModelArguments, max_grad_norm: float, total_updates: int
    ) -> None:
        """Load nothing."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        return [_scores(request) for request in requests]

    def set_teacher_head(self, teacher: str, head: HeadWeights) -> None: ...

    def train_step(
        self, micro_batches: Sequence[Sequence[TrainItem]], loss: object, tell: bool
    ) -> tuple[dict[str, float], list[TokenScores]]:
        names = ("tokens", "entropy", "ratio", "clipped", "old_minus_new")
        metrics = {"loss": 0.0, "grad_norm": 1.0, "lr": 1e-4, "max/ratio": 1.0} | {f"sum/{n}": 1.0 for n in names}
        items = [item for row in micro_batches for item in row] if tell else []
        return metrics, [_said(item.trajectory) for item in items]

    def export_weights(self, dtype: str | None, bucket_bytes: int, way: Any) -> Iterator[Any]:
        yield from ()

    def save(self, folder: str) -> None: ...

    def export_hf(self, folder: str) -> None: ...


def _scores(request: ScoreRequest, wanted: bool = True) -> ScoreResult:
    logprobs = np.where(request.response_mask, -0.5, 0.0).astype(np.float32)
    return ScoreResult(request.id, request.checksum, logprobs if wanted else None, -logprobs)


def _said(trajectory: Trajectory) -> TokenScores:
    logprobs = np.where(trajectory.response_mask, -0.5, 0.0).astype(np.float32)
    return TokenScores(trajectory.id, logprobs, -logprobs, dict.fromkeys(trajectory.teacher_scores, 2 * logprobs))


class TimedPipeline(RLVRPipeline):
    """Notes wall and CPU seconds of each phase of each step.

    Attributes:
        steps: by step, phase -> (wall, CPU of this process).
    """

    def __init__(self, loaded: LoadedConfig) -> None:
        super().__init__(loaded)
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.profiles: list[cProfile.Profile] = []
        for name in ("sync_weights", "collect", "compute_advantages", "update", "with_verdicts"):
            setattr(self, name, self._timed(name, getattr(self, name)))
        # report.step is what the loop calls; its method is replaced on this one object.
        self.report.step = self._timed("report", self.report.step)  # type: ignore[method-assign]

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = _clocks()
            try:
                return call(*args, **kwargs)
            finally:
                if self.steps:
                    self.steps[-1][name] = _since(began)

        return timed

    def _run_step(self, step: int) -> None:
        if step == WARMUP and PROFILE in os.environ:
            self._profile()
        self.steps.append({})
        began = _clocks()
        super()._run_step(step)
        self.steps[-1]["step"] = _since(began)
        if step == WARMUP + STEPS - 1:
            for profile in self.profiles:
                profile.disable()

    def _profile(self) -> None:
        """Profile this thread, and the one of the stream, until the end of the last step."""
        self.profiles = [cProfile.Profile(), cProfile.Profile()]
        self.stream._loop.call_soon_threadsafe(self.profiles[1].enable)
        self.profiles[0].enable()

    def save_checkpoint(self, step: int, final: bool) -> None:
        """Not part of a step."""


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return wall - began[0], cpu - began[1]


def config_of(trajectories: int, support: str, folder: Path, student: Path | None = None) -> LoadedConfig:
    """The quickstart with ``trajectories`` a step, in groups of 4, and another ``student`` if one is given."""
    raw = yaml.safe_load((QUICKSTART / "onpolicy_distill.yaml").read_text())
    text = yaml.safe_dump(raw).replace("${model_dir}", str(QUICKSTART / "models"))
    raw = yaml.safe_load(text.replace("${data_dir}", str(QUICKSTART / "data")))
    for unused in ("model_dir", "data_dir", "validation", "rewards"):
        raw.pop(unused, None)
    raw |= {
        "output_dir": str(folder),
        "max_steps": WARMUP + STEPS,
        "eval_steps": 0,
        "rollout_batch_size": trajectories // 4,
        "response_length": RESPONSE,
        "preflight": "off",
        "track_with": "tensorboard",
    }
    if student is not None:
        for role in ("student_train", "student_infer"):
            raw[role]["model_args"]["model_name_or_path"] = str(student)
    if support != "sampled":
        raw["opd_args"] = {"objective": "direct", "divergence": "reverse_kl", "support": support}
    return build_config(raw, "onpolicy_distill")


def run(trajectories: int, support: str) -> TimedPipeline:
    """Run ``WARMUP + STEPS`` steps; Ray must be up."""
    with tempfile.TemporaryDirectory(prefix="ceilings-") as folder, _idle_workers():
        pipeline = TimedPipeline(config_of(trajectories, support, Path(folder)))
        pipeline.check()
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            pipeline.run()
    return pipeline


@contextlib.contextmanager
def _idle_workers() -> Iterator[None]:
    """Have roles started with workers that do nothing."""
    before = role_clusters.InferWorker, role_clusters.TrainWorker
    role_clusters.InferWorker, role_clusters.TrainWorker = IdleInferWorker, IdleTrainWorker  # type: ignore[misc]
    try:
        yield
    finally:
        role_clusters.InferWorker, role_clusters.TrainWorker = before  # type: ignore[misc]


def _with_rest(step: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Add what no phase covers: metrics, above all."""
    rest = tuple(2 * step["step"][clock] - sum(times[clock] for times in step.values()) for clock in (0, 1))
    return {**step, "metrics": (rest[0], rest[1])}


def measure() -> Iterable[Row]:
    """Milliseconds a trajectory, whole and by phase."""
    with tempfile.TemporaryDirectory(prefix="ceilings-") as folder:
        args = config_of(256, "sampled", Path(folder)).config.ray_args
    for support in ("sampled", "full"):
        for trajectories in (32, 256, 1024):
            with ray_session(args):
                pipeline = run(trajectories, support)
            each = 1e3 / trajectories
            steps = [_with_rest(step) for step in pipeline.steps[WARMUP:]]
            for clock, what in enumerate(("wall time of a step", "CPU time of the driver")):
                phases = {name: float(np.median([each * step[name][clock] for step in steps])) for name in steps[0]}
                del phases["step"]
                note = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
                values = [each * step["step"][clock] for step in steps]
                case = f"{trajectories} trajectories, {support}: {what}"
                yield row("controller", case, "ms/trajectory", values, TARGET_MS, note=note, details=phases)
            for thread, profile in zip(("main", "stream"), pipeline.profiles, strict=False):
                target = Path(os.environ[PROFILE]) / f"{support}-{trajectories}-{thread}"
                profile.dump_stats(target)
                pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(0)
