"""The order of draws: a permutation in each epoch, and a pure function of the draw."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from fractions import Fraction

import pytest

from roll_opd.datasets.sampling import DomainOrder, PromptOrder


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


# ---- domains ---------------------------------------------------------------------------------------------------------


def windows(order: DomainOrder, count: int) -> list[Counter[str]]:
    """How many draws each domain has in each of the first windows."""
    return [
        Counter(order.index(draw)[0] for draw in range(w * order.batch, (w + 1) * order.batch)) for w in range(count)
    ]


def test_shares_by_hand():
    # 0.5, 0.3, 0.2 of 5 draws are 2.5, 1.5, 1. Rounded down 2, 1, 1, so one draw is left in every window.
    # Window 0: a and b are owed 0.5 each; a is first. Window 1: a is owed 2·2.5 - 3 - 2 = 0, b 3 - 1 - 1 = 1: b.
    order = DomainOrder({"a": 9, "b": 9, "c": 9}, {"a": 0.5, "b": 0.3, "c": 0.2}, seed=0, batch=5)
    expected = [{"a": 3, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}] * 3
    assert windows(order, 6) == expected


def test_whole_shares_are_the_same_in_every_window():
    order = DomainOrder({"a": 7, "b": 5}, {"a": 6, "b": 4}, seed=1, batch=10)  # scaled: 0.6 and 0.4
    assert windows(order, 50) == [{"a": 6, "b": 4}] * 50


def test_a_tenth_is_a_tenth():
    # As floats 0.1 + 0.2 + 0.7 is not 1 and 0.7 · 10 is not 7; as decimals they are.
    order = DomainOrder({"a": 3, "b": 3, "c": 3}, {"a": 0.1, "b": 0.2, "c": 0.7}, seed=0, batch=10)
    assert windows(order, 20) == [{"a": 1, "b": 2, "c": 7}] * 20
    assert order._denominator == 1  # as fractions of the floats, windows would owe each other for ever


@pytest.mark.parametrize("seed", range(40))
def test_every_window_and_the_long_run_have_the_shares(seed):
    rng = random.Random(seed)
    names = [f"d{i}" for i in range(rng.randint(1, 7))]
    weights = {name: rng.randint(1, 40) for name in names}
    batch, total = rng.randint(1, 24), sum(weights.values())
    order = DomainOrder(dict.fromkeys(names, 11), weights, seed=seed, batch=batch)
    drawn: Counter[str] = Counter()
    for number, counts in enumerate(windows(order, total), start=1):
        assert sum(counts.values()) == batch
        drawn += counts
        for name in names:
            quota = Fraction(batch * weights[name], total)
            assert quota - 1 < counts[name] < quota + 1  # rounded down or up
            assert abs(drawn[name] - number * quota) < 1.1  # what is owed is carried, and never grows
    # After as many windows as the shares have in their denominator, everything is whole: nothing may be owed.
    assert drawn == {name: batch * weights[name] for name in names}


def test_a_share_below_one_draw_comes_in_turn():
    # 0.05 of 4 draws: one in five windows.
    order = DomainOrder({"a": 50, "b": 2}, {"a": 0.95, "b": 0.05}, seed=0, batch=4)
    assert [counts["b"] for counts in windows(order, 20)].count(1) == 4
    assert all(sum(c["b"] for c in windows(order, 20)[start : start + 5]) == 1 for start in range(15))


def test_each_domain_walks_through_its_own_epochs():
    sizes = {"a": 7, "b": 4}
    order = DomainOrder(sizes, {"a": 0.6, "b": 0.4}, seed=5, batch=6)
    seen: dict[tuple[str, int], list[int]] = {}
    for draw in range(600):
        name, index = order.index(draw)
        seen.setdefault((name, order.epoch(draw)), []).append(index)
    for name, size in sizes.items():
        epochs = [seen[key] for key in seen if key[0] == name]
        assert [key[1] for key in seen if key[0] == name] == list(range(len(epochs)))
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])  # the last may be unfinished
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert len({tuple(epoch) for epoch in epochs}) > 3


def test_resumed_anywhere_a_run_draws_on_as_before():
    def fresh():
        return DomainOrder({"a": 13, "b": 5, "c": 3}, {"a": 0.55, "b": 0.3, "c": 0.15}, seed=3, batch=7)

    order = fresh()
    forward = [(order.index(draw), order.epoch(draw)) for draw in range(200)]
    for start in (1, 6, 7, 50, 133, 199):
        resumed = fresh()
        assert [(resumed.index(draw), resumed.epoch(draw)) for draw in range(start, 200)] == forward[start:]
    backwards = fresh()
    assert [backwards.index(draw) for draw in reversed(range(200))] == [index for index, _ in reversed(forward)]
    copied = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert [copied.index(draw) for draw in range(200)] == [index for index, _ in forward]


def test_recorded_domain_order():
    """A resumed run must draw on as before, so neither shares nor seeds may change between versions."""
    order = DomainOrder({"a": 4, "b": 3}, {"a": 0.6, "b": 0.4}, seed=42, batch=5)
    assert [order.index(draw) for draw in range(10)] == [
        ("a", 3), ("b", 1), ("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 2), ("a", 0)
    ]  # fmt: skip


def test_draws_of_a_domain_lie_spread_over_the_window():
    # Middles of equal parts: a at 1/12, 3/12, 5/12 ... and b at 1/4, 3/4 (3/12 = 1/4: the first domain goes first).
    order = DomainOrder({"a": 100, "b": 100}, {"a": 0.75, "b": 0.25}, seed=0, batch=8)
    assert "".join(order.index(draw)[0] for draw in range(16)) == "aabaaaba" * 2


def test_domains_have_seeds_of_their_own():
    order = DomainOrder({"a": 50, "b": 50}, {"a": 1, "b": 1}, seed=0, batch=2)
    first = {name: [order.index(draw)[1] for draw in range(100) if order.index(draw)[0] == name] for name in "ab"}
    assert first["a"] != first["b"]
    # The order within a domain depends neither on the other domains nor on their shares.
    alone = DomainOrder({"b": 50}, {"b": 0.3, "a": 0}, seed=0, batch=3)
    assert [alone.index(draw) for draw in range(50)] == [("b", index) for index in first["b"]]
    other = DomainOrder({"b": 50}, {"b": 1}, seed=1, batch=3)
    assert [other.index(draw) for draw in range(50)] != [alone.index(draw) for draw in range(50)]


def test_domains_without_shuffling():
    order = DomainOrder({"a": 2, "b": 3}, {"a": 1, "b": 1}, seed=0, shuffle=False, batch=2)
    assert [order.index(draw) for draw in range(8)] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 2), ("a", 1), ("b", 0)
    ]  # fmt: skip


def test_a_late_draw_takes_one_step_a_window():
    order = DomainOrder({"a": 10, "b": 10}, {"a": 0.123457, "b": 0.876543}, seed=0, batch=64)
    assert order.index(64 * 20_000)[0] in "ab"
    counts = [order._counts(w) for w in (0, 10_000, 20_000)]
    # 0.123457 · 64 · 10,000 = 79,012.48
    assert [count[0] for count in counts] == [0, 79_012, 158_025]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed"),
        ({"probs": {"a": 0, "b": 0}}, "no domain has a share"),
        ({"probs": {}}, "no domain has a share"),
        ({"probs": {"a": 1, "b": -0.5}}, "share of 'b'"),
        ({"probs": {"a": float("nan")}}, "share of 'a'"),
        ({"sizes": {"a": 3, "b": 0}}, "'b' has a share and no prompts"),
        ({"sizes": {"a": 3}}, "'b' has a share and no prompts"),
    ],
)
def test_domains_out_of_range(changes, problem):
    given = {"sizes": {"a": 3, "b": 3}, "probs": {"a": 0.5, "b": 0.5}, "seed": 0, "batch": 4} | changes
    with pytest.raises(ValueError, match=problem):
        DomainOrder(**given)


def test_negative_draw_of_domains():
    order = DomainOrder({"a": 3}, {"a": 1}, seed=0)
    for ask in (order.index, order.epoch):
        with pytest.raises(ValueError, match="-1"):
            ask(-1)
