"""The order of draws: a permutation in each epoch, and a pure function of the draw."""

from __future__ import annotations

import pickle
import random

import pytest

from roll_opd.datasets.sampling import PromptOrder


def test_every_epoch_is_a_permutation_of_its_own():
    order = PromptOrder(50, seed=7)
    epochs = [tuple(order.index(epoch * 50 + position) for position in range(50)) for epoch in range(20)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(epochs)) == 20
    assert tuple(range(50)) not in epochs


def test_independent_of_what_was_asked_before():
    draws = list(range(300))
    forward = [PromptOrder(37, seed=3).index(draw) for draw in draws]  # each from a fresh object
    order = PromptOrder(37, seed=3)
    shuffled = draws * 2
    random.Random(0).shuffle(shuffled)
    for draw in shuffled:
        assert order.index(draw) == forward[draw]
    resumed = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert [resumed.index(draw) for draw in draws] == forward


def test_recorded_order():
    """A resumed run must draw on as before, so the order may not change between versions of numpy or of this code.

    Philox's stream is fixed by its paper; the values were computed once from it.
    """
    order = PromptOrder(8, seed=42)
    assert [order.index(draw) for draw in range(16)] == [7, 1, 6, 4, 3, 5, 0, 2, 4, 5, 3, 0, 2, 7, 1, 6]


def test_seeds_and_epochs_differ():
    def epoch_of(seed, epoch):
        order = PromptOrder(100, seed=seed)
        return [order.index(epoch * 100 + position) for position in range(100)]

    assert epoch_of(0, 0) != epoch_of(1, 0)
    assert epoch_of(0, 1) != epoch_of(1, 0)  # (seed, epoch) is a pair, not a sum
    assert epoch_of(2**64 - 1, 0) != epoch_of(0, 0)


def test_every_position_is_equally_likely():
    # 4 prompts, 4000 epochs: each prompt is first about 1000 times; the standard deviation is sqrt(4000·3/16) = 27.
    order = PromptOrder(4, seed=11)
    first = [order.index(4 * epoch) for epoch in range(4000)]
    assert all(abs(first.count(prompt) - 1000) < 5 * 27 for prompt in range(4))


def test_without_shuffling():
    order = PromptOrder(3, seed=0, shuffle=False)
    assert [order.index(draw) for draw in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_epoch():
    order = PromptOrder(3, seed=0)
    assert [order.epoch(draw) for draw in (0, 2, 3, 8, 9)] == [0, 0, 1, 2, 3]


def test_one_prompt():
    assert [PromptOrder(1, seed=0).index(draw) for draw in range(3)] == [0, 0, 0]


def test_an_epoch_is_permuted_once_though_draws_straddle_two(monkeypatch):
    order = PromptOrder(10, seed=0)
    for draw in (9, 10, 8, 11, 7, 12):
        order.index(draw)
    assert sorted(order._recent) == [0, 1]
    held = dict(order._recent)
    order.index(9)
    assert order._recent[0] is held[0]
    order.index(25)
    assert len(order._recent) == 2


@pytest.mark.parametrize(("num_prompts", "seed"), [(0, 0), (-1, 0), (1, -1), (1, 2**64)])
def test_out_of_range(num_prompts, seed):
    with pytest.raises(ValueError, match="must be"):
        PromptOrder(num_prompts, seed)


@pytest.mark.parametrize("shuffle", [True, False])
def test_negative_draw(shuffle):
    with pytest.raises(ValueError, match="-1"):
        PromptOrder(3, seed=0, shuffle=shuffle).index(-1)
