"""The driver's side of environments: slots, processes and deadlines.

::

    episode(tag, seed) ─► a slot (num_envs, first come first served)
                          │
                          ├─► env-<name>-0   envs_per_worker episodes   started when a slot needs it
                          ├─► env-<name>-1   …                          ended when it dies or hangs, with its episodes
                          └─► env-<name>-2   one episode that plays alone

A process that hangs can only be ended, and nobody knows what a crash has damaged in it. So either costs all episodes
that it plays; the next one that needs a slot starts another process. Whether an episode that is lost is played again,
and where, follows from whose fault that was (:func:`next_attempt`). Everything but :meth:`EnvPool.close` belongs to one
event loop, and nothing in it blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ray
from ray.exceptions import RayError, RayTaskError

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.distributed.placement import Placement, Slot
from roll_opd.distributed.process_spec import thread_environment
from roll_opd.distributed.runtime import user_error
from roll_opd.environments.base import Opening, Outcome
from roll_opd.errors import EnvironmentFailedError, WorkerError
from roll_opd.pipeline.agentic.env_worker import EnvWorker, UnusableAnswerError

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time for a process to start."""

SHUT_DOWN_SECONDS = 2.0
"""Time for environments to close when the run ends."""

MOST_ALONE = 4
"""Episodes of a pool that play alone at the same time: each is a process, and a crash may lose hundreds at once."""

Failure = Literal["crash", "deadline", "error", "unusable"]
"""How an episode was lost: its process ended (by itself, or because another episode in it hung), its own call took too
long, its environment raised, or returned what cannot be used."""


class EpisodeLostError(EnvironmentFailedError):
    """An episode cannot go on.

    Args:
        tag: of the environment.
        reason: what happened, in one line.
        kind: ``crash`` where it may well be another episode's fault, else it is this one's own.
    """

    def __init__(self, tag: str, reason: str, kind: Failure) -> None:
        super().__init__(tag, reason)
        self.args = (tag, reason, kind)
        self.kind = kind


def next_attempt(lost: Sequence[Failure]) -> Literal["shared", "alone"] | None:
    """Where an episode is played that has been lost, by how it was lost each time; None: it is given up.

    ==========================  ================================================================================
    a first loss, by a crash    ``shared``: any process will do. As a rule the fault was another episode's
    its own fault, or a second  ``alone``: where nobody can harm it, and it harms nobody
    lost while it was alone     given up
    ==========================  ================================================================================
    """
    if len(lost) == 1:
        return "shared" if lost[0] == "crash" else "alone"
    # Behind a first crash the second attempt was shared, so that there is a third.
    return "alone" if len(lost) == 2 and lost[0] == "crash" else None


class EnvProcesses:
    """Starts environment processes on the driver's node, and ends them.

    Args:
        log_dir: folder of their log files.
        system_envs: environment variables.
    """

    def __init__(self, log_dir: str, system_envs: Mapping[str, Any]) -> None:
        self.log_dir = log_dir
        self.environment = {**thread_environment(1), **{k: str(v) for k, v in system_envs.items()}}

    def start(self, name: str, size: int) -> Any:
        """Start a process for ``size`` episodes; return its handle at once."""
        options: dict[str, Any] = {
            # Mostly idle, like the other CPU processes (see Cluster): Ray's CPU slots are not what we share out.
            "num_cpus": 0,
            "runtime_env": {"env_vars": self.environment},
            "max_restarts": 0,
            # Of each episode a call and, where that was given up, its end.
            "max_concurrency": 2 * size + 2,
            "scheduling_strategy": Placement({}, {}).strategy(Slot(None, (), 1)),
        }
        return ray.remote(EnvWorker).options(**options).remote(name, self.log_dir, size)

    def kill(self, handle: Any) -> None:
        """End a process at once."""
        ray.kill(handle, no_restart=True)

    def stop(self, handles: list[Any]) -> None:
        """Have processes close their environments, within :data:`SHUT_DOWN_SECONDS`, and end them."""
        closed = [handle.shut_down.remote() for handle in handles]
        ray.wait(closed, num_returns=len(closed), timeout=SHUT_DOWN_SECONDS)
        for handle in handles:
            self.kill(handle)


class _Worker:
    """A process: how many episodes it has, and why it was ended if it was."""

    def __init__(self, index: int, name: str, handle: Any, alone: bool) -> None:
        self.index = index
        self.name = name
        self.handle = handle
        self.alone = alone
        self.episodes = 0
        self.ended: str | None = None
        self.turn = asyncio.Lock()
        self.started: asyncio.Future[None]


