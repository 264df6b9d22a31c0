"""Make the tiny teacher and the tiny student of this example.

The files in ``models/`` beside this script were made by it::

    python examples/quickstart_agentic/make_lake_models.py --output_dir examples/quickstart_agentic/models

Both learn by supervised training on conversations on freshly drawn lakes. In each turn the right reply is the first
move of a shortest way from where the player is; the conversation goes on with that move or, in some episodes, with a
random one, so that the models also know what to do after a mistake. The student is smaller, and in the last
``RANDOM_STEPS`` steps of its training the right reply is a random move in ``RANDOM_SHARE`` of the turns: it has seen
the way, and does not stick to it. That is what distillation has to bring. (A student whose replies were random from
the start never learnt to see holes, and distillation did not teach it that in 5,000 episodes: it went to the goal in a
straight line, and stayed at 76 %.)

Tokenizer and model class are the quickstart's, with the names of the moves in the vocabulary. It uses one thread, so
that the result does not depend on the number of cores.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from roll_opd.environments.frozen_lake import FrozenLakeEnv, optimal_actions

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_models as quickstart

logger = logging.getLogger("roll_opd.examples.quickstart_agentic.make_lake_models")

MOVES = ("Left", "Down", "Right", "Up")
# As in the YAML.
LAKE: dict[str, Any] = {
    "size": 3,
    "p": 0.65,
    "is_slippery": False,
    "max_steps": 6,
    "action_pattern": "^(.*)$",
    "env_instruction": "",
}
RANDOM_SHARE = 0.8
RANDOM_STEPS = 150
# How often the conversation goes on with a random move, by episode.
MISTAKES = (0.0, 0.2, 0.6)
MAX_TURNS = 3
BATCH = 64

SHAPES = {
    "teacher": {"hidden_size": 96, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate_size": 256},
    "student": {"hidden_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate_size": 256},
}
STEPS = {"teacher": 800, "student": 950}
# Training episodes are drawn from seeds that no run's environment has: a run's have 31 bits.
FIRST_SEED = 1 << 40


def play(env: FrozenLakeEnv, seed: int, rng: random.Random, random_share: float) -> list[tuple[str, str, str]]:
    """Play one episode; return for each turn what is seen, the move that is learnt, and the move that is made."""
    observation, _ = env.reset(seed=seed)
    mistakes = rng.choice(MISTAKES)
    turns = []
    for _ in range(MAX_TURNS):
        best = optimal_actions(env)[0]
        learnt = rng.choice(MOVES) if rng.random() < random_share else best
        made = rng.choice(MOVES) if rng.random() < mistakes else best
        turns.append((observation, learnt, made))
        observation, _, terminated, _, _ = env.step(made)
        if terminated:
            break
    return turns


def encode(
    tokenizer: PreTrainedTokenizerFast, episodes: Sequence[Sequence[tuple[str, str, str]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, padded on the right; a label stands where the token before it decides on it."""
    rows = []
    for turns in episodes:
        ids: list[int] = []
        labels: list[int] = []
        for observation, learnt, made in turns:
            prompt = f"<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
            head = tokenizer.encode(prompt, add_special_tokens=False)
            shown, wanted = (tokenizer.encode(m, add_special_tokens=False) for m in (made, learnt))
            assert len(shown) == len(wanted) == 1
            end = tokenizer.encode(quickstart.EOS_TOKEN + "\n", add_special_tokens=False)
            ids += [*head, *shown, *end]
            labels += [*[quickstart.IGNORE] * len(head), *wanted, end[0], quickstart.IGNORE]
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets = torch.full((len(rows), width), quickstart.IGNORE)
    for i, (ids, labels) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        targets[i, : len(labels)] = torch.tensor(labels)
    return tokens, targets


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, random_steps: int, name: str
) -> None:
    """Train on the moves of freshly drawn episodes; in the last ``random_steps`` steps with random ones among them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1.0 - step / steps)
    )
    env, rng, seed = FrozenLakeEnv(**LAKE), random.Random(name), FIRST_SEED
    model.train()
    began = time.monotonic()
    for step in range(steps):
        share = RANDOM_SHARE if step >= steps - random_steps else 0.0
        episodes = [play(env, seed + i, rng, share) for i in range(BATCH)]
        seed += BATCH
        tokens, targets = encode(tokenizer, episodes)
        at = targets[:, 1:] != quickstart.IGNORE
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        loss = functional.cross_entropy(model.lm_head(hidden[at]), targets[:, 1:][at])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            logger.info("%s: step %d: loss %.4f (%.0f s)", name, step + 1, loss.item(), time.monotonic() - began)
    model.eval()


@torch.no_grad()
def success_rate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, episodes: int, seed: int) -> float:
    """Play episodes at temperature 1; return the share that reach the goal."""
    generator = torch.Generator().manual_seed(seed)
    won = 0
    for episode in range(episodes):
        env = FrozenLakeEnv(**LAKE)
        observation, _ = env.reset(seed=seed * 100_003 + episode)
        text, over = "", False
        while not over:
            text += f"<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[0, -1, : len(tokenizer)]
            move = str(tokenizer.decode(torch.multinomial(logits.float().softmax(-1), 1, generator=generator)))
            observation, reward, terminated, truncated, _ = env.step(move)
            text += f"{move}{quickstart.EOS_TOKEN}\n"
            over = terminated or truncated
        won += reward > 0
    return won / episodes


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models in ``--output_dir``."""
    parser = argparse.ArgumentParser(description="Make the tiny teacher and student of the agentic quickstart.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "models")
    parser.add_argument("--names", nargs="+", default=list(SHAPES))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    quickstart.PIECES = (*quickstart.PIECES, *MOVES)
    tokenizer = quickstart.make_tokenizer()
    for name in args.names:
        recipe = quickstart.Recipe(**SHAPES[name], steps=0, batch_size=0, learning_rate=0, warmup_steps=0)
        model = quickstart.make_model(recipe, tokenizer, seed=1)
        train(model, tokenizer, STEPS[name], RANDOM_STEPS if name == "student" else 0, name)
        model.bfloat16().float()
        score = success_rate(model, tokenizer, 300, seed=1)
        folder = args.output_dir / name
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        size = sum(p.numel() for p in model.parameters())
        logger.info("%s: %d parameters, %.1f %% of 300 lakes crossed at temperature 1", name, size, 100 * score)


if __name__ == "__main__":
    main()
