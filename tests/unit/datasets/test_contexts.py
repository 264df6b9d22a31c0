"""The teacher's own prompts: the row's fields in the last user message, and the same opening of the response."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from roll_opd.datasets.contexts import check_context_template, encode_contexts
from roll_opd.datasets.prompts import encode_prompts
from roll_opd.datasets.row import Row
from roll_opd.errors import ConfigError, DataError

REPO = Path(__file__).parents[3]
STUDENT = REPO / "examples" / "quickstart" / "models" / "student"
HINTED = "{{ prompt }} > {{ ground_truth }}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT)


def row(index: int = 0, **fields) -> Row:
    given = {"id": str(index), "tag": "", "messages": None, "prompt": None, "ground_truth": None, "source": None}
    given |= {"difficulty": None, "test_cases": None, "hint": None, "file": "x.jsonl", "line": index + 1}
    return Row(index=index, **(given | fields))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompts_of(rows, tokenizer, **kwargs):
    return encode_prompts(rows, tokenizer, prompt_length=10_000, **kwargs)[0]


def contexts_of(rows, template, tokenizer, **kwargs):
    kwargs.setdefault("max_length", 10_000)
    return encode_contexts(prompts_of(rows, tokenizer), template, tokenizer, **kwargs)


def chat(tokenizer, *messages) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_context_is_the_student_prompt_of_the_rendered_text(tokenizer):
    given = row(prompt="4 2 7", ground_truth="7 2 4")
    (context,) = contexts_of([given], HINTED, tokenizer)
    assert list(context) == chat(tokenizer, user("4 2 7 > 7 2 4"))
    assert tokenizer.decode(context) == "<|im_start|>user\n4 2 7 > 7 2 4<|im_end|>\n<|im_start|>assistant\n"


def test_only_the_last_user_message_is_replaced(tokenizer):
    system, first, said = {"role": "system", "content": "s"}, user("1"), {"role": "assistant", "content": "2"}
    tool = {"role": "tool", "content": "9"}
    given = row(messages=(system, first, said, user("3"), tool), ground_truth="5")
    (context,) = contexts_of([given], HINTED, tokenizer)
    assert list(context) == chat(tokenizer, system, first, said, user("3 > 5"), tool)
    assert given.messages is not None and given.messages[3] == user("3")  # the row itself is left as it was


def test_a_template_of_nothing_but_the_prompt_gives_the_student_prompt(tokenizer):
    rows = [row(0, prompt="4 2 7"), row(1, messages=({"role": "system", "content": "s"}, user("1 2")))]
    prompts = prompts_of(rows, tokenizer)
    assert encode_contexts(prompts, "{{ prompt }}", tokenizer, max_length=99) == [p.token_ids for p in prompts]


def test_all_fields_of_the_row(tokenizer):
    template = "{{ id }}{{ tag }}{{ ground_truth }}{{ hint[0] }}{{ test_cases[0].input }}{{ level + 1 }}"
    template += (
        "{{ messages[-1].content }}{{ source is defined }}{{ prompt }}{% if difficulty is defined %}!{% endif %}\n"
    )
    given = row(3, prompt="9", tag="2", ground_truth="4", hint=["5"], test_cases=[{"input": "6"}], extra={"level": 7})
    (context,) = contexts_of([given], template, tokenizer)
    assert list(context) == chat(tokenizer, user("3245689False9\n"))


def test_columns_of_the_file_do_not_hide_ours(tokenizer):
    given = row(prompt="1", ground_truth="2", extra={"prompt": "8", "ground_truth": "9", "messages": "7"})
    (context,) = contexts_of([given], "{{ prompt }}{{ ground_truth }}{{ messages | length }}", tokenizer)
    assert list(context) == chat(tokenizer, user("121"))


def test_the_response_is_the_same_tokens_behind_both_prompts(tokenizer):
    """The engine tokenises nothing: it appends sampled tokens to the prompt's. Both prompts must open them alike."""
    rows = [
        row(index, prompt=prompt, ground_truth=truth)
        for index, (prompt, truth) in enumerate([("4 2 7", "7 2 4"), ("1", "1"), ("0 0", "\n"), ("a", "é")])
    ]
    prompts = prompts_of(rows, tokenizer)
    contexts = encode_contexts(prompts, HINTED, tokenizer, max_length=999)
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    response = tokenizer("7 2 4<|im_end|>", add_special_tokens=False)["input_ids"]
    for prompt, context in zip(prompts, contexts, strict=True):
        assert list(prompt.token_ids[-len(opening) :]) == list(context[-len(opening) :]) == opening
        assert context != prompt.token_ids
        for before in (prompt.token_ids, context):
            # Tokenised in one go the text would give the same tokens: no token crosses the boundary.
            whole = tokenizer(tokenizer.decode([*before, *response]), add_special_tokens=False)["input_ids"]
            assert whole == [*before, *response]


def test_a_chat_template_that_looks_at_the_text_is_caught():
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>' if '/think' in messages[-1]['content'] else '' }}A: {% endif %}"
    )
    with pytest.raises(DataError, match=r"^x\.jsonl:1: the chat template opens the response with '<think>A: '"):
        contexts_of([row(prompt="1")], "{{ prompt }} /think", tokenizer)
    assert contexts_of([row(prompt="1")], "{{ prompt }} 2", tokenizer)