@dataclass(eq=False)
class Session:
    """An open episode; :meth:`EnvPool.episode` makes it.

    Attributes:
        tag: of its environment.
        opening: what the reset returned.
    """

    tag: str
    opening: Opening
    _pool: EnvPool
    _key: int
    _worker: _Worker

    async def step(self, action: str) -> Outcome:
        """Take the student's turn.

        Raises:
            EpisodeLostError: leave the episode.
            RollOPDError: another one that the environment raised; it is meant for the user.
        """
        outcome = await self._pool._call(self._worker, self.tag, "step", self._key, action)
        self._pool._count("step_seconds", outcome.seconds)
        return outcome


class EnvPool:
    """Plays up to ``num_envs`` episodes at the same time.

    Args:
        name: ``train`` or ``val``, for the names of the processes.
        environments: settings by tag.
        num_envs: episodes that are open at the same time.
        envs_per_worker: episodes that a process hosts; 0: all of them.
        processes: starts and ends processes.
    """

    def __init__(
        self,
        name: str,
        environments: Mapping[str, EnvironmentConfig],
        num_envs: int,
        envs_per_worker: int = 0,
        *,
        processes: EnvProcesses,
    ) -> None:
        self.name = name
        self.environments = environments
        self.processes = processes
        self._counts = _no_counts()
        self._size = min(envs_per_worker, num_envs) or num_envs
        self._slots = asyncio.Semaphore(num_envs)
        self._alone = asyncio.Semaphore(MOST_ALONE)
        self._limits = {
            tag: asyncio.Semaphore(config.max_env_step_concurrent)
            for tag, config in environments.items()
            if config.max_env_step_concurrent
        }
        self._episodes = 0
        self._keepers: set[asyncio.Task[None]] = set()
        self._workers: list[_Worker] = []
        self._closed = False
        # close() and take_counts() come from another thread than everything else.
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def episode(self, tag: str, seed: int, alone: bool = False) -> AsyncIterator[Session]:
        """Play the episode that ``seed`` stands for, once a slot is free.

        Whatever ends the block, the slot is given back when the environment has let go of the episode; the block's
        end does not wait for that.

        Args:
            tag: of the environment.
            seed: of its reset.
            alone: whether it gets a process of its own, which starts for it and ends with it. There are at most
                :data:`MOST_ALONE` of them; a further one waits, without a slot.

        Raises:
            EpisodeLostError: the environment failed in its reset.
            ConfigError, LaunchError: it cannot be made as it is configured, or on this machine.
            WorkerError: the pool has been closed.
        """
        with contextlib.ExitStack() as claims:
            if alone:
                await self._alone.acquire()
                claims.callback(self._alone.release)
            await self._slots.acquire()
            claims.callback(self._slots.release)
            worker = self._claim(alone)
            # From here on they are the keeper's.
            claims.pop_all()
        self._episodes += 1
        key, left = self._episodes, asyncio.Event()
        keeper = asyncio.create_task(self._keep(worker, tag, key, left))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)
        try:
            # Others may wait for the same start, so that it goes on if this episode is cancelled.
            await asyncio.shield(worker.started)
            opening = await self._call(worker, tag, "open", key, tag, self.environments[tag], seed)
            yield Session(tag, opening, self, key, worker)
        finally:
            left.set()

    def take_counts(self) -> dict[str, float]:
        """What has been counted since the last call; from any thread.

        Returns:
            ``failed_<kind>``: attempts at episodes that were lost, by :data:`Failure`. Of a process that is ended
            because one call in it took too long, that call's episode counts as ``deadline`` and the others as
            ``crash``. ``step_seconds``: that steps have taken in their processes, added up.
        """
        with self._lock:
            counts, self._counts = self._counts, _no_counts()
        return counts

    def _count(self, name: str, amount: float = 1.0) -> None:
        with self._lock:
            self._counts[name] += amount

    def close(self) -> None:
        """End all processes, from any thread; a second call does nothing."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
        if workers:
            self.processes.stop([worker.handle for worker in workers])

    # ---- processes -----------------------------------------------------------------------------------------------

    def _claim(self, alone: bool) -> _Worker:
        """A place in the process with the fewest episodes, or in a new one where none has room."""
        with self._lock:
            if self._closed:
                raise self._is_closed()
            room = [w for w in self._workers if not w.alone and w.episodes < self._size and not alone]
            worker = min(room, key=lambda w: w.episodes) if room else self._start(alone)
            worker.episodes += 1
            return worker

    def _start(self, alone: bool) -> _Worker:
        taken = {worker.index for worker in self._workers}
        index = next(i for i in range(len(taken) + 1) if i not in taken)
        name = f"env-{self.name}-{index}"
        worker = _Worker(index, name, self.processes.start(name, 1 if alone else self._size), alone)
        self._workers.append(worker)
        worker.started = asyncio.ensure_future(self._await_start(worker))
        return worker

    async def _await_start(self, worker: _Worker) -> None:
        try:
            pid = await asyncio.wait_for(_resolve(worker.handle.ready.remote()), START_SECONDS)
        except TimeoutError:
            self._end(worker, f"its process {worker.name} did not start within {START_SECONDS:.0f} s")
        except RayError as error:
            self._end(worker, f"its process {worker.name} did not start; {_details(error)}")
        else:
            logger.info("%s started, process %d", worker.name, pid)

    def _end(self, worker: _Worker, reason: str) -> None:
        """End a process, unless that has happened; ``reason`` is what its open episodes fail with."""
        if self._kill(worker):
            worker.ended = reason
            logger.warning("%s is ended, with %d open episode(s): %s", worker.name, worker.episodes, reason)

    def _kill(self, worker: _Worker) -> bool:
        with self._lock:
            if worker not in self._workers:
                return False
            self._workers.remove(worker)
        self.processes.kill(worker.handle)
        return True

    # ---- calls ---------------------------------------------------------------------------------------------------

    async def _call(self, worker: _Worker, tag: str, method: str, *args: Any) -> Any:
        config = self.environments[tag]
        setting = "reset_timeout" if method == "open" else "step_timeout"
        seconds: float = getattr(config, setting)
        turn = worker.turn if config.use_thread_lock else contextlib.nullcontext()
        # The time starts once it is this call's turn: environments do not pay for each other.
        async with turn, self._limits.get(tag) or contextlib.nullcontext():
            if worker.ended is not None:
                raise self._lost(worker, tag)
            try:
                # Not wait_for, which loses a cancellation that comes together with the answer (Python 3.11).
                async with asyncio.timeout(seconds):
                    return await getattr(worker.handle, method).remote(*args)
            except TimeoutError:
                took = f"took longer than {setting} ({seconds:g} s)"
                self._end(worker, f"its process {worker.name} was ended because environment {tag!r} {took}")
                raise self._failed("deadline", tag, took) from None
            except RayTaskError as error:
                cause = user_error(error)
                if isinstance(cause, EnvironmentFailedError):
                    kind: Failure = "unusable" if isinstance(cause, UnusableAnswerError) else "error"
                    raise self._failed(kind, tag, cause.reason) from error
                raise cause from error
            except RayError as error:
                self._end(worker, f"its process {worker.name} died; {_details(error)}")
                raise self._lost(worker, tag) from error

    def _lost(self, worker: _Worker, tag: str) -> EpisodeLostError | WorkerError:
        """What an episode fails with whose process is gone."""
        return self._failed("crash", tag, worker.ended) if worker.ended is not None else self._is_closed()

    def _is_closed(self) -> WorkerError:
        return WorkerError(f"the processes of the {self.name} environments have been ended")

    def _failed(self, kind: Failure, tag: str, reason: str) -> EpisodeLostError:
        self._count(f"failed_{kind}")
        return EpisodeLostError(tag, reason, kind)

    # ---- the end of an episode -----------------------------------------------------------------------------------

    async def _keep(self, worker: _Worker, tag: str, key: int, left: asyncio.Event) -> None:
        """Hold an episode's place and slot until it has left and its environment is done with a call it gave up.

        A task from the beginning, not one that the episode's end makes: a loop that is wound up cancels the tasks it
        finds, and would leave a new one behind.
        """
        try:
            await left.wait()
            if worker.ended is None and not self._closed:
                await self._let_go(worker, tag, key)
        finally:
            if worker.alone:
                self._kill(worker)
                self._alone.release()
            worker.episodes -= 1
            self._slots.release()

    async def _let_go(self, worker: _Worker, tag: str, key: int) -> None:
        config = self.environments[tag]
        await asyncio.shield(worker.started)
        # An episode that was alone takes its environment along; in others the environment plays the next one.
        closed = worker.handle.shut_down.remote() if worker.alone else worker.handle.close.remote(key)
        try:
            await asyncio.wait_for(_resolve(closed), config.reset_timeout + config.step_timeout)
        except TimeoutError:
            self._end(
                worker, f"its process {worker.name} was ended because environment {tag!r} does not come to an end"
            )
        except RayError as error:
            self._end(worker, f"its process {worker.name} died; {_details(error)}")


def _no_counts() -> dict[str, float]:
    return dict.fromkeys([*(f"failed_{kind}" for kind in get_args(Failure)), "step_seconds"], 0.0)


async def _resolve(ref: Any) -> Any:
    return await ref


def _details(error: RayError) -> str:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:1])
    return f"its log is in logging_dir. Ray says: {reason}"
