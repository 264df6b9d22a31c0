"""KL-to-reference estimates on the sampled token, and the coefficient that scales them.

Source of the estimators: Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html. As a
loss and as a reward the same estimator follows different gradients; :func:`kl_estimate` says which.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

KL_ESTIMATES = ("kl", "abs", "mse", "k3")


def kl_estimate(kind: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return an estimate of a divergence from the reference at each token, differentiable in ``logprobs``.

    With ``d = logprobs - ref_logprobs`` on a token sampled from ``pi``, and ``r = exp(-d) = pi_ref / pi``:

    ======== =========== ============================= ================================================
    kind     value       expected value                expected gradient, back-propagated as a loss
    ======== =========== ============================= ================================================
    ``kl``   ``d``       ``KL(pi || ref)``             none: ``E[grad log pi] = 0``. Use it as a reward.
    ``abs``  ``|d|``     no divergence named           of ``sum |pi - ref|``, twice the total variation
    ``mse``  ``d^2/2``   2nd-order to ``KL(pi||ref)``  of the reverse KL, ``KL(pi || ref)``
    ``k3``   ``r-1+d``   ``KL(pi || ref)``             of the *forward* KL, ``KL(ref || pi)``
    ======== =========== ============================= ================================================

    Args:
        kind: one of :data:`KL_ESTIMATES` (k1, |k1|, k2, k3).
        logprobs: ``[n]`` of the sampled tokens; may carry a gradient.
        ref_logprobs: ``[n]`` under the reference; no gradient.

    Returns:
        ``[n]``, in nats.

    Raises:
        ValueError: unknown kind; ``full`` needs whole rows of logits and is not an estimate.
    """
    d = logprobs - ref_logprobs.detach()
    if kind == "kl":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "mse":
        return 0.5 * d.square()
    if kind == "k3":
        # The exponent is bounded as in the policy ratio: a ratio beyond e^20 says that something is broken.
        return torch.expm1((-d).clamp(max=20.0)) + d
    raise ValueError(f"unknown KL estimate {kind!r}; one of {', '.join(KL_ESTIMATES)}")


class KLController(Protocol):
    """What scales the token-level KL reward."""

    @property
    def coef(self) -> float:
        """The coefficient in force."""

    def update(self, current_kl: float, num_samples: int) -> None:
        """Take note of the KL (nats per token) that ``num_samples`` responses showed."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's :meth:`state`."""


class FixedKLController:
    """A coefficient that stays as configured."""

    def __init__(self, coef: float) -> None:
        self._coef = coef

    @property
    def coef(self) -> float:
        """The coefficient in force."""
        return self._coef

    def update(self, current_kl: float, num_samples: int) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, float]:
        """Nothing: the config has it."""
        return {}

    def load(self, state: dict[str, float]) -> None:
        """Nothing to do: the config decides, whatever another controller left in the checkpoint."""


class AdaptiveKLController:
    """A coefficient that rises while the KL is above its target and falls while it is below.

    ``coef *= 1 + clip(current / target - 1, -0.2, 0.2) * num_samples / horizon``. Source: Ziegler et al.,
    https://arxiv.org/abs/1909.08593 (section 2.2). A batch larger than the horizon counts as one horizon, so that the
    coefficient can never change its sign.

    Args:
        init_coef: coefficient before the first update, > 0.
        target: KL to hold, > 0, in the unit that ``update`` is given.
        horizon: responses over which an error of the KL works itself out, > 0.

    Raises:
        ValueError: a number that is not above 0.
    """

    def __init__(self, init_coef: float, target: float, horizon: float) -> None:
        for name, value in (("init_coef", init_coef), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        self._coef, self._target, self._horizon = float(init_coef), float(target), float(horizon)

    @property
    def coef(self) -> float:
        """The coefficient in force."""
        return self._coef

    def update(self, current_kl: float, num_samples: int) -> None:
        """Move the coefficient after a batch of ``num_samples`` responses with mean KL ``current_kl``."""
        error = min(max(current_kl / self._target - 1.0, -0.2), 0.2)
        self._coef *= 1.0 + error * min(num_samples / self._horizon, 1.0)

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"coef": self._coef}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's :meth:`state`."""
        self._coef = float(state["coef"])
