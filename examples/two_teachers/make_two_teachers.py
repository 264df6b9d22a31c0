"""Make the tiny models of this example: two teachers, each right on one tag alone, and a student.

The files in ``models/`` beside this script were made by it::

    python examples/two_teachers/make_two_teachers.py --output_dir examples/two_teachers/models

All learn by supervised training on freshly drawn problems, none of them from the validation split. Each teacher has
learnt half of the task: ``teacher_up`` sorts when it is asked for ascending order, ``teacher_down`` when it is asked
for descending order, and under the other tag each repeats the digits as they stand. The student can sort both ways,
but in ``UNSORTED_SHARE`` of its training answers the digits are repeated as they stand: it does not know whether to
sort. In ``HINTED_SHARE`` of its prompts an answer stands in the user's message (sorted either way or not at all,
whatever the tag), and is then the reply: it can use an answer that it is shown, which is what makes it its own teacher
in ``self_teacher.yaml``.

A student that confuses the two orders was tried. Where its answers did not yet lean the right way under each tag, 40
steps of 128 samples brought it nothing, at any of three learning rates: it would first have to learn to look at the
tag.

Tokenizer and model class are the quickstart's, with three words more in the vocabulary. It uses one thread, so that
the result does not depend on the number of cores.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

import torch
import two_tags_task as task
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_models as quickstart

logger = logging.getLogger("roll_opd.examples.two_teachers.make_two_teachers")

PIECES = (" up", " down", "answer")
UNSORTED_SHARE = 0.5
HINTED_SHARE = 0.2

TEACHER_SHAPE = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 160}
STUDENT_SHAPE = {"hidden_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 24, "intermediate_size": 256}
TEACHER_STEPS = 600
STUDENT_STEPS = 1400

# The user's message and the assistant's reply.
Example = tuple[str, str]


def teacher_example(known: str, rng: random.Random) -> Example:
    """Draw an example for the teacher that sorts under one tag and repeats the digits under the other."""
    digits, tag = task.draw_digits(rng), rng.choice(task.TAGS)
    return task.question(digits, tag), task.response(task.answer(digits, tag) if tag == known else digits)


def student_example(rng: random.Random) -> Example:
    """Draw an example for the student: with an answer in the message, or sorted or not by chance."""
    digits, tag = task.draw_digits(rng), rng.choice(task.TAGS)
    if rng.random() < HINTED_SHARE:
        shown = rng.choice([digits, *(task.answer(digits, any_tag) for any_tag in task.TAGS)])
        return task.with_answer(task.question(digits, tag), shown), task.response(shown)
    reply = digits if rng.random() < UNSORTED_SHARE else task.answer(digits, tag)
    return task.question(digits, tag), task.response(reply)


Draw = Callable[[random.Random], Example]
MODELS: dict[str, tuple[Draw, dict[str, int], int]] = {
    "teacher_up": (lambda rng: teacher_example("ascending", rng), TEACHER_SHAPE, TEACHER_STEPS),
    "teacher_down": (lambda rng: teacher_example("descending", rng), TEACHER_SHAPE, TEACHER_STEPS),
    "student": (student_example, STUDENT_SHAPE, STUDENT_STEPS),
}


def fresh_examples(draw: Draw, excluded: Set[str], rng: random.Random) -> Iterator[Example]:
    """Draw examples for ever, passing over those of the excluded problems."""
    while True:
        message, reply = draw(rng)
        if task.digits_of(message) not in excluded:
            yield message, reply


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the quickstart's tokenizer with a token for each word that only this task has."""
    own = quickstart.PIECES
    quickstart.PIECES = (*own, *PIECES)
    try:
        return quickstart.make_tokenizer()
    finally:
        quickstart.PIECES = own


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> list[list[int]]:
    """Return the prompt's token ids of each user message."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": m}], add_generation_prompt=True, tokenize=False)
        for m in messages
    ]
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return ids


def make_batch(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels, padded on the right (causal attention then needs no mask)."""
    heads = encode(tokenizer, [message for message, _ in examples])
    replies = [reply + quickstart.EOS_TOKEN for _, reply in examples]
    tails = tokenizer(replies, add_special_tokens=False)["input_ids"]
    width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), quickstart.IGNORE)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    return ids, labels


