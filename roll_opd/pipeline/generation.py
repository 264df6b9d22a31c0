"""Asks engines for responses: streams them back, brings dead engines back, and says what went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from roll_opd.distributed.runtime import user_error
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult
from roll_opd.errors import EngineDiedError, GenerationError
from roll_opd.trajectory import Trajectory, TrajectoryId, check_per_token

logger = logging.getLogger(__name__)


class Generation:
    """The engines' side of a rollout.

    Args:
        revive: brings a worker back whose engine has died, with the weights that it had. None: a death is the end.
        deadline: seconds without any response after which the run stops.
    """

    def __init__(self, revive: Callable[[Any], Awaitable[None]] | None = None, deadline: float = 3600.0) -> None:
        self.revive = revive
        self.deadline = deadline
        # By worker: how many engines it has lost, and the lock of whoever brings it back.
        self._lost: defaultdict[int, int] = defaultdict(int)
        self._reviving: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ask(
        self, worker: Any, requests: Sequence[GenerateRequest], finished: Callable[[GenerateResult], None]
    ) -> None:
        """Have ``worker`` answer ``requests``; hand results to ``finished`` as they come.

        Raises:
            GenerationError: the engine is silent, dead beyond revival, or at fault.
        """
        left = {request.id: request for request in requests}
        while left:
            # An engine that is being replaced can answer nobody: there is none for a while, then one without weights.
            async with self._reviving[id(worker)]:
                lost = self._lost[id(worker)]
            try:
                await self._ask_once(worker, list(left.values()), finished, left)
                return
            except EngineDiedError as error:
                if self.revive is None:
                    raise
                logger.warning("%s; %d responses will be asked for again", error, len(left))
                await self._bring_back(worker, lost, self.revive)

    async def _bring_back(self, worker: Any, lost: int, revive: Callable[[Any], Awaitable[None]]) -> None:
        """Replace the engine of ``worker``, once, however many calls it took along; it had lost ``lost`` before."""
        async with self._reviving[id(worker)]:
            if self._lost[id(worker)] == lost:
                await revive(worker)
                self._lost[id(worker)] += 1

    async def _ask_once(
        self,
        worker: Any,
        requests: list[GenerateRequest],
        finished: Callable[[GenerateResult], None],
        left: dict[TrajectoryId, GenerateRequest],
    ) -> None:
        """Hand results on as they come, each taken off ``left``."""
        try:
            stream = worker.generate.options(num_returns="streaming").remote(requests)
            while True:
                try:
                    # Not wait_for, which loses a cancellation that comes together with the answer (Python 3.11).
                    async with asyncio.timeout(self.deadline):
                        ref = await anext(stream)
                except StopAsyncIteration:
                    return
                for result in await ref:
                    left.pop(result.id, None)
                    finished(result)
        except RayTaskError as error:  # before TimeoutError: Ray's copy of a worker's exception is of both classes
            raise user_error(error) from error
        except TimeoutError:
            raise GenerationError(f"the generating engine gave no response for {self.deadline:.0f} s") from None
        except RayActorError as error:
            raise GenerationError(f"the generating process died: {str(error).splitlines()[0]}") from error


def check_sampled(trajectory: Trajectory) -> None:
    """Refuse what an engine must not return.

    Raises:
        GenerationError: a log-probability that is not finite, or arrays of the wrong length.
    """
    try:
        check_per_token("infer_logprobs", trajectory.infer_logprobs, trajectory)
        check_per_token("weight_version", trajectory.weight_version, trajectory)
    except ValueError as error:
        raise GenerationError(f"an engine returned something unusable: {error}") from error
