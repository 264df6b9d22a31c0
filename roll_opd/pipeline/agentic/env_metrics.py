"""The numbers that an environment gives for each turn, as one number an episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MODES: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
    "last": lambda values: values[-1],
    "max": max,
    "min": min,
}


def aggregate(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each metric of an episode.

    Args:
        infos: of its turns, in order, as :mod:`~roll_opd.pipeline.agentic.env_worker` passes them; ``metrics`` and
            ``metrics_agg_mode`` are read, of which the last one counts.
    """
    values: dict[str, list[float]] = {}
    modes: dict[str, str] = {}
    for info in infos:
        modes |= info.get("metrics_agg_mode", {})
        for name, value in info.get("metrics", {}).items():
            if isinstance(value, (bool, int, float)):
                values.setdefault(name, []).append(float(value))
    return {name: MODES[modes.get(name, "mean")](seen) for name, seen in values.items()}
