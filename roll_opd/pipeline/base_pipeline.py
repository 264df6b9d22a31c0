"""The loop: sync weights, validate when due, collect, advantages, train, checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from roll_opd.configs import LoadedConfig, config_for_checkpoint_json
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.checkpoint import CONFIG_FILE, CheckpointFolder, read_state
from roll_opd.distributed.cluster import Cluster
from roll_opd.distributed.weight_sync import WeightSync, way_of
from roll_opd.pipeline.critic import Critic
from roll_opd.pipeline.metrics import opd_metrics, rollout_metrics
from roll_opd.pipeline.preflight.facts import model_field
from roll_opd.pipeline.preflight.finding import Finding, enforce
from roll_opd.pipeline.preflight.probe import Scorer, judge, noise_floor
from roll_opd.pipeline.preflight.run_checks import resume_findings
from roll_opd.pipeline.report import RunReport
from roll_opd.pipeline.role_clusters import RoleClusters
from roll_opd.pipeline.signal import Signal
from roll_opd.pipeline.student import Student
from roll_opd.pipeline.trajectory_stream import TEACHER_ROLE, Batch, TrajectoryStream
from roll_opd.trajectory import Trajectory

logger = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that a step waits for the verdicts of rewards that only monitor, unless they were late the last time."""


