"""What a step of on-policy distillation costs a machine at least: operations and bytes of each phase, on paper.

Counted are matrix products and attention with their operands, the update of the parameters, and what moves between
roles. Everything else (norms, rotary embedding, activations, softmax) is left out, as if it were fused into these.
A part takes the longest of its arithmetic, its memory traffic and its traffic with the host; parts follow each other,
and nothing stays in a cache between two of them. A machine of the given rates is faster with these algorithms only
where parts overlap or a cache helps after all; a phase's seconds here over its measured ones say what share it reaches.

The algorithms are the product's: a key-value cache, packed rows without padding, layers recomputed in the backward
pass, the head in chunks whose gradient is made ahead (four products), bf16 (or whatever ``size`` says) over fp32
parameters in AdamW. Symbols: ``H`` hidden size, ``V`` vocabulary, bytes and operations as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_opd.configs.memory import model_size

MASTER = 4
"""Bytes of a number in fp32: parameters of the trainer, their gradients, each of Adam's two moments."""


@dataclass(frozen=True)
class Machine:
    """Rates of a machine.

    Attributes:
        name: and where the rates are from.
        flops: operations a second of a large dense matrix product; a multiplication and an addition are two.
        memory: bytes a second, read and written ones together.
        link: bytes a second between device and host, one way; infinite where they are the same.
    """

    name: str
    flops: float
    memory: float
    link: float = math.inf


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP, as its ``config.json`` describes it.

    Attributes:
        parameters: as the planner counts them, without norms of queries and keys.
        kv_heads: heads of keys and values; ``heads`` are those of queries.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    parameters: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a model's config; ValueError for experts and for shapes that the planner does not know."""
        size = model_size(dict(config))
        if size is None or size.experts:
            raise ValueError("the roofline is that of a dense decoder with a gated MLP")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden,
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["intermediate_size"],
            config["vocab_size"],
            size.total,
        )

    @property
    def products(self) -> list[tuple[str, int, int]]:
        """Linear layers of one decoder layer: name, inputs, outputs; query, key and value are one."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("qkv", self.hidden, wide + 2 * narrow),
            ("attention output", wide, self.hidden),
            ("gate and up", self.hidden, 2 * self.intermediate),
            ("down", self.intermediate, self.hidden),
        ]

    def cache_bytes(self, size: int) -> int:
        """Bytes of keys and values of one token in all layers, ``size`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size


@dataclass(frozen=True)
class Part:
    """Something that is done ``times`` times; operations and bytes are those of one of them."""

    name: str
    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    times: float = 1.0

    def seconds(self, machine: Machine) -> float:
        """Return what all of them take at least."""
        return self.times * max(self.flops / machine.flops, self.memory / machine.memory, self.link / machine.link)

    def bound(self, machine: Machine) -> str:
        """Name what the seconds are spent on."""
        spent = {"matmul": self.flops / machine.flops, "memory": self.memory / machine.memory}
        spent["link"] = self.link / machine.link
        return max(spent, key=lambda name: spent[name])


@dataclass(frozen=True)
class Phase:
    """A phase of a step."""

    name: str
    parts: tuple[Part, ...]

    def seconds(self, machine: Machine) -> float:
        """Return what its parts take at least, one after the other."""
        return sum(part.seconds(machine) for part in self.parts)

    @property
    def flops(self) -> float:
        """Operations of all parts."""
        return sum(part.times * part.flops for part in self.parts)

    @property
    def memory(self) -> float:
        """Bytes of all parts to and from the device's memory."""
        return sum(part.times * part.memory for part in self.parts)

    @property
    def link(self) -> float:
        """Bytes of all parts between device and host."""
        return sum(part.times * part.link for part in self.parts)


# --- parts ------------------------------------------------------------------------------------------------------------


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key that it sees, in a sequence of ``length`` tokens."""
    return length * (length + 1) // 2


def product(name: str, rows: float, inputs: int, outputs: int, size: int, times: float = 1.0) -> Part:
    """Rows ``[rows, inputs]`` times a weight; both are read once and the result is written once."""
    memory = size * (rows * inputs + inputs * outputs + rows * outputs)
    return Part(name, 2.0 * rows * inputs * outputs, memory, times=times)


def weight_gradient(name: str, rows: float, inputs: int, outputs: int, size: int, times: float = 1.0) -> Part:
    """The gradient of a product's weight, added to a sum in fp32 that is read and written."""
    memory = size * rows * (inputs + outputs) + 2 * MASTER * inputs * outputs
    return Part(name, 2.0 * rows * inputs * outputs, memory, times=times)


def forward(shape: Shape, rows: float, pairs: float, size: int, times: float = 1.0, name: str = "layers") -> list[Part]:
    """All layers on ``rows`` tokens whose queries see ``pairs`` keys; queries, keys, values and results move once."""
    parts = [
        product(f"{name}: {what}", rows, inputs, outputs, size, times * shape.layers)
        for what, inputs, outputs in shape.products
    ]
    moved = size * rows * 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    flops = 4.0 * pairs * shape.heads * shape.head_dim
    return [*parts, Part(f"{name}: attention", flops, moved, times=times * shape.layers)]


def backward(shape: Shape, rows: float, pairs: float, size: int, times: float = 1.0) -> list[Part]:
    """The gradients of :func:`forward`. Attention takes five products for two: nobody stores its scores."""
    every = times * shape.layers
    parts = []
    for what, inputs, outputs in shape.products:
        parts.append(product(f"backward: {what}", rows, outputs, inputs, size, every))
        parts.append(weight_gradient(f"backward: {what}, weight", rows, inputs, outputs, size, every))
    # Queries, results and the gradients of both; keys, values and the gradients of both.
    moved = size * rows * 4 * (shape.heads + shape.kv_heads) * shape.head_dim
    flops = 10.0 * pairs * shape.heads * shape.head_dim
    return [*parts, Part("backward: attention", flops, moved, times=every)]


def decode(shape: Shape, sequences: int, prompt: int, new: int, size: int) -> list[Part]:
    """``new`` tokens for each of ``sequences``, all at once, with a cache that grows.

    The first token comes from the prompt (see :func:`forward`), so the layers run ``new - 1`` times, and the head
    ``new`` times. The sampler reads the logits once more, in fp32.
    """
    steps = new - 1
    parts = [
        product(f"decode: {what}", sequences, inputs, outputs, size, steps * shape.layers)
        for what, inputs, outputs in shape.products
    ]
    # Step i sees prompt + i keys, and has written its own.
    seen = steps * prompt + steps * (steps + 1) // 2
    moved = sequences * (seen + steps) * 2 * shape.kv_heads * shape.head_dim
    moved += sequences * steps * 2 * shape.heads * shape.head_dim
    flops = 4.0 * sequences * seen * shape.heads * shape.head_dim
    parts.append(Part("decode: attention", flops, float(size * moved), times=shape.layers))
    parts.append(product("decode: head", sequences, shape.hidden, shape.vocab, size, new))
    return [*parts, Part("sampler", memory=float(MASTER * sequences * shape.vocab), times=new)]


def scoring_head(shape: Shape, tokens: float, chunk: int, size: int, name: str = "head") -> Part:
    """Log-probabilities of ``tokens`` tokens, ``chunk`` at a time."""
    return product(name, chunk, shape.hidden, shape.vocab, size, tokens / chunk)


def divergence_head(student: Shape, teacher: Shape, tokens: float, chunk: int, size: int) -> list[Part]:
    """A divergence over the vocabulary and its gradient: both models' logits, and two products of the gradient."""
    times = tokens / chunk
    return [
        product("head: student's logits", chunk, student.hidden, student.vocab, size, times),
        product("head: teacher's logits", chunk, teacher.hidden, teacher.vocab, size, times),
        product("head: gradient of the hidden states", chunk, student.vocab, student.hidden, size, times),
        weight_gradient("head: gradient of the weight", chunk, student.hidden, student.vocab, size, times),
    ]


def adamw(parameters: int, times: int = 1) -> Part:
    """One update: weight, gradient and moments are read, all but the gradient written; its norm was read before."""
    return Part("AdamW", memory=8.0 * MASTER * parameters, times=times)


# --- a step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of distillation on one device, or on processes of a CPU.

    Attributes:
        sequences: prompts, one response each, all sampled at once.
        prompt: tokens of a prompt.
        new: tokens of a response.
        row: tokens of a packed row, at most.
        chunk: tokens whose logits are held at a time.
        size: bytes of a number that is computed with.
        updates: optimizer steps.
        recomputes: whether the layers are computed again in the backward pass.
        turns: whether the roles share one device and wait in the host's memory.
    """

    student: Shape
    teacher: Shape
    sequences: int
    prompt: int
    new: int
    row: int
    chunk: int
    size: int
    updates: int = 1
    recomputes: bool = True
    turns: bool = True

    @property
    def sampled(self) -> int:
        """Tokens that are sampled and trained on."""
        return self.sequences * self.new

    def cache(self) -> int:
        """Bytes of the student's key-value cache when all responses are at their end."""
        return self.sequences * (self.prompt + self.new) * self.student.cache_bytes(self.size)

    def phases(self) -> list[Phase]:
        """Return the phases in their order, under the names of the product's ``time/`` metrics.

        ``score`` is the part of ``time/rollout`` after the last response.
        """
        return [self._weight_sync(), self._generate(), self._score(), self._old_logprobs(), self._train()]

    def _packed(self) -> tuple[float, float, int]:
        """Tokens and pairs of one row, and how many rows there are."""
        length = self.prompt + self.new
        rows = math.ceil(self.sequences / max(1, self.row // length))
        share = self.sequences / rows
        return share * length, share * causal_pairs(length), rows

    def _moved(self, name: str, count: float) -> list[Part]:
        """Bytes between device and host that a turn, or an answer, costs; unchanged weights need no way back."""
        return [Part(name, link=float(count))] if self.turns else []

    def _weight_sync(self) -> Phase:
        count = self.student.parameters
        # Read in fp32, written once; read again by whoever checks what arrived.
        parts = [Part("weights", memory=float(count * (MASTER + 2 * self.size)))]
        return Phase("weight_sync", (*self._moved("turn: Adam's moments leave", 2 * MASTER * count), *parts))

    def _generate(self) -> Phase:
        tokens = self.sequences * self.prompt
        pairs = self.sequences * causal_pairs(self.prompt)
        parts = forward(self.student, tokens, pairs, self.size, name="prefill")
        parts += decode(self.student, self.sequences, self.prompt, self.new, self.size)
        return Phase(
            "generate", (*self._moved("turn: trainer's weights leave", MASTER * self.student.parameters), *parts)
        )

    def _score(self) -> Phase:
        tokens, pairs, rows = self._packed()
        parts = forward(self.teacher, tokens, pairs, self.size, rows)
        parts.append(scoring_head(self.teacher, self.sampled, self.chunk, self.size))
        came = self._moved("turn: teacher comes", self.size * self.teacher.parameters)
        return Phase("score", (*came, *parts, *self._moved("hidden states leave", self._hidden_states())))

    def _old_logprobs(self) -> Phase:
        tokens, pairs, rows = self._packed()
        came = self._moved("turn: trainer comes", 3 * MASTER * self.student.parameters)
        parts = forward(self.student, tokens, pairs, self.size, rows)
        parts.append(scoring_head(self.student, self.sampled, self.chunk, self.size))
        return Phase("old_logprobs", (*came, *self._cast(1), *parts))

    def _train(self) -> Phase:
        tokens, pairs, rows = self._packed()
        parts = forward(self.student, tokens, pairs, self.size, rows, "forward")
        if self.recomputes:
            parts += forward(self.student, tokens, pairs, self.size, rows, "recomputed")
        parts += divergence_head(self.student, self.teacher, self.sampled, self.chunk, self.size)
        parts += backward(self.student, tokens, pairs, self.size, rows)
        parts.append(adamw(self.student.parameters, self.updates))
        came = self._moved("hidden states come", self._hidden_states())
        return Phase("train", (*came, *self._cast(self.updates), *parts))

    def _cast(self, times: int) -> list[Part]:
        """What computes is made of the fp32 weights once for each version of them."""
        if self.size == MASTER:
            return []
        moved = self.student.parameters * (MASTER + self.size)
        return [Part("weights in low precision", memory=float(moved), times=times)]

    def _hidden_states(self) -> int:
        return self.size * self.sampled * self.teacher.hidden


# --- what is printed --------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return f"| {row[0].ljust(widths[0])} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def paper(phases: Sequence[Phase], machines: Sequence[Machine], *, every_part: bool = False) -> str:
    """What each phase of a step needs, and what it takes at least on each machine, as a Markdown table.

    Parts are added up by the beginning of their names, unless ``every_part`` is wanted; it then also says what each
    one is bound by on the first machine.
    """
    header = ["phase", "TFLOP", "GB memory", "GB link", *(f"{machine.name}, s" for machine in machines)]
    rows = []
    for phase in phases:
        rows.append(_row(phase.name, phase, machines))
        groups: dict[str, list[Part]] = {}
        for part in phase.parts:
            name = f"{part.name} ({part.bound(machines[0])})" if every_part else part.name.split(":")[0]
            groups.setdefault(name, []).append(part)
        rows += [_row(f"  {name}", Phase(name, tuple(parts)), machines) for name, parts in groups.items()]
    step = Phase("step", tuple(part for phase in phases for part in phase.parts))
    return table(header, [*rows, _row(step.name, step, machines)])


def _row(name: str, phase: Phase, machines: Sequence[Machine]) -> list[str]:
    needed = [f"{phase.flops / 1e12:,.3f}", f"{phase.memory / 1e9:,.2f}", f"{phase.link / 1e9:,.2f}"]
    return [name, *needed, *(f"{phase.seconds(machine):.4f}" for machine in machines)]
