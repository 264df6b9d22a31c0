"""Settings of `remote`."""

from __future__ import annotations

from dataclasses import dataclass

from roll_opd.configs.field_spec import ranged


@dataclass(frozen=True)
class RemoteSettings:
    """A vLLM server that somebody else runs."""

    base_url: str | None = None
    """Address of the server, such as `http://10.0.0.7:8000`."""
    served_model_name: str | None = None
    """Name under which the server offers the model; null: the one model that it has."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key for the Authorization header. The key itself never stands in
    a YAML file."""
    timeout: float = ranged(120.0, gt=0)
    """Seconds for one HTTP request."""
    max_retries: int = ranged(3, ge=0)
    """Further attempts at a request that fails for a reason that may pass, with growing pauses between them."""
    max_concurrency: int = ranged(16, ge=1)
    """HTTP requests in flight at once, from each worker."""
