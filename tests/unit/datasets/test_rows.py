"""Reading and checking rows: every refusal names file and line, and the counts add up."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from roll_opd.datasets.rows import Columns, ReadReport, read_rows
from roll_opd.datasets.sources import find_file
from roll_opd.errors import DataError

REPO = Path(__file__).parents[3]
USER = {"role": "user", "content": "hi"}


def write(path: Path, *rows: object) -> Path:
    """Writes one line a row: bytes as they are, everything else as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_one(tmp_path: Path, row: object, **kwargs):
    rows, _ = read_rows([write(tmp_path / "one.jsonl", row)], **kwargs)
    return rows[0]


def test_all_fields_of_a_row(tmp_path):
    given = {
        "id": "a",
        "tag": "math",
        "messages": [USER],
        "prompt": "unused",
        "ground_truth": "4",
        "source": "s",
        "difficulty": 0.5,
        "test_cases": [{"input": "1"}],
        "hint": "h",
        "language": "en",
        "level": 3,
    }
    path = write(tmp_path / "x.jsonl", given)
    (row,), report = read_rows([path])
    assert (row.index, row.id, row.tag, row.ground_truth, row.source) == (0, "a", "math", "4", "s")
    assert row.messages == (USER,)
    assert row.prompt == "unused"  # at hand, though messages win
    assert (row.difficulty, row.test_cases, row.hint) == (0.5, [{"input": "1"}], "h")
    assert row.extra == {"language": "en", "level": 3}
    assert (row.file, row.line, row.where) == (str(path), 1, f"{path}:1")
    assert report == ReadReport(files=(str(path),), read=1, blank=0, bad=0, kept=1)


def test_defaults_and_line_numbers_with_blank_lines(tmp_path):
    path = write(tmp_path / "stem.jsonl", {"prompt": "a"}, b"", b"  \r", {"prompt": "b", "id": None, "tag": None})
    rows, report = read_rows([path])
    assert [(row.index, row.id, row.line, row.tag) for row in rows] == [(0, "stem:1", 1, ""), (1, "stem:4", 4, "")]
    assert rows[0].messages is None and rows[0].ground_truth is None and rows[0].extra == {}
    assert (report.read, report.blank, report.bad, report.kept) == (2, 2, 0, 2)


def test_messages_as_json_text_equal_messages_as_list(tmp_path):
    messages = [{"role": "system", "content": "é\u2028"}, USER]
    as_list = read_one(tmp_path, {"messages": messages})
    as_text = read_one(tmp_path, {"messages": json.dumps(messages)})
    assert as_list == as_text
    assert as_list.messages == tuple(messages)


def test_null_means_not_given(tmp_path):
    row = read_one(tmp_path, {"messages": [{**USER, "name": None, "parts": {"a": None}}], "level": None, "hint": None})
    assert row.messages == ({**USER, "parts": {"a": None}},)  # deeper down, what a file of JSON says stands
    assert row.extra == {} and row.hint is None


def test_empty_text_in_messages_means_prompt(tmp_path):
    row = read_one(tmp_path, {"messages": "", "prompt": "p", "id": ""})
    assert (row.messages, row.prompt, row.id) == (None, "p", "one:1")


def test_prompt_beside_messages_may_have_any_form(tmp_path):
    row = read_one(tmp_path, {"messages": [USER], "prompt": [1, 2]})
    assert row.messages == (USER,) and row.prompt is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("72", "72"),
        (72, "72"),
        (-3, "-3"),
        (0.5, "0.5"),
        ("", ""),
        (None, None),
        ([1, "é"], '[1, "é"]'),
        ({"a": [True]}, '{"a": [true]}'),
    ],
)
def test_ground_truth_becomes_text(tmp_path, given, expected):
    assert read_one(tmp_path, {"prompt": "p", "ground_truth": given}).ground_truth == expected


def test_other_column_names(tmp_path):
    columns = Columns(prompt="question", ground_truth="answer", tag="domain")
    row = read_one(tmp_path, {"question": "q", "answer": 1, "domain": "d", "prompt": "other"}, columns=columns)
    assert (row.prompt, row.ground_truth, row.tag) == ("q", "1", "d")
    assert row.extra == {"prompt": "other"}
    with pytest.raises(DataError, match=r"one\.jsonl:1: neither 'messages' nor 'question' is given"):
        read_one(tmp_path, {"prompt": "other"}, columns=columns)


