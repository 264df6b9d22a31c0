"""Finding the student's move in what it wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_PATTERN = r"<answer>(.*?)</answer>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class ParsedAction:
    """What was found in a turn.

    Attributes:
        action: key of the action in the lookup; without a lookup, ``content``. None: there is no valid action.
        content: the text of the action; empty where the pattern was not found.
        thinking: the text of the thinking, where the pattern asks for it.
    """

    action: Any = None
    content: str = ""
    thinking: str = ""


class ActionParser:
    """Finds the first match of a pattern, and looks its text up among the names of the actions.

    Args:
        pattern: regular expression in which ``.`` stands for line breaks too. Its only group is the action; of two or
            more, the first is the thinking and the second the action.
        lookup: action → name. Names are compared without regard to case. None or empty: any text is an action.
        special_tokens: removed from the text before the search.

    Raises:
        ValueError: the pattern cannot be compiled or has no group, or two actions have the same name.
    """

    def __init__(
        self,
        pattern: str = ANSWER_PATTERN,
        lookup: Mapping[Any, str] | None = None,
        special_tokens: Sequence[str] | None = CHAT_TOKENS,
    ) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"action_pattern {pattern!r} is no regular expression ({error}); write {_EXAMPLE}"
            ) from error
        if self._pattern.groups == 0:
            raise ValueError(f"action_pattern {pattern!r} has no group that holds the action; write {_EXAMPLE}")
        self._actions = {name.lower(): action for action, name in (lookup or {}).items()}
        if len(self._actions) < len(lookup or {}):
            raise ValueError(f"action_lookup gives two actions the same name: {', '.join((lookup or {}).values())}")
        self._special_tokens = tuple(special_tokens or ())

    def parse(self, text: str) -> ParsedAction:
        """The action in the text of a turn."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        match = self._pattern.search(text.strip())
        if match is None:
            return ParsedAction()
        # A group inside an optional part of the pattern is None where that part is missing.
        found = [(group or "").strip() for group in match.groups()]
        thinking, content = ("", found[0]) if len(found) == 1 else (found[0], found[1])
        action = self._actions.get(content.lower()) if self._actions else content
        return ParsedAction(action, content, thinking)


_EXAMPLE = f"one with a group for the action, as in {ANSWER_PATTERN!r}"
