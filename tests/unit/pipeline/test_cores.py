"""Cores are lent so that busy threads never exceed them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Collection

import pytest
import torch
from ray.exceptions import RayActorError

from roll_opd.configs.worker_config import StrategyArguments, WorkerConfig
from roll_opd.distributed.cores import Cores, shares
from roll_opd.distributed.placement import cpu_threads, lent_cores
from roll_opd.distributed.strategy.threads import LentThreads


class Told:
    """A worker that takes its time to change its number of threads; ``in_force`` is what it computes with."""

    def __init__(self, threads: int = 1, delay: float = 0.0, dead: bool = False) -> None:
        self.in_force, self.delay, self.dead = threads, delay, dead

    class _Method:
        def __init__(self, worker: Told) -> None:
            self.worker = worker

        async def remote(self, threads: int) -> None:
            await asyncio.sleep(self.worker.delay)
            if self.worker.dead:
                raise RayActorError
            self.worker.in_force = threads

    @property
    def use_threads(self) -> _Method:
        return self._Method(self)


def test_the_only_one_has_all_cores_and_gives_back_what_a_second_one_gets() -> None:
    engine, teacher = Told(), Told()

    async def run() -> None:
        cores = Cores(4, {engine: 1, teacher: 1})
        async with cores.busy([engine]):
            assert engine.in_force == 4
            async with cores.busy([teacher]):
                assert (engine.in_force, teacher.in_force) == (2, 2)
            assert engine.in_force == 4
        async with cores.busy([teacher]):
            assert teacher.in_force == 4

    asyncio.run(run())


def test_nobody_is_given_a_core_before_the_other_has_given_it_back() -> None:
    slow, quick = Told(), Told()

    async def run() -> None:
        cores = Cores(4, {slow: 1, quick: 1})
        async with cores.busy([slow]):
            slow.delay = 0.05
            entered = asyncio.create_task(cores.busy([quick]).__aenter__())
            while not entered.done():
                assert slow.in_force == 2 or quick.in_force == 1
                await asyncio.sleep(0.005)
            assert (slow.in_force, quick.in_force) == (2, 2)

    asyncio.run(run())


def test_a_worker_that_is_asked_twice_is_busy_until_both_are_done() -> None:
    one, other = Told(), Told()

    async def run() -> None:
        cores = Cores(2, {one: 1, other: 1})
        async with cores.busy([one]):
            async with cores.busy([one]):
                pass
            async with cores.busy([other]):
                assert (one.in_force, other.in_force) == (1, 1)

    asyncio.run(run())


@pytest.mark.parametrize(("total", "count"), [(1, 3), (2, 5), (3, 3), (8, 3)])
def test_threads_of_the_busy_never_exceed_the_cores(total: int, count: int) -> None:
    """Workers come and go at random, and take a random time to obey."""
    rng = random.Random(total * 10 + count)
    workers = [Told(delay=rng.choice([0, 0.001, 0.003])) for _ in range(count)]
    most = 0

    async def run() -> None:
        nonlocal most
        cores = Cores(total, dict.fromkeys(workers, 1))
        at_work: list[Told] = []

        async def work(worker: Told) -> None:
            nonlocal most
            for _ in range(12):
                async with cores.busy([worker]):
                    at_work.append(worker)
                    for _ in range(3):
                        used = sum(w.in_force for w in set(at_work))
                        assert used <= total, [w.in_force for w in set(at_work)]
                        most = max(most, used)
                        await asyncio.sleep(rng.random() / 500)
                    at_work.remove(worker)
                await asyncio.sleep(rng.random() / 500)

        await asyncio.gather(*(work(worker) for worker in workers))

    asyncio.run(run())
    assert most == total


def test_more_engines_than_cores_have_one_thread_each_and_nobody_waits_for_ever() -> None:
    engines = [Told() for _ in range(3)]

    async def run() -> None:
        cores = Cores(2, dict.fromkeys(engines, 1))
        async with cores.busy(engines):
            assert [e.in_force for e in engines] == [1, 1, 1]

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_dead_worker_keeps_nobody_from_its_cores() -> None:
    dead, alive = Told(dead=True), Told()

    async def run() -> None:
        cores = Cores(2, {dead: 2, alive: 1})
        async with cores.busy([dead]), cores.busy([alive]):
            assert alive.in_force == 1
        async with cores.busy([alive]):
            assert alive.in_force == 2

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_stuck_worker_holds_nobody_up_for_longer_than_it_may_take() -> None:
    stuck, alive = Told(delay=1000.0), Told()

    async def run() -> None:
        cores = Cores(2, {stuck: 1, alive: 1}, patience=0.02)
        async with cores.busy([stuck]), cores.busy([alive]):
            assert alive.in_force == 2, "who does not answer is not counted any more"
        async with cores.busy([stuck]):
            assert stuck.in_force == 1

    asyncio.run(asyncio.wait_for(run(), 5))


def test_who_is_cancelled_while_it_comes_or_waits_leaves_nothing_behind() -> None:
    slow, other, third = Told(delay=0.05), Told(), Told()

    async def run() -> None:
        cores = Cores(2, {slow: 1, other: 1, third: 1})

        async def work(worker: Told) -> None:
            async with cores.busy([worker]):
                await asyncio.sleep(1000)

        coming = asyncio.create_task(work(slow))
        await asyncio.sleep(0.01)
        coming.cancel()
        await asyncio.wait([coming])
        async with cores.busy([other, third]):
            waiting = asyncio.create_task(work(slow))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
        async with cores.busy([other]):
            assert other.in_force == 2

    asyncio.run(asyncio.wait_for(run(), 5))


def test_others_are_not_told_anything() -> None:
    async def run(workers: Collection[object]) -> None:
        async with Cores().busy(workers):
            pass

    asyncio.run(run([object()]))


def test_shares() -> None:
    assert shares(5, "ab") == {"a": 3, "b": 2}
    assert shares(1, "ab") == {"a": 1, "b": 1}
    assert shares(4, "") == {}


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
def test_fixed_and_lent_threads_of_a_phase_sum_to_no_more_than_the_cores(cores: int) -> None:
    def on(strategy: str, **kwargs: int) -> WorkerConfig:
        return WorkerConfig(strategy_args=StrategyArguments(strategy_name=strategy), **kwargs)  # type: ignore[arg-type]

    roles = {"actor_train": on("fsdp2_train"), "actor_infer": on("vllm"), "teacher-a": on("hf_infer"),
             "teacher-b": on("hf_infer", cpu_threads=1), "teacher-c": on("hf_infer", world_size=2)}  # fmt: skip
    phases = {name: "train" if name == "actor_train" else "rollout" for name in roles}
    threads = cpu_threads(roles, phases, cores)
    total, borrowers = lent_cores(roles, phases, threads, cores)
    assert borrowers == ["teacher-a", "teacher-c"]
    assert threads["actor_train"] == cores
    assert total + threads["actor_infer"] + 1 <= max(cores, 3)


def test_threads_are_changed_between_two_pieces_of_work() -> None:
    lent, begun, may_pause = LentThreads(1), threading.Event(), threading.Event()
    seen: list[int] = []

    def compute() -> None:
        with lent.working():
            seen.append(torch.get_num_threads())
            begun.set()
            may_pause.wait(5)
            lent.pause()
            seen.append(torch.get_num_threads())

    lent.use(1)
    worker = threading.Thread(target=compute)
    worker.start()
    begun.wait(5)
    changing = threading.Thread(target=lent.use, args=(2,))
    changing.start()
    changing.join(0.05)
    assert changing.is_alive(), "told before it was so"
    may_pause.set()
    changing.join(5)
    worker.join(5)
    assert not changing.is_alive() and seen == [1, 2]
    lent.use(1)  # nobody computes: at once


def test_what_nobody_has_lent_cores_to_uses_as_many_as_at_the_start() -> None:
    lent, before = LentThreads(torch.get_num_threads()), torch.get_num_threads()
    lent.use(before + 1)
    with lent.working():
        assert torch.get_num_threads() == before + 1
    lent.rest()
    assert torch.get_num_threads() == before
