"""Models that are small enough for any test: the quickstart's trained pair, and a random one whose head is padded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

MODELS = Path(__file__).parents[1] / "examples" / "quickstart" / "models"


class TinyModels(NamedTuple):
    """Folders of the quickstart's models, as Hugging Face checkpoints with tokenizers."""

    student: str
    teacher: str


@pytest.fixture(scope="session")
def tiny_models() -> TinyModels:
    return TinyModels(str(MODELS / "student"), str(MODELS / "teacher"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random-weight Qwen3 with the quickstart's tokenizer: 305 tokens, 320 rows in an *untied* head.

    Weights are large enough for peaked, varied distributions; with the usual initialisation every test would see an
    almost uniform one.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("random_model")
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.3, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        Qwen3ForCausalLM(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(MODELS / "student")).save_pretrained(folder)
    return str(folder)
