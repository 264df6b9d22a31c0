"""Plays episodes: the student's turns at the engines, the answers of its environments, and the trajectories of both.

::

    draw ──► EnvPool.episode ──► opening ──► prompt ──► TurnQueue ──► the student's tokens ──┐
                  ▲                             ▲                                            ▼
                  │                             └── Conversation.observe ◄── outcome ◄── session.step(text)
                  └── played again when the environment failed (see env_pool.next_attempt)

The student's tokens are kept as sampled and never tokenised again. Episodes run side by side: while one waits for its
environment, others sample. An episode whose environment keeps failing is reported as failed, and the stream replaces
its group.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.datasets.contexts import render_context
from roll_opd.datasets.conversation import Conversation
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult
from roll_opd.environments.base import Opening, Outcome
from roll_opd.errors import DataError, GenerationError
from roll_opd.pipeline.agentic.dialogue import Dialogue, Message, Played, context_fields
from roll_opd.pipeline.agentic.env_metrics import aggregate
from roll_opd.pipeline.agentic.env_pool import EnvPool, EpisodeLostError, Failure, Session, next_attempt
from roll_opd.pipeline.agentic.turn_queue import TurnQueue
from roll_opd.pipeline.generation import Generation, check_sampled
from roll_opd.pipeline.rollout import Draw, RolloutJob, Sample
from roll_opd.trajectory import FinishReason, Trajectory, TrajectoryId, Turn

logger = logging.getLogger(__name__)

MOST_LOGGED = 5
"""Failures of one environment that are logged one by one; each is counted."""


@dataclass(frozen=True)
class EnvTask:
    """What a group plays: an environment, and the seed that makes all of its members begin alike."""

    tag: str
    seed: int


@dataclass(frozen=True)
class PrivilegedView:
    """What a teacher sees in place of the first user message.

    Attributes:
        template: Jinja text.
        max_length: tokens of the whole prompt at most.
        covers: whether the teacher scores a tag.
    """

    template: str
    max_length: int
    covers: Callable[[str], bool]


@dataclass
class _Taken:
    """A turn that the student has taken, and what came of it."""

    result: GenerateResult
    observation: str
    state: str
    text: str
    outcome: Outcome
    reward: float


@dataclass
class _Episode:
    """What is known of an episode while it is played."""

    opening: Opening
    conversation: Conversation
    taken: list[_Taken] = field(default_factory=list)
    cut: bool = False


class _EpisodeDroppedError(Exception):
    """An episode that no other attempt would change."""


class EpisodeRollout:
    """Plays episodes.

    Args:
        environments: by tag.
        pools: stream of a job -> the processes that its environments run in; ``train`` is the default.
        penalties: likewise, what is added to the reward of a turn whose action the environment did not understand.
        generation: asks the engines.
        side_by_side: whether an engine works on several calls at once.
        tokenizer: the student's.
        stop_ids: token ids that end a turn.
        max_length: tokens of a trajectory at most.
        views: scorer -> what it sees in place of the first user message.
        template_kwargs: variables of the chat template.

    Attributes:
        failures: episodes that failed, by tag; those that a second attempt saved included.
    """

    def __init__(
        self,
        *,
        environments: Mapping[str, EnvironmentConfig],
        pools: Mapping[str, EnvPool],
        penalties: Mapping[str, float],
        generation: Generation,
        side_by_side: bool,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        max_length: int,
        views: Mapping[str, PrivilegedView],
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.environments = environments
        self.pools = pools
        self.penalties = penalties
        self.generation = generation
        self.side_by_side = side_by_side
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.max_length = max_length
        self.views = views
        self.template_kwargs = dict(template_kwargs or {})
        self.failures: Counter[str] = Counter()
        self._shorten = {tag: _shortener(tag, config) for tag, config in environments.items()}

    async def run(self, job: RolloutJob, finished: Callable[[Sample], None]) -> None:
        """See :class:`~roll_opd.pipeline.rollout.Rollout`."""
        queues = [TurnQueue(self.generation, worker, self.side_by_side) for worker in job.engines.workers]

        async def play(draw: Draw, sample: int, queue: TurnQueue) -> None:
            finished(await self._sample(job, draw, sample, queue))

        async with asyncio.TaskGroup() as group:
            for queue in queues:
                group.create_task(queue.run())
            try:
                async with asyncio.TaskGroup() as episodes:
                    for i, draw in enumerate(job.draws):
                        for sample in range(job.num_samples):
                            # A group stays at one engine, which then computes its common beginning once.
                            episodes.create_task(play(draw, sample, queues[i % len(queues)]))
            finally:
                for queue in queues:
                    queue.close()

    async def _sample(self, job: RolloutJob, draw: Draw, sample: int, queue: TurnQueue) -> Sample:
        task: EnvTask = draw.task
        reason = ""
        lost: list[Failure] = []
        where: str | None = "shared"
        while where is not None:
            try:
                return await self._play(job, draw, sample, queue, alone=where == "alone")
            except EpisodeLostError as error:
                reason = str(error)
                lost.append(error.kind)
                where = next_attempt(lost)
                then = "its group is replaced" if where is None else "it is played again"
                self._failed(task.tag, draw, sample, reason, then)
            except _EpisodeDroppedError as error:
                reason = str(error)
                self._failed(task.tag, draw, sample, reason, "its group is replaced")
                break
        return Sample(draw.number, sample, (), failure=reason)

    def _failed(self, tag: str, draw: Draw, sample: int, reason: str, then: str) -> None:
        self.failures[tag] += 1
        if self.failures[tag] <= MOST_LOGGED:
            logger.warning("episode %d/%d: %s; %s", draw.number, sample, reason, then)
        if self.failures[tag] == MOST_LOGGED:
            logger.warning("further failures of environment %r are only counted, see rollout/failed_groups", tag)

    # ---- one episode ---------------------------------------------------------------------------------------------

    async def _play(self, job: RolloutJob, draw: Draw, sample: int, queue: TurnQueue, alone: bool) -> Sample:
        task: EnvTask = draw.task
        config = self.environments[task.tag]
        pool = self.pools.get(job.stream, self.pools["train"])
        async with pool.episode(task.tag, task.seed, alone=alone) as session:
            episode = await self._turns(job, draw, sample, queue, session, config)
        name = TrajectoryId(draw.number, sample, 0, job.stream)
        return Sample(draw.number, sample, self._trajectories(episode, task, name))

    async def _turns(
        self, job: RolloutJob, draw: Draw, sample: int, queue: TurnQueue, session: Session, config: EnvironmentConfig
    ) -> _Episode:
        limit = min(config.max_tokens_per_step or job.sampling.max_new_tokens, job.sampling.max_new_tokens)
        dialogue = Dialogue(config, session.opening, limit)
        conversation = Conversation(
            self.tokenizer,
            stop_ids=self.stop_ids,
            on_rewrite=config.on_rewrite,
            chat_template_kwargs=self.template_kwargs,
            where=f"custom_envs.{draw.task.tag}",
        )
        episode = _Episode(session.opening, conversation)
        conversation.start(dialogue.first())
        if len(conversation.prompt_ids) >= self.max_length:
            raise _EpisodeDroppedError(
                f"environment {draw.task.tag!r}: the first prompt has {len(conversation.prompt_ids)} tokens, and "
                f"sequence_length is {self.max_length}; raise it, or shorten the templates"
            )
        observation, info = session.opening.observation, session.opening.info
        penalty = self.penalties.get(job.stream, self.penalties["train"])
        # One turn of an episode is asked for at a time, so the episode's name tells requests apart.
        name = TrajectoryId(draw.number, sample, 0, job.stream)
        with queue.joined():
            while True:
                room = self.max_length - len(conversation.prompt_ids)
                sampling = replace(job.sampling, max_new_tokens=min(limit, room))
                seed = name.seed(job.seed, len(episode.taken))
                request = GenerateRequest(name, conversation.prompt_ids, seed, sampling)
                result = await queue.ask(request)
                if len(result.response_ids) == 0:
                    raise GenerationError(f"an engine returned an empty turn for trajectory {name}")
                text = conversation.sampled(result.response_ids.tolist())
                outcome = await session.step(text)
                invalid = outcome.info.get("metrics", {}).get("action_is_valid") is False
                reward = outcome.reward + (penalty if invalid else 0.0)
                state = str(info.get("state", observation))
                episode.taken.append(_Taken(result, observation, state, text, outcome, reward))
                if outcome.done or len(episode.taken) >= config.max_steps:
                    return episode
                observation, info = outcome.observation, outcome.info
                if not await self._continue(episode, dialogue, draw.task.tag):
                    episode.cut = True
                    return episode

    async def _continue(self, episode: _Episode, dialogue: Dialogue, tag: str) -> bool:
        """Put the last outcome before the student; False where the context has no room for another turn."""
        conversation = episode.conversation
        played = [Played(t.observation, _action(t), t.reward) for t in episode.taken]
        messages = dialogue.following(episode.taken[-1].outcome, played)
        if dialogue.stepwise:
            conversation.start(messages)
            return len(conversation.prompt_ids) < self.max_length
        if conversation.measure(messages) < self.max_length:
            conversation.observe(messages)
            return True
        shorten = self._shorten[tag]
        if shorten is None:
            return False
        field = f"custom_envs.{tag}.on_context_full"
        try:
            # In a thread: it may ask a model for a summary.
            shortened = await asyncio.to_thread(shorten, [*conversation.messages, *messages])
        except Exception as error:
            # Policy: stop. It is the user's code, and would fail in the next episode too.
            raise GenerationError(f"{field}: the function failed: {type(error).__name__}: {error}") from error
        conversation.start(_checked(shortened, field))
        return len(conversation.prompt_ids) < self.max_length

    # ---- trajectories --------------------------------------------------------------------------------------------

    def _trajectories(self, episode: _Episode, task: EnvTask, name: TrajectoryId) -> tuple[Trajectory, ...]:
        taken = episode.taken
        last = taken[-1]
        told = [t.outcome.info["metrics"]["success"] for t in taken if "success" in t.outcome.info.get("metrics", {})]
        # An episode that is cut off where the environment tells nothing, behind a tool's answer say, has not succeeded.
        success = last.outcome.info.get("metrics", {}).get("success", False if told else None)
        score = float(sum(t.reward for t in taken))
        segments = episode.conversation.segments
        assert sum(len(s.spans) for s in segments) == len(taken), f"turns of episode {name} were lost or doubled"
        out = []
        for number, segment in enumerate(segments):
            mine = taken[segment.first_turn : segment.first_turn + len(segment.spans)]
            is_last = number + 1 == len(segments)
            cut = mine[-1].result.finish_reason == "length" or (is_last and episode.cut)
            finish: FinishReason = "length" if cut else "stop"
            tokens = np.array(segment.token_ids, dtype=np.int32)
            mask = np.zeros(len(tokens), dtype=bool)
            logprobs = np.zeros(len(tokens), dtype=np.float32)
            versions = np.full(len(tokens), -1, dtype=np.int32)
            turns = []
            for i, ((start, end), t) in enumerate(zip(segment.spans, mine, strict=True)):
                mask[start:end] = True
                logprobs[start:end] = t.result.infer_logprobs
                versions[start:end] = t.result.weight_version
                valid = t.outcome.info.get("metrics", {}).get("action_is_valid")
                index = segment.first_turn + i
                valid = None if valid is None else bool(valid)
                turns.append(Turn(index, start, end, t.observation, t.reward, t.state, valid))
            counts = [end - start for start, end in segment.spans]
            ranked = [t.result.top_ids for t in mine if t.result.top_ids is not None]
            extras: dict[str, Any] = {
                "prompt": self.tokenizer.decode(tokens[: segment.spans[0][0]].tolist()),
            }
            if number == 0:
                extras["env_metrics"] = aggregate([t.outcome.info for t in taken])
            if is_last:
                extras["end"] = _end(last.outcome, episode.cut)
            trajectory = Trajectory(
                id=name._replace(segment=number),
                tag=task.tag,
                tokens=tokens,
                response_mask=mask,
                infer_logprobs=logprobs,
                weight_version=versions,
                finish_reason=finish,
                sampled_mass=float(np.average([t.result.sampled_mass for t in mine], weights=counts)),
                top_ids=np.concatenate(ranked) if ranked else None,
                contexts=self._contexts(episode, number, task),
                turns=tuple(turns),
                reward=score,
                correct=None if success is None else bool(success),
                extras=extras,
            )
            check_sampled(trajectory)
            out.append(trajectory)
        return tuple(out)

    def _contexts(self, episode: _Episode, segment: int, task: EnvTask) -> dict[str, tuple[int, ...]]:
        contexts = {}
        opening = episode.opening
        for scorer, view in self.views.items():
            if not view.covers(task.tag):
                continue
            messages = episode.conversation.segments[segment].opening
            first = next((m["content"] for m in messages if m["role"] == "user"), "")
            fields = context_fields(opening, first, task.tag)
            where = f"environment {task.tag!r}, seed {task.seed}"
            ids = episode.conversation.opening_with(segment, render_context(view.template, fields, where))
            if len(ids) > view.max_length:
                problem = (
                    f"{where}: the prompt of teacher {scorer!r} has {len(ids)} tokens, more than {view.max_length}; "
                    f"raise teacher_args.context_length, or shorten teacher_args.context_template"
                )
                # The first prompts are much alike; a later one has a history, whose length nobody could foresee.
                raise DataError(problem) if segment == 0 else _EpisodeDroppedError(problem)
            contexts[scorer] = ids
        return contexts


def _end(outcome: Outcome, cut: bool) -> str:
    """Why an episode is over, for pages."""
    if outcome.terminated:
        return "the environment"
    if outcome.truncated:
        return "the environment's limit"
    return "a full context" if cut else "the limit of turns"


def _action(taken: _Taken) -> str:
    """What a history shows of a turn: the move, where the environment names it."""
    return str(taken.outcome.info.get("action_content") or taken.text)


def _shortener(tag: str, config: EnvironmentConfig) -> Callable[[Sequence[Message]], Sequence[Message]] | None:
    if config.on_context_full == "stop":
        return None
    module, _, name = config.on_context_full.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _checked(messages: Any, field: str) -> list[Message]:
    """What a function of the user's made of a conversation."""
    whole = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not whole or not messages or messages[-1]["role"] == "assistant":
        raise GenerationError(
            f"{field}: the function must return messages (role and content) that end with what the student answers to"
        )
    return [dict(m) for m in messages]