class BasePipeline(ABC):
    """What every pipeline shares. A subclass says where trajectories come from and how the student is validated.

    Args:
        loaded: a checked config.

    Attributes:
        step: the step that runs next; also the version of the weights it samples with.
        tokenizer: the student's, set by :meth:`prepare`.
        findings: what the preflight found so far.
    """

    tokenizer: PreTrainedTokenizerBase
    stream: TrajectoryStream

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.config: PipelineConfig = loaded.config
        self.step = 0
        self.report = RunReport(self.config)
        checkpoints = self.report.folder.checkpoints
        self.checkpoints = CheckpointFolder(checkpoints, self.config.max_ckpt_to_keep)
        self.signal = Signal(self.config)
        self.next_draw = 0
        self.findings: list[Finding] = []
        self._rewards_in_time = True
        self._closers: list[Callable[[], None]] = []
        # Teachers' output projections that the trainer does not have yet, by teacher.
        self._new_heads: dict[str, Any] = {}
        self._resume_from: Path | None = None

    # ---- what a subclass provides --------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self) -> None:
        """Read data and check whatever can be checked before a process is started, into :attr:`findings`.

        What cannot work is an error among them; then the pipeline is not prepared.
        """

    @abstractmethod
    def build_stream(self, clusters: RoleClusters) -> TrajectoryStream:
        """Return the stream that this pipeline's trajectories come from."""

    @abstractmethod
    def task_of(self, draw: int) -> Any:
        """Name the task of a draw; a pure function of its number."""

    @abstractmethod
    def validate(self) -> None:
        """Measure the student on held-out prompts and report it."""

    @abstractmethod
    def probe_batch(self) -> Batch:
        """Sample a few trajectories that training will not see, scored by the teachers."""

    def step_metrics(self) -> dict[str, float]:
        """What this pipeline reports of a step besides."""
        return {}

    # ---- the loop ------------------------------------------------------------------------------------------------

    def at_end(self, close: Callable[[], None]) -> None:
        """Have something closed when the run is over, once the stream has stopped."""
        self._closers.append(close)

    def check(self) -> None:
        """Refuse what cannot work, before any process is started or file moved; comes before :meth:`run`."""
        self._resume_from = self.checkpoints.find(self.config.resume_from_checkpoint)
        if self._resume_from is not None:
            self.findings += resume_findings(self._resume_from, self.loaded)
        self.prepare()
        enforce(self.findings)

    def run(self) -> dict[str, Any]:
        """Train; return the summary that is also written to ``summary.json``."""
        resume_from = self._resume_from
        with contextlib.ExitStack() as stack:
            state = self._restore_state(resume_from)
            self.checkpoints.set_aside(resume_from)
            stack.enter_context(self.report.open(state, self.loaded))
            with self.report.phase("start"):
                self._start(stack, resume_from)
            if self.config.preflight == "full" and self.step < self.config.max_steps:
                enforce(self._probe())
            for step in range(self.step, self.config.max_steps):
                self._run_step(step)
            self.sync_weights()
            self.report.final = True
            if self.config.eval_steps > 0:
                self.validate()
            return self.report.finish(self.config.max_steps)

    def examine(self) -> None:
        """Load the models and try them on a few samples, without training; after :meth:`prepare`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.report.open(None, self.loaded))
            with self.report.phase("start"):
                self._start(stack, None)
            self._probe()

    def _probe(self) -> list[Finding]:
        """Try the loaded models; return what was found, which joins :attr:`findings`."""
        self.sync_weights()
        with self.report.phase("preflight"):
            batch = self.probe_batch()
            if not batch.trajectories:
                found = [Finding("error", "", f"no sample could be made: {batch.failure}", "samples")]
            else:
                self.clusters.turns.take("actor_train")
                first = self.student.scored(batch.trajectories)
                floor = noise_floor(first)
                self.report.note("probe/noise_floor", {"mean": floor.mean, "max": floor.max, "tokens": floor.tokens})
                scorers = {
                    name: Scorer(model_field(self.clusters.yaml_names[f"teacher-{name}"]), config.model_args.dtype)
                    for name, config in self.clusters.scorer_configs.items()
                }
                pure, extrapolates = self.config.is_pure_opd, self.config.opd_args.base_model is not None
                again = self.stream.score_again(first) if scorers else first
                judged = judge(first, again, scorers, pure=pure, extrapolates=extrapolates)
                found = [dataclasses.replace(finding, area="samples") for finding in judged]
        self.findings += found
        return found

    def _run_step(self, step: int) -> None:
        self.sync_weights()
        if self.config.eval_steps > 0 and step % self.config.eval_steps == 0:
            self.validate()
        batch = self.collect()
        trajectories, metrics = self.compute_advantages(batch)
        trajectories, trained = self.update(trajectories)
        metrics |= trained
        trajectories = self.with_verdicts(batch, trajectories)
        metrics |= rollout_metrics(trajectories, version=step) | opd_metrics(trajectories)
        metrics |= self.step_metrics()
        metrics["teacher/failed_requests"] = float(self.clusters.teacher_pool.failures)
        metrics["reward/failed"] = float(self.clusters.reward_pool.failures)
        metrics["rollout/filtered_groups"] = float(batch.filtered_groups)
        metrics["rollout/failed_groups"] = float(batch.failed_groups)
        self.step, self.next_draw = step + 1, batch.next_draw
        last = self.step == self.config.max_steps
        self.report.step(step, metrics, trajectories, self.tokenizer)
        if last or (self.config.save_steps > 0 and step > 0 and step % self.config.save_steps == 0):
            self.save_checkpoint(step, final=last)

    def _start(self, stack: contextlib.ExitStack, resume_from: Path | None) -> None:
        self.clusters = RoleClusters(self.loaded, self.report.folder.logs)
        stack.callback(self.clusters.stop)
        self.student = Student(self.config, self.clusters.train, self._score_again)
        self.critic = None if self.clusters.critic is None else Critic(self.config, self.clusters.critic)
        self.moving = {n: t for n, t in self.config.teachers.items() if t.teacher_args.self_teacher in ("ema", "live")}
        if resume_from is not None:
            self.clusters.turns.take("actor_train")
            self.clusters.train.call_all("load", str(resume_from / "actor_train"))
            if self.clusters.critic is not None:
                self.clusters.turns.take("critic")
                self.clusters.critic.call_all("load", str(resume_from / "critic"))
            for name in self.moving:
                folder = resume_from / f"teacher-{name}"
                if folder.is_dir():
                    self.clusters.turns.take(TEACHER_ROLE + name)
                    self.clusters.scorers[name].call_all("load_model", str(folder))
                else:
                    logger.warning("%s holds no weights of teacher %s, which did not move then", resume_from, name)
            logger.info("resumed from %s: step %d comes next", resume_from, self.step)
        self.weight_syncs = {"actor_infer": self._weight_sync(self.clusters.infer)}
        for name, teacher in self.moving.items():
            mix = 1.0 - teacher.teacher_args.ema_decay if teacher.teacher_args.self_teacher == "ema" else 1.0
            self.weight_syncs[TEACHER_ROLE + name] = self._weight_sync(self.clusters.scorers[name], mix)
        self._ask_for_heads(name for name in self.config.teachers if name not in self.moving)
        self.stream = self.build_stream(self.clusters)
        for close in self._closers:
            stack.callback(close)
        stack.callback(self.stream.close)
        size, last = self.config.groups_per_step, self.config.max_steps
        self.stream.start(self.task_of, size, self.next_draw, self.step, last)

    def _weight_sync(self, targets: Cluster, mix: float = 1.0) -> WeightSync:
        train, bucket = self.clusters.train, self.config.model_update_buffer_size_mb << 20
        way = way_of(train.config, targets.config, self.config.model_update_transport)
        return WeightSync(train, targets, bucket, mix, way)

    def _ask_for_heads(self, names: Iterable[str]) -> None:
        """Have teachers give their output projections, which turn their hidden states into distributions."""
        divergence = self.student.loss.divergence
        if divergence is not None and divergence.support == "full":
            for name in names:
                self.clusters.turns.take(TEACHER_ROLE + name, weights_only=True)
                replica = self.clusters.scorers[name].replicas[0]
                heads = [worker.head.remote() for worker in replica.workers]
                self._new_heads[name] = heads[replica.layout.answers[0]]

    def sync_weights(self) -> None:
        """Give the generator, and teachers that follow the student, this step's weights; then rollout may begin."""
        with self.report.phase("weight_sync"):
            for role, sync in self.weight_syncs.items():
                if sync.version != self.step:
                    self.clusters.turns.take("actor_train", role, weights_only=True)
                    sync.sync(self.step)
                    self._ask_for_heads(name for name in self.moving if TEACHER_ROLE + name == role)

    async def _revive(self, worker: Any) -> None:
        """Bring a worker back whose engine has died while it sampled, with the weights that it had."""

        def send_again() -> None:
            with self.clusters.turns.guest("actor_train"):
                self.weight_syncs["actor_infer"].revive(worker)

        if worker in self.clusters.infer.workers:
            await asyncio.to_thread(send_again)
        else:
            # A teacher that answers held-out prompts (validation.teacher_accuracy): its weights are its own.
            await self.clusters.teacher_pool.replace_engine(worker)

    def _score_again(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Have the teachers score once more, in the middle of the trainer's turn."""
        scored = self.stream.score_again(trajectories)
        self.clusters.turns.take("actor_train")
        return scored

    def collect(self) -> Batch:
        """Let the stream run on these weights and wait for the step's batch, and its rewards if they are trained on."""
        with self.report.phase("rollout"):
            self.stream.weights_ready(self.step)
            batch = self.stream.collect()
            if self.signal.uses_rewards:
                batch = dataclasses.replace(batch, trajectories=self.stream.verdicts(batch, None), grading=[])
        self.report.add_seconds("generate", batch.seconds["generate"])
        return batch

    def with_verdicts(self, batch: Batch, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Add rewards that only monitor: they had the time of the update to come, and once late are not waited for."""
        if self.signal.uses_rewards:
            return trajectories
        graded = self.stream.verdicts(batch, PATIENCE if self._rewards_in_time else 0.0)
        covered = [t for t in graded if self.clusters.reward_pool.route(t.tag) is not None]
        self._rewards_in_time = all(t.reward is not None for t in covered)
        return [
            dataclasses.replace(t, reward=g.reward, correct=g.correct)
            for t, g in zip(trajectories, graded, strict=True)
        ]

    def compute_advantages(self, batch: Batch) -> tuple[list[Trajectory], dict[str, float]]:
        """Add ``old_logprobs``, the critic's values and the training signal to the trajectories."""
        with self.report.phase("old_logprobs"):
            self.clusters.turns.take("actor_train")
            trajectories = self.student.with_old_logprobs(batch.trajectories)
        if self.critic is not None:
            with self.report.phase("values"):
                self.clusters.turns.take("critic")
                trajectories = self.critic.with_values(trajectories)
        with self.report.phase("advantages"):
            return self.signal(trajectories, self.step)

    def update(self, trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
        """Update the critic, if there is one, and, once it has warmed up, the student.

        Returns:
            The trajectories, with whatever only the update has told of them, and metrics.
        """
        with self.report.phase("train"):
            metrics = {}
            if self.critic is not None:
                self.clusters.turns.take("critic")
                metrics = self.critic.train(trajectories)
                if self.step < self.config.critic_warmup:
                    return trajectories, metrics
            self.clusters.turns.take("actor_train")
            # Not before its turn: they lie on its devices.
            for name, head in self._new_heads.items():
                self.student.set_teacher_head(name, head)
            self._new_heads = {}
            trajectories, trained = self.student.train(trajectories)
            return trajectories, metrics | trained

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, final: bool) -> None:
        """Write a checkpoint; with ``save_hf_model``, and in the last one, models are in Hugging Face format too."""

        def write(folder: Path) -> None:
            turns = self.clusters.turns

            def exports(role: WorkerConfig | None) -> bool:
                return final or (role is not None and role.training_args.save_hf_model)

            turns.take("actor_train")
            self.clusters.train.call_all("save", str(folder / "actor_train"))
            if exports(self.config.actor_train):
                self.clusters.train.call_all("export_hf", str(folder))
                self.tokenizer.save_pretrained(folder)
            if self.clusters.critic is not None:
                turns.take("critic")
                self.clusters.critic.call_all("save", str(folder / "critic"))
                if exports(self.config.critic):
                    self.clusters.critic.call_all("export_hf", str(folder / "critic-hf"))
                    self.tokenizer.save_pretrained(folder / "critic-hf")
            for name in self.moving:
                turns.take(TEACHER_ROLE + name)
                cluster = self.clusters.scorers[name]
                holders = cluster.replicas[0].workers
                cluster.wait([w.save_model.remote(str(folder / f"teacher-{name}")) for w in holders], "save_model")
            (folder / CONFIG_FILE).write_text(config_for_checkpoint_json(self.config))

        with self.report.phase("checkpoint"):
            state = {
                "step": step,
                "next_draw": self.next_draw,
                "signal": self.signal.state(),
                "report": self.report.state(),
            }
            self.report.checkpoint = self.checkpoints.save(step, state, write)

    def _restore_state(self, resume_from: Path | None) -> dict[str, Any] | None:
        if resume_from is None:
            return None
        state = read_state(resume_from)
        self.step = state["step"] + 1
        self.next_draw = state["next_draw"]
        self.signal.load(state["signal"])
        self.report.checkpoint = resume_from
        return dict(state["report"]) | {"next_step": self.step}
