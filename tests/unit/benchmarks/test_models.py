"""The comparison's models: what is drawn is what the language says, and a pair is made once, whole and as described."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.opd_step import language, models

TINY = dataclasses.replace(
    models.PAIRS["language-8k"],
    student=models.Shape(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, head_dim=16),
    teacher=models.Shape(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=16, head_dim=16),
    student_training=models.Training(steps=1, learning_rate=1e-3, reversed_share=0.5, documents=((2, 8),)),
    teacher_training=models.Training(steps=1, learning_rate=1e-3, documents=((2, 8),)),
    training_prompts=40,
    held_out_prompts=10,
)


def test_next_word_is_a_distribution_that_ends_at_the_kind_s_rate():
    table = language.Language(seed=1).next_word
    assert np.allclose(table.sum(-1), 1, atol=1e-5)
    ends = table[:, language.EOS_ID].reshape(language.KINDS, -1)
    assert np.allclose(1 / ends, np.array(language.MEAN_LENGTHS)[:, None])
    others = np.delete(table[:, : language.RESERVED], language.EOS_ID, axis=1)
    assert not others.any()


def test_documents_follow_the_table():
    grammar = language.Language(seed=1)
    documents = grammar.sample(np.random.default_rng(2), np.arange(256) % language.KINDS, 33)
    table = grammar.next_word.astype(np.float64)
    table[:, language.EOS_ID] = 0
    table /= table.sum(-1, keepdims=True)
    odds = table[documents.states[:, :-1], documents.words[:, 1:]]
    assert (odds > 0).all()
    # 8,192 words: their surprise averages to the entropy, within about three standard errors.
    entropy = -(table * np.log(table, out=np.zeros_like(table), where=table > 0)).sum(-1)
    assert -np.log(odds).mean() == pytest.approx(entropy[documents.states[:, :-1]].mean(), abs=0.06)


def test_a_variant_differs_in_the_reversed_rows_only():
    plain, variant, same = (language.Language(1, share).next_word for share in (0.0, 0.5, 0.0))
    assert (plain == same).all()
    rows = (plain != variant).any(-1).reshape(language.KINDS, -1)
    assert 0.3 < rows[:, : language.CLASSES].mean() < 0.7
    assert not rows[:, language.CLASSES].any()


def test_response_lengths_have_a_long_tail():
    lengths = np.array(language.MEAN_LENGTHS)[:, None]
    survival = ((1 - 1 / lengths) ** np.arange(600)).mean(0)
    assert 40 <= np.argmax(survival < 0.5) <= 60
    assert 200 <= np.argmax(survival < 0.05) <= 300
    assert 0.002 < survival[512] < 0.02


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> models.ModelPair:
    return models._ensure("tiny", TINY, tmp_path_factory.mktemp("models"))


def test_a_pair_loads_and_its_prompts_are_words_of_its_tokenizer(made: models.ModelPair):
    tokenizer = AutoTokenizer.from_pretrained(made.student)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (language.PAD_ID, language.EOS_ID)
    assert (tokenizer.padding_side, len(tokenizer)) == ("left", language.VOCAB_SIZE)
    files = (made.prompts, made.heldout)
    prompts, heldout = ([json.loads(line)["prompt"] for line in file.read_text().splitlines()] for file in files)
    assert (len(prompts), len(heldout)) == (40, 10)
    assert len(set(prompts + heldout)) == 50
    for ids in tokenizer(prompts + heldout)["input_ids"]:
        assert 16 <= len(ids) <= 48
        assert len(language.SPECIAL_TOKENS) <= ids[0] < language.RESERVED <= min(ids[1:])
    for folder, hidden_size in ((made.student, 16), (made.teacher, 32)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.hidden_size, model.config.vocab_size) == (hidden_size, language.VOCAB_SIZE)
        assert model.config.tie_word_embeddings
        assert model.dtype == torch.float32
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_a_pair_is_made_once_and_again_for_another_recipe(made: models.ModelPair, monkeypatch: pytest.MonkeyPatch):
    folder = made.student.parents[1]

    def refuse(recipe: models.Pair, target: Path) -> None:
        (target / "student").mkdir()
        raise RuntimeError("made again")

    monkeypatch.setattr(models, "_make", refuse)
    assert models._ensure("tiny", TINY, folder) == made
    with pytest.raises(RuntimeError, match="made again"):
        models._ensure("tiny", dataclasses.replace(TINY, seed=3), folder)
    assert list(folder.iterdir()) == [made.student.parent]  # nothing half-made is left


def test_an_unknown_pair_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="language-8k, random-152k"):
        models.ensure_models("language-9k", tmp_path)
