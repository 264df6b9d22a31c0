"""What the strategies need to know about the tokenizer, and the check that teacher and student share it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from roll_opd.configs.model_args import ModelArguments
from roll_opd.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """Facts about the student's tokenizer.

    Attributes:
        size: largest token id plus one; ids beyond are padding of the model's head.
        stop_ids: ids that end a response.
        decode: token ids to text, special tokens kept.
    """

    size: int
    stop_ids: tuple[int, ...]
    decode: Callable[[list[int]], str]


def load_tokenizer(args: ModelArguments, role: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        # Policy: refuse. The tokenizers library raises a bare Exception for a damaged file.
        where = "" if path and Path(path).exists() else " (no such folder here, and no cached or reachable hub model)"
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{role}.model_args.model_name_or_path: cannot load the tokenizer of {path!r}{where}: {reason}"
        ) from error
    if len(tokenizer.get_vocab()) < 2:
        # transformers makes up an empty one where a folder has no tokenizer files.
        raise ModelError(f"{role}.model_args.model_name_or_path: {path!r} holds no tokenizer")
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> Vocabulary:
    """Collect a tokenizer's facts; stop ids are its end-of-sequence token and those of the generation config."""
    stops: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        configured = GenerationConfig.from_pretrained(str(args.model_name_or_path)).eos_token_id
    except OSError:  # a model without generation_config.json: the tokenizer alone decides
        configured = None
    if configured is not None:
        stops += [configured] if isinstance(configured, int) else list(configured)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return Vocabulary(max(tokenizer.get_vocab().values()) + 1, tuple(sorted(set(stops))), decode)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int] | None:
    """Return the added token, and its id, with which the chat template closes an assistant's turn.

    None where there is no template, or where it closes a turn with ordinary text or with nothing.
    """
    if not tokenizer.chat_template:
        return None
    from jinja2.exceptions import TemplateError  # what templates fail with; only needed where one is used

    answer = "roll-opd-answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except TemplateError:  # it wants other conversations; what it makes of the data's is checked with the data
        return None
    _, found, after = text.rpartition(answer)
    if not found:
        return None
    added = tokenizer.added_tokens_decoder
    for token_id in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if token_id in added:
            return str(added[token_id].content), int(token_id)
    return None


def check_same_vocabulary(student: Any, teacher: Any, teacher_name: str) -> list[str]:
    """Compare two tokenizers; return warnings.

    Raises:
        ModelError: the token maps or the special ids differ; the message names the first token that does.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        by_id = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
        token, _ = by_id[0]
        raise ModelError(
            f"teacher {teacher_name!r} and student have different vocabularies: first difference is token {token!r}, "
            f"id {ours.get(token)} for the student ({len(ours)} tokens) and {theirs.get(token)} for the teacher "
            f"({len(theirs)} tokens). A teacher must share the student's tokenizer"
        )
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        a, b = getattr(student, name), getattr(teacher, name)
        if a != b:
            raise ModelError(
                f"teacher {teacher_name!r} and student disagree on {name}: {b} and {a}. A response that ends for one "
                f"of them goes on for the other; use the same (instruct or base) kind of checkpoint"
            )
    if getattr(student, "chat_template", None) != getattr(teacher, "chat_template", None):
        return [f"teacher {teacher_name!r} has another chat template; the student's is used for both"]
    return []
