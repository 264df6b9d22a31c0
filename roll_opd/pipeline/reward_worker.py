"""The actor around a reward. It holds no model, so this file imports no torch."""

from __future__ import annotations

from pathlib import Path

from roll_opd.configs.worker_config import RewardConfig
from roll_opd.distributed.process_spec import ProcessSpec
from roll_opd.errors import ConfigError, RollOPDError
from roll_opd.rewards import resolve_reward
from roll_opd.rewards.base import RewardItem, RewardResult
from roll_opd.utils.logging import configure_logging, log_file_path


class RewardWorkerActor:
    """One worker of one reward: holds the object that ``worker_cls`` names. An async actor."""

    def __init__(self, spec: ProcessSpec) -> None:
        configure_logging(log_file=log_file_path(Path(spec.log_dir), spec.name), process=spec.name)

    async def setup(self, name: str, worker_cls: str, config: RewardConfig) -> None:
        """Build the reward."""
        field = f"rewards.{name}.worker_cls"
        cls = resolve_reward(worker_cls, field)
        try:
            self.reward = cls(name, {"timeout": config.reward_timeout, **config.reward_args})
        except RollOPDError:
            raise
        except Exception as error:
            # Policy: refuse. A reward is anybody's code; what its constructor raises is the user's to mend.
            raise ConfigError(field, f"{worker_cls} cannot be built: {type(error).__name__}: {error}") from error

    async def grade(self, items: list[RewardItem]) -> list[RewardResult]:
        """Grade, in order."""
        return await self.reward.grade(items)

    async def close(self) -> None:
        """End the reward's own processes."""
        self.reward.close()