def train(
    model: Qwen3ForCausalLM,
    recipe: quickstart.Recipe,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
) -> None:
    """Train on the replies to freshly drawn examples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / recipe.warmup_steps) * max(0.02, 1.0 - step / recipe.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        ids, labels = make_batch(tokenizer, list(itertools.islice(examples, recipe.batch_size)))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=quickstart.IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            logger.info("step %d: loss %.4f (%.1f s)", step + 1, loss.item(), time.monotonic() - start)
    model.eval()


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: Sequence[str], seed: int
) -> list[str]:
    """Sample one reply to each user message at temperature 1; return the texts up to the end-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = encode(tokenizer, messages)
    texts = [""] * len(messages)
    # One batch for each length: its prompts are equally long, so nothing needs padding.
    for length in sorted({len(p) for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        output = model(input_ids=torch.tensor([prompts[i] for i in rows]), use_cache=True)
        new = []
        for _ in range(task.MAX_LENGTH + 4):
            probabilities = output.logits[:, -1, : len(tokenizer)].float().softmax(-1)
            sampled = torch.multinomial(probabilities, 1, generator=generator)
            new.append(sampled)
            output = model(input_ids=sampled, past_key_values=output.past_key_values, use_cache=True)
        for i, text in zip(rows, tokenizer.batch_decode(torch.cat(new, dim=1)), strict=True):
            texts[i] = text.split(quickstart.EOS_TOKEN)[0]
    return texts


def check(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[task.Row], seed: int
) -> dict[str, float]:
    """Sample a reply to each row at temperature 1, plain and with the answer in the message.

    Returns:
        For each tag the share of right replies (``<tag>``), of replies that repeat the digits as they stand
        (``<tag> unsorted``) and of right replies with the answer in the message (``<tag> shown``).
    """
    shares: dict[str, float] = {}
    for tag in task.TAGS:
        part = [row for row in rows if row["tag"] == tag]
        messages = [row["messages"][0]["content"] for row in part]
        right = [task.response(row["ground_truth"]) for row in part]
        unsorted = [task.response(task.digits_of(message)) for message in messages]
        shown = [task.with_answer(m, row["ground_truth"]) for m, row in zip(messages, part, strict=True)]
        plain, aided = sample(model, tokenizer, messages, seed), sample(model, tokenizer, shown, seed)
        compared = {tag: (plain, right), f"{tag} unsorted": (plain, unsorted), f"{tag} shown": (aided, right)}
        for name, (given, wanted) in compared.items():
            shares[name] = sum(g == w for g, w in zip(given, wanted, strict=True)) / len(part)
    return shares


def make_all(output_dir: Path, seed: int, names: Sequence[str] = tuple(MODELS)) -> None:
    """Train the named models and save each, in bf16 and with its tokenizer, under ``output_dir``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    _, validation = task.make_splits()
    excluded = {task.digits_of(row["messages"][0]["content"]) for row in validation}
    for name in names:
        make_example, shape, steps = MODELS[name]
        recipe = quickstart.Recipe(**shape, steps=steps, batch_size=64, learning_rate=3e-3, warmup_steps=20)
        rng = random.Random(f"{name}-{seed}")

        model = quickstart.make_model(recipe, tokenizer, seed + list(MODELS).index(name))
        train(model, recipe, tokenizer, fresh_examples(make_example, excluded, rng))
        # What ships is bf16, so measure that, in the fp32 arithmetic that the example uses.
        model.bfloat16().float()
        shares = check(model, tokenizer, validation, seed)
        folder = output_dir / name
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            # safetensors makes its file readable by the owner alone.
            file.chmod(0o644)
        figures = ", ".join(f"{what} {100 * share:.1f} %" for what, share in shares.items())
        logger.info(
            "%s: %d parameters; %s; saved in %s", name, sum(p.numel() for p in model.parameters()), figures, folder
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models in ``--output_dir``."""
    parser = argparse.ArgumentParser(description="Make the tiny models of the two-teachers example.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    make_all(args.output_dir, args.seed, args.models)


if __name__ == "__main__":
    main()