def test_chat_template_arguments_are_passed_on():
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{{ opening }}{% endif %}"
    kwargs = {"chat_template_kwargs": {"opening": "7"}}
    prompts = prompts_of([row(prompt="1", ground_truth="2")], tokenizer, **kwargs)
    (context,) = encode_contexts(prompts, HINTED, tokenizer, max_length=99, **kwargs)
    assert tokenizer.decode(context) == "1 > 27"
    with pytest.raises(DataError, match="opens the response"):  # the student's prompt was made with other arguments
        encode_contexts(prompts, HINTED, tokenizer, max_length=99, chat_template_kwargs={"opening": "8"})
    with pytest.raises(ValueError, match="truncation"):
        encode_contexts(prompts, HINTED, tokenizer, max_length=99, chat_template_kwargs={"truncation": True})


def test_without_a_chat_template_the_text_stands_as_it_is(tokenizer):
    prompts = prompts_of([row(prompt="4 2 =", ground_truth="6")], tokenizer, apply_chat_template=False)
    (context,) = encode_contexts(
        prompts, "({{ ground_truth }}) {{ prompt }}", tokenizer, max_length=99, apply_chat_template=False
    )
    assert list(context) == tokenizer("(6) 4 2 =")["input_ids"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ prompt }}{{ hint }}", r"'hint' is undefined \(it gives .*ground_truth, id, messages, prompt"),
        ("{% if hint %}{{ hint }}{% endif %}{{ prompt }}", "'hint' is undefined"),
        ("{{ messages[0].name }}", "has no attribute 'name'"),
        ("{{ prompt + 1 }}", "the context template fails here: can only concatenate"),
        ("{{ 1 // (prompt | length - 1) }}", "the context template fails here: .*division"),
        ("{{ prompt.__class__.__mro__ }}", "fails here: access to attribute '__class__'.* unsafe"),
        ("{{ messages.append(1) or prompt }}", "fails here|does not give"),
        ("{% for i in range(10 ** 9) %}{{ prompt }}{% endfor %}", "fails here: .*[Rr]ange"),
        ("{% if false %}{{ prompt }}{% endif %} ", "gives no text here"),
    ],
)
def test_what_a_row_does_not_give_is_named(tokenizer, template, problem):
    rows = [row(0, prompt="12", ground_truth="2", hint="3", messages=None), row(1, prompt="1", ground_truth="2")]
    with pytest.raises(DataError, match=rf"^x\.jsonl:\d: .*{problem}"):
        contexts_of(rows[1:] + rows[:1], template, tokenizer)


def test_the_row_that_lacks_a_field_is_the_one_that_is_named(tokenizer):
    rows = [row(0, prompt="1", hint="h"), row(1, prompt="2"), row(2, prompt="3", hint="h")]
    with pytest.raises(DataError, match=r"^x\.jsonl:2: .*'hint' is undefined"):
        contexts_of(rows, "{{ prompt }}{{ hint }}", tokenizer)
    optional = "{{ prompt }}{% if hint is defined %} {{ hint }}{% endif %}"
    contexts = contexts_of(rows, optional, tokenizer)
    assert [list(context) for context in contexts] == [chat(tokenizer, user(t)) for t in ("1 h", "2", "3 h")]


def test_no_user_message(tokenizer):
    with pytest.raises(DataError, match=r"^x\.jsonl:1: the row has no user message"):
        contexts_of([row(messages=({"role": "system", "content": "s"},))], HINTED, tokenizer)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(DataError, match=r"^x\.jsonl:1: .*unpaired surrogate"):
        contexts_of([row(prompt="1", hint="\ud800")], "{{ prompt }}{{ hint }}", tokenizer)


def test_a_context_that_is_too_long_is_named(tokenizer):
    rows = [row(0, prompt="1", ground_truth="2"), row(1, prompt="1", ground_truth="2 " * 20)]
    lengths = [len(context) for context in contexts_of(rows, HINTED, tokenizer)]
    assert len(contexts_of(rows, HINTED, tokenizer, max_length=lengths[1])) == 2
    with pytest.raises(DataError, match=rf"^x\.jsonl:2: .* has {lengths[1]} tokens, more than {lengths[1] - 1}; raise"):
        contexts_of(rows, HINTED, tokenizer, max_length=lengths[1] - 1)
    with pytest.raises(ValueError, match="max_length"):
        contexts_of(rows, HINTED, tokenizer, max_length=0)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ prompt }", "not a Jinja template: line 1: "),
        ("{{ prompt }}\n{% if hint %}", "not a Jinja template: line 2: "),
        ("{{ prompt | shout }}", "not a Jinja template: .*shout"),
        ("{% include 'other' %}{{ prompt }}", "refers to another template"),
        ("think hard", "is the same text for every row"),
        ("", "is the same text for every row"),
        ("{{ range(3) | length }}", "is the same text for every row"),
    ],
)
def test_faulty_templates_are_config_errors(template, problem, tokenizer):
    with pytest.raises(ConfigError, match=rf"^teacher\.teacher_args\.context_template: {problem}"):
        check_context_template(template, "teacher.teacher_args.context_template")
    with pytest.raises(ConfigError):
        contexts_of([row(prompt="1")], template, tokenizer)


@pytest.mark.parametrize("template", ["{{ prompt }}", HINTED, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_sound_templates_pass(template):
    check_context_template(template, "f")
