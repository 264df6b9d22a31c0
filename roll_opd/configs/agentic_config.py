"""Settings of the agentic pipeline, as far as a plan needs them. A launch refuses them until the pipeline exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import ranged
from roll_opd.configs.pipeline_config import PipelineConfig


@dataclass(frozen=True)
class AgenticConfig(PipelineConfig):
    """Environments and their rewards."""

    custom_envs: dict[str, Any] = field(default_factory=dict)
    """Environments by tag."""
    train_env_manager: dict[str, Any] = field(default_factory=dict)
    """Environments that produce training episodes."""
    val_env_manager: dict[str, Any] = field(default_factory=dict)
    """Environments that produce validation episodes."""
    render_save_dir: str | None = None
    """Folder of rendered episodes; null: none."""
    reward: dict[str, Any] | None = None
    """Reward worker of environments that ask for one."""
    reward_normalization: dict[str, Any] = field(default_factory=dict)
    """How episode scores are normalised."""
    env_monitor: dict[str, Any] = field(default_factory=dict)
    """Watch for hung environments."""
    batch_adjust_mode: Literal["copy", "delete", "auto", "random_sample"] = "delete"
    """How a batch gets its size; copies are never trained here."""
    episode_reward_weight: float = 1.0
    """Weight of the episode's outcome."""
    step_reward_weight: float = 1.0
    """Weight of step rewards."""
    step_reward_gamma: float = ranged(0.95, ge=0, le=1)
    """Discount per step."""
    ratio_type: Literal["token", "segment"] = "token"
    """Policy ratio per token or per turn."""
    use_token_reward: bool = False
    """Take rewards per token from the environment."""
