"""What a run tells the world: metrics, console, samples, timing, and the summary at its end."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.loader import LoadedConfig, config_without_secrets
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.pipeline.formula import formula
from roll_opd.pipeline.metrics import episodes_of, invalid_action_reports
from roll_opd.trajectory import Trajectory
from roll_opd.utils.console import ProgressConsole, print_summary
from roll_opd.utils.episode_log import write_episodes_log
from roll_opd.utils.files import set_aside, truncate_jsonl
from roll_opd.utils.run_folder import prepare_run_folder, write_summary
from roll_opd.utils.samples_page import SampleView, TokenView, TurnView, write_samples_jsonl, write_samples_page
from roll_opd.utils.tracking import RunTracker, build_tracker

logger = logging.getLogger(__name__)

WORK = ("weight_sync", "rollout", "old_logprobs", "values", "advantages", "train")
"""Phases whose time counts in tokens per second."""
MOST_CLIPPED = 0.5
"""Share of advantages that `advantage_clip` may cut before a warning says so."""


class RunReport:
    """Collects what the loop measures and writes it where the user asked for it.

    Attributes:
        folder: the run's folders.
        checkpoint: the newest checkpoint.
        final: whether training is over; the next validation is the summary's last.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        renders = config.render_save_dir if isinstance(config, AgenticConfig) else None
        self.folder = prepare_run_folder(
            config.output_dir, config.logging_dir, config.checkpoint_config.output_dir, renders
        )
        self.checkpoint: Path | None = None
        self.final = False
        self._summary: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._step_seconds: dict[str, float] = {}
        self._tokens = 0.0
        self._validation: dict[str, float] = {}
        self._not_understood: set[str] = set()

    @contextlib.contextmanager
    def open(self, state: Mapping[str, Any] | None, loaded: LoadedConfig) -> Iterator[None]:
        """Open trackers and console; ``state`` is what :meth:`state` gave to the checkpoint that is resumed."""
        first = 0
        if state is None:
            set_aside(self.folder.samples_jsonl)
        else:
            first = int(state["next_step"])
            self._summary, self._seconds = dict(state["summary"]), dict(state["seconds"])
            self._tokens = float(state["tokens"])
            truncate_jsonl(self.folder.samples_jsonl, first)
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        self._summary["formula"] = formula(self.config)
        logger.info("%s", self._summary["formula"])
        self._tracker: RunTracker = build_tracker(
            self.config.track_with,
            self.folder.root,
            self.config.exp_name,
            config_without_secrets(self.config),
            self.config.tracker_kwargs,
            resume_step=None if state is None else first,
        )
        with contextlib.closing(self._tracker), ProgressConsole(self.config.max_steps, first) as self._console:
            yield

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {"summary": self._summary, "seconds": self._seconds, "tokens": self._tokens}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the loop."""
        self._console.phase(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - began)
        if name in ("start", "preflight"):
            self._console.steps_begin()

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to a phase's time, of this step and of the run."""
        self._step_seconds[name] = self._step_seconds.get(name, 0.0) + seconds
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        trajectories: Sequence[Trajectory],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Report one finished step."""
        times, self._step_seconds = self._step_seconds, {}
        tokens = metrics["rollout/response_tokens"]
        self._tokens += tokens
        work = sum(s for name, s in times.items() if name in WORK)
        metrics |= {f"time/{name}": s for name, s in times.items()} | {
            "time/tokens_per_second": tokens / max(work, 1e-9)
        }
        if self._validation:
            metrics |= self._validation
        if metrics["rollout/sampled_mass"] < 1.0 and not self._summary.get("sampling_cut_off"):
            self._summary["sampling_cut_off"] = 1.0 - metrics["rollout/sampled_mass"]
            logger.warning(
                "sampling cut off %.3g of the probability mass; log-ratios are still taken between untruncated "
                "distributions at temperature 1, so they are slightly off the distribution sampled from",
                self._summary["sampling_cut_off"],
            )
        clipped = metrics.get("opd/advantage_clip_fraction", 0.0)
        if clipped > MOST_CLIPPED and not self.has("advantages_clipped"):
            self.note("advantages_clipped", clipped)
            logger.warning(
                "advantage_clip %g cut %.0f%% of the advantages, so little more than their signs is left; raise it, or "
                "lower opd_kl_coef",
                self.config.advantage_clip,
                100 * clipped,
            )
        if "opd/reverse_kl" in metrics:
            self._summary.setdefault("train_reverse_kl_first", metrics["opd/reverse_kl"])
            self._summary["train_reverse_kl_last"] = metrics["opd/reverse_kl"]
        if step % self.config.logging_steps == 0 or step + 1 == self.config.max_steps or self._validation:
            self._tracker.log(step, metrics)
        self._validation = {}
        self._console.step(step, metrics)
        what = f"training batch of step {step}"
        last = step + 1 == self.config.max_steps
        keep = step % self.config.eval_steps == 0 if self.config.eval_steps > 0 else last
        self._warn_of_actions(trajectories, tokenizer)
        log = self.folder.samples / "episodes.txt"
        self._write_samples(self.folder.samples_page, log, what, step, trajectories, tokenizer, keep)

    def _write_samples(
        self,
        page: Path,
        log: Path,
        what: str,
        step: int,
        trajectories: Sequence[Trajectory],
        tokenizer: PreTrainedTokenizerBase,
        keep: bool = True,
    ) -> None:
        """Write the first episodes as a page and, if ``keep``, add them to what is there of earlier steps.

        A single response is an episode. Those of environments are written as a text log as well.
        """
        if self.config.html_samples <= 0:
            return
        episodes = _spread(episodes_of(trajectories), self.config.html_samples)
        views = [sample_view(t, step, tokenizer, self.config, len(e)) for e in episodes for t in e]
        in_environments = any(view.turns for view in views)
        which = f"{len(episodes)} episodes" if in_environments else f"the first {len(episodes)} trajectories"
        write_samples_page(page, views, self.config.exp_name, f"{what}: {which}")
        if keep:
            write_samples_jsonl(self.folder.samples_jsonl, views)
        if in_environments:
            write_episodes_log(log, views)
            if keep and self.folder.renders is not None:
                write_episodes_log(self.folder.renders / f"{log.stem}-{step}.txt", views)

    def _warn_of_actions(self, trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn of environments that understood no action: once, and again only if one was understood in between."""
        reports = invalid_action_reports(trajectories, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        for tag, report in reports.items():
            if report is None:
                self._not_understood.discard(tag)
            elif tag not in self._not_understood:
                self._not_understood.add(tag)
                logger.warning("%s", report)

    def validation(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Sequence[Trajectory],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Report a validation before ``step`` (or, at the end, after the last one)."""
        named = {f"val/{name}": value for name, value in metrics.items()}
        self._console.validation(step, named)
        for name in ("accuracy", "reverse_kl"):
            if name in metrics:
                self._summary.setdefault(f"{name}_first", metrics[name])
            # None where this validation could not tell: an older figure must not pass for the last one.
            self._summary[f"{name}_last"] = metrics.get(name)
        self._warn_of_actions(samples, tokenizer)
        page, log = self.folder.samples / "validation.html", self.folder.samples / "validation-episodes.txt"
        self._write_samples(page, log, f"validation at step {step}", step, samples, tokenizer)
        if self.final:
            self._tracker.log(step, named)
        else:
            self._validation = named

    def note(self, name: str, value: Any) -> None:
        """Put a value into the summary."""
        self._summary[name] = value

    def has(self, name: str) -> bool:
        """Whether the summary holds a value already (from before a resume)."""
        return name in self._summary

    def finish(self, steps: int) -> dict[str, Any]:
        """Write ``summary.json`` and show it; return it."""
        generating = self._seconds.pop("generate", 0.0)  # within the rollout
        seconds = {name: round(s, 3) for name, s in sorted(self._seconds.items())}
        total = sum(self._seconds.values())
        work = sum(self._seconds.get(n, 0.0) for n in WORK)
        summary = {
            "accuracy_first": None,
            "accuracy_last": None,
            "teacher_accuracy": None,
            "reverse_kl_first": None,
            "reverse_kl_last": None,
            **self._summary,
            "exp_name": self.config.exp_name,
            "mode": self.config.mode,
            "steps": steps,
            "seconds": {**seconds, "total": round(total, 3)},
            "seconds_generating": round(generating, 3),
            "tokens_per_second": self._tokens / work if work else math.nan,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "tensorboard": None if self._tracker.tensorboard_dir is None else str(self._tracker.tensorboard_dir),
            "samples": str(self.folder.samples_page) if self.config.html_samples else None,
        }
        write_summary(self.folder.summary, summary)
        self._console.close()
        print_summary(summary)
        return summary


def sample_view(
    t: Trajectory, step: int, tokenizer: PreTrainedTokenizerBase, config: PipelineConfig, segments: int = 1
) -> SampleView:
    """A trajectory, one of its episode's ``segments``, as the sample page shows it."""
    positions = t.response_mask.nonzero()[0].tolist()
    student = t.old_logprobs if t.old_logprobs is not None else t.infer_logprobs
    # What was trained on, as far as it is the teachers': the log-ratio in validation, which has no advantage, where the
    # divergence itself is the loss, and where the advantage holds the reward's part too.
    advantages = t.advantages
    if advantages is None or t.divergence_weights or config.mode == "mixed_opd":
        terms = [config.teacher_coef(name) * (t.said_by(name) - student) for name in t.teachers]
        advantages = np.sum(terms, axis=0) if terms else np.zeros(len(t), dtype=np.float32)
    special = set(tokenizer.all_special_ids)
    ids = t.sampled(t.tokens).tolist()
    said = {name: t.sampled(t.said_by(name)).tolist() for name in t.teachers}
    tokens = [
        TokenView(
            text=_token_text(tokenizer, i),
            logprob_student=logprob,
            logprob_teacher={name: logprobs[n] for name, logprobs in said.items()},
            advantage=advantage,
            special=i in special,
        )
        for n, (i, logprob, advantage) in enumerate(
            zip(ids, t.sampled(student).tolist(), t.sampled(advantages).tolist(), strict=True)
        )
    ]
    turns = [
        TurnView(
            index=turn.index,
            start=bisect_left(positions, turn.start),
            end=bisect_left(positions, turn.end),
            observation=turn.observation,
            text=str(tokenizer.decode(t.tokens[turn.start : turn.end].tolist(), skip_special_tokens=True)),
            reward=turn.reward,
            is_valid=turn.is_valid,
        )
        for turn in t.turns
    ]
    texts = [turn.text for turn in turns]
    if not turns:
        texts.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
    return SampleView(
        id=str(t.id),
        step=step,
        tag=t.tag,
        prompt_text=str(t.extras.get("prompt", "")),
        response_text="\n".join(texts),
        finish_reason=str(t.extras.get("end", t.finish_reason)),
        tokens=tokens,
        reward=t.reward,
        correct=t.correct,
        ground_truth=t.extras.get("ground_truth"),
        episode=str(t.id).rpartition("/")[0] if turns else "",
        segment=t.id.segment,
        segments=segments,
        turns=turns,
    )


@functools.lru_cache(maxsize=1 << 16)
def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False))


def _spread(episodes: list[list[Trajectory]], number: int) -> list[list[Trajectory]]:
    """The first episodes; of groups in environments the first two of each, as long as there are enough groups.

    Members of a group begin alike, so two show what a page of eight would.
    """
    if not any(t.turns for segments in episodes for t in segments):
        return episodes[:number]
    chosen = sorted(episodes, key=lambda segments: (segments[0].id.sample // 2, segments[0].id))[:number]
    return sorted(chosen, key=lambda segments: segments[0].id)
