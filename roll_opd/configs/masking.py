"""Masks the secrets of a config: what is written to a file or sent to a tracker must not hold them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_PASSWORDS = {"password", "passwd", "passphrase", "secret", "secrets", "apikey", "credential", "credentials"}
_KEYS = {"api", "access", "private", "auth"}


def looks_secret(key: str) -> bool:
    """True for names such as ``judge_api_key``, ``HF_TOKEN``, ``dbPassword``; false for ``max_new_tokens``."""
    words = [word.lower() for word in _WORD.findall(key)]
    if not words:
        return False
    pairs = itertools.pairwise(words)
    # "token" is a secret at the end of a name only: use_token_reward is a switch.
    return (
        words[-1] == "token"
        or not _PASSWORDS.isdisjoint(words)
        or any(first in _KEYS and second == "key" for first, second in pairs)
    )


def without_secrets(value: Any) -> Any:
    """A copy of plain values in which everything under a key that looks like a secret is ``"***"``.

    Null, true and false stay: they hide nothing.
    """
    if isinstance(value, Mapping):
        return {
            key: MASK
            if isinstance(key, str) and looks_secret(key) and item is not None and not isinstance(item, bool)
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return value
