"""The life of one vLLM engine: started, called with a watchdog, put to sleep, stopped, started again.

::

    any thread ── call(coroutine, deadline) ──►┐
                                               │ thread "vllm": the loop that owns the AsyncLLM
    any loop ──── submit(coroutine) ──────────►┘        │
                                                        └─► process EngineCore ─► worker process(es)

The loop is ours, because the engine's sockets and tasks belong to the loop in which it was made, while we are called
from threads and from other loops. Everything that depends on vLLM's version is here and in ``weights.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, Literal, TypeVar

import torch

from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.errors import ConfigError, EngineDiedError, GenerationError, ModelError

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.5
"""Time between two looks at whether the engine's processes live."""
WORKER_EXTENSION = "roll_opd.distributed.strategy.vllm.weights.WorkerExtension"
SCORED_TOKENS = 2048
"""Tokens of a step of an engine that only scores. For each, vLLM holds log-probabilities of the whole vocabulary,
memory that it does not count when it takes the rest for its cache: 2.4 GiB for 2048 tokens at a vocabulary of 152k."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Residence = Literal["all", "weights", "away"]
"""What of an engine is on its devices: also the key-value cache, the weights alone, or nothing."""


def set_environment(settings: VLLMSettings, device: torch.device) -> None:
    """Set what vLLM reads when it is imported and when it starts processes; what the user has set stands."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # Never a fork of a process with threads.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # An engine lies on one node.
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.start_timeout)),
    }
    if device.type == "cpu":
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kvcache_space_gb),
            # vLLM would pin each engine's threads to the same first cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        if settings.enforce_eager:
            # vLLM's own helpers are compiled even so, for a quarter of a minute at the first request.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_arguments(
    role: str,
    config: WorkerConfig,
    settings: VLLMSettings,
    device: torch.device,
    *,
    generates: bool,
    max_model_len: int | None,
) -> dict[str, Any]:
    """Return the arguments of vLLM's ``AsyncEngineArgs``.

    Raises:
        ConfigError: ``engine_args`` repeats something that is decided elsewhere, or a setting cannot work here.
    """
    model, where = config.model_args, f"{role}.strategy_args.strategy_config"
    arguments: dict[str, Any] = {
        "model": model.model_name_or_path,
        "dtype": DTYPES[model.dtype],
        "trust_remote_code": model.trust_remote_code,
        "hf_overrides": dict(model.model_config_kwargs),
        # Token ids in, token ids out; and no sampling defaults from the checkpoint.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # The untruncated softmax at temperature 1, however a token is drawn, and as many of them as are asked for.
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": -1,
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
        "load_format": settings.load_format,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
    }
    if settings.tensor_parallel_size * settings.pipeline_parallel_size > 1:
        # Left to itself, vLLM takes Ray where it finds itself in a Ray actor, and asks it for GPUs that are ours.
        arguments["distributed_executor_backend"] = "mp"
    if device.type == "cuda":
        arguments |= {"gpu_memory_utilization": settings.gpu_memory_utilization, "enable_sleep_mode": True}
    optional = {
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "block_size": settings.block_size,
        "enable_chunked_prefill": settings.enable_chunked_prefill,
    }
    if not generates and settings.max_num_batched_tokens is None and settings.enable_chunked_prefill is not False:
        optional["max_num_batched_tokens"] = SCORED_TOKENS
    if device.type == "cpu":
        optional |= _without_cuda(where, settings, generates)
    arguments |= {name: value for name, value in optional.items() if value is not None}
    for name in settings.engine_args:
        if name in arguments:
            problem = f"is {arguments[name]!r} already, from another setting or by necessity; remove it"
            raise ConfigError(f"{where}.engine_args.{name}", problem)
    return arguments | settings.engine_args


def _without_cuda(where: str, settings: VLLMSettings, generates: bool) -> dict[str, Any]:
    """Arguments that keep vLLM's CPU engine from what ends it."""
    if settings.pipeline_parallel_size > 1:
        raise ConfigError(f"{where}.pipeline_parallel_size", "vLLM has no pipelines without CUDA; use 1")
    if not generates:
        return {}
    # It cannot set the generator of a request back after computing a part of its prompt.
    if settings.enable_chunked_prefill:
        problem = "without CUDA, vLLM dies of prompts that are cut where requests have seeds, as ours do; use false"
        raise ConfigError(f"{where}.enable_chunked_prefill", problem)
    return {"enable_chunked_prefill": False}


