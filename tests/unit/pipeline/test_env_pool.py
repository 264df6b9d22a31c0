"""Slots, deadlines, failures and processes of environments, with stand-ins for the processes."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.environments.base import Opening, Outcome
from roll_opd.errors import ConfigError, EnvironmentFailedError, WorkerError
from roll_opd.pipeline.agentic.env_pool import EnvPool, EpisodeLostError, next_attempt
from roll_opd.pipeline.agentic.env_worker import UnusableAnswerError

QUICK = EnvironmentConfig(env_type="any", reset_timeout=0.2, step_timeout=0.2)
NONE_FAILED = dict.fromkeys(["failed_crash", "failed_deadline", "failed_error", "failed_unusable", "step_seconds"], 0.0)
PATIENT = EnvironmentConfig(env_type="any", reset_timeout=20, step_timeout=20)


def raised(error: Exception) -> RayTaskError:
    """As the driver sees what an actor's method raised."""
    return RayTaskError("step", "Traceback …", error).as_instanceof_cause()


class Process:
    """An actor's handle. ``step`` says what an action comes to: a coroutine function or nothing."""

    def __init__(self, fakes: Any, name: str, size: int, step: Callable[[str], Awaitable[Any]] | None) -> None:
        self.name, self.size = name, size
        self.gone = asyncio.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.open_now: set[int] = set()
        self.most = 0
        self._step = step
        for method in ("ready", "open", "step", "close", "shut_down"):
            setattr(self, method, fakes.Method(self._or_gone(getattr(self, f"_do_{method}"))))

    def _or_gone(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """A call of a process that ends under it fails as Ray's do."""

        async def call(*args: Any) -> Any:
            work, gone = asyncio.ensure_future(method(*args)), asyncio.ensure_future(self.gone.wait())
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if self.gone.is_set():
                    raise RayActorError()
                return work.result()
            finally:
                work.cancel()
                gone.cancel()

        return call

    async def _do_ready(self) -> int:
        return 77

    async def _do_open(self, key: int, tag: str, config: EnvironmentConfig, seed: int) -> Opening:
        self.calls.append(("open", tag, seed))
        self.open_now.add(key)
        self.most = max(self.most, len(self.open_now))
        if seed < 0:
            await asyncio.Event().wait()
        return Opening(f"{tag} {seed}")

    async def _do_step(self, key: int, action: str) -> Any:
        self.calls.append(("step", action))
        answer = await self._step(action) if self._step else None
        return Outcome(action, 1.0, False, False, seconds=0.25) if answer is None else answer

    async def _do_close(self, key: int) -> None:
        self.calls.append(("close",))
        self.open_now.discard(key)

    async def _do_shut_down(self) -> None:
        self.calls.append(("shut_down",))


class Processes:
    """In place of EnvProcesses."""

    def __init__(self, fakes: Any, step: Callable[[str], Awaitable[Any]] | None = None) -> None:
        self.fakes, self.step = fakes, step
        self.started: list[Process] = []
        self.killed: list[Process] = []
        self.stopped: list[Process] = []

    def start(self, name: str, size: int) -> Process:
        self.started.append(Process(self.fakes, name, size, self.step))
        return self.started[-1]

    def kill(self, process: Process) -> None:
        process.gone.set()
        self.killed.append(process)

    def stop(self, processes: list[Process]) -> None:
        self.stopped += processes

    @property
    def names(self) -> list[str]:
        return [process.name for process in self.started]


def pool_of(processes: Processes, num_envs: int = 4, per_worker: int = 0, **tags: EnvironmentConfig) -> EnvPool:
    return EnvPool("train", tags or {"t": PATIENT}, num_envs, per_worker, processes=processes)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


class Held:
    """Episodes that stay open until they are told to end."""

    def __init__(self, pool: EnvPool) -> None:
        self.pool = pool
        self.order: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._ends: dict[int, asyncio.Event] = {}

    async def begin(self, *seeds: int, tag: str = "t", alone: bool = False) -> None:
        for seed in seeds:
            self._ends[seed] = asyncio.Event()
            self.tasks[seed] = asyncio.create_task(self._play(seed, tag, alone))
            await asyncio.sleep(0)
        await settle()

    async def _play(self, seed: int, tag: str, alone: bool) -> None:
        async with self.pool.episode(tag, seed, alone) as session:
            assert session.opening.observation == f"{tag} {seed}"
            self.order.append(seed)
            await self._ends[seed].wait()

    async def end(self, *seeds: int) -> None:
        for seed in seeds:
            self._ends[seed].set()
            await self.tasks[seed]
        await settle()


def test_slots_are_given_in_the_order_of_asking(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        held = Held(pool_of(processes, num_envs=2))
        await held.begin(0, 1, 2, 3, 4)
        assert held.order == [0, 1]
        await held.end(1)
        assert held.order == [0, 1, 2]
        await held.begin(5)
        await held.end(0, 2)
        assert held.order == [0, 1, 2, 3, 4]
        await held.end(3, 4, 5)
        assert held.order == [0, 1, 2, 3, 4, 5]
        assert processes.names == ["env-train-0"] and processes.started[0].most == 2

    asyncio.run(run())


def test_processes_are_started_as_slots_need_them(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        held = Held(pool_of(processes, num_envs=5, per_worker=2))
        await held.begin(0, 1)
        assert [(p.name, p.size) for p in processes.started] == [("env-train-0", 2)]
        await held.begin(2)
        await held.end(0, 1)
        # The process with the fewest episodes gets the next one.
        await held.begin(3, 4, 5, 6)
        assert processes.names == ["env-train-0", "env-train-1", "env-train-2"]
        assert [len(p.open_now) for p in processes.started] == [2, 2, 1]
        await held.end(2, 3, 4, 5, 6)
        assert not any(p.open_now for p in processes.started) and not processes.killed

    asyncio.run(run())


def test_an_episode_alone_takes_a_slot_and_has_a_process_until_its_end(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        held = Held(pool_of(processes, num_envs=2))
        await held.begin(0)
        await held.begin(1, alone=True)
        await held.begin(2)
        assert held.order == [0, 1] and [(p.name, p.size) for p in processes.started][1] == ("env-train-1", 1)
        assert [c[2] for c in processes.started[1].calls] == [1]
        await held.end(1)
        assert processes.killed == [processes.started[1]] and processes.started[1].calls[-1] == ("shut_down",)
        assert held.order == [0, 1, 2] and len(processes.started) == 2
        await held.end(0, 2)

    asyncio.run(run())


def test_only_a_few_processes_are_for_one_episode_each(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        held = Held(pool_of(processes, num_envs=6))
        await held.begin(*range(6), alone=True)
        assert held.order == [0, 1, 2, 3] and len(processes.started) == 4
        # Those that wait for one hold no slot.
        await held.begin(10, 11, 12)
        assert held.order == [0, 1, 2, 3, 10, 11] and [p.size for p in processes.started] == [1, 1, 1, 1, 6]
        # One that gives up waiting leaves its turn to the next.
        held.tasks[4].cancel()
        await held.end(10, 11, 12, 0)
        assert held.order == [0, 1, 2, 3, 10, 11, 12, 5] and len(processes.started) - len(processes.killed) == 5
        await held.end(1, 2, 3, 5)
        assert len(processes.killed) == 5

    asyncio.run(run())


def test_where_an_episode_is_played_again() -> None:
    # Those who met another's crash share a process; whoever is at fault, or crashes again, plays alone, and once.
    assert next_attempt(["crash"]) == "shared"
    assert next_attempt(["crash", "crash"]) == next_attempt(["crash", "error"]) == "alone"
    assert next_attempt(["crash", "crash", "crash"]) is None
    for kind in ("deadline", "error", "unusable"):
        assert next_attempt([kind]) == "alone"
        assert next_attempt([kind, "crash"]) is next_attempt([kind, kind]) is None


def test_a_crash_starts_no_process_for_each_of_its_episodes(fakes) -> None:
    async def step(action: str) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        processes = Processes(fakes, step)
        pool = pool_of(processes, num_envs=32)
        attempts: list[str] = []

        async def episode(seed: int) -> None:
            lost: list[Any] = []
            where: str | None = "shared"
            while where is not None:
                attempts.append(where)
                try:
                    async with pool.episode("t", seed, alone=where == "alone") as session:
                        await session.step("wait")
                except EpisodeLostError as error:
                    lost.append(error.kind)
                    where = next_attempt(lost)

        tasks = [asyncio.create_task(episode(seed)) for seed in range(32)]
        for alive in (1, 1, 4):
            await settle()
            now = [p for p in processes.started if not p.gone.is_set()]
            assert len(now) == alive
            now[0].gone.set()
        await settle()
        # 32 first attempts, and again together; then one by one, of which one is over and four are played.
        assert attempts.count("shared") == 64 and len(processes.started) == 2 + 5
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_step_beyond_its_deadline_costs_all_that_its_process_plays(fakes) -> None:
    async def step(action: str) -> None:
        if action == "hang":
            await asyncio.Event().wait()

    async def run() -> None:
        processes = Processes(fakes, step)
        pool = pool_of(processes, 4, 2, t=PATIENT, hasty=QUICK)

        async def episode(tag: str, seed: int, *actions: str) -> str:
            try:
                async with pool.episode(tag, seed) as session:
                    for action in actions:
                        await session.step(action)
                        while action == "think" and not processes.killed:
                            await asyncio.sleep(0.01)
                    return "played"
            except EnvironmentFailedError as error:
                return str(error)

        # The second one shares the first one's process and learns of its end when the student has thought.
        results = await asyncio.gather(
            episode("hasty", 0, "go", "hang"), episode("t", 1, "think", "go"), episode("t", 2, "think", "go")
        )
        assert results == [
            "environment 'hasty': took longer than step_timeout (0.2 s)",
            "environment 't': its process env-train-0 was ended because environment 'hasty' took longer than "
            "step_timeout (0.2 s)",
            "played",
        ]
        assert processes.killed == [processes.started[0]]
        counts = pool.take_counts()
        assert counts == NONE_FAILED | {"failed_crash": 1, "failed_deadline": 1, "step_seconds": 0.25 * 4}
        # Counted from call to call.
        assert pool.take_counts() == NONE_FAILED
        assert await episode("t", 3, "go") == "played" and len(processes.started) == 2
        # The name of the ended one is free again.
        await Held(pool).begin(4, 5, 6)
        assert processes.names == ["env-train-0", "env-train-1", "env-train-0"]

    asyncio.run(run())


def test_a_reset_beyond_its_deadline(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        pool = pool_of(processes, t=QUICK)
        with pytest.raises(EpisodeLostError, match=r"took longer than reset_timeout \(0.2 s\)") as caught:
            async with pool.episode("t", -1):
                pytest.fail("there is no opening")
        assert caught.value.kind == "deadline"
        assert pool.take_counts()["failed_deadline"] == 1 and processes.killed == processes.started

    asyncio.run(run())


def test_a_process_that_dies_takes_its_episodes_along_and_no_others(fakes) -> None:
    async def step(action: str) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        processes = Processes(fakes, step)
        pool = pool_of(processes, 3, 2)

        async def episode(seed: int) -> None:
            async with pool.episode("t", seed) as session:
                await session.step("wait")

        tasks = [asyncio.create_task(episode(seed)) for seed in range(3)]
        await settle()
        processes.started[0].gone.set()
        await settle()
        for task in tasks[:2]:
            with pytest.raises(
                EpisodeLostError, match=r"its process env-train-0 died; its log is in logging_dir"
            ) as caught:
                task.result()
            assert caught.value.kind == "crash"
        assert not tasks[2].done() and pool.take_counts()["failed_crash"] == 2
        # Four slots: all but the living one are free.
        held = Held(pool)
        await held.begin(7, 8, 9)
        assert held.order == [7, 8] and len(processes.started) == 3

    asyncio.run(run())


@pytest.mark.parametrize("hangs", [True, False])
def test_a_process_that_does_not_start(fakes, monkeypatch, hangs) -> None:
    monkeypatch.setattr("roll_opd.pipeline.agentic.env_pool.START_SECONDS", 0.02)

    async def ready(self: Process) -> int:
        if hangs:
            await asyncio.Event().wait()
        raise RayActorError()

    monkeypatch.setattr(Process, "_do_ready", ready)

    async def run() -> None:
        processes = Processes(fakes)
        pool = pool_of(processes)

        async def episode() -> None:
            async with pool.episode("t", 0):
                pytest.fail("there is no process")

        results = await asyncio.gather(episode(), episode(), return_exceptions=True)
        assert all("its process env-train-0 did not start" in str(result) for result in results)
        assert pool.take_counts()["failed_crash"] == 2 and processes.killed == processes.started

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EnvironmentFailedError("t", "raised"), "error"), (UnusableAnswerError("t", "reward of nan"), "unusable")],
)
def test_what_an_environment_does_wrong_costs_its_episode_alone(fakes, error, kind) -> None:
    async def step(action: str) -> None:
        if action == "fail":
            raise raised(error)

    async def run() -> None:
        processes = Processes(fakes, step)
        pool = pool_of(processes)
        async with pool.episode("t", 0) as other:
            with pytest.raises(EpisodeLostError) as caught:
                async with pool.episode("t", 1) as session:
                    await session.step("fail")
            assert (caught.value.kind, str(caught.value)) == (kind, str(error))
            assert copy.copy(caught.value).kind == kind
            assert (await other.step("go")).observation == "go"
        assert pool.take_counts() == NONE_FAILED | {f"failed_{kind}": 1, "step_seconds": 0.25}
        assert not processes.killed

    asyncio.run(run())


def test_a_config_error_stops_the_run_as_itself(fakes) -> None:
    async def step(action: str) -> None:
        raise raised(ConfigError("custom_envs.t.env_config", "has no map"))

    async def run() -> None:
        pool = pool_of(Processes(fakes, step))
        with pytest.raises(ConfigError) as caught:
            async with pool.episode("t", 0) as session:
                await session.step("go")
        assert type(caught.value) is ConfigError and caught.value.field == "custom_envs.t.env_config"
        assert pool.take_counts() == NONE_FAILED

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"max_env_step_concurrent": 2}, 2), ({"use_thread_lock": True}, 3), ({}, 6)],
    ids=["limit of the tag", "one in each process", "none"],
)
def test_calls_at_the_same_time_are_limited(fakes, settings, most) -> None:
    called: list[asyncio.Event] = []

    async def step(action: str) -> None:
        called.append(asyncio.Event())
        await called[-1].wait()

    async def run() -> None:
        pool = pool_of(Processes(fakes, step), 6, 2, t=EnvironmentConfig(env_type="any", **settings))

        async def episode(seed: int) -> None:
            async with pool.episode("t", seed) as session:
                await session.step("go")

        tasks = [asyncio.create_task(episode(seed)) for seed in range(6)]
        for done in range(6):
            await settle()
            # The others have not been called, so that no deadline of theirs runs yet.
            assert len(called) == min(done + most, 6)
            called[done].set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_an_episode_that_is_given_up_keeps_its_slot_until_the_environment_is_free(fakes) -> None:
    async def run() -> None:
        free = asyncio.Event()
        processes = Processes(fakes)
        pool = pool_of(processes, num_envs=1)
        held = Held(pool)
        await held.begin(0)

        async def close(key: int) -> None:
            await free.wait()

        processes.started[0].close = fakes.Method(close)
        held.tasks[0].cancel()
        await held.begin(1)
        # The one that gave up has not waited; the slot is not free yet.
        assert held.tasks[0].cancelled() and held.order == [0]
        free.set()
        await settle()
        assert held.order == [0, 1] and not processes.killed

    asyncio.run(run())


