"""An environment that does what its actions say, for tests of what runs environments."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class ObedientEnv:
    """``sleep 0.3`` sleeps, ``raise x`` and ``exit`` raise, and ``return x`` returns what ``answers`` has for ``x``.

    Args:
        answers: name -> what a step returns in place of its observation, reward, terminated, truncated or ``info``.
    """

    def __init__(self, answers: dict[str, dict[str, Any]] | None = None) -> None:
        self.answers = answers or {}
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.resets += 1
        return f"seed {seed}", {"pid": os.getpid(), "resets": self.resets, "torch": "torch" in sys.modules}

    def step(self, action: str) -> tuple[Any, ...]:
        verb, _, argument = action.partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "raise":
            raise KeyError(argument)
        elif verb == "exit":
            sys.exit("enough")
        usual = {"observation": action, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
        return tuple({**usual, **(self.answers[argument] if verb == "return" else {})}.values())

    def close(self) -> None:
        pass
