"""The order in which prompts are drawn: a pure function of the draw, so there is nothing to save or restore."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt


class PromptOrder:
    """Which prompt each draw of a run takes.

    Draws count prompts from the start of the run. Every ``num_prompts`` draws are an epoch, in which each prompt comes
    exactly once, in an order of that epoch's own. The answer for a draw depends on the arguments and the draw alone:
    not on what was asked before, on the batch size, or on where a run was resumed.

    Args:
        num_prompts: how many prompts there are, at least 1.
        seed: any whole number from 0 to 2**64 - 1.
        shuffle: false draws the prompts in the order of the data in every epoch.

    Raises:
        ValueError: ``num_prompts`` or ``seed`` out of range.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, not {num_prompts}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle
        self._recent: dict[int, npt.NDArray[np.intp]] = {}

    def epoch(self, draw: int) -> int:
        """The epoch that a draw belongs to, from 0.

        Raises:
            ValueError: ``draw`` is negative.
        """
        if draw < 0:
            raise ValueError(f"draws count from 0, so {draw} is none")
        return draw // self.num_prompts

    def index(self, draw: int) -> int:
        """The position, from 0, of the prompt that a draw takes.

        Raises:
            ValueError: ``draw`` is negative.
        """
        epoch, position = self.epoch(draw), draw % self.num_prompts
        return int(self._permutation(epoch)[position]) if self.shuffle else position

    def _permutation(self, epoch: int) -> npt.NDArray[np.intp]:
        permutation = self._recent.get(epoch)
        if permutation is None:
            # Philox takes (seed, epoch) as its key, so epochs are independent streams. Its raw numbers are the same in
            # every numpy version, which Generator.permutation does not promise; sorting them gives the permutation.
            random = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_prompts)
            permutation = np.argsort(random, kind="stable")
            # A batch may straddle two epochs, so two are kept. Replaced as a whole: other threads may be reading.
            self._recent = {**dict(list(self._recent.items())[-1:]), epoch: permutation}
        return permutation


class DomainOrder:
    """Which prompt of which domain each draw of a run takes.

    Draws fall into windows of ``batch``. In a window a domain has its share of the draws, rounded down or up: the draws
    left over after rounding down go, one each, to the domains that have received least against their shares since the
    run began (largest remainder, with what is owed carried from window to window), so that long runs have exact shares.
    A domain's draws lie evenly spread over the window. Each domain walks through its own prompts in the order of a
    :class:`PromptOrder`, epoch by epoch, with a seed made of the run's seed and the domain's name.

    As with :class:`PromptOrder` the answer for a draw depends on the arguments and the draw alone.

    Args:
        sizes: prompts of each domain.
        probs: share of each domain, scaled to add up to 1. Decimal fractions are taken as written: 0.1 is one tenth.
            Domains without a share, or with the share 0, are never drawn.
        seed: any whole number from 0 to 2**64 - 1.
        shuffle: false draws the prompts of a domain in the order of the data in every epoch.
        batch: draws of a window; ``rollout_batch_size``.

    Raises:
        ValueError: an argument out of range, or a domain with a share and no prompts.
    """

    def __init__(
        self, sizes: Mapping[str, int], probs: Mapping[str, float], seed: int, shuffle: bool = True, batch: int = 1
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        if negative := [name for name, share in probs.items() if not 0 <= share < float("inf")]:
            raise ValueError(f"the share of {negative[0]!r} must be a number of at least 0, not {probs[negative[0]]}")
        # The shortest decimal that names the float is what the user wrote, so the shares are exact fractions of it.
        shares = {name: Fraction(repr(float(share))) for name, share in probs.items() if share > 0}
        if not shares:
            raise ValueError("no domain has a share above 0")
        if empty := [name for name in shares if sizes.get(name, 0) < 1]:
            raise ValueError(f"domain {empty[0]!r} has a share and no prompts")
        self.batch = batch
        self.domains = tuple(shares)
        self._orders = {name: PromptOrder(sizes[name], _seed_of(seed, name), shuffle) for name in shares}
        # A window owes domain d quota[d] / denominator draws, all whole numbers.
        total = sum(shares.values())
        exact = [batch * share / total for share in shares.values()]
        self._denominator = math.lcm(*(quota.denominator for quota in exact))
        self._quotas = [int(quota * self._denominator) for quota in exact]
        # Draws of each domain before each window, as far as they were needed. Replaced as a whole, because other
        # threads may be reading, and grown by half at least, so that this costs one step a window.
        self._before: tuple[tuple[int, ...], ...] = ((0,) * len(shares),)
        self._spread: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def index(self, draw: int) -> tuple[str, int]:
        """The domain of a draw, and the position, from 0, of its prompt among the prompts of that domain.

        Raises:
            ValueError: ``draw`` is negative.
        """
        domain, number = self._locate(draw)
        return domain, self._orders[domain].index(number)

    def epoch(self, draw: int) -> int:
        """The epoch of its own domain that a draw belongs to, from 0.

        Raises:
            ValueError: ``draw`` is negative.
        """
        domain, number = self._locate(draw)
        return self._orders[domain].epoch(number)

    def _locate(self, draw: int) -> tuple[str, int]:
        """The domain of a draw, and how many draws of this domain came before it."""
        if draw < 0:
            raise ValueError(f"draws count from 0, so {draw} is none")
        window, position = divmod(draw, self.batch)
        before, after = self._counts(window), self._counts(window + 1)
        counts = tuple(b - a for a, b in zip(before, after, strict=True))
        places = self._spread.get(counts)
        if places is None:
            places = self._spread[counts] = _spread(counts)
        domain, number = places[position]
        return self.domains[domain], before[domain] + number

    def _counts(self, window: int) -> tuple[int, ...]:
        """Draws of each domain in all windows before ``window``."""
        known = self._before
        if window >= len(known):
            grown = list(known)
            for number in range(len(known), max(window + 1, len(known) * 3 // 2)):
                grown.append(self._next(grown[-1], number))
            known = self._before = tuple(grown)
        return known[window]

    def _next(self, before: tuple[int, ...], windows: int) -> tuple[int, ...]:
        """Draws of each domain in the first ``windows`` windows, given those in all but the last of them."""
        counts = [given + quota // self._denominator for given, quota in zip(before, self._quotas, strict=True)]
        owed = [quota * windows - given * self._denominator for given, quota in zip(counts, self._quotas, strict=True)]
        # A domain whose quota is whole has it already; the others take at most one draw more.
        uneven = [domain for domain, quota in enumerate(self._quotas) if quota % self._denominator]
        left = self.batch * windows - sum(counts)
        for domain in sorted(uneven, key=lambda domain: (-owed[domain], domain))[:left]:
            counts[domain] += 1
        return tuple(counts)


def _seed_of(seed: int, domain: str) -> int:
    """A seed of the domain's own, which does not change when other domains come or go."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    return int.from_bytes(hashlib.sha256(f"{seed}/{domain}".encode()).digest()[:8], "big")


def _spread(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Places the draws of each domain evenly: for each place of a window the domain and which of its draws it is."""
    places = [
        (Fraction(2 * number + 1, 2 * count), domain, number)
        for domain, count in enumerate(counts)
        for number in range(count)
    ]
    return [(domain, number) for _, domain, number in sorted(places)]
