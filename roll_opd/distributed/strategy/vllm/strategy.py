"""``vllm``: samples and scores with a vLLM engine beside this process.

::

    generate ─► one request each ─► engine ─► tokens
    score    ─► one request each ─► engine ─► prompt log-probabilities
    update   ─► pause, requests kept ─► buckets, through shared memory ─► caches emptied, tokens counted ─► resume

Log-probabilities are those of the untruncated softmax at temperature 1, whatever the sampling settings: the engine
takes them before it tempers or cuts (``logprobs_mode: raw_logprobs``), so training and validation may sample
differently. Padding of the model's head takes no part in any softmax.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoConfig

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    GenerateRequest,
    GenerateResult,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
)
from roll_opd.distributed.strategy.decoding import has_stop_string
from roll_opd.distributed.strategy.prompt_logprobs import check_want, score_result
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.vllm.engine import Engine, engine_arguments, set_environment
from roll_opd.distributed.strategy.vllm.truncation import kept_mass, ranks_needed
from roll_opd.distributed.strategy.weight_transfer import WeightBucket, in_shared_memory
from roll_opd.errors import EngineDiedError, GenerationError, ModelError
from roll_opd.trajectory import FloatArray

T = TypeVar("T")

TEMPERATURES = (0.01, 2.0)
"""What vLLM samples with: it replaces less without a word to us, and refuses more."""
HELD_OTHERWISE = -1
"""In place of a checksum: the engine's workers do not agree on what they hold. No checksum is negative."""


