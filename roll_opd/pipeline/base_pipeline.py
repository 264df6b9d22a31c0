"""The loop: sync weights, validate when due, collect, advantages, train, checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.algorithms.policy_loss import PolicyLoss
from roll_opd.configs import LoadedConfig, config_for_checkpoint_json, resume_conflicts
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.datasets.prompts import Prompt
from roll_opd.distributed.checkpoint import CONFIG_FILE, CheckpointFolder, read_json, read_state
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult, TrainItem
from roll_opd.distributed.weight_sync import WeightSync
from roll_opd.errors import ConfigError, TrainingError
from roll_opd.pipeline.batching import micro_batches, mini_batch_size, mini_batches, rank_shares, undeal
from roll_opd.pipeline.critic import Critic
from roll_opd.pipeline.finding import Finding, enforce
from roll_opd.pipeline.metrics import opd_metrics, rollout_metrics
from roll_opd.pipeline.preflight import model_field
from roll_opd.pipeline.probe import Scorer, judge, noise_floor
from roll_opd.pipeline.report import RunReport
from roll_opd.pipeline.role_clusters import RoleClusters
from roll_opd.pipeline.signal import Signal
from roll_opd.pipeline.trajectory_stream import Batch, TrajectoryStream
from roll_opd.trajectory import Trajectory, TrajectoryId, check_per_token

logger = logging.getLogger(__name__)

COMPONENTS = ("policy_loss", "divergence_loss", "kl_loss")
"""Parts of the loss that are reported one by one, as means over the sampled tokens."""
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

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.config: PipelineConfig = loaded.config
        self.step = 0
        self.report = RunReport(self.config)
        checkpoints = self.report.folder.checkpoints
        self.checkpoints = CheckpointFolder(checkpoints, self.config.max_ckpt_to_keep)
        self.signal = Signal(self.config)
        self.loss = loss_of(self.config)
        self.next_draw = 0
        self.findings: list[Finding] = []
        self._rewards_in_time = True

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
    def prompt_of(self, draw: int) -> Prompt:
        """Name the prompt of a draw; a pure function of its number."""

    @abstractmethod
    def validate(self) -> None:
        """Measure the student on held-out prompts and report it."""

    def probe_batch(self) -> Batch | None:
        """Sample a few trajectories that training will not see, scored by the teachers; None: cannot be done."""
        return None

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train; return the summary that is also written to ``summary.json``."""
        resume_from = self.checkpoints.find(self.config.resume_from_checkpoint)
        self.prepare()
        enforce(self.findings)
        with contextlib.ExitStack() as stack:
            self.checkpoints.set_aside(resume_from)
            stack.enter_context(self.report.open(self._restore_state(resume_from), self.loaded))
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
            if batch is None:
                found = [Finding("skipped", "", "samples: this pipeline has no probe", "samples")]
            else:
                first = self._scored_by_trainer(batch.trajectories)
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
        metrics |= self.update(trajectories)
        trajectories = self.with_verdicts(batch, trajectories)
        metrics |= rollout_metrics(trajectories, version=step) | opd_metrics(trajectories)
        metrics["teacher/failed_requests"] = float(self.clusters.teacher_pool.failures)
        metrics["reward/failed"] = float(self.clusters.reward_pool.failures)
        metrics["rollout/filtered_groups"] = float(batch.filtered_groups)
        self.step, self.next_draw = step + 1, batch.next_draw
        last = self.step == self.config.max_steps
        self.report.step(step, metrics, trajectories, self.tokenizer)
        if last or (self.config.save_steps > 0 and step > 0 and step % self.config.save_steps == 0):
            self.save_checkpoint(step, final=last)

    def _start(self, stack: contextlib.ExitStack, resume_from: Path | None) -> None:
        self.clusters = RoleClusters(self.loaded, self.report.folder.logs)
        stack.callback(self.clusters.stop)
        self.critic = None if self.clusters.critic is None else Critic(self.config, self.clusters.critic)
        self.moving = {n: t for n, t in self.config.teachers.items() if t.teacher_args.self_teacher in ("ema", "live")}
        if resume_from is not None:
            self.clusters.train.call_all("load", str(resume_from / "actor_train"))
            if self.clusters.critic is not None:
                self.clusters.critic.call_all("load", str(resume_from / "critic"))
            for name in self.moving:
                self.clusters.scorers[name].call_all("load_model", str(resume_from / f"teacher-{name}"))
            logger.info("resumed from %s: step %d comes next", resume_from, self.step)
        bucket = self.config.model_update_buffer_size_mb << 20
        self.weight_syncs = [WeightSync(self.clusters.train, self.clusters.infer, bucket)]
        for name, teacher in self.moving.items():
            mix = 1.0 - teacher.teacher_args.ema_decay if teacher.teacher_args.self_teacher == "ema" else 1.0
            self.weight_syncs.append(WeightSync(self.clusters.train, self.clusters.scorers[name], bucket, mix))
        self._send_teacher_heads(self.config.teachers)
        self.stream = self.build_stream(self.clusters)
        stack.callback(self.stream.close)
        size = self.config.rollout_batch_size
        self.stream.start(self.prompt_of, size, self.next_draw, self.step, self.config.max_steps)

    def _send_teacher_heads(self, names: Iterable[str]) -> None:
        """Give the trainer the output projections that turn teachers' hidden states into distributions."""
        if self.loss.divergence is None or self.loss.divergence.support != "full":
            return
        for name in names:
            head = self.clusters.scorers[name].workers[0].head.remote()
            self.clusters.train.call_all("set_teacher_head", name, head)

    def sync_weights(self) -> None:
        """Give the generator, and teachers that follow the student, this step's weights; then rollout may begin."""
        with self.report.phase("weight_sync"):
            for sync in self.weight_syncs:
                sync.sync(self.step)
            self._send_teacher_heads(self.moving)

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
            trajectories = self._with_old_logprobs(batch.trajectories)
        if self.critic is not None:
            with self.report.phase("values"):
                trajectories = self.critic.with_values(trajectories)
        with self.report.phase("advantages"):
            return self.signal(trajectories, self.step)

    def _with_old_logprobs(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        if self.config.opd_args.student_logprob_source == "infer":
            return [dataclasses.replace(t, old_logprobs=t.infer_logprobs) for t in trajectories]
        return self._scored_by_trainer(trajectories)

    def _scored_by_trainer(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Add ``old_logprobs`` and entropies from a trainer forward."""
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in trajectories]
        shares = rank_shares(requests, len(self.clusters.train))
        results: list[ScoreResult] = undeal(self.clusters.train.call_each("score", [(share,) for share in shares]))
        out = []
        for trajectory, request, result in zip(trajectories, requests, results, strict=True):
            assert result.checksum == request.checksum, f"scores of {result.id} for {trajectory.id}"
            check_per_token("old_logprobs", result.logprobs, trajectory)
            out.append(dataclasses.replace(trajectory, old_logprobs=result.logprobs, entropies=result.entropies))
        return out

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Update the critic, if there is one, and, once it has warmed up, the student."""
        if self.critic is None:
            return self.train(trajectories)
        with self.report.phase("train"):
            metrics = self.critic.train(trajectories)
        return metrics if self.step < self.config.critic_warmup else metrics | self.train(trajectories)

    def train(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Update the student on the batch; return the metrics of its optimizer steps, averaged."""
        config, cluster = self.config, self.clusters.train
        seen: set[TrajectoryId] = set()
        for trajectory in trajectories:
            assert trajectory.id not in seen, f"trajectory {trajectory.id} twice in one batch"
            seen.add(trajectory.id)
        size = mini_batch_size(config.actor_train, len(cluster))
        limit = config.response_length or 1
        updates: list[dict[str, float]] = []
        with self.report.phase("train"):
            steps = [
                micro_batches(mini_batch, config.actor_train, len(cluster), config.loss_agg_mode, limit)
                for mini_batch in mini_batches(trajectories, size)
            ]
            self._fetch_details(steps)
            for _ in range(config.ppo_epochs):
                for ranks in steps:
                    updates.append(_update_metrics(cluster.call_each("train_step", [(r, self.loss) for r in ranks])))
            if self._details_wanted:
                cluster.call_all("fetch_details", {})
        return {name: float(np.mean([u[name] for u in updates])) for name in updates[0]} | {
            "train/num_updates": float(len(updates))
        }

    @property
    def _details_wanted(self) -> bool:
        return self.loss.divergence is not None and self.loss.divergence.support != "sampled"

    def _fetch_details(self, steps: list[list[list[list[TrainItem]]]]) -> None:
        """Have each rank get the teachers' top-k tables or hidden states that its items need; score lost ones again."""
        if not self._details_wanted:
            return
        needed: list[dict[Any, list[Any]]] = [{} for _ in range(len(self.clusters.train))]
        by_id: dict[TrajectoryId, Trajectory] = {}
        for ranks in steps:
            for refs, rows in zip(needed, ranks, strict=True):
                for item in (item for row in rows for item in row if item.token_weight > 0):
                    trajectory = by_id[item.trajectory.id] = item.trajectory
                    for name in trajectory.divergence_weights:
                        refs[trajectory.id, name] = [trajectory.teacher_scores[name].details]
        for _ in range(2):
            lost = {key for keys in self._call_fetch(needed) for key in keys}
            if not lost:
                return
            logger.warning("%d teacher scores were lost with the node that held them; scoring again", len(lost))
            names = sorted({name for name, _ in lost})
            again = {t.id: t for t in self.stream.score_again([by_id[name] for name in names])}
            for refs in needed:
                for key in lost & set(refs):
                    refs[key] = [again[key[0]].teacher_scores[key[1]].details]
        raise TrainingError(f"{len(lost)} teacher scores were lost twice; the object store may be too small")

    def _call_fetch(self, needed: list[dict[Any, list[Any]]]) -> list[list[Any]]:
        return list(self.clusters.train.call_each("fetch_details", [(refs,) for refs in needed]))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, final: bool) -> None:
        """Write a checkpoint; the last one also holds the models in Hugging Face format."""

        def write(folder: Path) -> None:
            self.clusters.train.call_all("save", str(folder / "actor_train"))
            if self.clusters.critic is not None:
                self.clusters.critic.call_all("save", str(folder / "critic"))
            for name in self.moving:
                cluster = self.clusters.scorers[name]
                cluster.wait(cluster.workers[0].save_model.remote(str(folder / f"teacher-{name}")), "save_model")
            if final:
                self.clusters.train.call_all("export_hf", str(folder))
                self.tokenizer.save_pretrained(folder)
                if self.clusters.critic is not None:
                    self.clusters.critic.call_all("export_hf", str(folder / "critic-hf"))
                    self.tokenizer.save_pretrained(folder / "critic-hf")
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
        refused, noted = resume_conflicts(read_json(resume_from / CONFIG_FILE), self.config, self.loaded.yaml_names)
        if refused:
            raise ConfigError(
                "resume_from_checkpoint",
                f"{resume_from} was made with other values of {', '.join(refused)}, which would mix two runs; restore "
                f"them, or start a new run from the model that a finished run leaves",
            )
        for path in noted:
            logger.warning("%s differs from the run that made %s", path, resume_from)
        self.step = state["step"] + 1
        self.next_draw = state["next_draw"]
        self.signal.load(state["signal"])
        self.report.checkpoint = resume_from
        return dict(state["report"]) | {"next_step": self.step}


def loss_of(config: PipelineConfig) -> Loss:
    """The per-token loss that a config describes."""
    args = config.opd_args
    low, high = (config.pg_clip_low, config.pg_clip_high) if config.use_pg_clip_range else (config.pg_clip,) * 2
    divergence = DivergenceLoss(args.divergence, args.support, args.jsd_beta, args.add_tail, args.log_ratio_clip)
    return Loss(
        # The dual clip's bound is ROLL's 1 + 2 * pg_clip.
        policy=PolicyLoss(
            low, high, 1.0 + 2.0 * config.pg_clip if config.dual_clip_loss else None, config.importance_sampling
        ),
        divergence=divergence if config.teachers and args.objective == "direct" else None,
        entropy_coef=config.entropy_loss_coef,
        kl_coef=config.kl_loss_coef if config.needs_reference and config.use_kl_loss else 0.0,
        kl_kind="mse" if config.kl_loss_type == "k2" else "k3",
    )


def _update_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of one optimizer step; sums are global already, maxima are not."""
    first = ranks[0]
    tokens = max(first["sum/tokens"], 1.0)
    return {
        "train/loss": first["loss"],
        "train/grad_norm": first["grad_norm"],
        "train/lr": first["lr"],
        "train/entropy": first["sum/entropy"] / tokens,
        "train/ratio": first["sum/ratio"] / tokens,
        "train/ratio_max": max(r["max/ratio"] for r in ranks),
        "train/clip_fraction": first["sum/clipped"] / tokens,
        "train/old_minus_new_logprob": first["sum/old_minus_new"] / tokens,
    } | {f"train/{name}": first[f"sum/{name}"] / tokens for name in COMPONENTS if f"sum/{name}" in first}
