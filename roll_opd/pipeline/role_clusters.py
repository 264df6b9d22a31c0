"""Starts the processes of every role of a run, and ends them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from roll_opd.configs.launch_checks import starts_critic
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import TeacherConfig, WorkerConfig
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.cores import Cores
from roll_opd.distributed.placement import Placement, cpu_threads, lent_cores, usable_cores
from roll_opd.distributed.runtime import get
from roll_opd.distributed.turns import Turns
from roll_opd.pipeline.needs import updates_per_step, want_of
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.reward_worker import RewardWorkerActor
from roll_opd.pipeline.teacher_pool import TeacherPool
from roll_opd.pipeline.workers import CriticWorker, InferWorker, TrainWorker
from roll_opd.trajectory import BASE_MODEL, REFERENCE

logger = logging.getLogger(__name__)


def scorers_of(config: PipelineConfig) -> dict[str, TeacherConfig]:
    """Everything that scores the student's tokens: teachers, or the reference of a run without; and a base model."""
    scorers = dict(config.teachers)
    if config.reference is not None and config.needs_reference:
        worker = {f.name: getattr(config.reference, f.name) for f in dataclasses.fields(WorkerConfig)}
        scorers[REFERENCE] = TeacherConfig(**worker)
    if config.base_scorer is not None:
        scorers[BASE_MODEL] = config.base_scorer
    return scorers


