"""``hf_infer``: a plain transformers model in one process, for generation and for scoring."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model as load_model_file
from safetensors.torch import save_model

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy import attention
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    GenerateRequest,
    GenerateResult,
    HeadWeights,
    Sampling,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
)
from roll_opd.distributed.strategy.decoding import DecodingLoop
from roll_opd.distributed.strategy.packed_model import PackedModel, decoder_layers, load_model, raw_of
from roll_opd.distributed.strategy.scoring import in_order_of, rows_of, score_row
from roll_opd.distributed.strategy.threads import LentThreads
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket, tensor_checksum
from roll_opd.distributed.strategy.weight_update import WeightUpdate
from roll_opd.errors import GenerationError, ModelError

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "weights.safetensors"


class HFStrategy:
    """Generates and scores with one copy of the model.

    Args:
        role: named in messages.
        config: the role's worker config.
        vocabulary: the student's tokenizer facts; ids beyond it never enter a softmax.
        device: where the weights live.
        generates: whether the role must be able to sample; scoring alone is possible for more models.

    Raises:
        ModelError: the model cannot be loaded, or not do what is asked of it.
    """

    def __init__(
        self, role: str, config: WorkerConfig, vocabulary: Vocabulary, device: torch.device, *, generates: bool
    ) -> None:
        self.role, self.config, self.device = role, config, device
        self.model: PackedModel = load_model(
            config.model_args,
            role=role,
            vocab_size=vocabulary.size,
            device=device,
            decodes=generates,
            logits_in_fp32=config.logits_in_fp32,
        ).requires_grad_(False)
        if generates and self.model.lm.config.get_text_config()._attn_implementation != attention.NAME:
            raise ModelError(
                f"{role}.model_args.model_name_or_path: hf_infer generates only with models whose every layer attends "
                f"to all earlier tokens; {config.model_args.model_name_or_path!r} has sliding windows or the like"
            )
        self.version = 0
        self._threads = LentThreads(torch.get_num_threads())
        # Also between two layers: a row of long sequences would keep the others waiting.
        for module in (self.model.lm.base_model, *decoder_layers(self.model.lm)):
            module.register_forward_pre_hook(lambda *_: self._threads.pause())
        if generates:
            self._loop = DecodingLoop(self.model, vocabulary.stop_ids, vocabulary.decode)
        # One request list, scoring call or weight update at a time: they share the weights and the cores.
        self._lock = threading.Lock()
        self._parameters = dict(self.model.lm.named_parameters(remove_duplicate=False))
        self._end = TransferEnd(device)
        self._update = WeightUpdate(self._parameters, self._end)

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`; the work is done in a thread."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[GenerateResult | BaseException | None] = asyncio.Queue()

        closed = threading.Event()

        def work() -> None:
            outcome: BaseException | None = None
            try:
                for result in self._run(requests, closed.is_set):
                    loop.call_soon_threadsafe(queue.put_nowait, result)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
                outcome = error
            loop.call_soon_threadsafe(queue.put_nowait, outcome)

        task = loop.run_in_executor(None, work)
        try:
            while isinstance(item := await queue.get(), GenerateResult):
                yield item
        finally:
            closed.set()
        await task
        if item is not None:
            raise item

    def _run(self, requests: Sequence[GenerateRequest], closed: Callable[[], bool]) -> Iterator[GenerateResult]:
        with self._lock, self._threads.working():
            for batch in _batches(requests, self.config.infer_batch_size):
                if closed():
                    break
                yield from self._loop.run(batch, self.version, closed)

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`."""
        rows = rows_of(requests, self.config)
        with self._lock, self._threads.working(), torch.inference_mode():
            results = [result for row in rows for result in score_row(self.model, row, want)]
        return in_order_of(requests, rows, results)

    def use_threads(self, count: int) -> None:
        """Compute with ``count`` threads from now on; returns once that is so."""
        self._threads.use(count)

    def head(self) -> HeadWeights:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`."""
        head = self.model.head().trimmed()
        return HeadWeights(raw_of(head.weight_VH), None if head.bias_V is None else raw_of(head.bias_V), head.soft_cap)

    def save_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`."""
        with self._lock:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_model(self.model.lm, str(Path(folder) / _WEIGHTS_FILE))

    def load_model(self, folder: str) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`."""
        with self._lock:
            load_model_file(self.model.lm, str(Path(folder) / _WEIGHTS_FILE))

    def restart(self) -> None:
        """Refuse: the model lives and dies with its worker."""
        raise GenerationError(f"{self.role}: hf_infer has no engine that could be started again")

    def offload(self, keep_weights: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`; a scorer or generator has nothing but weights."""
        if not keep_weights:
            self._move(torch.device("cpu"))

    def onload(self, weights_only: bool = False) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.Resident`."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        with self._lock:
            # In place, parameter by parameter: the decoding loop and the name table hold on to these tensors.
            self.model.to(device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def begin_weight_update(self, version: int, mix: float = 1.0) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`; waits for what is being generated."""
        self._lock.acquire()
        # The replicas of a role take their weights over at the same time.
        self._threads.rest()
        self._update = WeightUpdate(self._parameters, self._end, mix)

    def load_weights(self, bucket: WeightBucket) -> dict[str, int]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`; in place."""
        return self._update.take(bucket)

    def finish_weight_update(self, version: int) -> Mapping[str, int]:
        """See :class:`~roll_opd.distributed.strategy.base.GenerateStrategy`."""
        self.version = version
        # A tied weight is there under each of its names.
        sums = {p: tensor_checksum(p) for p in self.model.lm.parameters()}
        self._lock.release()
        return {name: sums[p] for name, p in self._parameters.items()}

    def weight_dtype(self) -> str:
        """The dtype in which weights should be sent here, as torch names it."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def receivers(self) -> int:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`."""
        return 1

    def join_transfer(self, host: str, port: int, first_rank: int, size: int, timeout: float) -> None:
        """See :class:`~roll_opd.distributed.strategy.base.TakesWeights`."""
        self._end.join(host, port, first_rank, size, timeout)


def _batches(requests: Sequence[GenerateRequest], size: int) -> Iterator[list[GenerateRequest]]:
    """Cut into batches of at most ``size`` that share one :class:`Sampling` but for its limit, in the order given."""
    batch: list[GenerateRequest] = []
    for request in requests:
        if batch and (len(batch) == size or not _go_together(request.sampling, batch[0].sampling)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _go_together(one: Sampling, other: Sampling) -> bool:
    """Whether the decoding loop can sample both at once: everything but the limit is the same."""
    return dataclasses.replace(one, max_new_tokens=other.max_new_tokens) == other
