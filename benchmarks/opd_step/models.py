"""Makes the model pairs that the comparison runs on: a student, a larger teacher, and prompts.

``random-152k`` has Qwen3's vocabulary size and random weights, for the cost of a large vocabulary. ``language-8k`` is a
pair trained on :mod:`benchmarks.opd_step.language`: its responses end by themselves, at lengths with a long tail, and
the student has an error that on-policy distillation corrects within some tens of steps.

Both have the shapes of Qwen3 (tied embeddings, grouped-query attention, heads of 64). Prompts are JSON lines
``{"prompt": str}``; the tokenizer has one token for each word and adds none of its own, so a prompt's token ids do not
depend on who tokenizes it, as long as no chat template is put around it.

Needs only torch, transformers, tokenizers and numpy: an environment without ``roll_opd`` can import it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.opd_step import language

__all__ = ["PAIRS", "ModelPair", "ensure_models"]

logger = logging.getLogger("benchmarks.opd_step.models")

SEED = 20261
TRAINING_PROMPTS = 4096
HELD_OUT_PROMPTS = 256
PROMPT_LENGTHS = (16, 48)
"""Shortest and longest prompt, in tokens."""
MAX_POSITIONS = 2048
LARGE_VOCAB_SIZE = 151_936
"""Rows of the embedding of the published Qwen3 models."""


@dataclasses.dataclass(frozen=True)
class ModelPair:
    """Where a pair and its prompts are."""

    student: Path
    """Folder with model, tokenizer and generation config, as ``save_pretrained`` writes them; weights in fp32."""
    teacher: Path
    """The same; its tokenizer is the student's."""
    prompts: Path
    """JSON lines ``{"prompt": str}``, all different."""
    heldout: Path
    """The same, none of them in ``prompts``."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tells one model's architecture from the other's."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    head_dim: int = 64


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model learns the language."""

    steps: int
    learning_rate: float
    reversed_share: float = 0.0
    """See :class:`~benchmarks.opd_step.language.Language`: the error of the model's training data."""
    warmup_steps: int = 10
    documents: tuple[tuple[int, int], ...] = ((32, 128), (32, 128), (8, 512))
    """Documents a step and words of each, taken in turn: a few long ones, so that responses can become long."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """The recipe of a pair; whatever changes it makes a new folder."""

    vocab_size: int
    student_training: Training | None = None
    teacher_training: Training | None = None
    student: Shape = Shape(hidden_size=256, layers=4, heads=4, kv_heads=2, intermediate_size=768)
    teacher: Shape = Shape(hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=1536)
    training_prompts: int = TRAINING_PROMPTS
    held_out_prompts: int = HELD_OUT_PROMPTS
    seed: int = SEED


PAIRS = {
    "random-152k": Pair(vocab_size=LARGE_VOCAB_SIZE),
    "language-8k": Pair(
        vocab_size=language.VOCAB_SIZE,
        student_training=Training(steps=110, learning_rate=2e-3, reversed_share=0.5),
        teacher_training=Training(steps=55, learning_rate=1e-3),
    ),
}


def ensure_models(name: str, folder: Path) -> ModelPair:
    """Makes a pair, or finds it where an earlier call made it.

    A pair's folder carries a digest of its recipe and appears only when it is complete. Training ``language-8k`` takes
    two or three minutes on two cores with bf16 instructions; it is seeded, but the weights depend on the machine.

    Args:
        name: a key of :data:`PAIRS`.
        folder: where pairs are kept.

    Raises:
        ValueError: no pair has that name.
    """
    if name not in PAIRS:
        raise ValueError(f"no model pair is called {name!r}; there are {', '.join(sorted(PAIRS))}")
    return _ensure(name, PAIRS[name], folder)


def _ensure(name: str, recipe: Pair, folder: Path) -> ModelPair:
    # The sources are part of the recipe: a change of the language must not go unnoticed either.
    digest = hashlib.sha256(repr(recipe).encode())
    for source in (Path(__file__), Path(language.__file__)):
        digest.update(source.read_bytes())
    target = folder / f"{name}-{digest.hexdigest()[:10]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            _make(recipe, temporary)
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ModelPair(target / "student", target / "teacher", target / "prompts.jsonl", target / "heldout.jsonl")


def _publish(temporary: Path, target: Path) -> None:
    """Gives a complete folder its name; one that another process made in the meantime is as good."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _make(recipe: Pair, folder: Path) -> None:
    words = list(language.vocabulary(recipe.vocab_size))
    tokenizer = _make_tokenizer(recipe.vocab_size)
    prompts = _draw_prompts(recipe)
    for file, part in (
        ("prompts.jsonl", prompts[: recipe.training_prompts]),
        ("heldout.jsonl", prompts[recipe.training_prompts :]),
    ):
        rows = (json.dumps({"prompt": " ".join(words[i] for i in prompt)}) for prompt in part)
        (folder / file).write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    parts = (("student", recipe.student, recipe.student_training), ("teacher", recipe.teacher, recipe.teacher_training))
    for place, (role, shape, training) in enumerate(parts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + place)
            model = make_model(shape, recipe.vocab_size)
            if training is not None:
                _train(role, model, training, recipe.seed)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def _make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    pad, eos, unknown = language.SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(language.vocabulary(vocab_size), unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: Shape, vocab_size: int) -> Qwen3ForCausalLM:
    """A model with random weights in fp32, from torch's own generator."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=language.EOS_ID,
        pad_token_id=language.PAD_ID,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=language.EOS_ID, pad_token_id=language.PAD_ID
    )
    return model


def _draw_prompts(recipe: Pair) -> list[tuple[int, ...]]:
    """Different prompts, as many as both files need: beginnings of documents, or words drawn evenly."""
    rng = np.random.default_rng(recipe.seed)
    shortest, longest = PROMPT_LENGTHS
    count = recipe.training_prompts + recipe.held_out_prompts
    lengths = rng.integers(shortest, longest + 1, size=count)
    if recipe.teacher_training is None:
        words = rng.integers(language.RESERVED, recipe.vocab_size, size=(count, longest))
    else:
        kinds = rng.integers(language.KINDS, size=count)
        words = language.Language(recipe.seed).sample(rng, kinds, longest).words
    prompts = [tuple(row[:length].tolist()) for row, length in zip(words, lengths, strict=True)]
    assert len(set(prompts)) == count, "two prompts are equal; change the seed"
    return prompts


def _train(role: str, model: Qwen3ForCausalLM, training: Training, seed: int) -> None:
    """Fits the model to the language's exact next-word distributions, in bf16 with fp32 weights."""
    grammar = language.Language(seed, training.reversed_share)
    targets = torch.from_numpy(grammar.next_word)
    _start_embedding(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / training.warmup_steps) * max(0.02, 1 - step / training.steps)
    )
    rng = np.random.default_rng([seed, len(role)])
    start = time.monotonic()
    with _all_cores():
        for step in range(training.steps):
            count, width = training.documents[step % len(training.documents)]
            documents = grammar.sample(rng, rng.permutation(count) % language.KINDS, width)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=torch.from_numpy(documents.words), use_cache=False).logits
            wanted = targets[torch.from_numpy(documents.states).flatten()]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % 10 == 0:
                with torch.no_grad():
                    floor = -torch.special.xlogy(wanted, wanted).sum(-1).mean()
                logger.info(
                    "%s, step %d: %.3f nats above the language's entropy of %.3f (%.0f s)",
                    role, step + 1, loss.item() - floor.item(), floor.item(), time.monotonic() - start,
                )  # fmt: skip
    model.eval()


@torch.no_grad()
def _start_embedding(model: Qwen3ForCausalLM) -> None:
    """Starts each word's embedding from what the word is, so that training need not find that out 8,000 times."""
    weight: torch.Tensor = model.model.embed_tokens.weight
    words = torch.arange(language.RESERVED, len(weight))
    classes, bands = (torch.from_numpy(x) for x in language.class_and_band(words.numpy()))
    features = (
        (classes, language.CLASSES),
        (bands, language.BANDS),
        (words % language.GROUPS, language.GROUPS),
        (words // language.GROUPS, language.RANKS),
    )
    for feature, count in features:
        weight[words] += 0.04 * torch.randn(count, weight.shape[1])[feature]


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets torch use every core that this process may use, for as long as the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
