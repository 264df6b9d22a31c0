"""Drawing tokens from logits: the product's sampler beside torch.multinomial."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.ceilings.measure import Row, row, seconds
from benchmarks.ceilings.rates import machine
from roll_opd.algorithms.sampler import sample

CUTS = {"plain": (1.0, 0), "top-p 0.95": (0.95, 0), "top-k 50": (1.0, 50), "top-p 0.95 and top-k 50": (0.95, 50)}


def measure() -> Iterable[Row]:
    """Milliseconds for a batch of logits, beside reading these once; both give the token's log-probability too."""
    torch.set_num_threads(1)
    copy = machine(torch.float32).memory
    for batch, vocab in ((32, 8192), (256, 8192), (32, 151_936)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(batch, vocab, generator=generator) * 3
        uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
        for what, (top_p, top_k) in CUTS.items():
            if batch == 256 and what != "plain":
                continue
            ways: dict[str, Callable[[], object]] = {
                "ours": lambda top_p=top_p, top_k=top_k, logits=logits, uniform=uniform: sample(  # type: ignore[misc]
                    logits, uniform, top_p=top_p, top_k=top_k
                ),
                "multinomial": lambda top_p=top_p, top_k=top_k, logits=logits: _multinomial(  # type: ignore[misc]
                    logits, top_p, top_k
                ),
            }
            for who, way in ways.items():
                values = [1e3 * s for s in seconds(way)]
                case = f"{who}, {what}, batch {batch}, V = {vocab:,}"
                yield row("sampler", case, "ms", values, 1e3 * logits.nbytes / copy)


@torch.inference_mode()
def _multinomial(logits: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """What a loop would write without a sampler of its own."""
    logprobs = logits.log_softmax(-1)
    kept = logits
    if top_k:
        least = kept.topk(top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < least, -torch.inf)
    if top_p < 1:
        ranked, order = kept.sort(dim=-1, descending=True)
        probs = ranked.softmax(-1)
        out = probs.cumsum(-1) - probs >= top_p
        kept = kept.masked_fill(out.scatter(-1, order, out), -torch.inf)
    tokens = torch.multinomial(kept.softmax(-1), 1)
    return tokens, logprobs.gather(-1, tokens)
