"""A synthetic language of some 8,000 words with which a small teacher and a smaller student can be trained in minutes.

A document is a *kind* word and then words until the end-of-sequence token. Every word has a class (its part of speech)
and a band (the kind of document that mostly uses it). The next word's class depends on the last word's class, by a
grammar of the document's kind; its band is mostly the kind's; its rank within class and band follows Zipf's law. Each
kind ends with a constant chance a word, so that lengths are geometric within a kind and long-tailed over the kinds, and
so that any prefix of a document is a prompt whose response has the same law of lengths.

Because the language is known, so is the exact distribution of every next word (:attr:`Language.next_word`); training on
that instead of on the words that happened to come needs several times fewer tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BANDS",
    "CLASSES",
    "EOS_ID",
    "KINDS",
    "PAD_ID",
    "RESERVED",
    "SPECIAL_TOKENS",
    "UNKNOWN_ID",
    "VOCAB_SIZE",
    "Documents",
    "Language",
    "class_and_band",
    "kind_word",
]

VOCAB_SIZE = 8192
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
PAD_ID, EOS_ID, UNKNOWN_ID = range(len(SPECIAL_TOKENS))

MEAN_LENGTHS = (20, 40, 55, 65, 75, 90, 110, 170)
"""Words after the prompt, for each kind. Together: median 48, 95th percentile 250, a few in a thousand above 512."""
KINDS = BANDS = len(MEAN_LENGTHS)
CLASSES = 64
GROUPS = CLASSES * BANDS
RANKS = VOCAB_SIZE // GROUPS
RESERVED = len(SPECIAL_TOKENS) + KINDS
"""Ids below this are special tokens and kind words; documents go on with ids from here."""

SUCCESSOR_ODDS = (0.55, 0.25, 0.13, 0.07)
GRAMMARS = 2
"""The kinds share this many grammars."""
OWN_BAND = 0.9
"""Share of the words that come from the band of the document's kind; the others come from any band."""


def kind_word(kind: NDArray[np.int64]) -> NDArray[np.int64]:
    """The id of the word that announces a kind."""
    return len(SPECIAL_TOKENS) + kind


def class_and_band(word: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class and band of each word id from :data:`RESERVED` up."""
    group = word % GROUPS
    return group // BANDS, group % BANDS


@dataclasses.dataclass(frozen=True)
class Documents:
    """Beginnings of documents, all equally long."""

    words: NDArray[np.int64]
    """``[documents, width]``; the first is the kind word."""
    states: NDArray[np.int64]
    """``[documents, width]``: the row of :attr:`Language.next_word` that says what follows this word."""


class Language:
    """One variant of the language.

    Args:
        seed: makes the grammars; two variants with one seed differ in ``reversed_share`` only.
        reversed_share: for this share of (grammar, class) the likeliest successor is the rarest, and so on.
    """

    def __init__(self, seed: int, reversed_share: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        # Permutations make every class equally frequent in the long run, so that the whole vocabulary is used.
        self._successors = np.stack(
            [[rng.permutation(CLASSES) for _ in SUCCESSOR_ODDS] for _ in range(GRAMMARS)]
        ).transpose(0, 2, 1)  # [grammar, class, successor]
        is_reversed = rng.random((GRAMMARS, CLASSES)) < reversed_share
        self._successors = np.where(is_reversed[..., None], self._successors[..., ::-1], self._successors)
        self._rank_odds = 1.0 / np.arange(1, RANKS + 1)
        self._rank_odds /= self._rank_odds.sum()
        self.next_word = self._make_table()
        """``[kinds * (classes + 1), vocabulary]`` in fp32: the distribution of the next word, end of sequence included.
        Row ``kind * (classes + 1) + class`` is for after a word of that class, ``class = CLASSES`` for after the kind
        word."""

    def _make_table(self) -> NDArray[np.float32]:
        ids = np.arange(VOCAB_SIZE)
        classes, bands = class_and_band(ids)
        # The first words' places are taken by the reserved ids; the next rank of the same group stands in for them.
        weights = self._rank_odds[ids // GROUPS]
        weights[GROUPS : GROUPS + RESERVED] += weights[:RESERVED]
        weights[:RESERVED] = 0.0
        table = np.zeros((KINDS, CLASSES + 1, VOCAB_SIZE), dtype=np.float32)
        for kind in range(KINDS):
            of_band = np.full(BANDS, (1 - OWN_BAND) / BANDS)
            of_band[kind] += OWN_BAND
            of_class = np.zeros((CLASSES + 1, CLASSES))
            for place, odds in enumerate(SUCCESSOR_ODDS):
                np.add.at(of_class, (np.arange(CLASSES), self._successors[kind % GRAMMARS, :, place]), odds)
            of_class[CLASSES] = 1 / CLASSES
            end = 1 / MEAN_LENGTHS[kind]
            table[kind] = (1 - end) * of_class[:, classes] * (of_band[bands] * weights)
            table[kind, :, EOS_ID] = end
        return table.reshape(-1, VOCAB_SIZE)

    def sample(self, rng: np.random.Generator, kinds: NDArray[np.int64], width: int) -> Documents:
        """Draws one document of each kind in ``kinds``, given that it does not end within ``width`` words."""
        count = len(kinds)
        words = np.empty((count, width), dtype=np.int64)
        states = np.empty((count, width), dtype=np.int64)
        words[:, 0] = kind_word(kinds)
        classes = np.full(count, CLASSES)
        states[:, 0] = kinds * (CLASSES + 1) + classes
        for t in range(1, width):
            place = rng.choice(len(SUCCESSOR_ODDS), size=count, p=SUCCESSOR_ODDS)
            if t == 1:
                classes = rng.integers(CLASSES, size=count)
            else:
                classes = self._successors[kinds % GRAMMARS, classes, place]
            bands = np.where(rng.random(count) < OWN_BAND, kinds, rng.integers(BANDS, size=count))
            ranks = rng.choice(RANKS, size=count, p=self._rank_odds)
            word = classes * BANDS + bands + ranks * GROUPS
            words[:, t] = np.where(word < RESERVED, word + GROUPS, word)
            states[:, t] = kinds * (CLASSES + 1) + classes
        return Documents(words, states)


def vocabulary(size: int) -> dict[str, int]:
    """The words of a vocabulary of ``size``: special tokens, kind words, then words without meaning."""
    words: Sequence[str] = (*SPECIAL_TOKENS, *(f"kind{k}" for k in range(KINDS)))
    return {word: i for i, word in enumerate((*words, *(f"w{i}" for i in range(RESERVED, size))))}
