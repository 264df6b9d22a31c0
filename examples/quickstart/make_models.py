"""Make the quickstart's tiny teacher, tiny student and their tokenizer.

The files in ``models/`` beside this script were made by it::

    python examples/quickstart/make_models.py --output_dir examples/quickstart/models

Both models learn by supervised training. The teacher, the larger one, sees right answers only, and is nearly always
right. About every second of the student's training answers is sorted the wrong way round: it can sort, but does not
know which order is asked for, and is right less than half of the time. Which way round is what distillation has to
bring. (A student that merely stopped learning early was tried: it took more than five times as many sampled tokens to
come within five points of the teacher, too slow for a first look.) Training prompts are drawn fresh and never include
a validation prompt.

It takes about two minutes and uses one thread, so that the result does not depend on the number of cores. It needs
torch, transformers and tokenizers, and nothing of ``roll_opd``: the models are inputs of that package like any others.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import task
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger("roll_opd.examples.quickstart.make_models")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"

# Pieces that get a token of their own beside the 256 bytes. A space before a digit or a word belongs to it.
PIECES = ("Sort", " these", " digits", "system", "user", "assistant", r"\boxed{", *(f" {d}" for d in "0123456789"))

# Digits come one at a time, `\boxed{` in one piece; everything else is split the way GPT-2 does it.
PRE_TOKENIZER_PATTERN = r"\\boxed\{| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+?(?=\\boxed\{|\s|\p{L}|\p{N}|$)|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The embedding has more rows than the tokenizer has tokens, as most published models have: whoever reads logits must
# trim them.
VOCAB_MULTIPLE = 64
MAX_POSITIONS = 2048
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape and training of one model."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    # How many of the training answers are sorted the wrong way round.
    descending_share: float = 0.0


RECIPES = {
    "teacher": Recipe(
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        # The smallest that the attention of vLLM for CPUs knows.
        head_dim=32,
        intermediate_size=384,
        steps=400,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=30,
    ),
    "student": Recipe(
        hidden_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        # The smallest that the attention of vLLM for CPUs knows.
        head_dim=32,
        intermediate_size=256,
        steps=600,
        batch_size=64,
        learning_rate=3e-3,
        warmup_steps=20,
        descending_share=0.55,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer by hand: 256 bytes, a few task words, three special tokens.

    Every piece is built from its left end, a character at a time; `_check_tokenizer` proves that no merge of one piece
    gets in the way of another.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges: list[tuple[str, str]] = []
    for piece in PIECES:
        symbols = byte_level.pre_tokenize_str(piece)[0][0]
        for end in range(1, len(symbols)):
            pair = (symbols[:end], symbols[end])
            if pair not in merges:
                merges.append(pair)
                vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    _check_tokenizer(fast)
    return fast


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that splits one of its own pieces or does not give a text back."""
    for piece in PIECES:
        ids = tokenizer.encode(piece, add_special_tokens=False)
        if len(ids) != 1:
            raise AssertionError(f"{piece!r} became {tokenizer.convert_ids_to_tokens(ids)}")
    for text in ("Sort these digits: 5 3 9 1", r"so \boxed{1359}.", "Zwölf  Boxkämpfer\n\tjagen 10²! Дождь 🌧"):
        if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
            raise AssertionError(f"{text!r} does not survive encoding and decoding")


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Make an untrained model in fp32."""
    torch.manual_seed(seed)
    vocab_size = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def make_batch(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[str], responses: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, labels and prompt lengths, padded on the right (causal attention then needs no mask)."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task.question(p)}], add_generation_prompt=True, tokenize=False
        )
        for p in problems
    ]
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer([r + EOS_TOKEN for r in responses], add_special_tokens=False)["input_ids"]
    width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
    ids = torch.full((len(problems), width), tokenizer.pad_token_id)
    labels = torch.full((len(problems), width), IGNORE)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    return ids, labels, torch.tensor([len(h) for h in heads])


def train(
    model: Qwen3ForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    excluded: frozenset[str],
    rng: random.Random,
) -> None:
    """Train on the response tokens of freshly drawn problems, none of them among the excluded ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def scale(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * max(0.02, 1.0 - step / recipe.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        problems: list[str] = []
        responses: list[str] = []
        while len(problems) < recipe.batch_size:
            problem = task.draw_digits(rng)
            if problem not in excluded:
                problems.append(problem)
                responses.append(task.response(problem, descending=rng.random() < recipe.descending_share))
        ids, labels, _ = make_batch(tokenizer, problems, responses)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            logger.info("step %d: loss %.4f (%.1f s)", step + 1, loss.item(), time.monotonic() - start)
    model.eval()


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[str], seed: int) -> float:
    """Sample one answer to each problem at temperature 1 and return the share of exactly right ones."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    # One batch for each length: its prompts are equally long, so nothing needs padding.
    for length in sorted({len(p) for p in problems}):
        group = [p for p in problems if len(p) == length]
        ids, _, heads = make_batch(tokenizer, group, [task.response(p) for p in group])
        ids = ids[:, : int(heads[0])]
        output = model(input_ids=ids, use_cache=True)
        new = []
        for _ in range(task.MAX_LENGTH + 4):
            probabilities = output.logits[:, -1, : len(tokenizer)].float().softmax(-1)
            sampled = torch.multinomial(probabilities, 1, generator=generator)
            new.append(sampled)
            output = model(input_ids=sampled, past_key_values=output.past_key_values, use_cache=True)
        texts = tokenizer.batch_decode(torch.cat(new, dim=1), skip_special_tokens=False)
        right += sum(t.split(EOS_TOKEN)[0] == task.response(p) for t, p in zip(texts, group, strict=True))
    return right / len(problems)


def make_all(output_dir: Path, seed: int, names: Sequence[str] = tuple(RECIPES)) -> None:
    """Train the named models and save each, in bf16 and with its tokenizer, under ``output_dir``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    _, validation = task.make_splits()
    problems = [task.digits_of_row(row) for row in validation]
    for index, name in enumerate(names):
        recipe = RECIPES[name]
        model = make_model(recipe, tokenizer, seed + index)
        train(model, recipe, tokenizer, frozenset(problems), random.Random(f"{name}-{seed}"))
        # What ships is bf16, so measure that, in the fp32 arithmetic that the quickstart uses.
        model.bfloat16().float()
        score = accuracy(model, tokenizer, problems, seed)
        folder = output_dir / name
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            # safetensors makes its file readable by the owner alone.
            file.chmod(0o644)
        logger.info(
            "%s: %d parameters, accuracy %.1f %% on %d validation prompts at temperature 1, saved in %s",
            name,
            sum(p.numel() for p in model.parameters()),
            100 * score,
            len(problems),
            folder,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models in ``--output_dir``."""
    parser = argparse.ArgumentParser(description="Make the quickstart's tiny teacher and student.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "models")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    make_all(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