BAD_ROWS = {
    "not JSON": (b'{"prompt": "a"', "not valid JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
    "not an object": (b"7", "must be a JSON object, not a number"),
    "a list": ([1, 2], "not a list; write one object a line, not one array"),
    "the start of an array": (b"[", "not a list; write one object a line, not one array"),
    "a JSON null": (b"null", "must be a JSON object, not null"),
    "NaN": (b'{"prompt": "a", "ground_truth": NaN}', "NaN is not JSON"),
    "a number of 5000 digits": (b'{"prompt": "a", "difficulty": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "nested too deeply": (b'{"a":' * 200_000, "nested too deeply"),
    "not UTF-8": (b'{"prompt": "\xff"}', r"not UTF-8 text \(byte 13 of the line\)"),
    "half a surrogate pair": (b'{"prompt": "ab\\ud800"}', "prompt holds an unpaired surrogate at character 3"),
    "surrogate in messages": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "unpaired surrogate"),
    "neither": ({"text": "a"}, "neither 'messages' nor 'prompt' is given"),
    "both null": ({"prompt": None, "messages": None}, "neither 'messages' nor 'prompt' is given"),
    "prompt a number": ({"prompt": 5}, "'prompt' must be text, not a number"),
    "prompt a list": ({"prompt": [USER]}, "a list of messages belongs in 'messages'"),
    "prompt empty": ({"prompt": " \n"}, "'prompt' is empty"),
    "messages an object": ({"messages": USER}, "'messages' must be a list of messages .* not an object"),
    "messages text, not JSON": ({"messages": "hello"}, "'messages' is text but not valid JSON"),
    "messages text, not a list": ({"messages": '"hello"'}, "'messages' must be a list .* not text"),
    "messages empty": ({"messages": [], "prompt": "p"}, "'messages' is an empty list"),
    "messages text of an empty list": ({"messages": "[]"}, "'messages' is an empty list"),
    "message not an object": ({"messages": [USER, "hi"]}, "message 2 of 'messages' must be an object .* not text"),
    "unknown role": (
        {"messages": [{"role": "human", "content": "x"}]},
        "message 1 of 'messages' has the role 'human'; it must be one of system, user, assistant, tool",
    ),
    "role missing": ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has the role None"),
    "role a list": ({"messages": [{"role": [], "content": "x"}]}, r"has the role \[\]"),
    "content missing": (
        {"messages": [{"role": "user"}]},
        "message 1 of 'messages' must have text as content, not null",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        "must have text as content, not a list",
    ),
    "last is the assistant's": ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "is the assistant's"),
    "last is empty": ({"messages": [{"role": "user", "content": " "}]}, "the user's, is empty"),
    "ground_truth a bool": ({"prompt": "p", "ground_truth": True}, "'ground_truth' is true or false"),
    "id a bool": ({"prompt": "p", "id": True}, "'id' must be text or a whole number, not true or false"),
    "id a float": ({"prompt": "p", "id": 1.5}, "'id' must be text or a whole number, not a number"),
    "tag a number": ({"prompt": "p", "tag": 3}, "'tag' must be text, not a number"),
    "source a list": ({"prompt": "p", "source": []}, "'source' must be text, not a list"),
    "id used before": ({"prompt": "p", "id": "good"}, "id 'good' is already used on line 1"),
    "default id used before": ({"prompt": "p", "id": "bad:1"}, "id 'bad:1' is already used on line 1"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    bad, problem = BAD_ROWS[name]
    good = {"prompt": "p"} if name == "default id used before" else {"prompt": "p", "id": "good"}
    path = write(tmp_path / "bad.jsonl", good, b"", bad, {"prompt": "last"})

    with pytest.raises(DataError, match=rf"^{path}:3: .*{problem}.*on_bad_row: skip") as caught:
        read_rows([path])
    assert "\n" not in str(caught.value)

    rows, report = read_rows([path], on_bad_row="skip")
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 4)]
    assert (report.read, report.blank, report.bad, report.kept) == (3, 1, 1, 2)
    (example,) = report.examples
    assert example.startswith(f"{path}:3: ") and example in str(report) and not report.is_complete


def test_counts_over_files_and_at_most_five_examples(tmp_path):
    first = write(tmp_path / "a.jsonl", {"prompt": "0"}, *[{"prompt": number} for number in range(6)], b"")
    second = write(tmp_path / "b.jsonl", b"{", {"prompt": "1"}, {"prompt": "2"})
    rows, report = read_rows([first, second], on_bad_row="skip")
    # 7 rows in the first file, of which 6 bad; 3 in the second, of which 1 bad.
    assert (report.read, report.blank, report.bad, report.kept) == (10, 1, 7, 3)
    assert report.files == (str(first), str(second))
    assert [row.prompt for row in rows] == ["0", "1", "2"] and [row.index for row in rows] == [0, 1, 2]
    assert [example.split(": ")[0] for example in report.examples] == [f"{first}:{line}" for line in range(2, 7)]
    with pytest.raises(DataError, match=rf"^{first}:2: .*7 bad rows of 10; also {first}:3: .*; \.\.\.\]"):
        read_rows([first, second])


def test_the_same_id_in_two_files_is_fine(tmp_path):
    paths = [write(tmp_path / name, {"prompt": "p", "id": "x"}) for name in ("a.jsonl", "b.jsonl")]
    rows, _ = read_rows(paths)
    assert [row.id for row in rows] == ["x", "x"]


def test_the_id_of_a_refused_row_is_free(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "x"}, {"id": "x", "prompt": "p"})
    rows, report = read_rows([path], on_bad_row="skip")
    assert rows[0].line == 2 and report.bad == 1


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}')
    rows, report = read_rows([path])
    assert [row.prompt for row in rows] == ["a", "b"] and report.blank == 0


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_an_empty_file_is_named(tmp_path, content, on_bad_row):
    good = write(tmp_path / "good.jsonl", {"prompt": "p"})
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{empty}: the file holds no rows"):
        read_rows([good, empty], on_bad_row=on_bad_row)


