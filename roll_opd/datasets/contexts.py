"""The prompts that a teacher sees when it knows more than the student.

A teacher of self-distillation is the student's own model with a hint or the reference answer in its prompt
(on-policy self-distillation: Zhao et al. 2026, arXiv:2601.18734). The student's tokens follow that prompt as they
stand, so both prompts must end in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roll_opd.datasets.prompts import Prompt, check_template_kwargs, render_chat, response_opening, tokenize
from roll_opd.datasets.row import Row
from roll_opd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("id", "tag", "ground_truth", "source", "difficulty", "test_cases", "hint")
"""Fields of a row that a template can name, besides ``prompt``, ``messages`` and the columns in ``extra``."""


def check_context_template(template: str, field: str) -> None:
    """Refuses a template that can work for no row.

    Args:
        template: ``teacher_args.context_template``.
        field: its full path, for the message.

    Raises:
        ConfigError: a syntax error, an unknown filter, a reference to another template, or no field of the row at all.
    """
    from jinja2 import TemplateSyntaxError, meta

    environment = _environment()
    try:
        environment.from_string(template)
        tree = environment.parse(template)
    except TemplateSyntaxError as error:
        raise ConfigError(field, f"not a Jinja template: line {error.lineno}: {error.message}") from error
    if any(True for _ in meta.find_referenced_templates(tree)):
        raise ConfigError(field, "refers to another template; write all of the text here")
    if not meta.find_undeclared_variables(tree):
        raise ConfigError(
            field,
            "is the same text for every row; name the row's fields in it, for example {{ prompt }} and "
            "{{ ground_truth }}",
        )


def encode_contexts(
    prompts: Sequence[Prompt],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    apply_chat_template: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[int, ...]]:
    """Renders and tokenises the teacher's prompt of every prompt.

    The template's text takes the place of the last user message; system messages, earlier turns and what follows stay.
    The conversation then takes the same way as the student's (:func:`~roll_opd.datasets.prompts.encode_prompts`).
    In the template stand ``prompt`` (the last user message, or the bare prompt), ``messages``, ``ground_truth``,
    ``hint``, ``id``, ``tag``, ``source``, ``difficulty``, ``test_cases``, and the row's other columns under their
    names; what a row does not give is undefined. It runs in Jinja's sandbox.

    Without ``apply_chat_template`` the response follows the rendered text directly, so the template should end as the
    prompt does.

    Args:
        prompts: the student's prompts.
        template: ``teacher_args.context_template``.
        tokenizer: the student's.
        max_length: the most tokens that a context may have.
        apply_chat_template: as for the student's prompts.
        chat_template_kwargs: as for the student's prompts.

    Returns:
        Token ids of each teacher's prompt, in the order of ``prompts``.

    Raises:
        DataError: a row lacks a field that the template uses, or has no user message; a template that fails on a row
            or gives no text; a context that ends otherwise than the student's prompt, or is longer than ``max_length``.
        ConfigError: the template itself is faulty.
        ValueError: ``max_length`` below 1, or an argument that is ours among ``chat_template_kwargs``.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    kwargs = check_template_kwargs(chat_template_kwargs)
    check_context_template(template, "teacher_args.context_template")
    compiled = _environment().from_string(template)
    texts = []
    for prompt in prompts:
        text = _rendered(compiled, _template_fields(prompt.row), prompt.row.where)
        if apply_chat_template:
            text = _in_conversation(prompt, text, tokenizer, kwargs)
        texts.append(text)
    contexts = tokenize(texts, tokenizer, add_special_tokens=not apply_chat_template)
    for prompt, token_ids in zip(prompts, contexts, strict=True):
        if not token_ids:
            raise DataError(f"{prompt.row.where}: the context template gives no tokens")
        if len(token_ids) > max_length:
            raise DataError(
                f"{prompt.row.where}: the teacher's prompt has {len(token_ids)} tokens, more than {max_length}; raise "
                "teacher_args.context_length, or shorten teacher_args.context_template or the row's fields"
            )
    return contexts


def _environment() -> Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The text goes to a model, not into a page: nothing is escaped, and no line end is lost.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)


def render_context(template: str, fields: Mapping[str, Any], where: str) -> str:
    """Render a context template.

    Args:
        template: ``teacher_args.context_template``.
        fields: what it can name.
        where: what they belong to, for messages.

    Raises:
        DataError: a field is missing, the template fails, or it gives no text.
    """
    return _rendered(_environment().from_string(template), fields, where)


def _rendered(template: Template, fields: Mapping[str, Any], where: str) -> str:
    from jinja2 import TemplateError, UndefinedError

    try:
        text = template.render(fields)
        text.encode("utf-8")
    except UndefinedError as error:
        raise DataError(
            f"{where}: the context template uses a field that this does not give: {error.message} (it "
            f"gives {', '.join(sorted(fields))}); add it, or ask for it with {{% if ... is defined %}}"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the rendered context template holds an unpaired surrogate") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # Whatever an expression of the template can raise: it is the user's code.
        raise DataError(f"{where}: the context template fails here: {error}") from error
    if not text.strip():
        raise DataError(f"{where}: the context template gives no text here")
    return text


def _template_fields(row: Row) -> dict[str, Any]:
    """What the template can name; nothing is None, so that what is not given is undefined."""
    messages = row.messages or ({"role": "user", "content": row.prompt},)
    fields = {name: getattr(row, name) for name in _FIELDS}
    fields = {**row.extra, **{name: value for name, value in fields.items() if value is not None}}
    return {**fields, "messages": messages, "prompt": messages[_last_user(row, messages)]["content"]}


def _last_user(row: Row, messages: Sequence[Mapping[str, Any]]) -> int:
    for position in reversed(range(len(messages))):
        if messages[position]["role"] == "user":
            return position
    raise DataError(
        f"{row.where}: the row has no user message, whose place the teacher's context takes; add one, or remove "
        "teacher_args.context_template"
    )


def _in_conversation(prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """The row's conversation with ``text`` in place of the last user message, as the chat template writes it."""
    row = prompt.row
    messages = [dict(message) for message in row.messages or ({"role": "user", "content": row.prompt},)]
    messages[_last_user(row, messages)]["content"] = text
    context = render_chat(row.where, messages, tokenizer, kwargs)
    # The response follows both prompts, so what opens it must be the same; a chat template may look at the text.
    opening = response_opening(context, row.where, messages, tokenizer, kwargs)
    if not prompt.text.endswith(opening):
        raise DataError(
            f"{row.where}: the chat template opens the response with {opening!r} behind the teacher's context, and the "
            f"student's prompt ends with {prompt.text[-len(opening) :]!r}; change teacher_args.context_template"
        )
    return context
