"""Environments of GEM (``gem-llm``): games, questions of data sets, and tasks of reasoning-gym."""

from __future__ import annotations

import difflib
import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np

from roll_opd.errors import ConfigError

_GLOBALS = threading.Lock()
"""Held while the process's random generators, or its root logger, are not its own: environments run in threads."""


class GEMEnv(gymnasium.Env[str, str]):
    """An environment of GEM, which reads the student's whole text itself.

    GEM draws from Python's and NumPy's global generators. Here each environment has their state to itself, so that its
    episode follows from its seed alone, whatever else of GEM's runs in its process; calls come one after the other.

    An episode is a success where GEM says so (``correct``). Where it does not: a question, when its reward is 1; a
    game, when it terminates with a positive reward and is not cut off, since GEM rewards progress there too.

    Args:
        env_id: of GEM's registry: ``game:…``, ``math:…`` (loads a data set), ``rg:…``. ``game:Name-v0``, which newer
            versions of GEM do not register, is the game with the defaults of its class.
        **kwargs: settings of the environment, for ``gem.make``.

    Raises:
        ConfigError: GEM, or what the environment needs besides, is not installed.
        ValueError: GEM has no such environment.
    """

    def __init__(self, env_id: str, **kwargs: Any) -> None:
        self._gem = _import_gem()
        self._env_id, self._kwargs = env_id, kwargs
        self._register_bare_name()
        with _GLOBALS:
            self._chance: tuple[Any, Any] = random.getstate(), np.random.get_state()
        self._over = True
        self._env = self._make()

    def _register_bare_name(self) -> None:
        registry = self._gem.envs.registration.ENV_REGISTRY
        if self._env_id in registry:
            return
        classes = {spec.entry_point for name, spec in registry.items() if name.startswith(f"{self._env_id}-")}
        if len(classes) != 1:
            near = difflib.get_close_matches(self._env_id, registry, n=3)
            raise ValueError(f"GEM has no {self._env_id!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        self._gem.register(self._env_id, classes.pop())

    def _make(self) -> Any:
        try:
            with self._own_chance():
                return self._gem.make(self._env_id, **self._kwargs)
        except ImportError as error:
            raise ConfigError(
                "custom_envs", f"GEM's {self._env_id!r} needs a package that is not there: {error}"
            ) from error

    @contextmanager
    def _own_chance(self) -> Iterator[None]:
        with _GLOBALS:
            outer = random.getstate(), np.random.get_state()
            random.setstate(self._chance[0])
            np.random.set_state(self._chance[1])
            try:
                yield
            finally:
                self._chance = random.getstate(), np.random.get_state()
                random.setstate(outer[0])
                np.random.set_state(outer[1])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of ``seed``."""
        if self._env_id.startswith("rg:"):
            # Its questions change after as many resets as there are questions, whatever the seed.
            self._env = self._make()
        with self._own_chance():
            observation, info = self._env.reset(seed=seed)
        self._over = False
        return observation, dict(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Hand GEM the student's text.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or was never begun.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset before the next step")
        with self._own_chance():
            observation, given, ended, cut, info = self._env.step(action)
        reward, terminated, truncated = float(given), bool(ended), bool(cut)
        self._over = terminated or truncated
        if "correct" in info:
            success = bool(info["correct"])
        elif observation == self._gem.utils.constants.TERMINAL_STATE:
            success = reward >= 1
        else:
            success = terminated and not truncated and reward > 0
        report = {"metrics": {"success": success}, "metrics_agg_mode": {"success": "last"}}
        return observation, reward, terminated, truncated, dict(info) | report

    def close(self) -> None:
        """Close the environment; only some of GEM's can be."""
        if hasattr(self._env, "close"):
            self._env.close()


def _import_gem() -> Any:
    with _GLOBALS:
        return _import_quietly()


def _import_quietly() -> Any:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        import gem
        import gem.envs.registration
        import gem.utils.constants
    except ImportError as error:
        raise ConfigError(
            "custom_envs", f"environments of GEM need its package ({error}); install it with `pip install gem-llm`"
        ) from error
    finally:
        # GEM configures the root logger when it is imported; that is not a library's business.
        root.setLevel(level)
        root.handlers[:] = handlers
    return gem
