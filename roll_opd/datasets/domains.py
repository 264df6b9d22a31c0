"""Sorts prompts into the domains that a batch is mixed from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from roll_opd.datasets.prompts import Prompt
from roll_opd.datasets.row import Row
from roll_opd.errors import DataError

logger = logging.getLogger(__name__)

COLUMN = "domain"
"""The column with which a row names its domain itself, as in ROLL's data."""


def domains_of(
    prompts: Sequence[Prompt | Row], tag_to_domain: Mapping[str, str | None], probs: Mapping[str, float]
) -> dict[str, list[int]]:
    """Sorts prompts into domains.

    A row belongs to the domain that its own column ``domain`` names, if that is one of ``probs``; else to the domain of
    its tag.

    Args:
        prompts: prompts or rows.
        tag_to_domain: the domain (reward) of each tag, for example from :func:`~roll_opd.datasets.tags.route_tags`.
        probs: share of each domain (``domain_interleave_probs``).

    Returns:
        For each domain with a share above 0, in the order of ``probs``, the positions of its prompts. Prompts of no
        such domain are in no list; they are counted in a warning.

    Raises:
        DataError: a domain has a share and no prompts.
    """
    members: dict[str, list[int]] = {name: [] for name, share in probs.items() if share > 0}
    left_out: Counter[str] = Counter()
    for position, prompt in enumerate(prompts):
        row = prompt.row if isinstance(prompt, Prompt) else prompt
        own = row.extra.get(COLUMN)
        domain = own if isinstance(own, str) and own in probs else tag_to_domain.get(row.tag)
        if domain in members:
            members[domain].append(position)
        else:
            left_out[f"tag {row.tag!r} (domain {domain})" if domain else f"tag {row.tag!r} (no domain)"] += 1
    for name, positions in members.items():
        if not positions:
            tags = sorted(tag for tag, domain in tag_to_domain.items() if domain == name)
            known = ", ".join(sorted({domain for domain in tag_to_domain.values() if domain}))
            raise DataError(
                f"domain {name!r} has the share {probs[name]:g} and no prompt: "
                + (
                    f"none has a tag of {', '.join(map(repr, tags))}"
                    if tags
                    else f"no tag of the data leads to a reward of that name (tags lead to: {known or 'none'})"
                )
                + "; a domain is the name of a reward whose tag_included has the row's tag, or what the row's column "
                f"{COLUMN!r} says; correct the name, give the reward the tags, or remove the share"
            )
    if left_out:
        kinds = "; ".join(f"{count} with {kind}" for kind, count in sorted(left_out.items()))
        logger.warning(
            "%d of %d prompts belong to no domain with a share and are never drawn: %s",
            left_out.total(),
            len(prompts),
            kinds,
        )
    return members
