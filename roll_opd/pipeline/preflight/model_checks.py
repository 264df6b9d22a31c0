"""Whether the models fit together: tokens, shapes, how a response ends, and whether a teacher has anything to say."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from roll_opd.configs.memory import find_model_config
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.tokenizer import check_same_vocabulary, end_of_turn
from roll_opd.errors import ConfigError, ModelError
from roll_opd.pipeline.preflight.facts import Facts, model_field
from roll_opd.pipeline.preflight.finding import Check, Finding, Level, failed
from roll_opd.pipeline.preflight.model_identity import same_model

ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size"),
)
"""Entries of ``config.json`` that decide the shapes of the weights."""


def tokenizers(facts: Facts) -> Iterator[Finding]:
    """Every scorer has the student's tokens and special ids."""
    ours: PreTrainedTokenizerBase | None = None
    try:
        ours = facts.tokenizer
        yield Finding("ok", model_field(facts.student), f"tokenizer of {len(ours.get_vocab())} tokens")
    except ModelError as error:
        yield failed(error)
    for name, (path, _) in facts.scorers.items():
        field = model_field(path)
        try:
            theirs = facts.tokenizer_of(path)
        except ModelError as error:
            told = f"{name}: no tokenizer on this disk; its server's vocabulary is compared when the run starts"
            yield Finding("skipped", field, told) if facts.is_remote(path) else failed(error, field)
            continue
        if ours is None:
            continue
        try:
            # Messages of the check begin with "teacher".
            warnings = check_same_vocabulary(ours, theirs, name.removeprefix("teacher ").strip("'"))
        except ModelError as error:
            yield failed(error, field)
            continue
        for warning in warnings:
            yield Finding("warning", field, warning)
        others = set(ours.all_special_ids) ^ set(theirs.all_special_ids)
        if others:
            token = ours.convert_ids_to_tokens(min(others))
            problem = f"{name} and student do not both treat {token!r} (id {min(others)}) as special"
            yield Finding("warning", field, f"{problem}; check that the two belong to one family")
        yield Finding("ok", field, f"{name} has the student's {len(ours.get_vocab())} tokens and special ids")


def vocabulary_rows(facts: Facts) -> Iterator[Finding]:
    """The embedding of every model has a row for each token; more are padding."""
    size = facts.vocabulary.size
    for path in facts.models:
        rows = (facts.architecture(path) or {}).get("vocab_size")
        if rows is None:
            yield Finding("skipped", model_field(path), "number of embedding rows: config.json is not on this disk")
        elif rows < size:
            problem = f"the model has {rows} embedding rows for a tokenizer of {size} ids"
            yield Finding("error", model_field(path), f"{problem}; use the tokenizer that the model was trained with")
        else:
            padding = f"; {rows - size} are padding and never enter a softmax" if rows > size else ""
            yield Finding("ok", model_field(path), f"{rows} embedding rows for {size} ids{padding}")


def end_of_turn_reachable(facts: Facts) -> Iterator[Finding]:
    """A response can end: the token that closes a turn stops generation, and every scorer has it."""
    config, vocabulary, field = facts.config, facts.vocabulary, model_field(facts.student)
    sampling = config.actor_infer.generating_args
    stop_strings = list(sampling.stop_strings or []) if sampling is not None else []
    if not vocabulary.stop_ids and not stop_strings:
        problem = "no stop token: neither the tokenizer nor generation_config.json names an eos_token_id"
        fix = "add one, or set generating_args.stop_strings; else every response runs to response_length"
        yield Finding("error", field, f"{problem}; {fix}")
    beyond = [i for i in vocabulary.stop_ids if i >= vocabulary.size]
    if beyond and len(beyond) == len(vocabulary.stop_ids):
        problem = f"the stop ids {beyond} lie beyond the tokenizer's {vocabulary.size} ids, where every head is padding"
        yield Finding("error", field, f"{problem}; correct eos_token_id in generation_config.json")
    data = config.actor_train.data_args
    if data is not None and not data.apply_chat_template:
        yield Finding("ok", field, f"bare prompts: a response ends with one of the ids {list(vocabulary.stop_ids)}")
        return
    closing = end_of_turn(facts.tokenizer)
    if closing is None:
        yield Finding("skipped", field, "end of turn: the chat template closes a turn with no token of its own")
        return
    token, number = closing
    if number not in vocabulary.stop_ids and not stop_strings:
        problem = f"the chat template ends a turn with {token!r} (id {number}), which is not among the stop ids"
        role = facts.loaded.yaml_names["actor_infer"]
        fix = f"add it to eos_token_id in generation_config.json, or to {role}.generating_args.stop_strings"
        told = f"{problem} {list(vocabulary.stop_ids)}, so responses go on behind their end"
        yield Finding("error", field, f"{told}; {fix}")
    else:
        yield Finding("ok", field, f"a turn ends with {token!r} (id {number}), which stops generation")
    for name, (path, _) in facts.scorers.items():
        rows = (facts.architecture(path) or {}).get("vocab_size")
        if rows is not None and number >= rows:
            problem = f"{token!r} (id {number}), which ends a turn, lies beyond the {rows} rows of {name}"
            yield Finding("error", model_field(path), f"{problem}; use a teacher that was trained with this template")


