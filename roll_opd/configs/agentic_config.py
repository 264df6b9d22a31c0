"""Settings of the agentic pipeline: environments, the workers that run them, and how episodes become rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.configs.field_spec import as_list, parse_with, ranged
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.roll_compat import resolve_class_path
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig

ROLL_GROUP_FILTER = "roll_opd.pipeline.agentic.agentic_pipeline.GroupFilter"


def _group_filter(value: Any, path: str) -> Any:
    """ROLL's default class keeps every group."""
    found = resolve_class_path(value, path)
    return None if found == ROLL_GROUP_FILTER else found


@dataclass(frozen=True)
class LLMProxyArguments:
    """Who answers for the student in an environment."""

    proxy_type: Literal["policy", "openai", "random"] = "policy"
    """`policy`: the student; `openai`: a server; `random`: random actions, for tests of an environment."""
    proxy_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the proxy."""


@dataclass(frozen=True)
class EnvManagerConfig(WorkerConfig):
    """Workers that run environments. The members of a group play the same episode (environment, seed and prompt)."""

    llm_proxy: LLMProxyArguments = field(default_factory=LLMProxyArguments)
    """Who answers for the student."""
    num_env_groups: int = ranged(128, ge=1)
    """Groups of environments that run at the same time. Validation plays each of them once."""
    group_size: int = ranged(1, ge=1)
    """Episodes of a group. It divides `rollout_batch_size`, which counts episodes."""
    group_size_redundancy: int = ranged(0, ge=0)
    """Episodes of a group beyond `group_size`; the first ones that finish count."""
    tags: list[str] = field(default_factory=list, metadata=parse_with(as_list))
    """Keys of `custom_envs` that run here. None in `val_env_manager`: no validation."""
    num_groups_partition: list[int] | None = None
    """Groups of each tag, in the order of `tags`; null shares them out evenly. Their sum is `num_env_groups`. Always
    set after load."""
    max_traj_per_env: int = ranged(-1, ge=-1)
    """Episodes that one environment may play in a step: a number that is too small for the batch is refused. -1: as
    many as the batch needs."""
    max_env_num_per_worker: int = ranged(0, ge=0)
    """Environments in one worker process; 0: all of them."""
    format_penalty: float = 0.0
    """Added to the reward of a turn whose text has not the form that was asked for."""
    group_filter_cls: str | None = field(default=None, metadata=parse_with(_group_filter))
    """Import path of a class that decides which groups are trained; null: all."""

    @property
    def num_envs(self) -> int:
        """Environments, and so episodes, at the same time."""
        return self.num_env_groups * self.group_size

    @property
    def num_processes(self) -> int:
        """Processes that hold them."""
        return -(-self.num_envs // (self.max_env_num_per_worker or self.num_envs))


@dataclass(frozen=True)
class EnvRewardConfig(WorkerConfig):
    """A model that judges for environments that ask for one."""

    llm_proxy: LLMProxyArguments = field(default_factory=LLMProxyArguments)
    """How the judge is reached."""


@dataclass(frozen=True)
class RewardNormalizationArguments:
    """What the scores of episodes are centred and scaled over."""

    grouping: str = "batch"
    """Episodes that are compared: all of the `batch`, those of one draw (`traj_group_id`: same environment and seed),
    or those of one environment (`tags`)."""
    method: Literal["identity", "mean", "mean_std", "asym_clip"] = "identity"
    """Centre, scale, or neither; `norm_mean_type` and `norm_std_type` win where they are set."""
    norm_mean_type: Literal["batch", "group"] | None = None
    """What scores are centred over; null: as `method` says."""
    norm_std_type: Literal["batch", "group"] | None = None
    """What scores are scaled over; null: as `method` says."""


@dataclass(frozen=True)
class EnvMonitorArguments:
    """Watch for environments that hang."""

    enable: bool = True
    """Watch."""
    monitor_interval: float = ranged(30.0, gt=0)
    """Seconds between two looks."""
    hung_timeout: float = ranged(3600.0, gt=0)
    """Seconds without a step after which an environment counts as hung."""


@dataclass(frozen=True)
class AgenticConfig(PipelineConfig):
    """Environments and their rewards."""

    custom_envs: dict[str, EnvironmentConfig] = field(default_factory=dict)
    """Environments by tag."""
    train_env_manager: EnvManagerConfig = field(default_factory=EnvManagerConfig)
    """Environments that produce training episodes."""
    val_env_manager: EnvManagerConfig = field(default_factory=EnvManagerConfig)
    """Environments that produce validation episodes."""
    render_save_dir: str | None = None
    """Folder that keeps the episodes of every validation step as text; null: none."""
    reward: EnvRewardConfig | None = None
    """Reward worker of environments that ask for one."""
    reward_normalization: RewardNormalizationArguments = field(default_factory=RewardNormalizationArguments)
    """How episode scores are normalised."""
    env_monitor: EnvMonitorArguments = field(default_factory=EnvMonitorArguments)
    """Watch for hung environments."""
    batch_adjust_mode: Literal["copy", "delete", "auto", "random_sample"] = "copy"
    """How a batch gets its size in ROLL. Without effect: no row is trained twice and none is left out, and what does
    not divide is a smaller last optimizer step."""
    episode_reward_weight: float = 1.0
    """Weight of the episode's score in `gigpo`."""
    step_reward_weight: float = 1.0
    """Weight of the turns' returns, compared by state, in `gigpo`."""
    step_reward_gamma: float = ranged(0.95, ge=0, le=1)
    """Discount per turn, of `step_reinforce` and `gigpo` alone."""
    ratio_type: Literal["token", "segment"] = "token"
    """Policy ratio per token or per turn."""
    use_token_reward: bool = False
    """Take rewards per token from the environment."""

    @property
    def group_size(self) -> int:
        """Episodes of one environment and seed."""
        return self.train_env_manager.group_size

    @property
    def groups_per_step(self) -> int:
        """Pairs of environment and seed that a step plays; `rollout_batch_size` counts their episodes."""
        return self.rollout_batch_size // self.group_size

    def context_length(self, scorer: TeacherConfig) -> int:
        """Tokens that the prompt of a teacher with a view of its own may have."""
        assert self.sequence_length is not None, "set at load"
        return scorer.teacher_args.context_length or self.sequence_length

    def longest_view(self, scorer: TeacherConfig) -> int:
        """Tokens of the longest sequence that a teacher with a view of its own sees.

        Behind that prompt comes everything from the first sampled token on, the rest of an episode: ``sequence_length``
        bounds it, and ``response_length`` a turn.
        """
        assert self.sequence_length is not None, "set at load"
        return self.context_length(scorer) + self.sequence_length

    def environments_in_use(self) -> dict[str, EnvironmentConfig]:
        """The entries of `custom_envs` that train or validate, by tag."""
        tags = dict.fromkeys([*self.train_env_manager.tags, *self.val_env_manager.tags])
        return {tag: self.custom_envs[tag] for tag in tags}