class Engine:
    """One vLLM engine at a time, in an event loop of its own.

    Args:
        role: named in messages.
        arguments: of ``AsyncEngineArgs``.
        start_timeout: seconds that a start may take.
        call_timeout: seconds that any other call may take.

    Raises:
        ConfigError: vLLM does not know an argument.
        ModelError: it refuses the model or the settings, or does not come up.
    """

    def __init__(self, role: str, arguments: Mapping[str, Any], *, start_timeout: float, call_timeout: float) -> None:
        self.role = role
        self._arguments = dict(arguments)
        self._start_timeout, self._call_timeout = start_timeout, call_timeout
        self.residence: Residence = "all"
        self.llm: Any = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        self.start()

    # ---- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine; it has no predecessor, or that one was stopped."""
        assert self.llm is None
        began = time.monotonic()
        try:
            self.submit(self._start()).result(self._start_timeout)
        except TimeoutError:
            raise ModelError(f"{self.role}: the vLLM engine did not start within {self._start_timeout:.0f} s") from None
        logger.info("%s: vLLM engine up after %.1f s", self.role, time.monotonic() - began)

    def stop(self) -> None:
        """End the engine's processes, whatever state they are in."""
        self.submit(self._stop()).result(self._call_timeout)

    def close(self) -> None:
        """End the engine and the loop; nothing can be started afterwards."""
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``coroutine`` in the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        """Run ``function`` in the engine's loop, with watchdog and deadline, and wait for it.

        Args:
            what: named in messages.
            function: makes the awaitable; called in the loop.

        Raises:
            EngineDiedError: the engine is gone, or did not answer in time.
        """

        async def guarded() -> T:
            return await self.guard(what, function(), self._call_timeout)

        return self.submit(guarded()).result()

    def worker_call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of the worker extension in every worker process; return all answers.

        Raises:
            EngineDiedError: the engine is gone, or did not answer in time.
            GenerationError: the method failed.
        """
        try:
            return self.call(method, lambda: self.llm.collective_rpc(method, args=args))
        except EngineDiedError:
            raise
        except Exception as error:
            # Policy: refuse. What a worker raises comes as whatever vLLM makes of it.
            raise GenerationError(f"{self.role}: {method} failed in vLLM's worker: {error}") from error

    def in_loop(self, function: Callable[[], Any]) -> None:
        """Have the loop call ``function``, before whatever is submitted after this."""
        self._loop.call_soon_threadsafe(function)

    def move(self, residence: Residence, sleep_level: int) -> None:
        """Bring to the devices what ``residence`` names and no more; a level of 2 forgets the weights that leave."""
        if residence != self.residence:
            self.call(f"go from {self.residence} to {residence}", lambda: self._move(residence, sleep_level))
            self.residence = residence

    # ---- what it runs ------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> Any:
        """What vLLM knows of the model.

        Raises:
            EngineDiedError: there is no engine.
        """
        llm = self.llm  # once: another thread may be replacing it
        if llm is None:
            raise EngineDiedError(f"{self.role}: the vLLM engine died, and another one is being started")
        return llm.model_config

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, padding included."""
        return int(self._model.get_vocab_size())

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence that it takes."""
        return int(self._model.max_model_len)

    @property
    def dtype(self) -> str:
        """Of the weights, as torch names it."""
        return str(self._model.dtype).removeprefix("torch.")

    # ---- in the loop -------------------------------------------------------------------------------------------------

    async def guard(self, what: str, answer: Awaitable[T], timeout: float | None = None) -> T:
        """Wait for ``answer`` as long as the engine lives and there is time.

        A call of vLLM's own that is under way when the engine dies may hang for good; this does not.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        llm, deadline = self.llm, time.monotonic() + (timeout or float("inf"))
        task = asyncio.ensure_future(answer)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
                if done:
                    return task.result()
                if llm is None or llm.errored:
                    raise EngineDiedError(f"{self.role}: the vLLM engine died ({what})")
                if time.monotonic() > deadline:
                    raise EngineDiedError(f"{self.role}: the vLLM engine did not {what} within {timeout:.0f} s")
        except EngineDeadError as error:
            raise EngineDiedError(f"{self.role}: the vLLM engine died ({what})") from error
        finally:
            task.cancel()

    async def stream(
        self, name: str, prompt_ids: Sequence[int], *, each_step: bool = False, **sampling: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the outputs of one request; closing the iterator aborts it.

        Args:
            name: unique among all requests.
            prompt_ids: the prompt.
            each_step: yield what is new after every step of the engine; else all of it, once, at the end, for a third
                of the work on our side.
            sampling: of vLLM's ``SamplingParams``.

        Raises:
            GenerationError: vLLM refuses the request.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        # A prompt that needs no work, as vLLM's renderer would make it.
        prompt = {"type": "token", "prompt_token_ids": list(prompt_ids)}
        try:
            kind = RequestOutputKind.DELTA if each_step else RequestOutputKind.FINAL_ONLY
            params = SamplingParams(**sampling, detokenize=False, flat_logprobs=True, output_kind=kind)
            async with aclosing(self.llm.generate(prompt, params, name)) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError:
            raise
        except Exception as error:
            # Policy: refuse. A request is good or not; vLLM has many names for what is wrong with it.
            raise GenerationError(f"{self.role}: vLLM refuses request {name}: {error.__cause__ or error!r}") from error

    def tokens_so_far(self) -> dict[str, int]:
        """For each unfinished request, by its name, how many tokens it has; in the loop."""
        states = self.llm.output_processor.request_states.values()
        return {state.external_req_id: state.detokenizer.num_output_tokens() for state in states}

    async def _start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        where = f"{self.role}.strategy_args.strategy_config"
        try:
            arguments = AsyncEngineArgs(**self._arguments)
        except TypeError as error:
            raise ConfigError(f"{where}.engine_args", f"the installed vLLM says: {error}") from error
        # Policy: refuse. vLLM and the libraries below it raise whatever they like over a model or a setting.
        try:
            self.llm = AsyncLLM.from_engine_args(arguments)
        except Exception as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise ModelError(f"{self.role}: vLLM cannot run {self._arguments['model']!r}: {reason}") from error
        self.residence = "all"

    async def _stop(self) -> None:
        llm, self.llm = self.llm, None
        if llm is not None:
            llm.shutdown()

    async def _move(self, target: Residence, sleep_level: int) -> None:
        if target == "all":
            # Only what sleeps may be named.
            await self.llm.wake_up(["kv_cache"] if self.residence == "weights" else None)
        elif self.residence == "away":
            await self.llm.wake_up(["weights"])
        else:
            await self.llm.sleep(level=1 if target == "weights" else sleep_level)
            if target == "weights":
                await self.llm.wake_up(["weights"])
