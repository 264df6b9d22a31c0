"""Settings of `remote`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from roll_opd.configs.field_spec import parse_with, ranged
from roll_opd.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_base_url(value: Any, path: str) -> Any:
    """Return the address without a trailing `/v1`, which OpenAI's clients write and ours adds where it belongs.

    Raises:
        ConfigError: no address of an HTTP server, or one with a password in it.
    """
    if not isinstance(value, str):
        return value
    try:
        url = urlsplit(value.strip())
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise ConfigError(path, f"is no address of a server: {error}") from error
    if url.username is not None or url.password is not None:
        raise ConfigError(
            path, "must not hold a name or password; put the key into the variable that api_key_env names"
        )
    if url.scheme not in ("http", "https") or not host or url.query or url.fragment:
        raise ConfigError(path, f"{value!r} is no address of a server; write it like http://10.0.0.7:8000")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/').removesuffix('/v1')}"


def parse_variable_name(value: Any, path: str) -> Any:
    """Pass names of environment variables; whatever else stands there may be a key, and is not repeated.

    Raises:
        ConfigError: no name of a variable.
    """
    if isinstance(value, str) and not _VARIABLE.fullmatch(value):
        raise ConfigError(
            path, "must be the *name* of an environment variable (letters, digits, _), not the key itself"
        )
    return value


@dataclass(frozen=True)
class RemoteSettings:
    """A vLLM server that somebody else runs."""

    base_url: str | None = field(default=None, metadata=parse_with(parse_base_url))
    """Address of the server, such as `http://10.0.0.7:8000`."""
    served_model_name: str | None = None
    """Name under which the server offers the model; null: the one model that it has."""
    api_key_env: str | None = field(default=None, metadata=parse_with(parse_variable_name))
    """Name of the environment variable that holds the key for the Authorization header. The key itself never stands in
    a YAML file."""
    timeout: float = ranged(120.0, gt=0)
    """Seconds for one HTTP request."""
    max_retries: int = ranged(3, ge=0)
    """Further attempts at a request that fails for a reason that may pass, with growing pauses between them."""
    max_concurrency: int = ranged(16, ge=1)
    """HTTP requests in flight at once, from each worker."""