class RoleClusters:
    """The clusters of one run.

    Attributes:
        train: the student's trainer.
        infer: the student's generator.
        critic: the value model, where the estimator of the advantage needs one.
        scorers: name -> cluster of each teacher, of the reference, of the base model.
        teacher_pool: scores trajectories.
        reward_pool: grades them.
        turns: moves those that share devices.
        cores: lends this node's cores to those that sample and score.

    Args:
        loaded: a checked config, and the names that its user gave to the roles.
        log_dir: folder of the processes' logs.
    """

    def __init__(self, loaded: LoadedConfig, log_dir: Path) -> None:
        self.config = config = loaded.config
        self.yaml_names = dict(loaded.yaml_names)
        models: dict[str, WorkerConfig] = {"actor_train": config.actor_train, "actor_infer": config.actor_infer}
        self.scorer_configs = scorers_of(config)
        for name, scorer in self.scorer_configs.items():
            models[f"teacher-{name}"] = scorer
            self.yaml_names[f"teacher-{name}"] = _yaml_name(loaded, name)
        if starts_critic(config):
            assert config.critic is not None
            models["critic"] = config.critic
        # The critic is busy before and after the student's trainer, never beside it.
        alone = {"actor_train": "train", "critic": "critic"}
        phases = {role: alone.get(role, "rollout") for role in models}
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
        self.critic = cluster("critic", CriticWorker) if "critic" in models else None
        self.scorers = {name: cluster(f"teacher-{name}", InferWorker) for name in self.scorer_configs}
        self.rewards = {
            name: Cluster(f"reward-{name}", reward, RewardWorkerActor, threads=1, **shared)
            for name, reward in config.rewards.items()
        }
        total, borrowers = lent_cores(models, phases, threads, usable_cores())
        named = {f"teacher-{name}": scorer for name, scorer in self.scorers.items()} | {"actor_infer": self.infer}
        self.cores = Cores(total, {w: threads[role] for role in borrowers for w in named[role].workers})
        fixed = ", ".join(f"{role} {n}" for role, n in threads.items() if role not in borrowers)
        lent = f"; {total} lent to those busy of {', '.join(borrowers)}" if borrowers else ""
        logger.info("threads per process: %s%s", fixed, lent)
        roles = {"actor_train": self.train, "critic": self.critic, "actor_infer": self.infer}
        scorers = {f"teacher-{name}": scorer for name, scorer in self.scorers.items()}
        # A teacher does without replicas that have died (see TeacherPool); the ranks of one model do not.
        spare = [role for role, scorer in scorers.items() if not scorer.is_sharded]
        self.turns = Turns({role: c for role, c in {**roles, **scorers}.items() if c is not None}, spare)
        self._setup()
        self.teacher_pool = TeacherPool(
            {name: (self.scorer_configs[name], c.replicas) for name, c in self.scorers.items()},
            dict.fromkeys(config.teachers, want_of(config)),
            self.cores,
        )
        self.reward_pool = RewardPool(
            {name: (config.rewards[name], c.workers) for name, c in self.rewards.items()},
            waits=config.mode != "pure_opd",
        )

    def _setup(self) -> None:
        """Load all models, side by side where they have devices of their own; the first failure is what the user sees.

        Roles that share devices load one after the other, each leaving before the next one comes: trainers first,
        engines last, because an engine takes what memory it finds.
        """
        pending: list[Any] = []
        for name, cluster in self.rewards.items():
            reward = self.config.rewards[name]
            pending += cluster.start_all("setup", name, reward.worker_cls, reward)
        setups = self._model_setups()
        for role, cluster, arguments in setups:
            if role not in self.turns.sharing:
                self._connect(role, cluster)
                pending += cluster.start_all("setup", *arguments)
        for role, cluster, arguments in setups:
            if role in self.turns.sharing:
                self._connect(role, cluster)
                get(cluster.start_all("setup", *arguments), self.config.rpc_timeout, f"loading {self.yaml_names[role]}")
                self.turns.left(role)
        get(pending, self.config.rpc_timeout, "loading the models")

    def _connect(self, role: str, cluster: Cluster) -> None:
        if role in ("actor_train", "critic") or cluster.is_sharded:
            cluster.connect_ranks()

    def _model_setups(self) -> list[tuple[str, Cluster, tuple[Any, ...]]]:
        """Each role that holds a model, its cluster, and what its workers' ``setup`` takes."""
        config, student = self.config, self.config.actor_train.model_args
        # While the critic warms up, the student's schedule stands still.
        warmup = config.critic_warmup if self.critic is not None else 0
        setups: list[tuple[str, Cluster, tuple[Any, ...]]] = []

        def trained(role: str, cluster: Cluster, worker: WorkerConfig, steps: int) -> None:
            updates = max(steps, 0) * updates_per_step(config, worker)
            setups.append((role, cluster, (self.yaml_names[role], worker, student, config.max_grad_norm, updates)))

        trained("actor_train", self.train, config.actor_train, config.max_steps - warmup)
        if self.critic is not None and config.critic is not None:
            trained("critic", self.critic, config.critic, config.max_steps)
        assert config.sequence_length is not None
        teachers_generate = config.validation is not None and config.validation.teacher_accuracy
        for name, cluster in self.scorers.items():
            role, scorer = f"teacher-{name}", self.scorer_configs[name]
            generates = teachers_generate and name in config.teachers
            longest = config.sequence_length
            if scorer.teacher_args.context_template is not None:
                longest = max(longest, config.longest_view(scorer))
            setups.append((role, cluster, (self.yaml_names[role], scorer, student, generates, longest)))
        own = (self.yaml_names["actor_infer"], config.actor_infer, student, True, config.sequence_length)
        return [*setups, ("actor_infer", self.infer, own)]

    def stop(self) -> None:
        """End every process."""
        for cluster in self.rewards.values():
            # Rewards own processes themselves; those notice their parent's death, but asking is faster.
            cluster.start_all("close")
        models = [*self.scorers.values(), self.infer, self.train, *([] if self.critic is None else [self.critic])]
        for cluster in [*self.rewards.values(), *models]:
            cluster.stop()
        self.placement.release()


def _yaml_name(loaded: LoadedConfig, scorer: str) -> str:
    """The scorer's place in the YAML, for messages."""
    if scorer == BASE_MODEL:
        return "opd_args.base_model"
    return REFERENCE if scorer == REFERENCE else loaded.teacher_yaml_name(scorer)
