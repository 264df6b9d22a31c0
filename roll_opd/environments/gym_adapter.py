"""Any registered Gymnasium environment whose observations and actions can be written as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from roll_opd.environments.action import ANSWER_PATTERN, CHAT_TOKENS, ActionParser, ParsedAction
from roll_opd.environments.grid_game import checked_lookup

_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_ESCAPE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])")


class GymTextEnv(gymnasium.Env[str, str]):
    """A Gymnasium environment, played in text.

    =================  ===============================================================================================
    observation space  what the student sees
    =================  ===============================================================================================
    ``Text``           the observation itself, as wherever the observation is a string
    anything           with ``render_mode: ansi``: the rendering, see :func:`without_escapes`
    numbers            (``Discrete`` and its like, also in ``Tuple`` and ``Dict``) the observation as JSON
    ``Box``            nothing: refused
    =================  ===============================================================================================

    A ``Discrete`` action is looked up by its name in what ``action_pattern`` finds. A ``Text`` action is the student's
    whole text, or what ``action_pattern`` finds where one is given. A turn without a valid action does not reach the
    environment: its observation is the last one, its reward ``format_penalty``.

    Args:
        env_id: as for ``gymnasium.make``, also ``module:Name-v0``.
        action_pattern: where the action is in the student's text; null: ``<answer>(.*?)</answer>`` for ``Discrete``
            actions, the whole text for ``Text`` actions.
        action_lookup: number of a ``Discrete`` action → its name; null: the numbers are the names.
        env_instruction: the rules; null: the names of the actions.
        format_penalty: reward of a turn without a valid action; usually negative.
        special_token_list: removed from the student's text first.
        success_reward: an episode succeeds when the sum of the environment's rewards reaches it (0 or less: has reached
            it when the environment ends the episode, since every sum begins at 0); null: when the reward of the step
            that terminates it is positive.
        **kwargs: for ``gymnasium.make``.

    Raises:
        ValueError: Gymnasium cannot make the environment, it cannot be played in text, or an argument cannot work.
    """

    def __init__(
        self,
        env_id: str,
        *,
        action_pattern: str | None = None,
        action_lookup: Mapping[int, str] | None = None,
        env_instruction: str | None = None,
        format_penalty: float = 0.0,
        special_token_list: Sequence[str] | None = CHAT_TOKENS,
        success_reward: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("disable_env_checker", True)  # it wants spaces, which an environment of strings may not have
        try:
            self._env: gymnasium.Env[Any, Any] = gymnasium.make(env_id, **kwargs)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:  # the second is of module:Name-v0
            raise ValueError(f"Gymnasium cannot make {env_id!r}: {without_escapes(str(error))}") from error
        self._rendered = self._env.render_mode == "ansi"
        self._numbers = _is_text(getattr(self._env, "observation_space", None))
        self._check_observations(env_id)

        space = getattr(self._env, "action_space", None)
        pattern = action_pattern
        names: dict[int, str] | None = None
        if isinstance(space, spaces.Discrete):
            numbers = range(int(space.start), int(space.start + space.n))
            names = checked_lookup("action_lookup", action_lookup, {number: str(number) for number in numbers})
            pattern = action_pattern or ANSWER_PATTERN
        elif not (space is None or isinstance(space, spaces.Text)):
            raise ValueError(
                f"{env_id} takes actions of {space}, which are no text; Discrete and Text ones can be played"
            )
        elif action_lookup is not None:
            raise ValueError(f"action_lookup names Discrete actions; those of {env_id} are text")
        self._parser = None if pattern is None else ActionParser(pattern, names, special_token_list)
        self._special_tokens = tuple(special_token_list or ())
        self._instruction = env_instruction
        if env_instruction is None and names is not None:
            self._instruction = "Your available actions are:\n" + ", ".join(names.values())
            if pattern == ANSWER_PATTERN:
                self._instruction += (
                    f"\nGive one of them in each turn, as in <answer>{next(iter(names.values()))}</answer>"
                )
        self._format_penalty = float(format_penalty)
        self._success_reward = success_reward
        self._observation: str | None = None
        self._state: dict[str, str] = {}
        self._return = 0.0

    def _check_observations(self, env_id: str) -> None:
        modes = self._env.metadata.get("render_modes") or []
        if self._rendered and "ansi" not in modes:
            raise ValueError(f"{env_id} has no render_mode 'ansi'; it has {', '.join(map(repr, modes)) or 'none'}")
        if not self._rendered and not self._numbers:
            way = "set render_mode: ansi to see its rendering" if "ansi" in modes else "it cannot be played in text"
            raise ValueError(f"{env_id} has observations of {self._env.observation_space}, which are no text; {way}")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of ``seed``."""
        observation, info = self._env.reset(seed=seed, options=options)
        self._return = 0.0
        self._observation = self._seen(observation)
        rules = {} if self._instruction is None else {"env_instruction": self._instruction}
        return self._observation, _plain_values(info) | rules | self._state

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action that the text names.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or was never begun.
            TypeError: the observation cannot be written as text.
        """
        if self._observation is None:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset before the next step")
        parsed = self._parsed(action)
        if parsed.action is None:
            report = self._report(parsed, success=self._succeeds(False, False, 0.0), penalty=self._format_penalty)
            return self._observation, self._format_penalty, False, False, report | self._state

        observation, given, ended, cut, info = self._env.step(parsed.action)
        reward, terminated, truncated = float(given), bool(ended), bool(cut)  # some return NumPy's
        self._return += reward
        seen = self._seen(observation)
        self._observation = None if terminated or truncated else seen
        report = self._report(parsed, success=self._succeeds(terminated, truncated, reward), penalty=0.0)
        return seen, reward, terminated, truncated, _plain_values(info) | report | self._state

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _parsed(self, text: str) -> ParsedAction:
        if self._parser is not None:
            return self._parser.parse(text)
        for token in self._special_tokens:
            text = text.replace(token, "")
        return ParsedAction(text, text)

    def _succeeds(self, terminated: bool, truncated: bool, reward: float) -> bool:
        if self._success_reward is None:
            return terminated and reward > 0
        return self._return >= self._success_reward and (self._success_reward > 0 or terminated or truncated)

    @staticmethod
    def _report(parsed: ParsedAction, *, success: bool, penalty: float) -> dict[str, Any]:
        valid = parsed.action is not None
        return {
            "metrics": {"action_is_valid": valid, "success": success, "format_penalty": penalty},
            "metrics_agg_mode": {"success": "last"},
            "action_content": parsed.content,
        }

    def _seen(self, observation: Any) -> str:
        if self._rendered:
            if self._numbers:  # a rendering may also tell the last action, so equal states may look different
                self._state = {"state": _written(observation)}
            rendering = self._env.render()
            if not isinstance(rendering, str):  # Gymnasium's own ones return text, older ones a StringIO
                raise TypeError(f"render_mode 'ansi' returned {type(rendering).__name__}, not str")
            return without_escapes(rendering).strip("\n")
        return _written(observation)


def without_escapes(text: str) -> str:
    """Text without the terminal's escape sequences; what they colour is put into braces with the name of the colour.

    The colour is often all that shows where the player is: ``"\\x1b[41mS\\x1b[0mFFF"`` becomes ``"{red:S}FFF"``.
    """
    written, colours, end = "", list[str](), 0
    for escape in _ESCAPE.finditer(text):
        written += _coloured(text[end : escape.start()], colours)
        end = escape.end()
        if escape[2] == "m":
            for code in escape[1].split(";"):
                if code.lstrip("0") == "":
                    colours.clear()
                elif code[:-1] in ("3", "4", "9", "10") and code[-1] < "8":
                    colours.append(_COLOURS[int(code[-1])])
    return written + _coloured(text[end:], colours)


def _coloured(piece: str, colours: Sequence[str]) -> str:
    return f"{{{' '.join(colours)}:{piece}}}" if piece and colours else piece


def _is_text(space: spaces.Space[Any] | None) -> bool:
    """Whether observations can be written; of a space that is not Gymnasium's, only the observation itself can tell."""
    inner: Iterable[spaces.Space[Any]] = ()
    if isinstance(space, spaces.Dict):
        inner = space.spaces.values()
    elif isinstance(space, spaces.Tuple | spaces.OneOf):
        inner = space.spaces
    elif isinstance(space, spaces.Sequence):
        inner = [space.feature_space]
    return not isinstance(space, spaces.Box | spaces.Graph) and all(map(_is_text, inner))


def _written(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    return json.dumps(observation, default=_from_numpy)


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.integer | np.ndarray):
        return value.tolist()
    raise TypeError(f"an observation with a {type(value).__name__} in it cannot be written as text")


def _plain_values(info: Mapping[str, Any]) -> dict[str, Any]:
    """What may cross to another process; masks and other arrays may not."""
    return {key: value for key, value in info.items() if isinstance(value, str | int | float)}
