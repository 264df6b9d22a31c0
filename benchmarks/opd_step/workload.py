"""What both sides do and how they are judged. Both Pythons import this: nothing but the standard library here.

Nothing in this file may be changed because of a result; but see ``Learning.max_steps``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

MAX_STEPS = 1_000_000
"""Steps that both sides are told they will run; they end when they are told to."""
TOLERANCE = 1e-5
"""Largest relative difference in loss, and in gradient by its norm, with which ratios are printed at all."""
GATE_LENGTHS = (1, 3, 17, 40, 64, 90, 127, 128)
"""Response tokens of the sequences on which loss and gradient are compared."""
MAX_OTHERS = 0.10
"""Cores that other processes may use in a turn that counts."""
MIN_TURN_SECONDS = 3.0
"""A turn has as many steps as take this long, by the quicker side's warm-up."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW at a constant rate; no decay on vectors, which is both sides' habit.

    The rate is both sides' default. It is so low that the lengths of the responses stay what they are at the start,
    however many steps are measured.
    """

    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Regime:
    """One workload: temperature 1, no truncation of what is sampled, no gradient checkpointing.

    Attributes:
        name: on the command line and in results.
        title: for tables.
        models: a pair that ``models.ensure_models`` makes.
        sequences: prompts of a step, one response each.
        max_new_tokens: of a response.
        fixed_length: every response has ``max_new_tokens``, whatever it says.
        dtype: ``fp32``, or ``bf16`` as either side does it by itself.
        objective: of our side. TRL's is always ``direct``, the divergence itself.
        target: lowest ratio of trained tokens/s, ours by TRL's, that was asked for; None: shown beside the others.
        memory_target: likewise, highest ratio of peak memory.
    """

    name: str
    title: str
    models: str
    sequences: int
    max_new_tokens: int
    fixed_length: bool
    dtype: Literal["fp32", "bf16"] = "fp32"
    objective: Literal["direct", "policy_gradient"] = "direct"
    target: float | None = None
    memory_target: float | None = None
    optimizer: Optimizer = Optimizer()


FIXED = Regime("fixed", "fixed 128 tokens, V = 8k, fp32", "language-8k", 32, 128, True, target=2.0)
RAGGED = Regime("ragged", "up to 512 tokens, V = 8k, fp32", "language-8k", 32, 512, False, target=2.5)
VOCAB = Regime(
    "vocab-152k", "fixed 64 tokens, V = 152k, fp32", "random-152k", 8, 64, True, target=2.0, memory_target=1.0
)
REGIMES = {
    regime.name: regime
    for regime in (
        FIXED,
        dataclasses.replace(
            FIXED, name="fixed-bf16", title="fixed 128 tokens, V = 8k, bf16", dtype="bf16", target=None,
        ),
        dataclasses.replace(
            FIXED, name="fixed-sampled", title="fixed, ours with the sampled reverse KL as an advantage",
            objective="policy_gradient", target=None,
        ),
        RAGGED,
        VOCAB,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Learning:
    """Time to a held-out reverse KL.

    Attributes:
        regime: the workload.
        max_steps: of training; each side ends where it has reached the KL. A budget, which favours nobody: it was 32
            until neither side had reached the KL in them.
        every: steps between two looks at the weights.
        share: the KL to reach, as a share of the one that training starts from.
        prompts: held-out prompts, one response each.
        target: lowest ratio of the times, TRL's by ours, that was asked for.
    """

    regime: Regime
    max_steps: int = 96
    every: int = 4
    share: float = 0.1
    prompts: int = 128
    target: float = 1.5


LEARNING = Learning(dataclasses.replace(RAGGED, optimizer=Optimizer(learning_rate=3e-4)))


@dataclass(frozen=True)
class Job:
    """What one process of either side is to do. Paths are absolute.

    Attributes:
        regime: the workload.
        student: folder of its weights and tokenizer.
        teacher: likewise.
        prompts: JSON lines with ``prompt``, in the order in which they are taken.
        folder: for whatever the process leaves.
        seed: of its sampling.
    """

    regime: Regime
    student: str
    teacher: str
    prompts: str
    folder: str
    seed: int = 0

    def write(self) -> Path:
        """Write it into its folder; return where."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        return path

    @classmethod
    def read(cls, path: str) -> Job:
        """Undo :meth:`write`."""
        values = json.loads(Path(path).read_text())
        regime = values.pop("regime")
        return cls(Regime(**regime | {"optimizer": Optimizer(**regime["optimizer"])}), **values)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in order."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def gate_responses(vocab_size: int) -> list[list[int]]:
    """Token ids of the responses on which loss and gradient are compared; any will do, end-of-sequence included."""
    random = Random(0)
    return [[random.randrange(vocab_size) for _ in range(length)] for length in GATE_LENGTHS]


Step = dict[str, Any]
"""A step's report: ``seconds``, ``tokens`` trained, ``loss``, ``phases`` in seconds, ``prompts``, a checksum."""