class VLLMStrategy:
    """Generates and scores with a vLLM engine.

    Args:
        role: named in messages.
        config: the role's worker config; ``strategy_args.strategy_config`` is a
            :class:`~roll_opd.configs.backends.vllm.VLLMSettings`.
        vocabulary: the student's tokenizer facts; ids beyond it have probability 0.
        device: ``cuda`` or ``cpu``; which GPUs, the process's environment says.
        generates: whether the role samples, or only scores.
        max_length: tokens of the longest sequence, unless the settings name a ``max_model_len``.

    Raises:
        ConfigError: a setting that vLLM does not know or take.
        ModelError: vLLM cannot run the model, or does not start.
    """

    def __init__(
        self,
        role: str,
        config: WorkerConfig,
        vocabulary: Vocabulary,
        device: torch.device,
        *,
        generates: bool,
        max_length: int | None = None,
    ) -> None:
        assert config.strategy_args is not None
        settings: VLLMSettings = backend_settings(config.strategy_args, f"{role}.strategy_args")
        self.role, self.config, self.settings, self.vocabulary = role, config, settings, vocabulary
        self.version = 0
        self._sleeps = device.type == "cuda"
        self._names = itertools.count()
        self._in_flight: dict[str, _Response] = {}
        self._updating = False
        # Weights that no update has brought yet, and that the checkpoint did not bring either.
        self._stale = settings.load_format == "dummy"
        self._updated = False
        # The engine took the place of one that died, and no update has come since.
        self._replaced = False
        set_environment(settings, device)
        limit = settings.max_model_len
        if limit is None and max_length is not None:
            limit = _max_model_len(config, max_length)
        self._engine = Engine(
            role,
            engine_arguments(role, config, settings, device, generates=generates, max_model_len=limit),
            start_timeout=settings.start_timeout,
            call_timeout=60.0 * config.backend_timeout,
        )
        self._serving = asyncio.Event()
        self._prepare()

    def _prepare(self) -> None:
        """Make a fresh engine fit to serve."""
        rows = self._engine.vocab_size
        if rows < self.vocabulary.size:
            path = self.config.model_args.model_name_or_path
            raise ModelError(
                f"{self.role}: the head of {path!r} has {rows} rows, the tokenizer {self.vocabulary.size} tokens"
            )
        if rows > self.vocabulary.size:
            self._engine.worker_call("opd_mask_vocabulary", self.vocabulary.size)
        self._engine.in_loop(self._open)

    # ---- sampling ----------------------------------------------------------------------------------------------------

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`; results come as they finish."""
        for request in requests:
            self._check(request)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[GenerateResult | None] = asyncio.Queue()

        def put(item: GenerateResult | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        async def work() -> None:
            await self._engine.guard("generate", _together([self._sample(request, put) for request in requests]))

        working = self._engine.submit(work())
        working.add_done_callback(lambda _: put(None))
        try:
            while (item := await queue.get()) is not None:
                yield item
            working.result()
        finally:
            working.cancel()

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what vLLM would do otherwise than asked, or would die of."""
        prompt, sampling = request.prompt_ids, request.sampling
        where = f"{self.role}: request {request.id}"
        if not prompt or not 0 <= min(prompt) <= max(prompt) < self.vocabulary.size:
            raise GenerationError(f"{where}: the prompt is empty or has ids beyond the vocabulary")
        limit = self._engine.max_model_len
        if len(prompt) + sampling.max_new_tokens > limit:
            lengths = f"{len(prompt)} tokens and {sampling.max_new_tokens} new ones"
            raise GenerationError(f"{where}: {lengths} are more than max_model_len {limit}")
        low, high = TEMPERATURES
        if not sampling.greedy and not low <= sampling.temperature <= high:
            raise GenerationError(
                f"{where}: vLLM samples at temperatures from {low} to {high}, not at {sampling.temperature}"
            )

    async def _sample(self, request: GenerateRequest, put: Callable[[GenerateResult], None]) -> None:
        await self._admitted()
        sampling, name = request.sampling, self._name(request.id)
        response = self._in_flight[name] = _Response(request, self.vocabulary)
        steps = self._engine.stream(
            name,
            request.prompt_ids,
            each_step=bool(sampling.stop_strings),
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            seed=request.seed,
            max_tokens=sampling.max_new_tokens,
            logprobs=response.ranks,
            # Whether a token ends the response, the tokenizer's facts decide and not the checkpoint's.
            ignore_eos=True,
            stop_token_ids=list(response.stop_ids),
        )
        try:
            async with aclosing(steps):
                async for step in steps:
                    if response.extend(step.outputs[0]):
                        break
        finally:
            del self._in_flight[name]
        put(response.result(self.version))

    async def _admitted(self) -> None:
        """Wait until requests may be sent to the engine.

        Raises:
            EngineDiedError: it was replaced and has no weights yet; who asked before that was known may ask again.
            GenerationError: it has no weights for another reason.
        """
        if self._stale and not self._updating:
            raise (EngineDiedError if self._replaced else GenerationError)(
                f"{self.role}: the engine holds no weights that could be served; a weight update must bring them"
            )
        await self._serving.wait()

    def _name(self, request: object) -> str:
        return f"{request}-{next(self._names)}"

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`.

        Raises:
            ModelError: given ids or hidden states are wanted, or a sequence is too long.
            EngineDiedError: the engine is gone.
        """
        check_want(self.role, want)
        limit = self._engine.max_model_len
        for request in requests:
            # Prompt log-probabilities come with one token that is sampled and thrown away.
            if len(request.tokens) + 1 > limit:
                raise ModelError(
                    f"{self.role}: sequence {request.id} has {len(request.tokens)} tokens, and with one more it does "
                    f"not fit into max_model_len {limit}"
                )
        return self._engine.call("score", lambda: _together([self._score(request, want) for request in requests]))

    async def _score(self, request: ScoreRequest, want: ScoreWant) -> ScoreResult:
        await self._admitted()
        steps = self._engine.stream(
            self._name(request.id), request.tokens.tolist(), max_tokens=1, prompt_logprobs=want.top_k
        )
        async with aclosing(steps):
            (answer,) = [step async for step in steps]
        return score_result(request, answer.prompt_logprobs, want, self.vocabulary.size)

    def head(self) -> HeadWeights:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; an engine does not give its weights away."""
        raise ModelError(f"{self.role}: a vllm engine cannot hand out its output layer; use hf_infer for support: full")

    def save_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`; the trainer holds the same."""
        raise ModelError(f"{self.role}: a vllm engine cannot write its weights; a teacher with its own needs hf_infer")

    def load_model(self, folder: str) -> None:
        """See :meth:`save_model`."""
        raise ModelError(f"{self.role}: a vllm engine cannot read weights; a teacher with its own needs hf_infer")

    # ---- weights -----------------------------------------------------------------------------------------------------

    def weight_dtype(self) -> str:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`."""
        return self._engine.dtype

    def receivers(self) -> int:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`; the engine's workers."""
        return self.settings.tensor_parallel_size * self.settings.pipeline_parallel_size

    def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`."""
        self._engine.worker_call("opd_join", host, port, first_rank, size, timeout)

    def begin_weight_update(self, version: int, mix: float = 1.0) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`; interrupts what is being generated.

        Raises:
            GenerationError: ``mix`` asks for a moving average, which an engine cannot form.
        """
        if mix != 1.0:
            raise GenerationError(
                f"{self.role}: a vllm engine cannot hold a moving average of the student; use hf_infer"
            )
        assert self._engine.residence != "away", "a weight update of an engine that is not on its device"
        self._engine.call("pause", self._pause)
        self._engine.worker_call("opd_begin_update")

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`.

        Raises:
            GenerationError: the model has no such tensor, or one of another shape.
        """
        # Bytes lie in this process's memory: engines read them from a file instead of from their sockets.
        given, file = in_shared_memory(bucket) if bucket.way == "host" else (bucket, None)
        try:
            self._engine.worker_call("opd_load", [dataclasses.astuple(spec) for spec in given.specs], given.handles)
        finally:
            if file is not None:
                file.close()
        return dict(bucket.checksums)

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`.

        Checksums are read back from the model's memory, or are those of what it was given to load, where it keeps its
        own form of it. An engine that holds something else does not serve.
        """
        held: dict[str, int] = {}
        for answer in self._engine.worker_call("opd_finish_update"):
            for name, checksum in answer.items():
                held[name] = checksum if held.get(name, checksum) == checksum else HELD_OTHERWISE
        if HELD_OTHERWISE in held.values():
            self._updating = False
        else:
            self._engine.call("resume", lambda: self._resume(version))
        return held

    async def _pause(self) -> None:
        self._serving.clear()
        self._updated = self._stale = self._updating = True
        self._replaced = False
        # The cache goes with the weights that it was computed with: requests that go on are computed anew.
        await self._engine.llm.pause_generation(mode="keep", clear_cache=True)

    async def _resume(self, version: int) -> None:
        if await self._engine.llm.reset_prefix_cache() is False:
            raise GenerationError(f"{self.role}: the prefix cache still holds blocks of the weights before {version}")
        tokens = self._engine.tokens_so_far()
        for name, response in self._in_flight.items():
            response.split(tokens.get(name), self.version)
        self.version = version
        self._stale = self._updating = False
        await self._engine.llm.resume_generation()
        self._open()

    # ---- coming and going --------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`.

        An engine that was never updated holds its checkpoint, and serves again at once.
        """
        self._engine.in_loop(self._serving.clear)
        self._replaced = True
        self._updating = False
        self._stale = self._updated or self.settings.load_format == "dummy"
        self._engine.stop()
        self._engine.start()
        self._prepare()

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`; vLLM's sleep mode, which only CUDA has."""
        if self._sleeps:
            self._engine.in_loop(self._serving.clear)
            self._engine.move("weights" if keep_weights else "away", self.settings.sleep_level)
            self._stale |= not keep_weights and self.settings.sleep_level == 2

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        if self._sleeps:
            self._engine.move("weights" if weights_only else "all", self.settings.sleep_level)
            self._engine.in_loop(self._open)

    def close(self) -> None:
        """End the engine. A worker that is killed takes its engine along without this."""
        self._engine.close()

    def _open(self) -> None:
        """Let requests in, if the engine can serve them; in the loop."""
        if self._engine.residence == "all" and not self._stale:
            self._serving.set()


