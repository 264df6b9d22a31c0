"""Which tags of the data are covered by teachers and rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def uncovered_tags(tags: Iterable[str], covers: Sequence[Sequence[str]]) -> list[str]:
    """The tags that nothing covers, each once, sorted.

    Args:
        tags: the tags of rows.
        covers: ``tag_included`` of each teacher (or reward); an empty one covers every tag. Without any, nothing is
            covered.
    """
    if any(not cover for cover in covers):
        return []
    covered = {tag for cover in covers for tag in cover}
    return sorted(set(tags) - covered)


def route_tags(tags: Iterable[str], covers: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """For each tag the first of ``covers`` that takes it, or None.

    Args:
        tags: the tags of rows.
        covers: name -> ``tag_included``, in the order in which they are asked; an empty one takes every tag.
    """
    return {
        tag: next((name for name, cover in covers.items() if not cover or tag in cover), None)
        for tag in sorted(set(tags))
    }
