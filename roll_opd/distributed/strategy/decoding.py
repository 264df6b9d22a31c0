"""A batched decoding loop over a static key-value cache, for the ``hf_infer`` strategy.

Prompts are left-padded to one width; each prompt of a group is computed once and its cache copied to the group's
samples. Sequences that have finished are handed out at once, and leave the batch when they are an eighth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from roll_opd.algorithms.projection import Head
from roll_opd.algorithms.sampler import sample, token_logprob
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling
from roll_opd.distributed.strategy.packed_model import PackedModel
from roll_opd.trajectory import FinishReason

LEAVE = 8
"""One in so many rows may be a sequence that has finished, before the others are copied to a smaller batch."""


@dataclass
class _Sequence:
    """A response being sampled."""

    request: GenerateRequest
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    kept: float = 0.0
    finish_reason: FinishReason | None = None
    handed_out: bool = False

    def result(self, version: int) -> GenerateResult:
        assert self.finish_reason is not None
        n = len(self.tokens)
        return GenerateResult(
            id=self.request.id,
            response_ids=np.array(self.tokens, dtype=np.int32),
            infer_logprobs=np.array(self.logprobs, dtype=np.float32),
            weight_version=np.full(n, version, dtype=np.int32),
            finish_reason=self.finish_reason,
            sampled_mass=self.kept / max(n, 1),
            top_ids=np.array(self.top_ids, dtype=np.int32) if self.top_ids else None,
        )


class DecodingLoop:
    """Samples batches of responses from a :class:`PackedModel`.

    Args:
        model: the weights; its device decides where the work is done.
        stop_ids: token ids that end a response (and belong to it).
        decode: turns token ids into text; used for stop strings alone.
    """

    def __init__(self, model: PackedModel, stop_ids: Sequence[int], decode: Callable[[list[int]], str]) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode

    @torch.inference_mode()
    def run(
        self, requests: Sequence[GenerateRequest], version: int, closed: Callable[[], bool] = lambda: False
    ) -> Iterator[GenerateResult]:
        """Sample one batch, whose :class:`Sampling` may differ in the limit alone; yield results as sequences finish.

        Nothing more is computed once ``closed`` says so.
        """
        live = [_Sequence(r, _uniforms(r.seed, r.sampling.max_new_tokens)) for r in requests]
        # Once: in fp32 it may be a copy.
        head = self.model.head().trimmed()
        limit = max(r.sampling.max_new_tokens for r in requests)
        logits, cache, visible, width = self._prefill(requests, limit, head)
        for step in range(limit):
            if closed():
                return
            self._draw(live, logits, step, requests[0].sampling)
            for sequence in live:
                if sequence.finish_reason is not None and not sequence.handed_out:
                    sequence.handed_out = True
                    yield sequence.result(version)
            keep = [i for i, s in enumerate(live) if s.finish_reason is None]
            if not keep:
                break
            if LEAVE * (len(live) - len(keep)) >= len(live):
                live = [live[i] for i in keep]
                visible = visible[torch.tensor(keep, device=visible.device)]
                _select_rows(cache, keep)
            width += 1
            logits = self._forward_one([s.tokens[-1] for s in live], cache, visible[:, :width], head)

    def _prefill(
        self, requests: Sequence[GenerateRequest], max_new: int, head: Head
    ) -> tuple[Tensor, StaticCache, Tensor, int]:
        """Compute each distinct prompt once.

        Returns:
            Next-token logits, cache, the mask of visible keys ``[b, P + max_new]`` (those to come are), and ``P``.
        """
        device = next(self.model.parameters()).device
        distinct = list(dict.fromkeys(r.prompt_ids for r in requests))
        row_of = {prompt: i for i, prompt in enumerate(distinct)}
        width = max(len(p) for p in distinct)
        tokens = torch.zeros(len(distinct), width, dtype=torch.long)
        visible = torch.zeros(len(distinct), width, dtype=torch.bool)
        for i, prompt in enumerate(distinct):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            visible[i, width - len(prompt) :] = True
        tokens, visible = tokens.to(device), visible.to(device)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # A padding row must see something, or its softmax is NaN and the NaN spreads through the cache: itself.
        own = torch.eye(width, dtype=torch.bool, device=device)
        mask = (causal & visible[:, None, :]) | own
        cache = StaticCache(config=self.model.lm.config, max_cache_len=width + max_new)
        positions = (visible.cumsum(-1) - 1).clamp_(min=0)
        logits = self._logits(tokens, positions, mask[:, None], cache, head)
        rows = [row_of[r.prompt_ids] for r in requests]
        _select_rows(cache, rows)
        index = torch.tensor(rows, device=device)
        visible = torch.nn.functional.pad(visible[index], (0, max_new), value=True)
        return logits[index], cache, visible, width

    def _forward_one(self, tokens: list[int], cache: StaticCache, visible: Tensor, head: Head) -> Tensor:
        """Feed one token per row, whose own key is the last one that is visible; return next-token logits."""
        column = torch.tensor(tokens, device=visible.device)[:, None]
        positions = visible.sum(-1, keepdim=True) - 1
        return self._logits(column, positions, visible[:, None, None, :], cache, head)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: StaticCache, head: Head) -> Tensor:
        output = self.model.lm.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        hidden = output.last_hidden_state[:, -1].to(head.weight_VH.dtype)
        logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V).float()
        cap = head.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _draw(self, live: list[_Sequence], logits: Tensor, step: int, sampling: Sampling) -> None:
        """Append one token to every unfinished sequence and note which of them end with it."""
        if sampling.greedy:
            tokens = logits.argmax(-1)
            logprobs = token_logprob(logits, tokens)
            kept = logprobs.exp()
        else:
            # What has ended has none left, and its draw is not looked at.
            drawn_with = [s.uniforms[min(step, len(s.uniforms) - 1)] for s in live]
            uniform = torch.tensor(drawn_with, dtype=torch.float64, device=logits.device)
            tokens, logprobs, kept = sample(
                logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
        wide = min(sampling.report_top_ids, logits.shape[-1])
        top_ids = logits.topk(wide, dim=-1).indices.tolist() if wide else [None] * len(live)
        drawn = zip(live, tokens.tolist(), logprobs.tolist(), kept.tolist(), top_ids, strict=True)
        for sequence, token, logprob, mass, ranked in drawn:
            if sequence.finish_reason is not None:
                continue
            if ranked is not None:
                sequence.top_ids.append(ranked)
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.kept += mass
            if (token in self.stop_ids and not sampling.ignore_eos) or has_stop_string(
                sequence.tokens, sampling.stop_strings, self.decode
            ):
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
                sequence.finish_reason = "length"


def has_stop_string(tokens: list[int], stop_strings: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    """Whether the text of ``tokens`` contains one of ``stop_strings``; to be asked after every token."""
    if not stop_strings:
        return False
    # A token is at least one byte, so the last len(stop) tokens, and some slack for split characters, suffice.
    tail = decode(tokens[-(max(len(s.encode()) for s in stop_strings) + 4) :])
    return any(s in tail for s in stop_strings)


def _uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one request: ``[count]`` in [0, 1), from its seed alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def _select_rows(cache: StaticCache, rows: list[int]) -> None:
    """Keep (or repeat) the given rows of every layer of ``cache``."""
    for layer in cache.layers:
        assert isinstance(layer, StaticLayer) and layer.keys is not None and layer.values is not None
        index = torch.tensor(rows, device=layer.keys.device)
        layer.keys = layer.keys.index_select(0, index)
        layer.values = layer.values.index_select(0, index)
        layer.batch_size = len(rows)