def test_no_kept_rows(tmp_path):
    path = write(tmp_path / "bad.jsonl", {}, {})
    with pytest.raises(DataError, match=rf"^{path}:1: neither.*all 2 rows are bad"):
        read_rows([path], on_bad_row="skip")


def test_no_files_and_unknown_policy(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read_rows([])
    with pytest.raises(ValueError, match="on_bad_row"):
        read_rows([write(tmp_path / "a.jsonl", {"prompt": "p"})], on_bad_row="ignore")  # type: ignore[arg-type]


def test_a_lone_name_is_one_file(tmp_path):
    assert len(read_rows(str(write(tmp_path / "a.jsonl", {"prompt": "p"})))[0]) == 1


def test_unsupported_ending_is_refused_before_reading(tmp_path):
    bad = write(tmp_path / "bad.jsonl", {})
    other = tmp_path / "x.txt"
    other.write_bytes(b"x")
    with pytest.raises(DataError, match=rf"^{other}: cannot tell the format of .*'\.txt'; supported: \.json, \.jsonl"):
        read_rows([bad, other])
    other.write_bytes(b'{"prompt": "p"}')
    assert read_rows([other], dataset_type="jsonl")[0][0].prompt == "p"


def test_file_lookup(tmp_path, monkeypatch, caplog):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    target = write(data / "x.jsonl", {"prompt": "p"})
    monkeypatch.chdir(tmp_path)
    assert find_file(target) == target  # absolute
    assert find_file("data/x.jsonl") == Path("data/x.jsonl")  # relative to the working directory
    assert find_file("x.jsonl", "data") == Path("data/x.jsonl")  # relative to dataset_dir
    monkeypatch.chdir(elsewhere)
    assert find_file("data/x.jsonl", tmp_path) == target
    with caplog.at_level(logging.WARNING):
        assert find_file("data/x.jsonl", data) == target  # ROLL's style: dataset_dir and file_name both name the folder
    assert not caplog.records
    assert find_file("other/x.jsonl", data) == target  # found by its last part alone, so a person is told
    assert "other/x.jsonl" in caplog.text


def test_the_working_directory_comes_before_dataset_dir(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "x.jsonl", {"prompt": "here"})
    write(tmp_path / "data" / "x.jsonl", {"prompt": "there"})
    monkeypatch.chdir(tmp_path)
    assert read_rows(["x.jsonl"], dataset_dir=Path("data"))[0][0].prompt == "here"


def test_a_missing_file_lists_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_rows(["data/no.jsonl"], dataset_dir="sets")
    message = str(caught.value)
    assert message.startswith("data/no.jsonl: data file not found; tried ")
    for tried in ("data/no.jsonl", "sets/data/no.jsonl", "sets/no.jsonl"):
        assert str(tmp_path / tried) in message
    with pytest.raises(DataError, match=rf"^{tmp_path}: this is a folder"):
        read_rows([tmp_path])


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"prompt": "p"})

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(DataError, match=rf"^{path}: cannot read the data file: Permission denied"):
        read_rows([path])


@pytest.mark.parametrize(
    ("name", "count", "bare"),
    [
        ("gsm8k_sample.jsonl", 50, 0),
        ("messages_list_sample.jsonl", 6, 0),
        ("messages_string_sample.jsonl", 4, 0),
        ("prompt_sample.jsonl", 4, 4),
        ("code_sample.jsonl", 3, 3),
    ],
)
def test_the_samples_are_good(name, count, bare):
    rows, report = read_rows([name], dataset_dir=REPO / "data")
    assert (report.read, report.bad, report.kept) == (count, 0, count)
    assert sum(row.messages is None for row in rows) == bare


def test_samples_in_one_go():
    names = sorted(path.name for path in (REPO / "data").glob("*.jsonl"))
    rows, report = read_rows(names, dataset_dir=REPO / "data")
    assert report.read == report.kept == 67
    assert [row.index for row in rows] == list(range(67))
    assert {row.tag for row in rows} == {"", "math_rule", "general", "code_sandbox"}
