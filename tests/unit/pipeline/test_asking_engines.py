"""How engines are asked: an answer and a cancellation at once, and who brings back whom."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from roll_opd.distributed.strategy.base import GenerateRequest, Sampling
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.generation import Generation
from roll_opd.trajectory import TrajectoryId

pytestmark = pytest.mark.timeout(60)


def test_a_cancellation_that_comes_with_a_response_is_not_lost() -> None:
    async def run() -> None:
        came = asyncio.get_running_loop().create_future()

        async def remote(requests):
            yield await came
            await asyncio.sleep(3600)

        worker = SimpleNamespace(generate=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote)))
        request = GenerateRequest(TrajectoryId(0, 0), (5,), 1, Sampling())
        asking = asyncio.create_task(Generation(None, 20.0).ask(worker, [request], lambda result: None))
        await asyncio.sleep(0.01)
        ref = asyncio.get_running_loop().create_future()
        ref.set_result([])
        came.set_result(ref)
        asking.cancel()
        await asyncio.sleep(0.05)
        assert asking.cancelled()

    asyncio.run(run())


def test_a_teacher_that_samples_gets_no_weights_of_the_student() -> None:
    """Its engine is replaced by whoever does so when it dies over scores; the student's is given the weights again."""
    log: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def guest(role: str):
        log.append(("guest", role))
        yield

    async def replace_engine(worker: str) -> None:
        log.append(("replaced", worker))

    pipeline = SimpleNamespace(
        clusters=SimpleNamespace(
            infer=SimpleNamespace(workers=["student-0", "student-1"]),
            turns=SimpleNamespace(guest=guest),
            teacher_pool=SimpleNamespace(replace_engine=replace_engine),
        ),
        weight_syncs={"actor_infer": SimpleNamespace(revive=lambda worker: log.append(("weights", worker)))},
    )

    async def run() -> None:
        for worker in ("student-1", "teacher-0"):
            await BasePipeline._revive(pipeline, worker)  # type: ignore[arg-type]

    asyncio.run(run())
    assert log == [("guest", "actor_train"), ("weights", "student-1"), ("replaced", "teacher-0")]
