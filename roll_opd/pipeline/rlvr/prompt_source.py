"""The prompts of a run: read, encoded, checked against teachers and rewards, and put in the order of the draws."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from roll_opd.configs import LoadedConfig
from roll_opd.configs.data_args import DataArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.datasets.contexts import check_context_template, encode_contexts
from roll_opd.datasets.domains import domains_of
from roll_opd.datasets.prompts import Prompt, encode_prompts
from roll_opd.datasets.rows import Columns, read_rows
from roll_opd.datasets.sampling import DomainOrder, PromptOrder
from roll_opd.datasets.tags import route_tags, uncovered_tags
from roll_opd.errors import DataError

logger = logging.getLogger(__name__)

Note = Callable[[str, Any], None]
Contexts = dict[str, dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class PromptSource:
    """Prompts by draw.

    Attributes:
        train: prompts to train on.
        validation: held-out prompts.
        contexts: teacher name -> prompt (by ``id``; they all live in this object) -> what this teacher sees instead.
        domains: domain -> indices into ``train``, where domains are mixed by shares; else empty.
        position_of: draw number -> index into ``train``; a pure function, so a resumed run needs nothing else.
    """

    train: list[Prompt]
    validation: list[Prompt]
    contexts: Contexts
    domains: dict[str, list[int]]
    position_of: Callable[[int], int]

    def prompt_of(self, draw: int) -> Prompt:
        """Return the prompt of a draw."""
        return self.train[self.position_of(draw)]

    def contexts_of(self, prompt: Prompt) -> dict[str, tuple[int, ...]]:
        """Return what each teacher with a view of its own sees in place of ``prompt``."""
        return {name: places[id(prompt)] for name, places in self.contexts.items() if id(prompt) in places}


def read_prompts(loaded: LoadedConfig, tokenizer: PreTrainedTokenizerBase, note: Note) -> PromptSource:
    """Read and check the data of a run.

    Args:
        loaded: a checked config.
        tokenizer: the student's.
        note: takes counts for the summary, by name.

    Raises:
        DataError: a file, a row, a tag that nothing covers, a domain without prompts, a context that cannot be made.
        ConfigError: a faulty context template.
    """
    config, name = loaded.config, loaded.yaml_names["actor_train"]
    data = config.actor_train.data_args
    assert data is not None and data.file_name, "the config's checks let no run without data pass"
    for teacher, settings in config.teachers.items():
        if settings.teacher_args.context_template is not None:
            field = f"{loaded.teacher_yaml_name(teacher)}.teacher_args.context_template"
            check_context_template(settings.teacher_args.context_template, field)
    train = _with_signal(config, _encoded(config, data, f"{name}.data_args", "train", tokenizer, note), note)
    validation: list[Prompt] = []
    contexts_of_validation: Contexts = {}
    if config.validation is not None and config.validation.data_args.file_name and config.eval_steps > 0:
        held_out = config.validation.data_args
        validation = _encoded(config, held_out, "validation.data_args", "validation", tokenizer, note)
        validation = validation[: config.validation.max_prompts]
        contexts_of_validation = _contexts(config, held_out, validation, tokenizer)
    contexts = {
        name: by_place | contexts_of_validation.get(name, {})
        for name, by_place in _contexts(config, data, train, tokenizer).items()
    }
    domains = _domains(config, data, train)
    return PromptSource(train, validation, contexts, domains, _order(config, data, len(train), domains))


def _encoded(
    config: PipelineConfig,
    data: DataArguments,
    field: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    note: Note,
) -> list[Prompt]:
    columns = Columns(id=data.id, tag=data.tag, prompt=data.prompt or "prompt", messages=data.messages or "messages")
    try:
        rows, read = read_rows(
            data.file_name,
            columns=columns,
            on_bad_row=data.on_bad_row,
            dataset_dir=Path(data.dataset_dir) if data.dataset_dir else None,
            dataset_type=data.dataset_type,
            split=data.split,
            subset=data.subset,
        )
    except DataError as error:
        raise DataError(f"{field}.file_name: {error}") from error
    prompts, encoded = encode_prompts(
        rows,
        tokenizer,
        prompt_length=config.prompt_length,
        apply_chat_template=data.apply_chat_template,
        chat_template_kwargs=_template_kwargs(data),
    )
    level = logging.WARNING if encoded.dropped_overlong or read.bad else logging.INFO
    logger.log(level, "%s: %s; %s", field, read, encoded)
    note(
        f"rows_{split}",
        {
            "read": read.read,
            "bad": read.bad,
            "kept": read.kept,
            "dropped_overlong": encoded.dropped_overlong,
            "used": encoded.used,
        },
    )
    return prompts


def _template_kwargs(data: DataArguments) -> dict[str, Any]:
    return {} if data.enable_thinking is None else {"enable_thinking": data.enable_thinking}


def _with_signal(config: PipelineConfig, prompts: list[Prompt], note: Note) -> list[Prompt]:
    """Keep the prompts that the run has a training signal for.

    Raises:
        DataError: a tag without a teacher or without a reward where one is needed, and nothing says to skip it.
    """
    if config.mode != "pure_opd":
        ungraded = uncovered_tags((p.row.tag for p in prompts), [r.tag_included for r in config.rewards.values()])
        if ungraded:
            raise DataError(
                f"no reward grades the tag {ungraded[0]!r} ({len(ungraded)} uncovered tag(s) in the data); add it to a "
                f"reward's tag_included, or leave those rows out"
            )
    if not config.teachers:
        return prompts
    missing = set(uncovered_tags((p.row.tag for p in prompts), [t.tag_included for t in config.teachers.values()]))
    kept = [p for p in prompts if p.row.tag not in missing]
    note("rows_without_teacher", len(prompts) - len(kept))
    if not missing or config.opd_args.uncovered == "reward_only":
        return prompts
    if config.opd_args.uncovered == "error" or not kept:
        raise DataError(
            f"no teacher covers the tag {min(missing)!r} ({len(missing)} uncovered tag(s) in the data); add it to a "
            f"teacher's tag_included, leave tag_included out to cover every tag, or set opd_args.uncovered: skip"
        )
    logger.warning("%d prompts without a teacher are skipped, tags %s", len(prompts) - len(kept), sorted(missing)[:5])
    return kept


def _contexts(
    config: PipelineConfig, data: DataArguments, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase
) -> Contexts:
    """What each teacher with a view of its own sees in place of the prompts that it scores."""
    contexts: Contexts = {}
    for name, teacher in config.teachers.items():
        template = teacher.teacher_args.context_template
        if template is None:
            continue
        scored = [p for p in prompts if not uncovered_tags([p.row.tag], [teacher.tag_included])]
        encoded = encode_contexts(
            scored,
            template,
            tokenizer,
            max_length=config.context_length(teacher),
            apply_chat_template=data.apply_chat_template,
            chat_template_kwargs=_template_kwargs(data),
        )
        contexts[name] = {id(p): ids for p, ids in zip(scored, encoded, strict=True)}
    return contexts


def _domains(config: PipelineConfig, data: DataArguments, prompts: list[Prompt]) -> dict[str, list[int]]:
    shares = data.domain_interleave_probs
    if not shares:
        return {}
    # ROLL's domains are rewards; pure distillation needs none, and there a domain may be a teacher.
    covers = {name: teacher.tag_included for name, teacher in config.teachers.items() if name in shares}
    covers |= {name: reward.tag_included for name, reward in config.rewards.items()}
    return domains_of(prompts, route_tags((p.row.tag for p in prompts), covers), shares)


def _order(
    config: PipelineConfig, data: DataArguments, count: int, domains: dict[str, list[int]]
) -> Callable[[int], int]:
    """How draws walk through the prompts: all of them in one order, or each domain in its own by shares."""
    if not domains:
        return PromptOrder(count, config.seed, data.shuffle).index
    sizes = {name: len(positions) for name, positions in domains.items()}
    shares = data.domain_interleave_probs or {}
    order = DomainOrder(sizes, shares, config.seed, data.shuffle, config.rollout_batch_size)

    def position_of(draw: int) -> int:
        domain, index = order.index(draw)
        return domains[domain][index]

    return position_of
