"""What an environment is to us, and what crosses the border of its process.

An environment is a class with Gymnasium's interface whose observations and actions are text::

    class MyEnv(gymnasium.Env[str, str]):
        def reset(self, *, seed=None, options=None) -> tuple[str, dict]: ...
        def step(self, action: str) -> tuple[str, float, bool, bool, dict]: ...
        def close(self) -> None: ...

The same seed must give the same episode: the members of a group play the same one. ``action`` is everything that the
student wrote in its turn; finding the move in it is the environment's business (:mod:`roll_opd.environments.action`).

Keys of ``info`` that mean something, all optional:

=====================  ===============================================================================================
``env_instruction``    at reset: the rules, shown in front of the first observation (``step`` mode: in every turn)
``metrics``            numbers and booleans of the turn; ``success`` (of the episode so far) and ``action_is_valid`` are
                       booleans known to the pipeline, the others are averaged as ``metrics_agg_mode`` says (``mean``,
                       ``sum``, ``last``, ``max``, ``min``; ``mean`` where it says nothing)
``action_content``     the move that was found, for histories and pages
``state``              text that is equal in equal states; the observation, where it is missing
``use_tool``           the observation is a tool's answer, and is shown under the role ``tool``
``suffix``             text for ``{suffix}`` of the next message
=====================  ===============================================================================================

Whatever else is in the ``info`` of a reset and is text or a number can be named in a teacher's ``context_template``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsFloat


class TextEnvironment(Protocol):
    """Gymnasium's interface with text."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode that ``seed`` stands for; return its first observation and ``info``."""
        ...

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take the student's turn; return observation, reward, whether it ended, whether it was cut, and ``info``."""
        ...

    def close(self) -> None:
        """Let go of what is held."""
        ...


@dataclass(frozen=True)
class Opening:
    """What a reset returned, checked.

    Attributes:
        observation: the first one.
        info: plain values alone.
    """

    observation: str
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a step returned, checked.

    Attributes:
        observation: what the student sees next.
        reward: finite.
        terminated: the episode has come to its end.
        truncated: it was cut off.
        info: plain values alone.
        seconds: that the step took in its process.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether no further step can be taken."""
        return self.terminated or self.truncated
