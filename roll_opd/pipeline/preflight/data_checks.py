"""Whether the data can be used, and who scores and grades it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from roll_opd.datasets.tags import route_tags
from roll_opd.errors import RollOPDError
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding, failed

OVERLONG = 0.2
"""Share of overlong prompts above which the setting is more likely wrong than the data."""
MAX_TAGS = 20
"""Tags that are listed one by one."""


def data_rows(facts: Facts) -> Iterator[Finding]:
    """Files are there, rows have what they need, prompts fit."""
    unusable: Finding | None = None
    field = f"{facts.student}.data_args"
    try:
        prompts = len(facts.source.train)
    except RollOPDError as error:
        unusable = failed(error, field)
    for split, counts in facts.rows.items():
        where = field if split == "train" else "validation.data_args"
        told = ", ".join(f"{counts[key]} {word}" for key, word in _COUNTED)
        yield Finding("ok", f"{where}.file_name", told)
        if counts["bad"]:
            yield Finding("ok", f"{where}.on_bad_row", f"{counts['bad']} bad rows are skipped, as it says")
        if counts["dropped_overlong"] > OVERLONG * counts["kept"]:
            share = counts["dropped_overlong"] / counts["kept"]
            problem = f"{share:.0%} of the {split} rows are longer than {facts.config.prompt_length} tokens"
            yield Finding("warning", "prompt_length", f"{problem} and left out; raise it, or remove them from the data")
    if unusable is not None:
        yield unusable
    elif prompts < facts.config.rollout_batch_size:
        problem = f"{facts.config.rollout_batch_size} prompts a step of {prompts} in all, so some come twice in a step"
        yield Finding("warning", "rollout_batch_size", f"{problem}; lower it, or give more rows")


_COUNTED = (("read", "rows read"), ("bad", "bad"), ("dropped_overlong", "too long"), ("used", "used"))


def tag_coverage(facts: Facts) -> Iterator[Finding]:
    """Who scores and who grades each tag, and who has nothing to do."""
    config, source = facts.config, facts.source
    tags = Counter(p.row.tag for p in source.train)
    teachers = {name: teacher.tag_included for name, teacher in config.teachers.items()}
    rewards = {name: reward.tag_included for name, reward in config.rewards.items()}
    graded_by = route_tags(tags, rewards)
    for tag, count in tags.most_common(MAX_TAGS):
        who = [name for name, included in teachers.items() if not included or tag in included]
        said = f"tag {tag!r}: {count} prompts"
        if teachers:
            said += f", teacher {', '.join(who)}" if who else ", no teacher (opd_args.uncovered: reward_only)"
        if rewards and graded_by[tag] is None:
            problem = f"{said}, no reward, so its responses are not graded"
            yield Finding("warning", "rewards", f"{problem}; add the tag to a reward's tag_included")
        else:
            yield Finding("ok", "tag_included", said + (f", reward {graded_by[tag]}" if rewards else ""))
    if len(tags) > MAX_TAGS:
        yield Finding("ok", "tag_included", f"{len(tags) - MAX_TAGS} more tags")
    for name, included in teachers.items():
        yield from _idle(f"{facts.loaded.teacher_yaml_name(name)}.tag_included", included, tags, "scores")
    seen = [*tags, *(p.row.tag for p in source.validation)]
    used = set(route_tags(seen, rewards).values())
    for name in rewards:
        if name not in used:
            problem = "no tag of the data leads to this reward, so it grades nothing"
            yield Finding("warning", f"rewards.{name}.tag_included", f"{problem}; name tags of the data, or remove it")


def _idle(field: str, included: Sequence[str], tags: Mapping[str, int], does: str) -> Iterator[Finding]:
    if included and not set(included) & set(tags):
        some = ", ".join(sorted(tags)[:5])
        problem = f"none of {', '.join(included)} is a tag of the data ({some}), so this teacher {does} nothing"
        yield Finding("warning", field, f"{problem}; name tags of the data, or remove it")
    for tag in sorted(set(included) - set(tags)) if set(included) & set(tags) else ():
        yield Finding("warning", field, f"{tag!r} is no tag of the data; remove it, or correct the spelling")


def domain_shares(facts: Facts) -> Iterator[Finding]:
    """How many prompts stand behind each domain's share."""
    data = facts.config.actor_train.data_args
    shares = data.domain_interleave_probs if data is not None else None
    if not shares:
        return
    domains = facts.source.domains
    field, total = f"{facts.student}.data_args.domain_interleave_probs", sum(shares.values())
    for name, share in shares.items():
        yield Finding("ok", field, f"domain {name!r}: share {share / total:.1%}, {len(domains.get(name, []))} prompts")


DATA_CHECKS: tuple[Check[Facts], ...] = (
    Check("data", data_rows, always=True),
    Check("data", tag_coverage),
    Check("data", domain_shares),
)
