"""Settings of `hf_infer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HFSettings:
    """A plain transformers model has no settings of its own."""
