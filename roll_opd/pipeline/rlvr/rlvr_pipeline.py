"""Single-turn prompts: rows of a file, groups of samples, rewards by tag."""

from __future__ import annotations

import logging
from dataclasses import replace

from roll_opd.algorithms.reward_shaping import query_filter
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.datasets.prompts import Prompt
from roll_opd.distributed.strategy.base import Sampling
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.generation import Generation
from roll_opd.pipeline.metrics import reward_metrics
from roll_opd.pipeline.needs import want_of
from roll_opd.pipeline.preflight.data_checks import DATA_CHECKS
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import errors_of, run_checks, wanted
from roll_opd.pipeline.preflight.model_checks import MODEL_CHECKS
from roll_opd.pipeline.preflight.probe import LOOK_AHEAD, MAX_NEW_TOKENS, STREAM, pick_prompts
from roll_opd.pipeline.preflight.setting_checks import SETTING_CHECKS
from roll_opd.pipeline.reward_pool import RewardPool
from roll_opd.pipeline.rlvr.prompt_rollout import PromptRollout
from roll_opd.pipeline.rlvr.prompt_source import PromptSource
from roll_opd.pipeline.role_clusters import RoleClusters
from roll_opd.pipeline.rollout import Engines
from roll_opd.pipeline.trajectory_stream import TEACHER_ROLE, Batch, TrajectoryStream
from roll_opd.pipeline.validation import sampling_of, validation_metrics
from roll_opd.trajectory import Trajectory

logger = logging.getLogger(__name__)


class RLVRPipeline(BasePipeline):
    """Prompts -> samples -> rewards beside teachers -> advantages -> update."""

    source: PromptSource

    def prepare(self) -> None:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        facts = Facts(self.loaded, self.report.note)
        checks = wanted(self.config, (*MODEL_CHECKS, *SETTING_CHECKS, *DATA_CHECKS))
        self.findings += run_checks(checks, facts)
        if not errors_of(self.findings):
            self.tokenizer, self.source = facts.tokenizer, facts.source

    # ---- where trajectories come from ----------------------------------------------------------------------------

    def build_stream(self, clusters: RoleClusters) -> TrajectoryStream:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        config = self.config
        sampling = sampling_of(config.actor_infer.generating_args, config.response_length)
        if want_of(config).given:
            sampling = replace(sampling, report_top_ids=config.opd_args.top_k)
        assert isinstance(config, RLVRConfig)
        filters = any(r.query_filter_config.type != "no_filter" for r in config.rewards.values())
        extra = config.max_additional_running_prompts if config.is_use_additional_prompts else 0
        rollout = PromptRollout(
            Generation(self._revive, config.rpc_timeout),
            lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            lambda tag: clusters.reward_pool.route(tag) is not None,
            self.source.contexts_of if self.source.contexts else None,
        )
        return TrajectoryStream(
            engines=Engines("actor_infer", clusters.infer.workers),
            rollout=rollout,
            teachers=clusters.teacher_pool,
            rewards=clusters.reward_pool,
            seed=config.seed,
            group_size=config.group_size,
            sampling=sampling,
            keep_group=self.keeps if filters and self.signal.uses_rewards else None,
            extra_draws=extra,
            turns=clusters.turns,
            cores=clusters.cores,
        )

    def task_of(self, draw: int) -> Prompt:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`."""
        return self.source.prompt_of(draw)

    def keeps(self, group: list[Trajectory]) -> bool:
        """Whether the filter of the reward that graded ``group`` lets it train; an ungraded group never does."""
        name = self.clusters.reward_pool.route(group[0].tag)
        rewards = [t.reward for t in group if t.reward is not None]
        if name is None or not rewards:
            return name is None
        spec = self.config.rewards[name].query_filter_config
        return query_filter(spec.type, spec.filter_args, rewards)

    def probe_batch(self) -> Batch:
        """See :class:`~roll_opd.pipeline.base_pipeline.BasePipeline`; prompts are the first draws' own."""
        ahead = [self.task_of(draw) for draw in range(min(LOOK_AHEAD, len(self.source.train)))]
        prompts = pick_prompts(ahead, [scorer.tag_included for scorer in self.clusters.scorer_configs.values()])
        stream = self.stream
        sampling = replace(stream.sampling, max_new_tokens=min(MAX_NEW_TOKENS, stream.sampling.max_new_tokens))
        # Nobody reads their verdicts, and a reward that hangs must not hold up the start.
        stream.rewards, rewards = RewardPool({}), stream.rewards
        try:
            batch = stream.validate(prompts, 1, sampling, self.config.seed, stream=STREAM)
            stream.verdicts(batch, None)
        finally:
            stream.rewards = rewards
        return batch

    # ---- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Sample held-out prompts with fixed seeds; accuracy by the rewards, reverse KL by the teachers."""
        validation = self.config.validation
        if not self.source.validation or validation is None:
            return
        sampling = sampling_of(validation.generating_args, self.config.response_length)
        num_samples = validation.generating_args.num_return_sequences or 1
        with self.report.phase("validation"):
            batch = self.stream.validate(self.source.validation, num_samples, sampling, validation.seed)
            samples = self.stream.verdicts(batch, patience=None)
            metrics = validation_metrics(samples, sampling)
            self.report.validation(self.step, metrics, samples, self.tokenizer)
            if validation.teacher_accuracy and not self.report.has("teacher_accuracy"):
                graded = [t for name in self.config.teachers for t in self._samples_of_teacher(name, sampling)]
                self.report.note("teacher_accuracy", reward_metrics(graded, "val").get("val/accuracy"))

    def _samples_of_teacher(self, name: str, sampling: Sampling) -> list[Trajectory]:
        """Let a teacher answer the held-out prompts that it covers; graded."""
        validation, teacher = self.config.validation, self.config.teachers[name]
        assert validation is not None
        prompts = [p for p in self.source.validation if not teacher.tag_included or p.row.tag in teacher.tag_included]
        if not prompts:
            return []
        engines = Engines(TEACHER_ROLE + name, self.clusters.scorers[name].workers)
        num_samples = validation.generating_args.num_return_sequences or 1
        batch = self.stream.validate(prompts, num_samples, sampling, validation.seed, engines)
        return self.stream.verdicts(batch, patience=None)