def context_lengths(facts: Facts) -> Iterator[Finding]:
    """No sequence is longer than a model's positions reach."""
    config = facts.config
    rlvr = config.pipeline == "rlvr"
    whole = (config.prompt_length + (config.response_length or 0) if rlvr else config.sequence_length) or 0
    behind = "response_length" if rlvr else "sequence_length"
    views = {
        facts.loaded.teacher_yaml_name(name): teacher
        for name, teacher in config.teachers.items()
        if teacher.teacher_args.context_template is not None
    }
    for path in facts.models:
        limit = (facts.architecture(path) or {}).get("max_position_embeddings")
        if limit is None:
            yield Finding("skipped", model_field(path), "context length: no config.json on this disk names one")
            continue
        if whole > limit:
            what = "prompt_length + response_length" if rlvr else "sequence_length"
            error = ConfigError(behind, f"{what} = {whole} tokens, but {path} reaches {limit}; shorten them")
            yield failed(error)
            continue
        if path in views:
            context, longest = config.context_length(views[path]), config.longest_view(views[path])
            if longest > limit:
                rest, most = longest - context, limit - (longest - context)
                problem = f"{context} tokens and {behind} = {rest} are more than the {limit} of {path}"
                fix = f"set it to {most} at most" if most > 0 else f"shorten {behind}"
                level: Level = "error" if views[path].teacher_args.context_length else "warning"
                yield Finding(level, f"{path}.teacher_args.context_length", f"{problem}; {fix}")
                continue
        yield Finding("ok", model_field(path), f"sequences of up to {whole} tokens, positions up to {limit}")


def teachers_differ(facts: Facts) -> Iterator[Finding]:
    """A teacher that is the student says nothing."""
    config, student = facts.config, facts.config.actor_train.model_args
    same = []
    for name, teacher in config.teachers.items():
        field = model_field(facts.loaded.teacher_yaml_name(name))
        args, path = teacher.teacher_args, teacher.model_args.model_name_or_path
        if args.context_template is not None or args.self_teacher is not None:
            yield Finding("ok", field, f"teacher {name!r} is told apart from the student by its teacher_args")
        elif config.opd_args.base_model is not None:
            yield Finding("ok", field, f"teacher {name!r} is told apart from the student by opd_args.base_model")
        elif _same(student, teacher.model_args):
            same.append((name, field, path))
        else:
            yield Finding("ok", field, f"teacher {name!r} is another model than the student")
    alone = config.mode == "pure_opd" and len(same) == len(config.teachers)
    for name, field, path in same:
        what = f"teacher {name!r} is the student's own model ({path})"
        if alone:
            fix = "name another model, give it a teacher_args.context_template, or set preflight: off for a control run"
            yield Finding("error", field, f"{what}, and its signal zero; {fix}")
        else:
            yield Finding("warning", field, f"{what}: its term only pulls the student back to where it started")


def _same(one: ModelArguments, other: ModelArguments) -> bool:
    """Whether two roles begin with one model: weights, adapter, and what replaces entries of ``config.json``."""
    if one.model_config_kwargs != other.model_config_kwargs:
        return False
    pairs = ((one.model_name_or_path, other.model_name_or_path), (one.adapter_name_or_path, other.adapter_name_or_path))
    return all(a == b or (a and b and same_model(a, b)) for a, b in pairs)


def student_roles(facts: Facts) -> Iterator[Finding]:
    """Both student roles hold one architecture: the trained weights are copied into the generator."""
    names, config = facts.loaded.yaml_names, facts.config
    ours = find_model_config(config.actor_train.model_args.model_name_or_path)
    theirs = find_model_config(config.actor_infer.model_args.model_name_or_path)
    if ours is None or theirs is None:
        yield Finding("skipped", model_field(names["actor_infer"]), "architecture: config.json is not on this disk")
        return
    for key in ARCHITECTURE:
        if ours.get(key) != theirs.get(key):
            problem = f"{key} is {theirs.get(key)}, and {ours.get(key)} in {names['actor_train']}"
            yield Finding(
                "error", model_field(names["actor_infer"]), f"{problem}; both student roles must name the same model"
            )
            return
    yield Finding("ok", model_field(names["actor_infer"]), f"the architecture of {names['actor_train']}")
    given = {role: getattr(config, role).model_args.model_config_kwargs for role in ("actor_train", "actor_infer")}
    if given["actor_train"] != given["actor_infer"]:
        problem = f"not the one of {names['actor_train']}, so that trainer and generator may compute two models"
        field = f"{names['actor_infer']}.model_args.model_config_kwargs"
        yield Finding("warning", field, f"{problem}; give both roles the same")


MODEL_CHECKS: tuple[Check[Facts], ...] = (
    Check("models", tokenizers, always=True),
    Check("models", vocabulary_rows),
    Check("models", end_of_turn_reachable),
    Check("models", context_lengths, always=True),
    Check("models", teachers_differ),
    Check("models", student_roles),
)