def test_a_cancellation_that_comes_with_an_answer_is_not_lost(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        pool = pool_of(processes)
        answer = asyncio.get_running_loop().create_future()

        async def episode() -> None:
            async with pool.episode("t", 0) as session:
                processes.started[0].step = SimpleNamespace(remote=lambda *_: answer)
                await session.step("go")

        task = asyncio.create_task(episode())
        await settle()
        answer.set_result(Outcome("there", 1.0, False, False))
        task.cancel()
        await settle()
        assert task.cancelled()

    asyncio.run(run())


def test_an_episode_that_is_given_up_and_never_comes_back(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        pool = pool_of(processes, num_envs=1, t=QUICK)
        held = Held(pool)
        await held.begin(0)
        processes.started[0].close = fakes.Method(lambda key: asyncio.Event().wait())
        await held.end(0)
        await held.begin(1)
        assert held.order == [0]
        while held.order != [0, 1]:
            await asyncio.sleep(0.01)
        assert len(processes.started) == 2 and processes.killed == processes.started[:1]

    asyncio.run(run())


def test_close_ends_all_processes_once_and_for_all(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes)
        pool = pool_of(processes, 3, 1)
        held = Held(pool)
        await held.begin(0, 1)
        for _ in range(2):
            closing = threading.Thread(target=pool.close)
            closing.start()
            closing.join()
        assert processes.stopped == processes.started and len(processes.started) == 2
        for process in processes.started:
            process.gone.set()
        await held.end(0, 1)
        with pytest.raises(WorkerError, match="the processes of the train environments have been ended"):
            async with pool.episode("t", 2):
                pytest.fail("there is no process")
        assert len(processes.started) == 2 and pool.take_counts() == NONE_FAILED

    asyncio.run(run())


def test_a_call_that_close_interrupts_is_no_failure_of_the_environment(fakes) -> None:
    async def run() -> None:
        processes = Processes(fakes, lambda action: asyncio.Event().wait())
        pool = pool_of(processes)

        async def episode() -> None:
            async with pool.episode("t", 0) as session:
                await session.step("wait")

        task = asyncio.create_task(episode())
        await settle()
        pool.close()
        processes.started[0].gone.set()
        with pytest.raises(WorkerError):
            await task
        assert pool.take_counts() == NONE_FAILED

    asyncio.run(run())