class _Response:
    """A response that is being sampled.

    The mass that truncation keeps is measured on the first response of each group alone: it takes many
    log-probabilities a token, which halve the speed of an engine.
    """

    def __init__(self, request: GenerateRequest, vocabulary: Vocabulary) -> None:
        self.request, self.vocabulary = request, vocabulary
        sampling = request.sampling
        self.stop_ids = () if sampling.ignore_eos else tuple(i for i in vocabulary.stop_ids if i < vocabulary.size)
        needed = min(ranks_needed(sampling), vocabulary.size)
        wanted = min(sampling.report_top_ids, vocabulary.size)
        self.measured = request.id.sample == 0 or needed <= wanted
        self.ranks = max(wanted, needed if self.measured else 0)
        """Of the most probable tokens that are to be reported with each sampled one."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.best: list[list[tuple[int, float]]] = []
        self.splits: list[tuple[int | None, int]] = []
        self.stopped = False

    def split(self, length: int | None, version: int) -> None:
        """Note that the first ``length`` tokens (None: all) are not of later weights than ``version``."""
        self.splits.append((length, version))

    def extend(self, output: Any) -> bool:
        """Add what the engine has sampled; return whether a stop string is complete."""
        if output.finish_reason not in (None, "stop", "length"):
            raise GenerationError(f"request {self.request.id}: the engine ended it: {output.finish_reason}")
        flat, stop_strings = output.logprobs, self.request.sampling.stop_strings
        for token, start, end in zip(output.token_ids, flat.start_indices, flat.end_indices, strict=True):
            self.tokens.append(token)
            self.logprobs.append(flat.logprobs[start])
            self.best.append(_best(flat, start, end, self.ranks))
            stopped = has_stop_string(self.tokens, stop_strings, self.vocabulary.decode)
            self.stopped = stopped or token in self.stop_ids
            if stopped:
                return True
        return False

    def result(self, version: int) -> GenerateResult:
        """The whole response; tokens after the last split are of weights ``version``."""
        sampling = self.request.sampling
        versions = np.full(len(self.tokens), version, dtype=np.int32)
        for length, before in reversed(self.splits):
            versions[:length] = before
        logprobs = np.array(self.logprobs, dtype=np.float32)
        top_ids = np.array([[i for i, _ in row[: sampling.report_top_ids]] for row in self.best], dtype=np.int32)
        return GenerateResult(
            id=self.request.id,
            response_ids=np.array(self.tokens, dtype=np.int32),
            infer_logprobs=logprobs,
            weight_version=versions,
            finish_reason="stop" if self.stopped else "length",
            sampled_mass=self._sampled_mass(logprobs),
            top_ids=top_ids if sampling.report_top_ids else None,
        )

    def _sampled_mass(self, logprobs: FloatArray) -> float:
        sampling = self.request.sampling
        if sampling.greedy:
            return float(np.exp(logprobs).mean())
        needed = min(ranks_needed(sampling), self.vocabulary.size)
        if not needed:
            return 1.0
        if not self.measured:
            return math.nan
        best = np.array([[logprob for _, logprob in row[:needed]] for row in self.best])
        return float(kept_mass(best, sampling, self.vocabulary.size).mean())


def _best(flat: Any, start: int, end: int, count: int) -> list[tuple[int, float]]:
    """The ``count`` most probable tokens of a step, best first, without what comes before them: the sampled token.

    Where vLLM has put steps together, the sampled token stands there once, among them if it is one of them.
    """
    entries = range(start + 1, end) if end - start > count else sorted(range(start, end), key=flat.ranks.__getitem__)
    return [(flat.token_ids[i], flat.logprobs[i]) for i in entries]


async def _together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all side by side; the first failure ends the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _max_model_len(config: WorkerConfig, longest: int) -> int:
    """Room for the longest sequence and for the token that scoring samples, as far as the model's positions reach."""
    model = config.model_args
    try:
        path = str(model.model_name_or_path)
        whole = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError):  # what is wrong with the model, vLLM will say
        return longest
    positions = getattr(whole.get_text_config(), "max_position_embeddings", None)
    positions = model.model_config_kwargs.get("max_position_embeddings", positions)
    # Bounds of a teacher's own view may add up to more than any sequence has, and than vLLM starts with.
    return longest + 1 if positions is None else min(longest + 1, int(positions))
