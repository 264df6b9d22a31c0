"""Head and divergence: time and memory over the number of tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.ceilings.measure import Row, row
from benchmarks.ceilings.rates import machine

SCRIPT = Path(__file__).parents[1] / "full_vocabulary_kl.py"
HIDDEN, VOCAB = 256, 151_936
TOKENS = (256, 512, 1024)
REPEATS = {"ahead": 5, "naive": 5}


def measure() -> Iterable[Row]:
    """Seconds of forward and backward at Qwen3's vocabulary, one thread, fp32; memory beyond inputs and gradients."""
    torch.set_num_threads(1)
    flops = machine(torch.float32).flops
    for tokens in TOKENS:
        for variant, repeats in REPEATS.items():
            if variant == "naive" and tokens != min(TOKENS):
                continue
            runs = [_run(variant, tokens) for _ in range(repeats)]
            # Two forward products and two of the gradient: the least that anybody needs.
            ceiling = 4 * 2.0 * tokens * HIDDEN * VOCAB / flops
            extra = sorted(run["extra"] for run in runs)[repeats // 2] / 1e6
            case = f"{variant}, T = {tokens}, H = {HIDDEN}, V = {VOCAB:,}"
            seconds = [run["seconds"] for run in runs]
            yield row("head and divergence", case, "s", seconds, ceiling, note=f"{extra:,.0f} MB extra")


def _run(variant: str, tokens: int) -> dict[str, float]:
    """One run in a process of its own, because memory is a peak."""
    with tempfile.TemporaryDirectory(prefix="ceilings-") as folder:
        out = Path(folder) / "run"
        options = {"hidden": HIDDEN, "vocab": VOCAB, "tokens": tokens, "threads": 1, "variant": variant, "out": out}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, str(SCRIPT), *flags], check=True)
        found: dict[str, float] = json.loads(out.with_suffix(".json").read_text())
        return found
