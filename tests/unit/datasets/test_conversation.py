"""An episode's tokens: the student's own as they were sampled, and around them exactly what the template writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roll_opd.datasets.conversation import Conversation
from roll_opd.errors import DataError

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
END_OF_TURN = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>"}
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
ADDED = ("<think>", "</think>", "<tool_response>", "</tool_response>")
"""Tokens of their own, but not special: as in Qwen3, decoding never leaves them out."""
MERGES = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("u", "s"), ("us", "e"), ("use", "r"), ("Ġ", "a")]
DATE = {"llama3_1": {"date_string": "1 Jan"}}


def make_tokenizer(name: str, template: str | None = None, special: tuple = SPECIAL) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, so that a text has many spellings in tokens and only one of them is the tokenizer's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(left + right for left, right in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token if isinstance(token, AddedToken) else AddedToken(token) for token in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>" if name.startswith("llama") else None,
        eos_token=END_OF_TURN[name],
        chat_template=template or (TEMPLATES / f"{name}.jinja").read_text(),
    )


TOKENIZERS = {name: make_tokenizer(name) for name in END_OF_TURN}
BYTE = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
ENDOFTEXT = TOKENIZERS["chatml"].convert_tokens_to_ids("<|endoftext|>")


def spell(text: str) -> list[int]:
    """One token a byte: what the tokenizer itself would do only where nothing can be merged."""
    ((letters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [BYTE[letter] for letter in letters]


def talk(name: str, tokenizer: PreTrainedTokenizerFast | None = None, **options) -> Conversation:
    tokenizer = tokenizer or TOKENIZERS[name]
    stops = {tokenizer.eos_token_id, ENDOFTEXT}
    kwargs = DATE.get(name, {}) | options.pop("chat_template_kwargs", {})
    return Conversation(tokenizer, stop_ids=stops, chat_template_kwargs=kwargs, **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


def turn(name: str, text: str) -> list[int]:
    return [*spell(text), TOKENIZERS[name].eos_token_id]


def squeeze(text: str) -> str:
    return "".join(text.split())


def spans_of(conversation: Conversation) -> list[list[str]]:
    decode = conversation._tokenizer.decode
    return [[decode(s.token_ids[a:b]) for a, b in s.spans] for s in conversation.segments]


def test_chatml_by_hand():
    conversation = talk("chatml")
    conversation.start([user("hi")])
    start, end = (TOKENIZERS["chatml"].convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>"))
    user_token = TOKENIZERS["chatml"].convert_tokens_to_ids("user")
    assert user_token == 256 + MERGES.index(("use", "r"))
    prompt = [start, user_token, *spell("\nhi"), end, *spell("\n"), start, *spell("assistant\n")]
    assert list(conversation.prompt_ids) == prompt
    # The student spells "the" in three tokens; the tokenizer has one for it.
    assert conversation.sampled([*spell("the"), end]) == "the"
    # <|im_end|> was sampled, so the observation begins behind it.
    observation = [*spell("\n"), start, user_token, *spell("\nno"), end, *spell("\n"), start, *spell("assistant\n")]
    assert conversation.measure([user("no")]) == len(prompt) + 4 + len(observation)
    assert conversation.observe([user("no")]) is False
    assert list(conversation.prompt_ids) == [*prompt, *spell("the"), end, *observation]
    # Cut at its limit: the mark belongs to the observation, and is not the student's.
    assert conversation.sampled(spell("us")) == "us"
    assert conversation.observe([user("")]) is False
    (segment,) = conversation.segments
    first, second = len(prompt), len(prompt) + 4 + len(observation)
    assert segment.spans == ((first, first + 4), (second, second + 2))
    assert list(segment.token_ids) == [*prompt, *spell("the"), end, *observation, *spell("us")]
    assert (segment.first_turn, segment.opening) == (0, (user("hi"),))
    tail = [end, *spell("\n"), start, user_token, *spell("\n"), end, *spell("\n"), start, *spell("assistant\n")]
    assert list(conversation.prompt_ids) == [*segment.token_ids, *tail]
    assert [message["content"] for message in conversation.messages] == ["hi", "the", "no", "us", ""]


def test_qwen3_splits_where_thinking_is_removed():
    conversation = talk("qwen3")
    conversation.start([user("1+1")])
    think = "<think>\nhm\n</think>\n\n"
    assert conversation.sampled(turn("qwen3", f"{think}look up")) == f"{think}look up"
    # The answer of a tool is no new question: the thinking stays, and so does the segment.
    assert conversation.observe([tool("2"), tool("two")]) is False
    conversation.sampled(turn("qwen3", f"{think}2"))
    assert conversation.observe([user("sure?")]) is True
    conversation.sampled(turn("qwen3", f"{think}yes"))
    assert spans_of(conversation) == [
        [f"{think}look up<|im_end|>", f"{think}2<|im_end|>"], [f"{think}yes<|im_end|>"]
    ]  # fmt: skip
    first, second = conversation.segments
    decode = TOKENIZERS["qwen3"].decode
    assert decode(first.token_ids) == (
        f"<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n{think}look up<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{think}2<|im_end|>"
    )
    assert decode(second.token_ids[: second.spans[0][0]]) == (
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\nlook up<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.first_turn, second.first_turn) == (0, 2)
    assert [message["role"] for message in second.opening] == ["user", "assistant", "tool", "tool", "assistant", "user"]


@pytest.mark.parametrize("observation", [user, tool])
@pytest.mark.parametrize(
    ("text", "kwargs", "splits"),
    [
        # Thinking is removed in front of a user's message, and kept in front of a tool's.
        ("<think>\nhm\n</think>\n\nup", {}, {user: True, tool: False}),
        # Without thinking there is nothing to remove.
        ("up", {}, {user: False, tool: False}),
        ("up", {"enable_thinking": True}, {user: False, tool: False}),
        # Cut while it thinks: the template does not see that as thinking, and keeps it.
        ("<think>\nhm", {}, {user: False, tool: False}),
        # The empty thinking of the prompt is never in the history.
        ("up", {"enable_thinking": False}, {user: True, tool: True}),
    ],
)
def test_when_qwen3_splits(observation, text, kwargs, splits):
    split, keep = (talk("qwen3", chat_template_kwargs=kwargs, on_rewrite=mode) for mode in ("split", "keep"))
    for index in range(3):
        for conversation in (split, keep):
            if not index:
                conversation.start([user("q")])
            conversation.sampled(turn("qwen3", text))
            assert conversation.observe([observation("o")]) is (splits[observation] and conversation is split)
    assert len(split.segments) == (3 if splits[observation] else 1)
    assert len(keep.segments) == 1 and len(keep.segments[0].spans) == 3
    opener = "<think>\n\n</think>\n\n" if kwargs.get("enable_thinking") is False else ""
    asked = "<|im_start|>user\no<|im_end|>\n" if observation is user else (
        "<|im_start|>user\n<tool_response>\no\n</tool_response><|im_end|>\n"
    )  # fmt: skip
    turns = [f"<|im_start|>assistant\n{opener}{text}<|im_end|>"] * 3
    assert TOKENIZERS["qwen3"].decode(keep.segments[0].token_ids) == (
        "<|im_start|>user\nq<|im_end|>\n" + f"\n{asked}".join(turns)
    )


def test_llama3_trims_and_that_is_no_reason_to_split():
    conversation = talk("llama3")
    conversation.start([{"role": "system", "content": " s "}, user("q\n")])
    assert conversation.sampled(turn("llama3", "  a \n")) == "  a \n"
    assert conversation.observe([user(" o ")]) is False
    assert TOKENIZERS["llama3"].decode(conversation.prompt_ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "  a \n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\no<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert spans_of(conversation) == [["  a \n<|eot_id|>"]]


def test_llama3_1_splits_at_midnight():
    date = ["1 Jan"]
    tokenizer = TOKENIZERS["llama3_1"]
    conversation = Conversation(
        tokenizer, stop_ids=[tokenizer.eos_token_id], chat_template_kwargs={"strftime_now": lambda _: date[0]}
    )
    conversation.start([user("q")])
    conversation.sampled(turn("llama3_1", "a"))
    assert conversation.observe([tool('"é"')]) is False
    before = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nDate: 1 Jan\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        'a<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n{"output": "\\"é\\""}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(conversation.prompt_ids) == before
    conversation.sampled(turn("llama3_1", "b"))
    length = conversation.measure([user("o")])
    date[0] = "20 Jan"
    # What was measured is what comes, even when midnight lies between the two.
    assert conversation.observe([user("o")]) is False and len(conversation.prompt_ids) == length
    conversation.sampled(turn("llama3_1", "c"))
    assert conversation.observe([user("o")]) is True
    assert tokenizer.decode(conversation.prompt_ids).startswith(before.replace("1 Jan", "20 Jan")[:-2])


def test_steps_stand_alone():
    conversation = talk("chatml")
    for index in range(3):
        conversation.start([user(f"state {index}")])
        conversation.sampled(turn("chatml", f"move {index}"))
    conversation.start([user("not answered")])
    conversation.start([user("not answered either")])
    assert [(s.first_turn, s.opening, len(s.spans)) for s in conversation.segments] == [
        (index, (user(f"state {index}"),), 1) for index in range(3)
    ]
    assert conversation.messages == [user("not answered either")]


def test_a_summary_begins_a_segment_that_goes_on():
    conversation = talk("chatml")
    conversation.start([user("q")])
    conversation.sampled(turn("chatml", "a"))
    conversation.observe([user("o")])
    conversation.sampled(turn("chatml", "b"))
    conversation.start([user("q"), {"role": "assistant", "content": "in short"}, user("go on")])
    conversation.sampled(turn("chatml", "c"))
    assert conversation.observe([user("o")]) is False
    conversation.sampled(turn("chatml", "d"))
    assert spans_of(conversation) == [["a<|im_end|>", "b<|im_end|>"], ["c<|im_end|>", "d<|im_end|>"]]
    assert [segment.first_turn for segment in conversation.segments] == [0, 2]
    roles = ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in conversation.messages] == roles


def test_the_environment_sees_no_special_tokens_and_the_template_does():
    conversation = talk("chatml")
    start = TOKENIZERS["chatml"].convert_tokens_to_ids("<|im_start|>")
    conversation.start([user("q")])
    assert conversation.sampled([*spell("a "), start, *spell("b"), ENDOFTEXT]) == "a b"
    assert conversation.observe([user("o")]) is False
    # Another stop token than the template's: the template's own mark follows.
    assert (
        TOKENIZERS["chatml"]
        .decode(conversation.prompt_ids)
        .endswith("a <|im_start|>b<|endoftext|><|im_end|>\n<|im_start|>user\no<|im_end|>\n<|im_start|>assistant\n")
    )
    assert conversation.messages[1]["content"] == "a <|im_start|>b"


def test_the_context_of_a_privileged_teacher():
    conversation = talk("qwen3")
    conversation.start([{"role": "system", "content": "s"}, user("q")])
    conversation.sampled(turn("qwen3", "<think>hm</think>a"))
    conversation.observe([user("o")])
    conversation.sampled(turn("qwen3", "b"))
    first, second = (TOKENIZERS["qwen3"].decode(conversation.opening_with(i, "q, and the answer is a")) for i in (0, 1))
    opening = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq, and the answer is a<|im_end|>\n"
    assert first == f"{opening}<|im_start|>assistant\n"
    assert second == f"{opening}<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\no<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )
    for index, segment in enumerate(conversation.segments):
        assert conversation.opening_with(index, "q") == segment.token_ids[: segment.spans[0][0]]


def test_a_context_that_opens_the_turn_otherwise_is_refused():
    template = (TEMPLATES / "chatml.jinja").read_text() + (
        "{%- if add_generation_prompt and '/no_think' in messages[-1].content -%}{{- '<think></think>' -}}{%- endif -%}"
    )
    conversation = talk("chatml", make_tokenizer("chatml", template), where="custom_envs.maze")
    conversation.start([user("q")])
    conversation.sampled(turn("chatml", "a"))
    with pytest.raises(DataError, match=r"^custom_envs\.maze: the chat template opens the student's turn with .*think"):
        conversation.opening_with(0, "q /no_think")
    conversation.start([{"role": "system", "content": "no question"}])
    conversation.sampled(turn("chatml", "a"))
    with pytest.raises(DataError, match="no user message"):
        conversation.opening_with(1, "text")


@pytest.mark.parametrize(
    ("before", "end", "behind", "expected"),
    [
        # A blank in front of the mark, as in Llama 2: the student did not write it.
        (" ", "<|im_end|>", "", ">q <|im_end|>>a<|im_end|>>o <|im_end|>>"),
        # A mark that swallows the white space behind it, as in Phi-3: no token stands for the line end.
        ("", AddedToken("<|im_end|>", rstrip=True), "\n", ">q<|im_end|>>a<|im_end|>>o<|im_end|>>"),
        # No mark: the stop token is the student's alone.
        ("", "<|im_end|>", None, ">q\n>a<|im_end|>\n>o\n>"),
    ],
    ids=["blank-before", "swallows-behind", "no-mark"],
)
def test_marks_that_are_written_with_white_space(before, end, behind, expected):
    template = (
        "{%- for m in messages -%}{{- '>' ~ m.content ~ "
        + repr("\n" if behind is None else f"{before}<|im_end|>{behind}")
    ) + " -}}{%- endfor -%}{%- if add_generation_prompt -%}>{%- endif -%}"
    tokenizer = make_tokenizer("chatml", template, tuple(end if text == "<|im_end|>" else text for text in SPECIAL))
    conversation = talk("chatml", tokenizer)
    conversation.start([user("q")])
    conversation.sampled([*spell("a"), tokenizer.eos_token_id])
    assert conversation.observe([user("o")]) is False
    assert tokenizer.decode(conversation.prompt_ids) == expected


def test_what_the_prompt_opened_belongs_to_the_turn():
    # The history is written as it is given, so the <think> that the prompt wrote must be given with it.
    template = (TEMPLATES / "chatml.jinja").read_text().replace("assistant\\n'", "assistant\\n<think>\\n'")
    conversation = talk("chatml", make_tokenizer("chatml", template))
    conversation.start([user("q")])
    assert conversation.sampled(turn("chatml", "hm</think>a")) == "hm</think>a"
    assert conversation.observe([user("o")]) is False
    conversation.sampled(turn("chatml", "b"))
    assert conversation.observe([user("p")]) is False
    assert conversation._tokenizer.decode(conversation.prompt_ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nhm</think>a<|im_end|>\n<|im_start|>user\no<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nb<|im_end|>\n<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert [m["content"] for m in conversation.messages] == ["q", "<think>\nhm</think>a", "o", "<think>\nb", "p"]


def test_a_template_that_drops_unfinished_thinking_still_goes_on():
    template = (
        (TEMPLATES / "chatml.jinja").read_text().replace("message.content ~", "message.content.split('<think>')[0] ~")
    )
    conversation = talk("chatml", make_tokenizer("chatml", template))
    conversation.start([user("q")])
    conversation.sampled(spell("a<think>b"))
    assert conversation.observe([user("o")]) is True
    keep = talk("chatml", make_tokenizer("chatml", template), on_rewrite="keep")
    keep.start([user("q")])
    keep.sampled(spell("a<think>b"))
    assert keep.observe([user("o")]) is False
    assert keep._tokenizer.decode(keep.prompt_ids).endswith(
        "a<think>b<|im_end|>\n<|im_start|>user\no<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_template_refuses():
    template = (
        "{% for m in messages %}{% if m.role in ('system', 'tool') %}{{ raise_exception('no ' ~ m.role ~ ' role') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    conversation = talk("chatml", make_tokenizer("chatml", template), where="custom_envs.maze")
    with pytest.raises(
        DataError, match=r"^custom_envs\.maze: .*no system role \(its roles: system, user\).*agent_system"
    ):
        conversation.start([{"role": "system", "content": "s"}, user("q")])
    conversation.start([user("q")])
    conversation.sampled(spell("a"))
    for call in (conversation.measure, conversation.observe):
        with pytest.raises(DataError, match=r"no tool role \(its roles: user, assistant, tool\)"):
            call([tool("o")])
    assert conversation.observe([user("o")]) is False  # the refused messages have left nothing behind
    silent = talk(
        "chatml", make_tokenizer("chatml", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    )
    silent.start([user("q")])
    silent.sampled(spell("a"))
    with pytest.raises(DataError, match="leaves out messages of the role 'tool'"):
        silent.observe([tool("o")])
    with pytest.raises(DataError, match="leaves out messages of the role 'assistant'"):
        silent.observe([user("o")])
    with pytest.raises(DataError, match="leaves out messages of the role 'system'"):
        silent.start([{"role": "system", "content": "s"}, user("q")])
    with pytest.raises(DataError, match="makes no tokens"):
        silent.start([user("")])
    bare = make_tokenizer("chatml")
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        talk("chatml", bare)
    with pytest.raises(ValueError, match="add_generation_prompt cannot be set"):
        talk("chatml", chat_template_kwargs={"add_generation_prompt": False})


PIECES = (
    "the user", " a", "\n\n", "\n", "  ", "\t", "é", "漢字", "🙂", "</think>", "<think>", "<tool_response>",
    "</tool_response>", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>", "{{ x }}", "EndOfTurn", "\u00a0", "",
)  # fmt: skip


def random_turn(rng: random.Random, name: str) -> list[int]:
    """Thinking or none, special-looking text, any spelling; ended by either stop token, or cut, even in a letter."""
    text = "".join(rng.choices(PIECES, k=rng.randint(0, 6)))
    if rng.random() < 0.4:
        text = f"<think>\n{text}\n</think>\n\n{''.join(rng.choices(PIECES[:9], k=2))}"
    tokenizer, ids = TOKENIZERS[name], []
    while text:
        chunk, text = text[: (size := rng.randint(1, 9))], text[size:]
        ids += spell(chunk) if rng.random() < 0.5 else tokenizer(chunk, add_special_tokens=False)["input_ids"]
    ids = [token_id for token_id in ids if token_id not in (tokenizer.eos_token_id, ENDOFTEXT)]
    end = rng.choice([[tokenizer.eos_token_id], [tokenizer.eos_token_id], [ENDOFTEXT], []])
    return ids[: rng.randint(1, len(ids) or 1)] + end or spell("x")


@pytest.mark.parametrize("mode", ["split", "keep"])
@pytest.mark.parametrize("name", sorted(END_OF_TURN))
def test_random_episodes(name, mode):
    rng = random.Random(f"{name} {mode}")
    tokenizer = TOKENIZERS[name]
    splits = 0
    for _ in range(30):
        kwargs = rng.choice([{}, {}, {"enable_thinking": False}]) if name == "qwen3" else {}
        conversation = talk(name, on_rewrite=mode, chat_template_kwargs=kwargs)
        kwargs = kwargs | DATE.get(name, {})

        def rendered(messages, kwargs=kwargs):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)

        # As the test sees them: a stop token that is not the template's is text of its turn.
        messages = [{"role": "system", "content": " s\n"}][: rng.randint(0, 1)] + [
            user("".join(rng.choices(PIECES, k=3)))
        ]
        conversation.start(messages)
        assert list(conversation.prompt_ids) == tokenizer(rendered(messages), add_special_tokens=False)["input_ids"]
        segments: list[tuple[list[int], list[tuple[int, int]]]] = [(list(conversation.prompt_ids), [])]
        turns = []
        for _ in range(rng.randint(1, 5)):
            turns.append(random_turn(rng, name))
            ids, spans = segments[-1]
            assert list(conversation.prompt_ids) == ids
            text = conversation.sampled(turns[-1])
            spans.append((len(ids), len(ids) + len(turns[-1])))
            ids += turns[-1]
            stopped = turns[-1][-1] in (tokenizer.eos_token_id, ENDOFTEXT)
            assert text == tokenizer.decode(turns[-1][:-1] if stopped else turns[-1], skip_special_tokens=True)
            own = turns[-1][:-1] if turns[-1][-1] == tokenizer.eos_token_id else turns[-1]
            messages.append({"role": "assistant", "content": tokenizer.decode(own)})
            back = [rng.choice([user, tool])("".join(rng.choices(PIECES, k=3))) for _ in range(rng.randint(1, 2))]
            messages += back
            conversation.measure([user("what would have come back otherwise")])
            length = conversation.measure(back)
            assert length == conversation.measure(back) and list(conversation.prompt_ids) == ids
            whole = squeeze(rendered(messages))
            continues = whole.startswith(squeeze(tokenizer.decode(ids)))
            if rng.random() < 0.5:
                conversation.measure([user("")])
            assert conversation.observe(back) is (mode == "split" and not continues)
            prompt = list(conversation.prompt_ids)
            assert len(prompt) == length
            if continues:
                assert squeeze(tokenizer.decode(prompt)) == whole
            if continues or mode == "keep":
                bridge = prompt[len(ids) :]
                assert prompt[: len(ids)] == ids and whole.endswith(squeeze(tokenizer.decode(bridge)))
                ids += bridge
            else:
                splits += 1
                segments.append((prompt, []))
                # The new prompt is the template's alone, and knows no other stop token.
                messages = [{**m, "content": m["content"].removesuffix("<|endoftext|>")} for m in messages]
                assert messages == conversation.messages
                assert prompt == tokenizer(rendered(messages), add_special_tokens=False)["input_ids"]
        expected = [(tuple(ids[: spans[-1][1]]), tuple(spans)) for ids, spans in segments if spans]
        assert [(segment.token_ids, segment.spans) for segment in conversation.segments] == expected
        sampled = [list(s.token_ids[a:b]) for s in conversation.segments for a, b in s.spans]
        assert sampled == turns
        counted = [len(spans) for _, spans in expected]
        assert [segment.first_turn for segment in conversation.segments] == [
            sum(counted[:k]) for k in range(len(counted))
        ]
    assert (splits > 0) is (name == "qwen3" and mode == "split")
