"""Environments in real processes: what dies, hangs or misbehaves costs its episode, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.errors import ConfigError, EnvironmentFailedError

pytestmark = pytest.mark.integration

SAMPLES = Path(__file__).parents[1] / "unit" / "environments"

NAN = {"reward": float("nan")}
ENVIRONMENTS = {
    "good": EnvironmentConfig("sample_envs.ObedientEnv", {"answers": {"nan": NAN, "number": {"observation": 7}}}),
    "hasty": EnvironmentConfig("sample_envs.ObedientEnv", step_timeout=1.0),
    "unknown": EnvironmentConfig("sample_envs.ObedientEnv", {"no_such": 1}),
}

Play = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, loop: asyncio.Runner) -> Iterator[Any]:
    """Eight slots, all in one process."""
    from roll_opd.configs import RayArguments
    from roll_opd.distributed.runtime import ray_session
    from roll_opd.pipeline.agentic.env_pool import EnvPool, EnvProcesses

    logs = tmp_path_factory.mktemp("logs")
    with ray_session(RayArguments()):
        processes = EnvProcesses(str(logs), {"PYTHONPATH": str(SAMPLES)})
        pool = EnvPool("train", ENVIRONMENTS, 8, processes=processes)
        yield pool
        pids = processes_of(pool)
        pool.close()
        pool.close()
        assert pids and not left_of(pids)
        log = (logs / "env-train-0.log").read_text()
        assert "failed in step" in log and "KeyError: 'move'" in log and "sample_envs.py" in log


def processes_of(pool: Any) -> list[int]:
    import ray

    return [ray.get(worker.handle.ready.remote(), timeout=60) for worker in pool._workers]


def left_of(pids: list[int]) -> list[psutil.Process]:
    """Those that still run after 10 s."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return alive


async def episode(pool: Any, *actions: str, tag: str = "good", seed: int = 0, alone: bool = False) -> list[Any]:
    """The opening and the outcomes, or as last one the error."""
    out: list[Any] = []
    try:
        async with pool.episode(tag, seed, alone) as session:
            out.append(session.opening)
            for action in actions:
                out.append(await session.step(action))
    except EnvironmentFailedError as error:
        out.append(error)
    return out


def test_environments_of_a_process_do_not_wait_for_each_other(pool, loop) -> None:
    async def play() -> tuple[list[list[Any]], float]:
        await episode(pool)
        began = time.perf_counter()
        played = await asyncio.gather(*(episode(pool, *["sleep 0.3"] * 3, seed=seed) for seed in range(8)))
        return played, time.perf_counter() - began

    played, seconds = loop.run(play())
    assert [p[0].observation for p in played] == [f"seed {seed}" for seed in range(8)]
    assert all(o.observation == "sleep 0.3" and o.seconds >= 0.3 for p in played for o in p[1:])
    assert seconds < 8 * 3 * 0.3 * 0.8 and pool.take_counts()["step_seconds"] > 8 * 3 * 0.3
    assert len({p[0].info["pid"] for p in played}) == 1
    # The first one's environment has been reset, and torch has not been imported for any of this.
    assert max(p[0].info["resets"] for p in played) == 2 and not any(p[0].info["torch"] for p in played)


def test_what_an_environment_does_wrong_fails_its_episode_alone(pool, loop) -> None:
    async def play() -> list[list[Any]]:
        bad = ["raise move", "exit", "return nan", "return number"]
        return await asyncio.gather(*(episode(pool, "go", action, "go") for action in [*bad, "sleep 0.3"]))

    before = processes_of(pool)
    *failed, good = loop.run(play())
    reasons = [str(played[-1]) for played in failed]
    assert reasons[0].startswith("environment 'good': step raised KeyError: 'move' (sample_envs.py, line ")
    assert reasons[1].startswith("environment 'good': step raised SystemExit: enough (sample_envs.py, line ")
    assert reasons[2:] == [
        "environment 'good': step returned a reward of nan",
        "environment 'good': step returned an observation that is an int, not a string",
    ]
    assert [len(played) for played in failed] == [3] * 4 and [o.reward for o in good[1:]] == [1.0] * 3
    counts = pool.take_counts()
    assert (counts["failed_crash"], counts["failed_error"], counts["failed_unusable"]) == (0, 2, 2)
    assert processes_of(pool) == before


def test_a_setting_that_cannot_work_is_the_runs_error(pool, loop) -> None:
    with pytest.raises(ConfigError, match=r"custom_envs\.unknown\.env_config.*no_such"):
        loop.run(episode(pool, tag="unknown"))


def test_a_process_that_is_killed(pool, loop) -> None:
    """Its episodes fail, whether in a step or between two; the next ones get another process."""

    async def play() -> tuple[list[Any], ...]:
        tasks = [asyncio.create_task(episode(pool, "sleep 30", seed=seed)) for seed in range(2)]
        async with pool.episode("good", 2) as session:
            await session.step("sleep 0.2")
            os.kill(session.opening.info["pid"], signal.SIGKILL)
            stepping = await asyncio.gather(*tasks)
            with pytest.raises(EnvironmentFailedError) as caught:
                await session.step("go")
        after = await asyncio.gather(episode(pool, "go"), episode(pool, "go", alone=True))
        # The process of the one that played alone ends with its episode, which does not wait for that.
        while len(pool._workers) > 1:
            await asyncio.sleep(0.05)
        return [stepping[0][-1], stepping[1][-1], caught.value], after

    pool.take_counts()
    failed, (after, alone) = loop.run(play())
    assert all("its process env-train-0 died; its log is in logging_dir" in str(error) for error in failed)
    assert pool.take_counts()["failed_crash"] == 3
    assert after[1].reward == alone[1].reward == 1.0 and after[0].info["pid"] != alone[0].info["pid"]
    assert processes_of(pool) == [after[0].info["pid"]] and not left_of([alone[0].info["pid"]])


def test_an_environment_that_hangs(pool, loop) -> None:
    async def play() -> tuple[list[list[Any]], float, list[Any]]:
        began = time.perf_counter()
        played = await asyncio.gather(episode(pool, "go", "sleep 60", tag="hasty"), episode(pool, "sleep 60"))
        return played, time.perf_counter() - began, await episode(pool, "go", tag="hasty")

    before = processes_of(pool)
    (hung, beside), seconds, after = loop.run(play())
    assert str(hung[-1]) == "environment 'hasty': took longer than step_timeout (1 s)"
    assert str(beside[-1]).endswith("was ended because environment 'hasty' took longer than step_timeout (1 s)")
    assert seconds < 20 and after[1].reward == 1.0 and not left_of(before)
