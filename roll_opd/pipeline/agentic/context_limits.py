"""What to do when an episode no longer fits its context: functions for ``on_context_full``.

Each takes the messages so far and returns those that the student goes on with. Any function with that signature will
do, for example one that asks a model for a summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEPT_TURNS = 2


def drop_oldest_turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the system message, the first user message (which has the rules) and the last two exchanges."""
    head = 2 if messages and messages[0]["role"] == "system" else 1
    tail = [i for i, message in enumerate(messages) if i >= head and message["role"] == "assistant"][-KEPT_TURNS:]
    kept = [*messages[:head], *(messages[tail[0] :] if tail else messages[head:])]
    return [dict(message) for message in kept]
