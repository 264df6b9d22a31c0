"""Starts the processes of every role of a run, and ends them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.placement import Placement, cpu_threads, usable_cores
from roll_opd.distributed.runtime import get
from roll_opd.pipeline.batching import mini_batch_size
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.reward_worker import RewardWorkerActor
from roll_opd.pipeline.teacher_pool import TeacherPool
from roll_opd.pipeline.workers import InferWorker, TrainWorker

logger = logging.getLogger(__name__)


def updates_per_step(config: PipelineConfig) -> int:
    """Optimizer steps of one pipeline step."""
    trajectories = config.rollout_batch_size * config.num_return_sequences_in_group
    size = mini_batch_size(config.actor_train, config.actor_train.world_size or 1)
    return config.ppo_epochs * -(-trajectories // size)


class RoleClusters:
    """The clusters of one run.

    Attributes:
        train: the student's trainer.
        infer: the student's generator.
        teachers: name -> cluster.
        teacher_pool: scores trajectories.
        reward_pool: grades them.

    Args:
        loaded: a checked config, and the names that its user gave to the roles.
        log_dir: folder of the processes' logs.
    """

    def __init__(self, loaded: LoadedConfig, log_dir: Path) -> None:
        self.config = config = loaded.config
        self.yaml_names = dict(loaded.yaml_names)
        models: dict[str, WorkerConfig] = {"actor_train": config.actor_train, "actor_infer": config.actor_infer}
        for name, teacher in config.teachers.items():
            models[f"teacher-{name}"] = teacher
            self.yaml_names[f"teacher-{name}"] = loaded.teacher_yaml_name(name)
        phases = {role: "train" if role == "actor_train" else "rollout" for role in models}
        threads = cpu_threads(models, phases, usable_cores())
        self.placement = Placement(models, self.yaml_names)
        shared: dict[str, Any] = {
            "placement": self.placement,
            "log_dir": str(log_dir),
            "seed": config.seed,
            "system_envs": config.system_envs,
            "timeout": config.rpc_timeout,
        }

        def cluster(role: str, worker_cls: type) -> Cluster:
            return Cluster(role, models[role], worker_cls, threads=threads[role], **shared)

        self.train = cluster("actor_train", TrainWorker)
        self.infer = cluster("actor_infer", InferWorker)
        self.teachers = {name: cluster(f"teacher-{name}", InferWorker) for name in config.teachers}
        self.rewards = {
            name: Cluster(f"reward-{name}", reward, RewardWorkerActor, threads=1, **shared)
            for name, reward in config.rewards.items()
        }
        logger.info("threads per process: %s", ", ".join(f"{role} {n}" for role, n in threads.items()))
        self._setup()
        self.teacher_pool = TeacherPool({n: (config.teachers[n], c.workers) for n, c in self.teachers.items()})
        self.reward_pool = RewardPool({n: (config.rewards[n], c.workers) for n, c in self.rewards.items()})

    def _setup(self) -> None:
        """Load all models side by side; the first failure is the error that the user sees."""
        config, student = self.config, self.config.actor_train.model_args
        self.train.connect_ranks()
        pending = self.train.start_all(
            "setup",
            self.yaml_names["actor_train"],
            config.actor_train,
            student,
            config.max_grad_norm,
            config.max_steps * updates_per_step(config),
        )
        pending += self.infer.start_all("setup", self.yaml_names["actor_infer"], config.actor_infer, student, True)
        teachers_generate = config.validation is not None and config.validation.teacher_accuracy
        for name, cluster in self.teachers.items():
            yaml_name = self.yaml_names[f"teacher-{name}"]
            pending += cluster.start_all("setup", yaml_name, config.teachers[name], student, teachers_generate)
        for name, cluster in self.rewards.items():
            reward = config.rewards[name]
            pending += cluster.start_all("setup", name, reward.worker_cls, reward)
        get(pending, config.rpc_timeout, "loading the models")

    def stop(self) -> None:
        """End every process."""
        for cluster in self.rewards.values():
            # Rewards own processes themselves; those notice their parent's death, but asking is faster.
            cluster.start_all("close")
        for cluster in [*self.rewards.values(), *self.teachers.values(), self.infer, self.train]:
            cluster.stop()
        self.placement.release()
