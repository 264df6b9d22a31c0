"""Tag -> reward worker. A reward that fails costs its verdict, never the run.

Verdicts that somebody waits for, to train on them or to validate, are lost only if the reward is at fault, never to a
loaded machine: otherwise a run would not repeat. Verdicts that only monitor are given up once too many are waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from roll_opd.configs.worker_config import RewardConfig
from roll_opd.rewards.base import RewardItem, RewardResult

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time for a grading process to start, on top of the time for each response."""

MAX_PENDING = 4096
"""Responses that may wait for one reward that nobody waits for; more are left ungraded, or a slow one would pile up for
ever."""

VALIDATION = "val:"
"""What the ids of validation samples begin with, see :class:`~roll_opd.trajectory.TrajectoryId`."""


@dataclass(eq=False)
class _Worker:
    """A reward's worker, and how many responses it has been asked about and has not answered."""

    handle: Any
    pending: int = 0


class RewardPool:
    """Grades finished responses.

    Args:
        rewards: name -> (config, worker handles). The first reward whose ``tag_included`` has the tag grades it.
        waits: whether training waits for all verdicts. Validation always does.
    """

    def __init__(self, rewards: Mapping[str, tuple[RewardConfig, Sequence[Any]]], waits: bool = False) -> None:
        self.rewards = {name: (config, [_Worker(h) for h in handles]) for name, (config, handles) in rewards.items()}
        self.waits = waits
        self._turn = 0
        self._dropped = dict.fromkeys(rewards, 0)
        self.failures = 0

    def route(self, tag: str) -> str | None:
        """Return the name of the reward for ``tag``, or None."""
        for name, (config, _) in self.rewards.items():
            if not config.tag_included or tag in config.tag_included:
                return name
        return None

    async def grade(self, items: Sequence[RewardItem]) -> list[RewardResult | None]:
        """Return one result per item; None where no reward covers the tag or the grading failed (counted)."""
        out: list[RewardResult | None] = [None] * len(items)
        by_reward: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            if (name := self.route(item.tag)) is not None:
                by_reward.setdefault(name, []).append(i)
        # Side by side: none waits for another's answer or deadline.
        graded = await asyncio.gather(*(self._grade_by(n, [items[i] for i in mine]) for n, mine in by_reward.items()))
        for mine, results in zip(by_reward.values(), graded, strict=True):
            for i, result in zip(mine, results, strict=True):
                out[i] = result
                self.failures += result is None or result.error is not None
        return out

    async def _grade_by(self, name: str, items: list[RewardItem]) -> list[RewardResult] | list[None]:
        config, workers = self.rewards[name]
        ungraded = [None] * len(items)
        waited_for = self.waits or any(item.id.startswith(VALIDATION) for item in items)
        if not workers or (not waited_for and self._is_full(name, len(items))):
            return ungraded
        worker = self._least_loaded(workers)
        worker.pending += len(items)
        # Items may be graded one after the other, behind those that came before, and a grader may have to be started.
        queue = worker.pending if waited_for else len(items)
        request = worker.handle.grade.remote(items)
        try:
            results = await asyncio.wait_for(_resolve(request), START_SECONDS + config.reward_timeout * queue)
            if [r.id for r in results] != [item.id for item in items]:
                raise ValueError(f"{len(results)} results, or for other responses than the {len(items)} asked for")
            return results
        except (RayError, TimeoutError, ValueError) as error:
            # Monitoring must not stop training; the count is a metric and the log says why.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            logger.warning("reward %s failed on %d responses: %s", name, len(items), reason)
            if isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError):
                if worker in workers:
                    workers.remove(worker)
                if not workers:
                    logger.warning("reward %s has no process left; its samples stay ungraded", name)
            return ungraded
        finally:
            worker.pending -= len(items)

    def _is_full(self, name: str, more: int) -> bool:
        """Whether ``more`` responses would be too many; says so once when that begins and once when it ends."""
        pending = sum(worker.pending for worker in self.rewards[name][1])
        dropped = self._dropped[name]
        if pending + more > MAX_PENDING:
            if not dropped:
                logger.warning(
                    "reward %s is slow: %d responses wait for it, so %d more stay ungraded, as do others until it has "
                    "caught up",
                    name, pending, more,
                )  # fmt: skip
            self._dropped[name] += more
            return True
        if dropped:
            logger.warning("reward %s has caught up; it left %d responses ungraded", name, dropped)
            self._dropped[name] = 0
        return False

    def _least_loaded(self, workers: list[_Worker]) -> _Worker:
        """The worker with the fewest pending responses; among equals they take turns."""
        self._turn += 1
        first = self._turn % len(workers)
        return min([*workers[first:], *workers[:first]], key=lambda worker: worker.pending)


async def _resolve(ref: Any) -> list[RewardResult]:
    return await ref
