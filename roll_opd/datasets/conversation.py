"""The tokens of an episode: what the student sampled, as it sampled it, and what stands around it.

A turn's tokens are never decoded and encoded again: the student is trained on exactly what it produced, behind exactly
what it saw. Around them stands what the chat template writes. A *bridge* is the text between the end of one turn and
the begin of the next (end-of-turn mark, the environment's messages, generation prompt)::

    prompt            turn 0       bridge             turn 1       bridge
    [system user >>]  [sampled]    [<end> user >>]    [sampled]    [<end> tool >>]  ...

Some templates write earlier turns otherwise than the student saw them: they leave out their thinking, or the empty
thinking that the generation prompt opened them with. What the student would see next is then not what it has seen,
continued. ``on_rewrite="split"`` ends the segment there and begins a new one, whose prompt is the conversation as the
template now writes it; ``"keep"`` puts the bridge behind the tokens all the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from roll_opd.datasets.prompts import check_template_kwargs, render_chat, response_opening, tokenize
from roll_opd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""``role`` (``system``, ``user``, ``assistant``, ``tool``) and ``content``."""

_MARK = f"EndOfTurn{secrets.token_hex(16)}"
"""Marks the end of a turn in a rendering. Drawn anew in each process, so that no text of an environment can hold it."""


_ROLES_ADVICE = (
    "A template without a system role needs agent_system_template: null, and one without a tool role cannot show the "
    "answers of tools; or use a model whose template has these roles"
)


@dataclass(frozen=True)
class Segment:
    """A part of an episode that is one token sequence.

    Attributes:
        token_ids: prompt, sampled turns and bridges: exactly what the student saw and produced. Ends with the last
            sampled token.
        spans: ``[start, end)`` of each sampled turn in ``token_ids``, in order; at least one.
        first_turn: which turn of the episode ``spans[0]`` is, from 0.
        opening: messages of the segment's prompt, which is ``token_ids[: spans[0][0]]``.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    first_turn: int
    opening: tuple[Message, ...]


@dataclass
class _Draft:
    """A segment that may still grow."""

    token_ids: list[int]
    first_turn: int
    opening: tuple[Message, ...]
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Continuation:
    """What follows a turn: a bridge, or the prompt of a new segment."""

    token_ids: tuple[int, ...]
    text: str
    begins_segment: bool
    turn: dict[str, str]
    """The student's turn, as it stands in the history from now on."""


