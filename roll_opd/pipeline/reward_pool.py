"""Tag -> reward worker. A reward that fails costs its verdict, never the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from roll_opd.configs.worker_config import RewardConfig
from roll_opd.rewards.base import RewardItem, RewardResult

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time for a grading process to start, on top of the time for each response."""

MAX_PENDING = 4096
"""Responses that may wait for one reward; more are left ungraded, or a slow reward would pile up for ever."""


class RewardPool:
    """Grades finished responses.

    Args:
        rewards: name -> (config, worker handles). The first reward whose ``tag_included`` has the tag grades it.
    """

    def __init__(self, rewards: Mapping[str, tuple[RewardConfig, Sequence[Any]]]) -> None:
        self.rewards = {name: (config, list(workers)) for name, (config, workers) in rewards.items()}
        self._turn = 0
        self._pending = dict.fromkeys(rewards, 0)
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
        for name, mine in by_reward.items():
            for i, result in zip(mine, await self._grade_by(name, [items[i] for i in mine]), strict=True):
                out[i] = result
                self.failures += result is None or result.error is not None
        return out

    async def _grade_by(self, name: str, items: list[RewardItem]) -> list[RewardResult] | list[None]:
        config, workers = self.rewards[name]
        ungraded = [None] * len(items)
        if not workers or self._pending[name] + len(items) > MAX_PENDING:
            return ungraded
        self._turn += 1
        worker = workers[self._turn % len(workers)]
        self._pending[name] += len(items)
        request = worker.grade.remote(items)
        try:
            # Items may be graded one after the other, and a grader may have to be started first.
            results = await asyncio.wait_for(_resolve(request), START_SECONDS + config.reward_timeout * len(items))
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
            self._pending[name] -= len(items)


async def _resolve(ref: Any) -> list[RewardResult]:
    return await ref
