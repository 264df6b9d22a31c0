"""Turns rows into the tokens that the student continues: chat template, tokenizer, and the limit on length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roll_opd.datasets.row import Row
from roll_opd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024
"""Texts handed to the tokenizer at once: enough for its speed, without a second copy of a large data set."""

_RESERVED = frozenset(
    {
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of ``apply_chat_template`` that are ours to set: they would cut, pad or reshape a prompt."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row, ready for the student."""

    row: Row
    token_ids: tuple[int, ...]
    """At least one token, and at most ``prompt_length``."""
    text: str
    """The text that was tokenised: the rendered template, or the bare prompt."""


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """What became of the rows: ``rows == used + dropped_overlong``. The caller logs it."""

    rows: int
    used: int
    dropped_overlong: int
    """Rows whose prompt is longer than ``prompt_length``; they are left out, never cut."""
    longest: int
    """Tokens of the longest prompt, dropped ones included."""

    def __post_init__(self) -> None:
        assert self.rows == self.used + self.dropped_overlong, f"prompt counts do not add up: {self}"

    @property
    def is_complete(self) -> bool:
        """Whether every row is used; the report of a set that is not complete is worth a warning."""
        return self.dropped_overlong == 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: {self.used} prompts used, {self.dropped_overlong} dropped as too long "
            f"(the longest has {self.longest} tokens)"
        )


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_length: int,
    apply_chat_template: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], PromptReport]:
    """Renders and tokenises every row, and leaves out prompts that are too long.

    With ``apply_chat_template`` the row's messages, or its bare prompt as one user message, go through the tokenizer's
    chat template with the generation prompt added. The template writes all special tokens itself, so the tokenizer
    adds none. Without it the bare prompt is tokenised as it stands, and the tokenizer adds the special tokens that it
    adds to any text (for many models a beginning-of-sequence token, for Qwen none).

    Args:
        rows: accepted rows.
        tokenizer: a Hugging Face tokenizer.
        prompt_length: the most tokens that a prompt may have, special tokens included.
        apply_chat_template: see above.
        chat_template_kwargs: what the template takes besides the messages, for example ``enable_thinking``.

    Returns:
        The prompts in the order of the rows, and the report of the counts.

    Raises:
        DataError: there is no chat template; a row that the template refuses, that has messages where bare prompts
            are wanted, or that gives no tokens; or all prompts are longer than ``prompt_length``.
        ValueError: ``prompt_length`` below 1, or an argument that is ours among ``chat_template_kwargs``.
    """
    if prompt_length < 1:
        raise ValueError(f"prompt_length must be at least 1, not {prompt_length}")
    kwargs = check_template_kwargs(chat_template_kwargs)
    if not rows:
        raise DataError("there are no rows to make prompts of")
    if apply_chat_template and not tokenizer.chat_template and "chat_template" not in kwargs:
        raise DataError(
            f"{rows[0].where}: the tokenizer of {tokenizer.name_or_path or 'the student'} has no chat template; "
            "set data_args.apply_chat_template: false to use bare prompts as they stand, or use a model with a template"
        )

    prompts: list[Prompt] = []
    longest = 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        # Rendering first and tokenising the text is what apply_chat_template(tokenize=True) does inside; this way the
        # text is at hand, and nothing depends on whether a transformers version returns a list or a dict there.
        texts = [
            render_chat(row.where, row.messages or ({"role": "user", "content": row.prompt},), tokenizer, kwargs)
            if apply_chat_template
            else _bare(row)
            for row in batch
        ]
        encoded = tokenize(texts, tokenizer, add_special_tokens=not apply_chat_template)
        for row, text, token_ids in zip(batch, texts, encoded, strict=True):
            if not token_ids:
                raise DataError(f"{row.where}: the prompt gives no tokens")
            longest = max(longest, len(token_ids))
            if len(token_ids) <= prompt_length:
                prompts.append(Prompt(row=row, token_ids=token_ids, text=text))

    report = PromptReport(rows=len(rows), used=len(prompts), dropped_overlong=len(rows) - len(prompts), longest=longest)
    if not prompts:
        raise DataError(
            f"{rows[0].file}: all {len(rows)} prompts are longer than prompt_length {prompt_length} (the longest has "
            f"{longest} tokens); raise prompt_length, or use shorter prompts"
        )
    return prompts, report


def check_template_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a chat template, as a copy.

    Raises:
        ValueError: one of them is ours to set.
    """
    kwargs = dict(kwargs or {})
    if reserved := sorted(_RESERVED & kwargs.keys()):
        raise ValueError(
            f"chat_template_kwargs: {', '.join(reserved)} cannot be set; only the template's variables can"
        )
    return kwargs


def render_chat(
    where: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as the chat template writes it, ending where the student begins.

    Args:
        where: the row or the environment that it belongs to, for the message.
        messages: the conversation.
        tokenizer: has the chat template.
        kwargs: see :func:`check_template_kwargs`.
        add_generation_prompt: false ends with the last message.

    Raises:
        DataError: the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError  # what templates fail with; only needed where one is used

    copies = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            copies, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
    except TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)
    return text


def response_opening(
    text: str,
    where: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
) -> str:
    """What the chat template writes behind the last message: the mark of the assistant's turn, perhaps a first word.

    Args:
        text: what :func:`render_chat` made of the conversation; the other arguments are those it was given.
    """
    without = render_chat(where, messages, tokenizer, kwargs, add_generation_prompt=False)
    return text.removeprefix(without) if text.startswith(without) else ""


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> list[tuple[int, ...]]:
    """The tokens of each text, all of them.

    Args:
        texts: rendered templates, which hold their special tokens already, or bare prompts.
        tokenizer: a Hugging Face tokenizer.
        add_special_tokens: add what the tokenizer adds to any text.
    """
    out: list[tuple[int, ...]] = []
    for start in range(0, len(texts), _BATCH):
        encoded = tokenizer(
            list(texts[start : start + _BATCH]),
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,  # its remark on the model's own maximum length, which is not what decides
        )
        out += [tuple(token_ids) for token_ids in encoded["input_ids"]]
    return out


def _bare(row: Row) -> str:
    """The row's bare prompt; messages cannot be used as they stand."""
    if row.messages is not None or row.prompt is None:
        raise DataError(
            f"{row.where}: the row has messages, which need a chat template; set data_args.apply_chat_template: true, "
            "or give the row a prompt and no messages"
        )
    return row.prompt