class Conversation:
    """One episode between a student and its environment.

    Calls alternate: :meth:`start`, then :meth:`sampled` and :meth:`observe` in turns; :meth:`start` may stand in place
    of an :meth:`observe`, too. ``assert`` guards the order.

    Args:
        tokenizer: the student's, with a chat template.
        stop_ids: tokens that end a turn when they are sampled (end-of-sequence tokens and their like).
        on_rewrite: what to do when the template rewrites earlier turns, see the module.
        chat_template_kwargs: what the template takes besides the messages, for example ``enable_thinking``.
        where: the setting that the conversation stems from (``custom_envs.<tag>``), for messages of errors.

    Raises:
        DataError: the tokenizer has no chat template.
        ValueError: an argument that is ours among ``chat_template_kwargs``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int],
        on_rewrite: Literal["split", "keep"] = "split",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        where: str = "custom_envs",
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._splits = on_rewrite == "split"
        self._kwargs = check_template_kwargs(chat_template_kwargs)
        self._where = where
        if not tokenizer.chat_template and "chat_template" not in self._kwargs:
            raise DataError(
                f"{where}: the tokenizer of {tokenizer.name_or_path or 'the student'} has no chat template, which "
                "conversations need; use a model with a template"
            )
        self._messages: list[dict[str, str]] = []
        self._drafts: list[_Draft] = []
        self._turns = 0
        self._seen = ""
        """The current segment as the template has written it, without white space."""
        self._ahead = ""
        """What the template wrote last: the text that the student's turn follows."""
        self._student_is_next = False
        self._written_roles: set[str] = set()
        self._foreseen: tuple[list[dict[str, str]], _Continuation] | None = None
        """The last continuation that was worked out, with the messages that it is for."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that the student continues now; at least one."""
        return tuple(self._drafts[-1].token_ids)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation since the last :meth:`start`, as the student sees it; a copy.

        Turns of the student hold everything it wrote but the token that ended the turn.
        """
        return [dict(message) for message in self._messages]

    @property
    def segments(self) -> list[Segment]:
        """The segments in which the student took a turn, in order; the last one may still grow."""
        return [
            Segment(tuple(draft.token_ids[: draft.spans[-1][1]]), tuple(draft.spans), draft.first_turn, draft.opening)
            for draft in self._drafts
            if draft.spans
        ]

    def start(self, messages: Sequence[Message]) -> None:
        """Begins a segment with a prompt of its own: the first, or a further one that stands on nothing earlier.

        Raises:
            DataError: the template refuses the messages, leaves one out, or makes no tokens of them.
        """
        opening = [dict(message) for message in messages]
        self._check_roles([], opening)
        text = self._render(opening)
        token_ids = self._tokenize(text)
        self._messages = opening
        self._begin_segment(text, token_ids)

    def sampled(self, token_ids: Sequence[int]) -> str:
        """Takes the student's turn.

        Args:
            token_ids: what was sampled behind :attr:`prompt_ids`, the stop token included where there is one.

        Returns:
            The turn's text for the environment: without the stop token, and without other special tokens.
        """
        assert self._student_is_next, "the student's turn was taken already, or the conversation has not begun"
        ids = [int(token_id) for token_id in token_ids]
        assert ids, "the student's turn has no tokens"
        draft = self._drafts[-1]
        start = len(draft.token_ids)
        draft.token_ids += ids
        draft.spans.append((start, start + len(ids)))
        self._turns += 1
        self._student_is_next = False
        content = ids[:-1] if ids[-1] in self._stop_ids else ids
        # For the template the turn is everything that the student wrote: a special token in its middle is part of what
        # it has seen. The environment is spared them.
        self._messages.append({"role": "assistant", "content": self._decode(content, skip_special_tokens=False)})
        self._seen += _squeeze(self._messages[-1]["content"])
        return self._decode(content, skip_special_tokens=True)

    def observe(self, messages: Sequence[Message]) -> bool:
        """Takes what came back for the student's turn.

        Returns:
            Whether a new segment had to begin, because the template rewrote earlier turns.

        Raises:
            DataError: the template refuses the messages, or leaves one or the student's turn out.
        """
        continuation = self._continuation(messages)
        self._messages[-1] = continuation.turn
        self._messages += [dict(message) for message in messages]
        if continuation.begins_segment:
            self._begin_segment(continuation.text, continuation.token_ids)
        else:
            self._drafts[-1].token_ids += continuation.token_ids
            self._seen += _squeeze(continuation.text)
            self._hand_over(continuation.text)
        return continuation.begins_segment

    def measure(self, messages: Sequence[Message]) -> int:
        """Returns how many tokens :attr:`prompt_ids` would have after ``observe(messages)``, which raises alike."""
        continuation = self._continuation(messages)
        return len(continuation.token_ids) + (0 if continuation.begins_segment else len(self._drafts[-1].token_ids))

    def opening_with(self, segment: int, text: str) -> tuple[int, ...]:
        """Returns a segment's prompt with ``text`` in place of its first user message: what a privileged teacher sees.

        Args:
            segment: index into :attr:`segments`.
            text: the message's new content.

        Raises:
            DataError: there is no user message, the template refuses the messages, or it opens the student's turn
                otherwise than in the segment's own prompt.
        """
        opening = [draft for draft in self._drafts if draft.spans][segment].opening
        messages = [dict(message) for message in opening]
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is None:
            raise DataError(
                f"{self._where}: the conversation has no user message, whose place the teacher's context takes; "
                "change agent_template, or remove teacher_args.context_template"
            )
        user["content"] = text
        context = self._render(messages)
        # The same tokens follow both prompts, so what opens the turn must be the same.
        begin = response_opening(context, self._where, messages, self._tokenizer, self._kwargs)
        own = self._render(opening)
        if not own.endswith(begin):
            raise DataError(
                f"{self._where}: the chat template opens the student's turn with {begin!r} behind the teacher's "
                f"context, and the student's prompt ends with {own[-len(begin) :]!r}; change "
                "teacher_args.context_template"
            )
        return self._tokenize(context)

    def _begin_segment(self, text: str, token_ids: tuple[int, ...]) -> None:
        opening = tuple(dict(message) for message in self._messages)
        self._drafts.append(_Draft(list(token_ids), self._turns, opening))
        self._seen = _squeeze(text)
        self._hand_over(text)

    def _hand_over(self, ahead: str) -> None:
        self._ahead = ahead
        self._student_is_next = True
        self._foreseen = None

    def _continuation(self, messages: Sequence[Message]) -> _Continuation:
        """What ``observe(messages)`` has to put behind the student's turn."""
        assert self._drafts and not self._student_is_next, "it is the student's turn"
        assert messages, "nothing came back"
        following = [dict(message) for message in messages]
        # Usually the caller measures first: the work is done once, and both calls speak of the same tokens even when
        # the template writes the time of day.
        if self._foreseen is None or self._foreseen[0] != following:
            self._foreseen = following, self._work_out(following)
        return self._foreseen[1]

    def _work_out(self, following: list[dict[str, str]]) -> _Continuation:
        self._check_roles(self._messages, following)
        bridge = self._bridge(following)
        turn = self._messages[-1]
        if self._splits:
            whole = self._render([*self._messages, *following])
            expected = self._seen + _squeeze(bridge)
            # Templates trim what they write, which is no reason to split: white space does not count.
            if _squeeze(whole) != expected:
                opened = {**turn, "content": self._opening_lacked(_squeeze(whole), expected) + turn["content"]}
                if opened == turn or _squeeze(self._render([*self._messages[:-1], opened, *following])) != expected:
                    return _Continuation(self._tokenize(whole), whole, begins_segment=True, turn=turn)
                turn = opened
        return _Continuation(
            self._without_sampled_stop(self._tokenize(bridge)), bridge, begins_segment=False, turn=turn
        )

    def _opening_lacked(self, whole: str, expected: str) -> str:
        """What the generation prompt opened the student's turn with, if that is all that the history lacks; else "".

        It is a ``<think>``, say, that the template does not write for earlier turns, but expects in their content.
        """
        missing = len(expected) - len(whole)
        begin = len(self._seen) - len(_squeeze(self._messages[-1]["content"]))
        if not 0 < missing <= begin or whole != expected[: begin - missing] + expected[begin:]:
            return ""
        start = len(self._ahead)
        while missing and start:
            start -= 1
            missing -= not self._ahead[start].isspace()
        return self._ahead[start:]

    def _bridge(self, following: list[dict[str, str]]) -> str:
        """What the template writes between the content of the student's turn and the next one."""
        # The mark goes behind the content, so that a template which looks for thinking in it takes the same branch. A
        # template that drops the tail of such a turn (thinking without an end) is asked again with the mark alone.
        *before, turn = self._messages
        for content in (turn["content"] + _MARK, _MARK):
            text = self._render([*before, {**turn, "content": content}, *following])
            _, mark, bridge = text.rpartition(_MARK)
            if mark:
                return bridge
        raise self._left_out("assistant")

    def _check_roles(self, before: list[dict[str, str]], messages: list[dict[str, str]]) -> None:
        """Refuses a template that silently writes nothing for a role: the student would never see those messages."""
        for index, message in enumerate(messages):
            if message["role"] not in self._written_roles:
                marked = [*messages[:index], {**message, "content": _MARK}, *messages[index + 1 :]]
                if _MARK not in self._render([*before, *marked]):
                    raise self._left_out(message["role"])
                self._written_roles.add(message["role"])

    def _left_out(self, role: str) -> DataError:
        return DataError(
            f"{self._where}: the tokenizer's chat template leaves out messages of the role {role!r}. {_ROLES_ADVICE}"
        )

    def _without_sampled_stop(self, bridge: tuple[int, ...]) -> tuple[int, ...]:
        """The bridge without the end-of-turn token that it begins with, if that is what the student sampled last."""
        last = self._drafts[-1].token_ids[-1]
        if last in self._stop_ids:
            for position, token_id in enumerate(bridge):
                if token_id == last:
                    return bridge[position + 1 :]
                if self._decode([token_id], skip_special_tokens=False).strip():
                    break  # only white space may stand before it (some templates set a blank there)
        return bridge

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return render_chat(self._where, messages, self._tokenizer, self._kwargs)
        except DataError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"{error} (its roles: {roles}). {_ROLES_ADVICE}") from error

    def _tokenize(self, text: str) -> tuple[int, ...]:
        (token_ids,) = tokenize([text], self._tokenizer, add_special_tokens=False)
        if not token_ids:
            raise DataError(f"{self._where}: the tokenizer's chat template makes no tokens of this conversation")
        return token_ids

    def _decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())
