"""Episodes as plain text: what the student saw, what it wrote, and what it got for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from roll_opd.utils.files import atomic_write_text
from roll_opd.utils.samples_page import LAYOUT, SampleView, TurnView, by_episode, episode_facts, short, visible

_INDENT = "    "


def write_episodes_log(path: Path, views: Iterable[SampleView]) -> None:
    """Write episodes one after the other, segments in order, replacing an earlier file atomically.

    Args:
        path: of the file.
        views: segments of episodes; a sample without turns is left out.
    """
    groups = by_episode(view for view in views if view.turns)
    atomic_write_text(path, "\n".join(_episode(segments) for segments in groups))


def _episode(segments: Sequence[SampleView]) -> str:
    head = [f"episode {segments[-1].episode}", segments[-1].tag, *episode_facts(segments)]
    if segments[-1].correct is not None:
        head.append("success" if segments[-1].correct else "no success")
    lines = [f"==== {visible(' · '.join(part for part in head if part))}"]
    for sample in segments:
        if sample.segments > 1:
            lines.append(f"---- segment {sample.segment + 1} of {sample.segments}")
        for turn in sample.turns:
            lines += _turn(turn)
    if segments[-1].ground_truth is not None:
        lines += ["---- expected", _text(segments[-1].ground_truth)]
    return "\n".join(lines) + "\n"


def _turn(turn: TurnView) -> list[str]:
    verdict = ", invalid action" if turn.is_valid is False else ""
    return [
        f"---- turn {turn.index}",
        _text(turn.observation),
        "  student:",
        _text(turn.text) if turn.text else f"{_INDENT}(nothing)",
        f"  reward {short(turn.reward)}{verdict}",
    ]


def _text(text: str) -> str:
    """Foreign text: each line indented, so that none can pass for one of ours, and nothing in it acts on a terminal."""
    return "\n".join((_INDENT + line).rstrip(" ") for line in visible(text, keep=LAYOUT).split("\n"))
