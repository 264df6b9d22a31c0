"""Prompts: the template's tokens either way, and the limit on length."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from roll_opd.datasets.prompts import PromptReport, encode_prompts
from roll_opd.datasets.rows import Row, read_rows
from roll_opd.errors import DataError

REPO = Path(__file__).parents[3]
STUDENT = REPO / "examples" / "quickstart" / "models" / "student"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' and no_tools is defined %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ thinking }}{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, a <s> before any text that asks for special tokens, and ChatML marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<s>", "<|im_start|>", "<|im_end|>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


def row(index: int = 0, **fields) -> Row:
    given = {"id": str(index), "tag": "", "messages": None, "prompt": None, "ground_truth": None, "source": None}
    given |= {"difficulty": None, "test_cases": None, "hint": None, "file": "x.jsonl", "line": index + 1}
    return Row(index=index, **(given | fields))


def ids_of(output) -> list[int]:
    """What apply_chat_template(tokenize=True) returns is a dict in transformers 5, a list before."""
    return list(output if isinstance(output, list) else output["input_ids"])


def test_a_bare_prompt_by_hand():
    (prompt,), report = encode_prompts([row(prompt="hi")], byte_tokenizer(), prompt_length=100)
    assert prompt.text == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def spell(text):  # byte-level BPE writes the newline as Ċ
        return [letters[letter] for letter in text.replace("\n", "Ċ")]

    # One <s>, not two: the template has written it, so the tokenizer adds none.
    expected = [256, 257, *spell("user\nhi"), 258, *spell("\n"), 257, *spell("assistant\n")]
    assert list(prompt.token_ids) == expected
    # <s> + mark + "user\nhi" 7 + mark + "\n" + mark + "assistant\n" 10 = 22
    assert report == PromptReport(rows=1, used=1, dropped_overlong=0, longest=22)


@pytest.mark.parametrize("thinking", [None, "<think>"])
def test_equal_to_the_tokenizers_own_way_for_every_sample(thinking):
    tokenizer = byte_tokenizer()
    kwargs = {} if thinking is None else {"thinking": thinking}
    rows, _ = read_rows(sorted((REPO / "data").glob("*.jsonl")))
    prompts, report = encode_prompts(rows, tokenizer, prompt_length=10_000, chat_template_kwargs=kwargs)
    assert (report.rows, report.used) == (67, 67)
    for given, prompt in zip(rows, prompts, strict=True):
        messages = list(given.messages or [{"role": "user", "content": given.prompt}])
        for shape in ({}, {"return_dict": False}, {"return_dict": True}):
            direct = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs, **shape)
            assert list(prompt.token_ids) == ids_of(direct)
        assert prompt.row is given
        assert prompt.text.endswith("<|im_start|>assistant\n" + (thinking or ""))
        assert tokenizer.decode(prompt.token_ids) == prompt.text


@pytest.mark.skipif(not (STUDENT / "tokenizer_config.json").is_file(), reason="the quickstart's models are not made")
def test_equal_with_the_quickstart_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    rows = [row(0, messages=({"role": "user", "content": "4 2 7"},)), row(1, prompt="4 2 7")]
    prompts, _ = encode_prompts(rows, tokenizer, prompt_length=10_000)
    direct = tokenizer.apply_chat_template([{"role": "user", "content": "4 2 7"}], add_generation_prompt=True)
    assert list(prompts[0].token_ids) == list(prompts[1].token_ids) == ids_of(direct)


def test_messages_win_over_prompt():
    both = row(messages=({"role": "user", "content": "from messages"},), prompt="from prompt")
    (prompt,), _ = encode_prompts([both], byte_tokenizer(), prompt_length=100)
    assert "from messages" in prompt.text and "from prompt" not in prompt.text


def test_raw_prompts_get_the_tokenizers_own_special_tokens():
    tokenizer = byte_tokenizer(template=None)
    (prompt,), _ = encode_prompts([row(prompt="ab")], tokenizer, prompt_length=3, apply_chat_template=False)
    assert prompt.text == "ab"
    assert list(prompt.token_ids) == [256, *tokenizer("ab", add_special_tokens=False)["input_ids"]]
    assert len(prompt.token_ids) == 3


def test_raw_prompts_of_messages_are_refused():
    rows = [row(0, prompt="a"), row(1, messages=({"role": "user", "content": "b"},), prompt="b")]
    with pytest.raises(DataError, match=r"^x\.jsonl:2: the row has messages, which need a chat template"):
        encode_prompts(rows, byte_tokenizer(), prompt_length=100, apply_chat_template=False)


@pytest.mark.parametrize("template", [None, ""])
def test_no_chat_template(template):
    with pytest.raises(DataError, match=r"no chat template; set data_args\.apply_chat_template: false"):
        encode_prompts([row(prompt="a")], byte_tokenizer(template), prompt_length=100)
    given = {"chat_template": TEMPLATE}
    assert encode_prompts([row(prompt="a")], byte_tokenizer(template), prompt_length=100, chat_template_kwargs=given)


def test_a_row_that_the_template_refuses_is_named():
    rows = [row(0, prompt="a"), row(1, messages=({"role": "tool", "content": "b"},))]
    with pytest.raises(DataError, match=r"^x\.jsonl:2: .*template refuses this conversation: no tools here"):
        encode_prompts(rows, byte_tokenizer(), prompt_length=100, chat_template_kwargs={"no_tools": 1})


def test_overlong_prompts_are_dropped_and_counted_never_cut():
    # Every prompt has 20 tokens besides its text (22 for "hi", above).
    rows = [row(index, prompt="x" * size) for index, size in enumerate((5, 11, 10, 30, 1))]
    prompts, report = encode_prompts(rows, byte_tokenizer(), prompt_length=30)
    assert [(prompt.row.index, len(prompt.token_ids)) for prompt in prompts] == [(0, 25), (2, 30), (4, 21)]
    assert report == PromptReport(rows=5, used=3, dropped_overlong=2, longest=50)
    assert "2 dropped as too long" in str(report) and not report.is_complete


def test_all_overlong():
    rows = [row(0, prompt="xxx"), row(1, prompt="xxxx")]
    with pytest.raises(
        DataError, match=r"all 2 prompts are longer than prompt_length 22 \(the longest has 24 tokens\)"
    ):
        encode_prompts(rows, byte_tokenizer(), prompt_length=22)


def test_batches_keep_the_order(monkeypatch):
    rows = [row(index, prompt="x" * (index + 1)) for index in range(7)]
    whole, report = encode_prompts(rows, byte_tokenizer(), prompt_length=26)
    monkeypatch.setattr("roll_opd.datasets.prompts._BATCH", 3)
    assert encode_prompts(rows, byte_tokenizer(), prompt_length=26) == (whole, report)
    assert (report.used, report.dropped_overlong, report.longest) == (6, 1, 27)


def test_a_truncating_tokenizer_does_not_cut():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.model_max_length = 4
    (prompt,), _ = encode_prompts([row(prompt="hi")], tokenizer, prompt_length=100)
    assert len(prompt.token_ids) == 22


def test_a_prompt_without_tokens_is_named():
    given = {"chat_template": "{{ '' }}"}
    with pytest.raises(DataError, match=r"^x\.jsonl:1: the prompt gives no tokens"):
        encode_prompts([row(prompt="a")], byte_tokenizer(), prompt_length=100, chat_template_kwargs=given)


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "truncation", "return_dict"])
def test_our_own_arguments_cannot_be_set(name):
    with pytest.raises(ValueError, match=name):
        encode_prompts([row(prompt="a")], byte_tokenizer(), prompt_length=9, chat_template_kwargs={name: True})


def test_no_rows_and_no_length():
    with pytest.raises(DataError, match="no rows"):
        encode_prompts([], byte_tokenizer(), prompt_length=9)
    with pytest.raises(ValueError, match="prompt_length"):
        encode_prompts([row(prompt="a")], byte_tokenizer(), prompt_length=0)
