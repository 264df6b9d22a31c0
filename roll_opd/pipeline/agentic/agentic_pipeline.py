"""Multi-turn episodes in environments: groups of one environment and seed, rewards by the environment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from roll_opd.configs.agentic_config import AgenticConfig, EnvManagerConfig
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.datasets.sampling import DomainOrder
from roll_opd.distributed.strategy.base import Sampling
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.pipeline.agentic.env_pool import EnvPool, EnvProcesses
from roll_opd.pipeline.agentic.episodes import EnvTask, EpisodeRollout, PrivilegedView
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.generation import Generation
from roll_opd.pipeline.metrics import environment_metrics, episode_metrics
from roll_opd.pipeline.needs import want_of
from roll_opd.pipeline.preflight.env_checks import ENV_CHECKS
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import errors_of, run_checks, wanted
from roll_opd.pipeline.preflight.model_checks import MODEL_CHECKS
from roll_opd.pipeline.preflight.probe import MAX_NEW_TOKENS, NUM_PROMPTS, STREAM
from roll_opd.pipeline.preflight.setting_checks import SETTING_CHECKS
from roll_opd.pipeline.role_clusters import RoleClusters
from roll_opd.pipeline.rollout import Engines
from roll_opd.pipeline.trajectory_stream import Batch, TrajectoryStream
from roll_opd.pipeline.validation import sampling_of, validation_metrics
from roll_opd.pipeline.workers import SIDE_BY_SIDE
from roll_opd.trajectory import TrajectoryId

logger = logging.getLogger(__name__)

VALIDATION_SEED = 1234
"""Seed of validation episodes: fixed, so that steps and runs compare."""


class AgenticPipeline(BasePipeline):
    """Environments -> episodes -> teachers -> advantages -> update."""

    config: AgenticConfig
    vocabulary: Vocabulary

    def prepare(self) -> None:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        facts = Facts(self.loaded, self.report.note)
        checks = wanted(self.config, (*MODEL_CHECKS, *SETTING_CHECKS, *ENV_CHECKS))
        self.findings += run_checks(checks, facts)
        if not errors_of(self.findings):
            self.tokenizer, self.vocabulary = facts.tokenizer, facts.vocabulary

    # ---- where trajectories come from ----------------------------------------------------------------------------

    def build_stream(self, clusters: RoleClusters) -> TrajectoryStream:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        config = self.config
        self._tasks = task_order(config.train_env_manager, config.seed, "train")
        sampling = sampling_of(config.actor_infer.generating_args, config.response_length)
        if want_of(config).given:
            sampling = replace(sampling, report_top_ids=config.opd_args.top_k)
        managers = {"train": config.train_env_manager, "val": config.val_env_manager}
        self.pools = {name: self._pool(name, manager) for name, manager in managers.items() if manager.tags}
        assert config.actor_infer.strategy_args is not None and config.sequence_length is not None
        self.rollout = EpisodeRollout(
            environments=config.environments_in_use(),
            pools=self.pools,
            penalties={name: manager.format_penalty for name, manager in managers.items()},
            generation=Generation(self._revive, config.rpc_timeout),
            side_by_side=config.actor_infer.strategy_args.strategy_name in SIDE_BY_SIDE,
            tokenizer=self.tokenizer,
            stop_ids=self.vocabulary.stop_ids,
            max_length=config.sequence_length,
            views=self._views(clusters),
            template_kwargs=self._template_kwargs(),
        )
        return TrajectoryStream(
            engines=Engines("actor_infer", clusters.infer.workers),
            rollout=self.rollout,
            teachers=clusters.teacher_pool,
            rewards=clusters.reward_pool,
            seed=config.seed,
            group_size=config.group_size,
            sampling=sampling,
            turns=clusters.turns,
            cores=clusters.cores,
        )

    def _pool(self, name: str, manager: EnvManagerConfig) -> EnvPool:
        environments = {tag: self.config.custom_envs[tag] for tag in manager.tags}
        pool = EnvPool(
            name=name,
            environments=environments,
            num_envs=manager.num_envs,
            envs_per_worker=manager.max_env_num_per_worker,
            processes=EnvProcesses(str(self.report.folder.logs), {**self.config.system_envs, **manager.system_envs}),
        )
        self.at_end(pool.close)
        return pool

    def _views(self, clusters: RoleClusters) -> dict[str, PrivilegedView]:
        """Teachers with a view of their own."""
        views = {}
        for name, teacher in clusters.scorer_configs.items():
            template = teacher.teacher_args.context_template
            if template is not None:
                views[name] = PrivilegedView(template, self.config.context_length(teacher), _covers(teacher))
        return views

    def _template_kwargs(self) -> dict[str, bool]:
        data = self.config.actor_train.data_args
        return {} if data is None or data.enable_thinking is None else {"enable_thinking": data.enable_thinking}

    def task_of(self, draw: int) -> EnvTask:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        return self._tasks(draw)

    def probe_batch(self) -> Batch:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`; environments are the first draws' own."""
        draws = range(max(NUM_PROMPTS, len(self.config.train_env_manager.tags)))
        sampling = self.stream.sampling
        sampling = replace(sampling, max_new_tokens=min(MAX_NEW_TOKENS, sampling.max_new_tokens))
        return self.stream.validate([self.task_of(d) for d in draws], 1, sampling, self.config.seed, stream=STREAM)

    def step_metrics(self) -> dict[str, float]:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`: what the training environments did."""
        return {f"env/{name}": value for name, value in self.pools["train"].take_counts().items()}

    # ---- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Play the validation environments, each group once, with fixed seeds; success, reward, reverse KL."""
        manager = self.config.val_env_manager
        if not manager.tags:
            return
        sampling = self._validation_sampling()
        order = task_order(manager, VALIDATION_SEED, "val")
        tasks = [order(draw) for draw in range(manager.num_env_groups)]
        with self.report.phase("validation"):
            batch = self.stream.validate(tasks, manager.group_size, sampling, VALIDATION_SEED)
            samples = batch.trajectories
            metrics = {"failed_groups": float(batch.failed_groups)}
            if samples:
                metrics |= validation_metrics(samples, sampling) | environment_metrics(samples)
                metrics |= {k.removeprefix("/"): v for k, v in episode_metrics(samples, "").items()}
            else:
                logger.warning("validation: every group failed, one of them with: %s", batch.failure)
            self.report.validation(self.step, metrics, samples, self.tokenizer)

    def _validation_sampling(self) -> Sampling:
        return sampling_of(self.config.val_env_manager.generating_args, self.config.response_length)


def task_order(manager: EnvManagerConfig, seed: int, stream: str) -> Callable[[int], EnvTask]:
    """The environment and seed of each draw, a pure function of its number: tags by their shares, evenly mixed."""
    partition = manager.num_groups_partition
    assert partition is not None, "set at load"
    shares = {tag: float(groups) for tag, groups in zip(manager.tags, partition, strict=True)}
    # Tags as domains: a validation plays each of a tag's groups once, and training never runs out of them.
    sizes = dict(zip(manager.tags, partition, strict=True)) if stream == "val" else dict.fromkeys(shares, 1)
    order = DomainOrder(sizes, shares, seed, False, manager.num_env_groups)

    def task(draw: int) -> EnvTask:
        tag, number = order.index(draw)
        # Validation counts each tag's groups from 0, so that an environment over a file can walk through its rows.
        # Training's seeds have 31 bits: what every environment's random generator takes.
        return EnvTask(tag, number if stream == "val" else TrajectoryId(draw, 0, 0, "environment").seed(seed) >> 32)

    return task


def _covers(teacher: TeacherConfig) -> Callable[[str], bool]:
    return lambda tag: not teacher.tag_included or tag in teacher.tag_included
