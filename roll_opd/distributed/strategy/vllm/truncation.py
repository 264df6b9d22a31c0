"""The probability mass that top-p and top-k leave, from what an engine reports of each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roll_opd.distributed.strategy.base import Sampling

NUCLEUS = 128
"""Log-probabilities to ask for where nobody knows beforehand how many tokens matter: how many top-p leaves, or how many
the normaliser at another temperature is made of."""


def ranks_needed(sampling: Sampling) -> int:
    """How many of the most probable tokens :func:`kept_mass` has to know; 0 where sampling cuts nothing off."""
    if sampling.greedy or (sampling.top_p >= 1.0 and sampling.top_k <= 0):
        return 0
    if sampling.top_k > 0 and sampling.temperature == 1.0:
        return sampling.top_k
    return max(sampling.top_k, NUCLEUS)


def kept_mass(best: NDArray[np.float64], sampling: Sampling, vocab_size: int) -> NDArray[np.float64]:
    """Return the probability, at the temperature of ``sampling``, of the tokens that it leaves, for each position.

    Exact at temperature 1 as long as the tokens that are left are among those reported. A nucleus of more than
    :data:`NUCLEUS` tokens is taken to hold just ``top_p`` (it holds more by less than the probability of one of its
    least likely tokens). At another temperature the normaliser depends on how the mass outside is spread: the answer is
    the middle, on a logarithmic scale, between even and as uneven as it can be.

    Args:
        best: ``[n, K]`` log-probabilities of the most probable tokens at temperature 1, best first, with
            ``K = min(ranks_needed(sampling), vocab_size)``.
        sampling: with top-p or top-k.
        vocab_size: tokens that there are.
    """
    ranks, power = best.shape[1], 1.0 / sampling.temperature
    weights = np.exp(best * power)
    total = weights.sum(axis=1)
    if vocab_size > ranks:
        total += _outside(1.0 - np.exp(best).sum(axis=1), vocab_size - ranks, np.exp(best[:, -1]), power)
    probs = weights / total[:, None]
    held = np.ones(len(best))
    if sampling.top_k > 0:
        probs = probs[:, : sampling.top_k]
        held = probs.sum(axis=1)
    before = probs.cumsum(axis=1) - probs
    keep = before < sampling.top_p * held[:, None]
    keep[:, 0] = True
    kept: NDArray[np.float64] = (probs * keep).sum(axis=1)
    return np.minimum(np.where(keep.all(axis=1), np.maximum(kept, sampling.top_p * held), kept), 1.0)


def _outside(mass: NDArray[np.float64], count: int, largest: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Sum of ``p ** power`` over ``count`` tokens of total probability ``mass``, none above ``largest``."""
    mass = np.maximum(mass, 0.0)
    even = count * (mass / count) ** power
    uneven = mass * largest ** (power - 1.0)
    return np.sqrt(even * uneven)
