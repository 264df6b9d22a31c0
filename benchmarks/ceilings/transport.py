"""What moves between processes: a student's weights, and a batch of trajectories."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.ceilings import tiny
from benchmarks.ceilings.controller import QUICKSTART, RESPONSE, config_of
from benchmarks.ceilings.measure import Row, row, seconds
from benchmarks.ceilings.rates import machine
from roll_opd.distributed.runtime import ray_session
from roll_opd.distributed.strategy.weight_transfer import tensor_checksum
from roll_opd.distributed.weight_sync import WeightSync, way_of
from roll_opd.pipeline.role_clusters import RoleClusters
from roll_opd.trajectory import TeacherScores, Trajectory, TrajectoryId

WHOLE, BEGIN = "whole", "begin"
TARGET_MS = 200.0
"""Milliseconds that a sync of 29M parameters may take."""
REPEATS = 7
TRAJECTORIES = 1000


def weight_sync() -> Iterable[Row]:
    """A 29M student from ``fsdp2_train`` to ``hf_infer``, whole and call by call."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name:
        folder = Path(name)
        model = folder / "model"
        shape = tiny.save_model(model, "teacher")
        for file in (QUICKSTART / "models" / "student").glob("*token*"):
            shutil.copy(file, model)
        loaded = config_of(8, "sampled", folder / "out", student=model)
        config = loaded.config
        with ray_session(config.ray_args):
            clusters = RoleClusters(loaded, folder)
            try:
                way = way_of(config.actor_train, config.actor_infer)
                bucket = config.model_update_buffer_size_mb << 20
                sync = WeightSync(clusters.train, clusters.infer, bucket, 1.0, way)
                ceiling: float | None
                copy = 4e3 * shape.parameters * 2 / machine(torch.float32).memory
                case = f"{shape.parameters / 1e6:.1f}M fp32, {way}"
                times: dict[str, list[float]] = {}
                for version in range(2 * (REPEATS + 1)):
                    steps = _whole(sync, version) if version % 2 else _by_hand(clusters, way, bucket, version)
                    for what, value in steps.items():
                        times.setdefault(what, []).append(value)
                for what, values in times.items():
                    ceiling, note = (TARGET_MS, "ceiling: the target") if what == WHOLE else (copy, "ceiling: one copy")
                    if what == BEGIN:
                        ceiling, note = None, "a round trip"
                    yield row("weight sync", f"{what}, {case}", "ms", values[1:], ceiling, note=note)
            finally:
                clusters.stop()
    weights = [torch.randn(1536, 512) for _ in range(37)]
    values = [1e3 * s for s in seconds(lambda: [tensor_checksum(w) for w in weights])]
    size = sum(w.nbytes for w in weights)
    ceiling = 1e3 * size / machine(torch.float32).memory
    yield row("weight sync", f"checksum alone, {size / 1e6:.0f} MB in 37 tensors", "ms", values, ceiling)


def _whole(sync: WeightSync, version: int) -> dict[str, float]:
    began = time.perf_counter()
    sync.sync(version)
    return {WHOLE: 1e3 * (time.perf_counter() - began)}


def _by_hand(clusters: RoleClusters, way: Any, bucket: int, version: int) -> dict[str, float]:
    """The calls of a sync one after the other, each waited for."""
    (source,), (target,) = clusters.train.workers, clusters.infer.workers
    times, last = {}, time.perf_counter()

    def lap(what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[what], last = 1e3 * (now - last), now

    ray.get(target.begin_weight_update.remote(version, 1.0))
    lap(BEGIN)
    refs = list(source.export_weights.options(num_returns="streaming").remote("float32", bucket, way))
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    lap("export: gather, checksum, put")
    for ref in refs:
        ray.get(target.load_weights.remote(ref if way == "host" else ray.get(ref)))
    lap("load: get, copy")
    ray.get(target.finish_weight_update.remote(version))
    lap("verify: checksum of what is held")
    if way == "handles":
        ray.get(source.end_transfer.remote())
    return times


def objects() -> Iterable[Row]:
    """1,000 trajectories as they go to the trainer: through the object store, and as an argument of a call."""
    torch.set_num_threads(1)
    batch = [_trajectory(i) for i in range(TRAJECTORIES)]
    size = len(pickle.dumps(batch, protocol=5))
    copy = machine(torch.float32).memory
    with tempfile.TemporaryDirectory(prefix="ceilings-") as name:
        args = config_of(8, "sampled", Path(name)).config.ray_args
    with ray_session(args):
        taker: Any = ray.remote(_Taker).options(num_cpus=0).remote()
        ray.get(taker.take.remote(None))
        ways: dict[str, Callable[[Any], object]] = {
            "put": lambda values: ray.put(values),
            "put and get": lambda values: ray.get(ray.put(values)),
            "argument of a call": lambda values: ray.get(taker.take.remote(values)),
            "result of a call": lambda values: ray.get(taker.give.remote()),
        }
        for shape, values in (("as they are", batch), ("one array a field", _columns(batch))):
            ray.get(taker.keep.remote(values))
            for what, way in ways.items():
                found = seconds(lambda way=way, values=values: way(values))  # type: ignore[misc]
                note = f"{1e-6 * size / float(np.median(found)):,.0f} MB/s"
                case = f"{TRAJECTORIES:,} trajectories ({size / 1e6:.1f} MB), {shape}, {what}"
                each = [1e3 * s / TRAJECTORIES for s in found]
                yield row("object transfer", case, "ms/trajectory", each, 2e3 * size / copy / TRAJECTORIES, note=note)


class _Taker:
    """An actor that takes and gives."""

    def keep(self, values: Any) -> None:
        self.values = values

    def take(self, values: Any) -> int:
        return 0 if values is None else len(values)

    def give(self) -> Any:
        return self.values


def _trajectory(number: int) -> Trajectory:
    mask = np.arange(32 + RESPONSE) >= 32
    floats = np.random.default_rng(number).random(len(mask)).astype(np.float32)
    ints = np.arange(len(mask), dtype=np.int32)
    return Trajectory(
        id=TrajectoryId(number, 0),
        tag="tag",
        tokens=ints,
        response_mask=mask,
        infer_logprobs=floats,
        weight_version=ints,
        extras={"prompt": "p" * 100, "response": "r" * 400},
        old_logprobs=floats + 1,
        entropies=floats + 2,
        teacher_scores={"default": TeacherScores(floats + 3)},
        advantages=floats + 4,
        policy_weights=floats + 5,
    )


def _columns(batch: Sequence[Trajectory]) -> dict[str, Any]:
    """The same numbers laid end to end, to show what many small arrays cost."""
    names = ("tokens", "response_mask", "infer_logprobs", "weight_version", "old_logprobs", "entropies", "advantages",
             "policy_weights")  # fmt: skip
    columns: dict[str, Any] = {name: np.concatenate([getattr(t, name) for t in batch]) for name in names}
    columns["teacher"] = np.concatenate([t.teacher_scores["default"].logprobs for t in batch])
    columns["rest"] = [(tuple(t.id), t.tag, len(t), dict(t.extras)) for t in batch]
    return columns
