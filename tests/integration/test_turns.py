"""Real runs in which roles share devices. The devices are only counted, the models are on the CPU; every call of a
worker is written into a log, in which what happened first stands first.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from roll_opd.errors import WorkerDiedError, WorkerError
from roll_opd.pipeline.workers import InferWorker, TrainWorker

pytestmark = pytest.mark.integration

SHORT = {
    "max_steps": 2,
    "rollout_batch_size": 8,
    "eval_steps": 0,
    "html_samples": 0,
    "preflight": "off",
    "student_train__training_args__warmup_steps": 0,
}
ONE_DEVICE = {"student_train": [0], "student_infer": [0], "teacher": [0]}
TWO_TEACHERS = Path(__file__).parents[2] / "examples" / "two_teachers"


class Spied:
    """Puts a worker on the CPU and writes its calls into the file that ``TURNS_LOG`` names."""

    spec: Any
    strategy: Any

    def start(self) -> None:
        import torch

        self.device = torch.device("cpu")
        self.note(f"process {os.getpid()}")

    def note(self, event: str) -> None:
        with open(os.environ["TURNS_LOG"], "a") as log:
            log.write(f"{self.spec.name} {event}\n")

    def weights(self) -> str:
        crc = 0
        for parameter in self.strategy.model.parameters():
            crc = zlib.crc32(parameter.detach().numpy().data, crc)
        return f"{crc:08x}"


class SpiedInfer(Spied, InferWorker):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.start()

    async def setup(self, *arguments) -> None:
        await super().setup(*arguments)
        self.note(f"loaded {self.weights()}")

    async def offload(self, keep_weights: bool) -> None:
        await super().offload(keep_weights)
        self.note("leaves" if not keep_weights else "leaves but weights")

    async def onload(self, weights_only: bool) -> None:
        if os.environ.get("DIES_AWAY") == self.spec.role:
            os._exit(1)
        self.note("comes" if not weights_only else "comes with weights")
        await super().onload(weights_only)

    async def begin_weight_update(self, version, mix) -> None:
        self.note(f"update {version}")
        await super().begin_weight_update(version, mix)

    async def generate(self, requests):
        self.note(f"generate {self.weights()}")
        last = None
        async for results in super().generate(requests):
            if last is not None:
                results.insert(0, last)
            last = results.pop()
            if results:
                yield results
        if "HOLDS_LAST" in os.environ and last.id.stream == "train":
            await self.wait_for_scoring()
        yield [last]
        self.note("generated")

    async def wait_for_scoring(self) -> None:
        """Until a teacher has begun to score what this call of ``generate`` has sampled so far."""
        async with asyncio.timeout(30):
            while True:
                events = Path(os.environ["TURNS_LOG"]).read_text().splitlines()
                began = max(i for i, event in enumerate(events) if event.startswith(f"{self.spec.name} generate"))
                if any(" score " in event for event in events[began:]):
                    return
                await asyncio.sleep(0.02)

    async def score(self, requests):
        self.note(f"score {self.weights()}")
        return await super().score(requests)

    async def score_with_details(self, requests, want):
        self.note(f"score {self.weights()}")
        return await super().score_with_details(requests, want)

    async def head(self):
        self.note("head")
        return await super().head()

    async def save_model(self, folder) -> None:
        self.note("save")
        await super().save_model(folder)


class SpiedTrain(Spied, TrainWorker):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.start()

    def offload(self, keep_weights: bool) -> None:
        super().offload(keep_weights)
        self.note("leaves" if not keep_weights else "leaves but weights")

    def onload(self, weights_only: bool) -> None:
        self.note("comes" if not weights_only else "comes with weights")
        super().onload(weights_only)

    def export_weights(self, dtype, bucket_bytes, way):
        self.note("export")
        yield from super().export_weights(dtype, bucket_bytes, way)

    def score(self, requests):
        self.note("score")
        return super().score(requests)

    def set_teacher_head(self, teacher, head) -> None:
        self.note(f"heads {teacher}")
        super().set_teacher_head(teacher, head)

    def train_step(self, micro_batches, loss, tell):
        self.note("train")
        return super().train_step(micro_batches, loss, tell)

    def save(self, folder) -> None:
        self.note("save")
        super().save(folder)


class Event(NamedTuple):
    role: str
    what: str
    detail: str


class Run(NamedTuple):
    """What came of a run."""

    metrics: list[dict[str, Any]]
    events: list[Event]

    def of(self, role: str, *what: str) -> list[Event]:
        return [event for event in self.events if event.role == role and (not what or event.what in what)]

    def story(self) -> list[str]:
        """Who did what in which order; repetitions count once."""
        told = [f"{e.role} {e.what}" for e in self.events if e.what not in ("process", "loaded", "generated")]
        return [line for line, _ in groupby(told)]


def events_of(log: Path) -> list[Event]:
    out = []
    for line in log.read_text().splitlines():
        name, _, event = line.partition(" ")
        what, _, detail = (event, "", "") if event.startswith(("leaves", "comes")) else event.partition(" ")
        out.append(Event(name.rpartition("-")[0], what, detail))
    return out


@pytest.fixture(scope="module")
def address(ray_nodes) -> Iterator[str]:
    """A head without GPUs, and a node that counts four."""
    with ray_nodes(0, 4) as address:
        yield address


@pytest.fixture(scope="module")
def turns_run(run, address, tmp_path_factory) -> Iterator[Callable[..., Run]]:
    """Run the quickstart with roles on devices, spied upon."""
    patch = pytest.MonkeyPatch()
    patch.setattr("roll_opd.pipeline.role_clusters.InferWorker", SpiedInfer)
    patch.setattr("roll_opd.pipeline.role_clusters.TrainWorker", SpiedTrain)

    def start(devices: dict[str, list[int]], log: Path | None = None, **settings: Any) -> Run:
        folder = tmp_path_factory.mktemp("turns")
        log = log or folder / "log"
        values = SHORT | settings
        for role, numbers in devices.items():
            # Thread counts and blocks change rounding.
            values |= {f"{role}__device_mapping": numbers, f"{role}__cpu_threads": 1}
            values |= {f"{role}__infer_batch_size": 16} if role.startswith("teacher") else {}
        finished = run(folder / "run", ray_args__address=address, system_envs__TURNS_LOG=log, **values)
        metrics = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in finished.metrics]
        return Run(metrics, events_of(log))

    yield start
    patch.undo()


@pytest.fixture(scope="module")
def apart(turns_run) -> Run:
    """A run whose roles share nothing; its engine keeps a response back until a teacher scores."""
    devices = {"student_train": [0], "student_infer": [1], "teacher": [2]}
    return turns_run(devices, system_envs__HOLDS_LAST=1)


def check_nobody_is_disturbed(run: Run, sharing: list[set[str]]) -> None:
    """Whoever works is on its devices, and whoever shares them with it is not."""
    there = {role: "all" for roles in sharing for role in roles}
    needs = dict.fromkeys(("update", "export", "head"), ("all", "weights"))
    needs |= dict.fromkeys(("generate", "score", "train", "save", "heads"), ("all",))
    for event in run.events:
        others = {role for roles in sharing if event.role in roles for role in roles - {event.role}}
        if event.what in ("leaves", "comes", "leaves but weights", "comes with weights"):
            assert others, f"{event} shares nothing"
            there[event.role] = "weights" if "weights" in event.what else "away" if event.what == "leaves" else "all"
            if event.what == "comes":
                assert {there[role] for role in others} == {"away"}, event
            elif event.what == "comes with weights":
                assert "all" not in {there[role] for role in others}, event
        elif event.what in needs and event.role in there:
            assert there[event.role] in needs[event.what], event


def test_roles_of_their_own_devices_work_at_the_same_time(apart) -> None:
    assert not [event for event in apart.events if event.what.startswith(("leaves", "comes"))]
    # Of each batch, the first block is scored before the engine has come to its end, for which the engine waited.
    order = [event.what for event in apart.events if event.what in ("generate", "generated")
             or (event.role == "teacher-default" and event.what == "score")]  # fmt: skip
    for step in range(2):
        assert order[4 * step : 4 * step + 2] == ["generate", "score"]
        assert sorted(order[4 * step + 2 : 4 * step + 4]) == ["generated", "score"]


def test_all_roles_on_one_device(turns_run, apart) -> None:
    run = turns_run(ONE_DEVICE)
    loading = ["actor_train leaves", "teacher-default leaves", "actor_infer leaves"]
    weights = ["actor_infer update", "actor_train export"]
    scoring = ["teacher-default comes", "teacher-default score", "teacher-default leaves"]
    rollout = ["actor_train leaves", "actor_infer comes", "actor_infer generate", "actor_infer leaves", *scoring]
    training = ["actor_train comes", "actor_train score", "actor_train train"]
    swap = ["actor_train leaves but weights", "actor_infer comes with weights"]
    step = [*weights, *rollout, *training]
    first = ["actor_infer comes with weights", "actor_train comes with weights"]
    story = run.story()
    began = slice(len(loading), len(loading) + len(first))
    story[began] = sorted(story[began])  # these two come at the same time
    assert story == [*loading, *first, *step, *swap, *step, "actor_train save", *swap, *weights]
    check_nobody_is_disturbed(run, [{"actor_train", "actor_infer", "teacher-default"}])
    # It is the same training.
    assert run.metrics == apart.metrics
    assert [e.detail for e in run.of("actor_infer", "generate")] == [
        e.detail for e in apart.of("actor_infer", "generate")
    ]


def test_updates_of_the_student_never_touch_a_teacher(apart) -> None:
    assert [event.detail for event in apart.of("actor_infer", "update")] == ["0", "1", "2"]
    assert not apart.of("teacher-default", "update")
    sampled = {event.detail for event in apart.of("actor_infer", "generate")}
    held = {event.detail for event in apart.of("teacher-default", "loaded", "score")}
    assert len(sampled) == 2 and len(held) == 1


def test_teachers_that_stay_and_teachers_that_share(turns_run) -> None:
    """One teacher has a device of its own; one shares a device with a moving average of the student, and the student's
    roles share theirs. With the probe, validation, teachers that generate, and teachers' heads for the trainer.
    """
    alone = {
        "model_args.model_name_or_path": "${model_dir}/teacher_up",
        "model_args.dtype": "fp32",
        "strategy_args.strategy_name": "hf_infer",
    }
    run = turns_run(
        {"student_train": [0], "student_infer": [0], "teacher__up": [1], "teacher__down": [1], "teacher__alone": [2]},
        example=TWO_TEACHERS,
        max_steps=1,
        preflight="full",
        eval_steps=1,
        validation__max_prompts=4,
        validation__teacher_accuracy=True,
        system_envs__HOLDS_LAST=1,
        opd_args__objective="direct",
        opd_args__support="full",
        teacher__down__model_args__model_name_or_path="${model_dir}/student",
        teacher__down__teacher_args__self_teacher="ema",
        teacher__down__teacher_args__context_template="{{ prompt }} (answer {{ ground_truth }})",
        **{f"teacher.alone.{key}": value for key, value in alone.items()},
    )
    check_nobody_is_disturbed(run, [{"actor_train", "actor_infer"}, {"teacher-up", "teacher-down"}])
    assert not [event for event in run.of("teacher-alone") if event.what in ("leaves", "comes", "update")]
    held = {name: {e.detail for e in run.of(f"teacher-{name}", "loaded", "score")} for name in ("up", "down", "alone")}
    assert held["up"] == held["alone"] and len(held["up"]) == 1
    assert len(held["down"]) == 2 and not held["down"] & held["up"]
    assert [event.detail for event in run.of("teacher-down", "update")] == ["0", "1"]
    # The one that moves is asked again after each update, and is saved.
    assert len(run.of("teacher-down", "head")) == 2 and len(run.of("teacher-up", "head")) == 1
    assert {event.detail for event in run.of("actor_train", "heads")} == {"up", "down", "alone"}
    assert len(run.of("teacher-down", "save")) == 1


@pytest.mark.long
def test_a_worker_that_dies_while_it_is_away(turns_run, address, tmp_path) -> None:
    import ray

    log = tmp_path / "log"
    with pytest.raises(WorkerError, match=r"teacher-default\.onload: a process died; its log is in logging_dir"):
        turns_run(ONE_DEVICE, log=log, system_envs__DIES_AWAY="teacher-default")
    processes = [int(event.detail) for event in events_of(log) if event.what == "process"]
    assert len(processes) == 3
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in processes))
    # A second run could begin at once.
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        wait_until(lambda: ray.available_resources().get("GPU") == 4)
    finally:
        ray.shutdown()


def test_processes_that_fail_to_move(address) -> None:
    import ray

    from roll_opd.configs import WorkerConfig
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement
    from roll_opd.distributed.turns import Turns

    class Model:
        """Cannot give up a part of what it holds."""

        def __init__(self, spec) -> None: ...

        def offload(self, keep_weights: bool) -> None:
            if keep_weights:
                raise RuntimeError("host memory is full")

        def onload(self, weights_only: bool) -> None: ...

    roles = {
        name: WorkerConfig(name=name, device_mapping=devices)
        for name, devices in {"train": [0, 1], "infer": [0], "teacher": [0, 1]}.items()
    }
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        placement = Placement(roles, {})
        clusters = {
            name: Cluster(name, role, Model, placement=placement, threads=1, log_dir="", seed=0, system_envs={})
            for name, role in roles.items()
        }
        turns = Turns(clusters, spare=["teacher"])
        turns.take("train")
        with pytest.raises(
            WorkerError, match=r"train could not leave its devices: RuntimeError\('host memory is full'"
        ):
            turns.take("train", "infer", weights_only=True)
        first, second = clusters["teacher"].workers
        ray.kill(first)
        turns.take("teacher")
        ray.kill(second)
        with pytest.raises(WorkerDiedError, match=r"teacher\.offload: a process died"):
            turns.take("train")
    finally:
        ray.shutdown()


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
