"""Parquet, Arrow, CSV and `datasets` sources: the same rows, checks and messages as for JSON lines."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import decimal
import json
import random
import string
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_opd.datasets.rows import Columns, read_rows
from roll_opd.datasets.tables import plain
from roll_opd.errors import DataError

USER = {"role": "user", "content": "hi"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # No test asks the network; with it left on, an unreachable hub takes half a minute of retries.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table_of(rows: list[dict]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(table_of(rows), path, row_group_size=3)
    return path


def write_arrow_stream(path: Path, rows: list[dict]) -> Path:
    table = table_of(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_arrow_file(path: Path, rows: list[dict]) -> Path:
    table = table_of(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
    return path


def write_saved(path: Path, rows: list[dict]) -> Path:
    datasets.Dataset(table_of(rows)).save_to_disk(str(path))
    return path


TABLES = {
    "parquet": (write_parquet, "x.parquet"),
    "arrow stream": (write_arrow_stream, "x.arrow"),
    "arrow file": (write_arrow_file, "x.arrow"),
    "saved": (write_saved, "x"),
}


def random_rows(seed: int) -> list[dict]:
    """Rows whose columns keep one type each, as tables need it, with every kind of gap."""
    rng = random.Random(seed)
    letters = string.ascii_letters + ' \n\t"\\,;é漢\u2028😀'

    def text() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 30))) + "."

    answers = [text, lambda: rng.randint(-(2**40), 2**40), rng.random, lambda: [text() for _ in range(3)]]
    answer = answers[seed % len(answers)]
    rows = []
    for number in range(rng.randint(1, 15)):
        turns = [{"role": rng.choice(["user", "tool"]), "content": text()} for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            turns.insert(0, {"role": "system", "content": text(), "name": text()})
        row: dict = {"id": number if seed % 2 else f"row {number}", "tag": rng.choice(["math", "code"])}
        row |= rng.choice([{"messages": turns}, {"prompt": text()}, {"messages": turns, "prompt": text()}])
        optional = {
            "ground_truth": answer(),
            "source": text(),
            "hint": text(),
            "difficulty": rng.random(),
            "test_cases": [{"input": text()} | rng.choice([{}, {"output": text()}]) for _ in range(rng.randint(1, 3))],
            "level": rng.randint(0, 9),
            "parts": {"a": text()} | rng.choice([{}, {"b": [1, rng.randint(0, 5)]}]),
        }
        rows.append(row | {name: value for name, value in optional.items() if rng.random() < 0.7})
    return rows


def without_place(rows):
    return [dataclasses.replace(row, file="") for row in rows]


@pytest.mark.parametrize("seed", range(12))
def test_the_same_rows_in_every_format_are_equal(tmp_path, seed):
    rows = random_rows(seed)
    expected, report = read_rows([write_jsonl(tmp_path / "x.jsonl", rows)])
    assert report.kept == len(rows)
    for name, (write, file) in TABLES.items():
        folder = tmp_path / name
        folder.mkdir()
        found, found_report = read_rows([write(folder / file, rows)])
        assert without_place(found) == without_place(expected), name
        assert (found_report.read, found_report.kept) == (report.read, report.kept)


@pytest.mark.parametrize("seed", range(12))
def test_the_same_rows_in_csv_are_equal(tmp_path, seed):
    # CSV has text only: messages as JSON text are messages again, the answer becomes text in every format, and columns
    # that a file of JSON lines keeps as they are hold text there too.
    rows = [
        {k: v for k, v in row.items() if k in ("id", "tag", "messages", "prompt", "ground_truth", "source", "hint")}
        for row in random_rows(seed)
    ]
    for row in rows:
        row["id"] = str(row["id"])
    expected, _ = read_rows([write_jsonl(tmp_path / "x.jsonl", rows)])
    found, _ = read_rows([write_csv(tmp_path / "x.csv", rows)])
    if seed % 4 == 3:  # lists are written as JSON by this test's writer, with \u escapes
        expected, found = (
            [dataclasses.replace(r, ground_truth=r.ground_truth and json.loads(r.ground_truth)) for r in rows_]
            for rows_ in (expected, found)
        )
    same = [dataclasses.replace(row, line=0) for row in without_place(expected)]
    assert [dataclasses.replace(row, line=0) for row in without_place(found)] == same


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_row_is_named_by_its_number(tmp_path, name):
    write, file = TABLES[name]
    rows: list[dict] = [{"prompt": f"p{n}", "messages": None, "id": n} for n in range(9)]
    rows[4]["prompt"] = " "
    rows[7]["messages"] = [{"role": "human", "content": "x"}]
    path = write(tmp_path / file, rows)
    with pytest.raises(DataError, match=rf"^{path}:5: 'prompt' is empty \[2 bad rows of 9; also {path}:8: message 1"):
        read_rows([path])
    kept, report = read_rows([path], on_bad_row="skip")
    assert [row.line for row in kept] == [1, 2, 3, 4, 6, 7, 9] and report.bad == 2


def test_rows_without_an_id_are_named_by_file_and_number(tmp_path):
    rows, _ = read_rows([write_parquet(tmp_path / "set.parquet", [{"prompt": "a"}, {"prompt": "b"}])])
    assert [row.id for row in rows] == ["set:1", "set:2"]


def test_values_of_tables_become_plain(tmp_path):
    decimals = pa.array([decimal.Decimal("12.50"), decimal.Decimal("7.00"), None], pa.decimal128(20, 2))
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "ground_truth": decimals,
            "difficulty": pa.array(np.array([0.5, 1.5, 2.5], dtype=np.float32)),
            "hint": pa.array(["x", None, "y"]).dictionary_encode(),
            "day": pa.array([datetime.date(2026, 1, 2)] * 3),
            "at": pa.array([datetime.datetime(2026, 1, 2, 3, 4)] * 3, pa.timestamp("ns")),
            "map": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
            "count": pa.array(np.array([1, 2, 3], dtype=np.uint8)),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows, _ = read_rows([tmp_path / "x.parquet"])
    assert [row.ground_truth for row in rows] == ["12.5", "7", None]
    assert [row.difficulty for row in rows] == [0.5, 1.5, 2.5] and [row.hint for row in rows] == ["x", None, "y"]
    assert rows[0].extra == {"day": "2026-01-02", "at": "2026-01-02T03:04:00", "map": {"k": 1}, "count": 1}
    assert type(rows[0].extra["count"]) is int and type(rows[0].difficulty) is float


def test_decimals():
    given = [decimal.Decimal(text) for text in ("0.1", "3", "1E+3", "-0.25", "0.1234567890123456789012345")]
    assert [plain(value) for value in given] == [0.1, 3, 1000, -0.25, "0.1234567890123456789012345"]
    assert type(plain(decimal.Decimal("3.00"))) is int


def test_numpy_scalars_written_by_pandas(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {"prompt": ["a", "b"], "ground_truth": [np.float64(2.5), np.nan], "n": [np.int64(1), np.int64(2)]}
    )
    frame.to_parquet(tmp_path / "x.parquet")
    rows, _ = read_rows([tmp_path / "x.parquet"])
    assert [row.ground_truth for row in rows] == ["2.5", None]  # pandas writes its NaN as null


@pytest.mark.parametrize(
    ("truth", "problem"),
    [
        (pa.array([float("nan")]), "'ground_truth' is nan, which is no answer"),
        (pa.array([[1.0, float("inf")]]), "'ground_truth' cannot be written as JSON"),
        (pa.array([b"\x00"]), "'ground_truth' must be text, .* not binary data"),
        (pa.array([[b"\x00"]]), "'ground_truth' cannot be written as JSON"),
    ],
)
def test_answers_that_are_none(tmp_path, truth, problem):
    pq.write_table(pa.table({"prompt": ["a"], "ground_truth": truth}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"x\.parquet:1: {problem}"):
        read_rows([tmp_path / "x.parquet"])


def test_a_row_that_python_cannot_hold_is_one_bad_row(tmp_path):
    # "\xff" is not UTF-8, which Arrow does not check; the year 300000 is beyond Python's dates.
    text = pa.StringArray.from_buffers(
        5, pa.py_buffer(np.array([0, 1, 2, 3, 4, 5], np.int32).tobytes()), pa.py_buffer(b"ab\xffde")
    )
    days = pa.array([0, 0, 0, 108_000_000, 0], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": text, "day": days}), tmp_path / "x.parquet")
    rows, report = read_rows([tmp_path / "x.parquet"], on_bad_row="skip")
    assert [(row.prompt, row.line) for row in rows] == [("a", 1), ("b", 2), ("e", 5)]
    first, second = report.examples
    assert first.endswith(":3: 'prompt' is not UTF-8 text") and ":4: 'day' cannot be read: " in second


@pytest.mark.parametrize(("name", "kind"), [("x.parquet", "Parquet"), ("x.arrow", "Arrow")])
def test_a_file_of_another_format_is_named(tmp_path, name, kind):
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "p"}\n')
    with pytest.raises(DataError, match=rf"^{path}: cannot read the data file as {kind}: ") as caught:
        read_rows([path])
    assert "\n" not in str(caught.value)
    assert read_rows([path], dataset_type="jsonl")[0][0].prompt == "p"


@pytest.mark.parametrize("name", ["parquet", "arrow stream", "arrow file"])
def test_a_damaged_file_is_named(tmp_path, name):
    write, file = TABLES[name]
    path = write(tmp_path / file, [{"prompt": "x" * 50, "id": n} for n in range(20)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"^{path}: cannot read the data file as "):
        read_rows([path])


def test_the_type_wins_over_the_ending(tmp_path):
    path = write_parquet(tmp_path / "data.bin", [{"prompt": "p"}])
    with pytest.raises(DataError, match=r"cannot tell the format of files that end in '\.bin'.*dataset_type"):
        read_rows([path])
    assert read_rows([path], dataset_type="parquet")[0][0].prompt == "p"


def test_endings_are_told_apart_file_by_file(tmp_path):
    paths = [
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "0"}]),
        write_parquet(tmp_path / "b.PARQUET", [{"prompt": "1"}]),
        write_csv(tmp_path / "c.csv", [{"prompt": "2"}]),
    ]
    rows, report = read_rows(paths)
    assert [row.prompt for row in rows] == ["0", "1", "2"] and report.files == tuple(map(str, paths))


def test_empty_tables_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=rf"^{path}: the file holds no rows"):
        read_rows([path])


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: there are two columns 'prompt'"):
        read_rows([tmp_path / "x.parquet"])


# ---- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_rows_are_named_by_the_line_that_they_begin_on(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfid, prompt \r\n1,"two\r\nlines"\r\n\r\n2,a,b\r\n3,\xff\r\n4,""\r\n5,last\r\n')
    rows, report = read_rows([path], on_bad_row="skip")
    assert [(row.id, row.prompt, row.line) for row in rows] == [("1", "two\r\nlines", 2), ("5", "last", 8)]
    assert report.blank == 1
    assert [example.removeprefix(f"{path}:") for example in report.examples] == [
        "5: 3 fields, where the header names 2 columns",
        "6: not UTF-8 text",
        "7: neither 'messages' nor 'prompt' is given",
    ]


def test_csv_with_an_open_quote(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt\na\n"b\n')
    with pytest.raises(DataError, match=rf"^{path}:3: not valid CSV: "):
        read_rows([path])


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("", "the file holds no rows; its first line must name the columns"),
        ("a,,b\n", "column 2 of the header has no name"),
        ("a,b,a\n", "names the column 'a' twice"),
    ],
)
def test_csv_headers(tmp_path, header, problem):
    (tmp_path / "x.csv").write_text(header)
    with pytest.raises(DataError, match=rf"x\.csv.*{problem}"):
        read_rows([tmp_path / "x.csv"])


def test_csv_answers_stay_as_written_and_prompts_may_be_long(tmp_path):
    path = write_csv(tmp_path / "x.csv", [{"prompt": "x" * 200_000, "ground_truth": "007", "other": ""}])
    (row,), _ = read_rows([path])
    assert row.prompt == "x" * 200_000 and row.ground_truth == "007" and row.extra == {}


# ---- datasets --------------------------------------------------------------------------------------------------------


def saved_dict(path: Path) -> Path:
    splits = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} {n}"} for n in range(3)]) for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def test_saved_folders_need_no_type_and_splits_are_chosen(tmp_path):
    path = saved_dict(tmp_path / "set")
    assert [row.prompt for row in read_rows([path])[0]] == ["train 0", "train 1", "train 2"]
    rows, report = read_rows(["set"], dataset_dir=tmp_path, split="test")
    assert [row.prompt for row in rows] == ["test 0", "test 1", "test 2"]
    assert rows[1].where == f"{path}[test]:2" and report.files == (f"{path}[test]",) and rows[1].id == "set:2"
    with pytest.raises(DataError, match=r"no split 'dev'; set data_args\.split to one of train, test"):
        read_rows([path], split="dev")


def test_saved_folder_of_selected_and_formatted_rows(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": str(n), "ground_truth": n} for n in range(10)])
    data.select([7, 2, 5]).with_format("numpy").save_to_disk(str(tmp_path / "set"))
    rows, _ = read_rows([tmp_path / "set"], dataset_type="hub")
    assert [(row.prompt, row.ground_truth) for row in rows] == [("7", "7"), ("2", "2"), ("5", "5")]


def test_a_folder_of_data_files_is_loaded_by_datasets(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"messages": [USER], "id": n} for n in range(4)])
    write_jsonl(folder / "test.jsonl", [{"messages": [USER], "id": n} for n in range(2)])
    with pytest.raises(DataError, match=r"this is a folder; .*set data_args\.dataset_type: hub"):
        read_rows([folder])
    assert len(read_rows([folder], dataset_type="hub")[0]) == 4
    rows, _ = read_rows([folder], dataset_type="hub", split="test[:1]")
    assert [(row.messages, row.where) for row in rows] == [((USER,), f"{folder}[test[:1]]:1")]
    with pytest.raises(DataError, match=r"`datasets` cannot load this data set: .*dev"):
        read_rows([folder], dataset_type="hub", split="dev")


def test_other_columns_of_a_data_set(tmp_path):
    path = tmp_path / "set"
    datasets.Dataset.from_list([{"question": "q", "answer": "4"}]).save_to_disk(str(path))
    rows, _ = read_rows([path], columns=Columns(prompt="question", ground_truth="answer"))
    assert (rows[0].prompt, rows[0].ground_truth) == ("q", "4")


def test_builders_that_decode_archives_are_refused(tmp_path):
    import tarfile

    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "0.txt").write_text("x")
    with tarfile.open(folder / "train.tar", "w") as archive:
        archive.add(tmp_path / "0.txt", "0.txt")
    with pytest.raises(DataError, match=r"read by the builder 'webdataset' .*convert it"):
        read_rows([folder], dataset_type="hub")


def test_a_hub_without_a_network_is_one_clear_error():
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^nobody/nothing: `datasets` cannot load .*save_to_disk") as caught:
        read_rows(["nobody/nothing"], dataset_type="hub")
    assert "\n" not in str(caught.value) and time.monotonic() - start < 5


def test_a_file_is_no_hub_and_has_no_split(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match=r"this is a file, not a data set of a hub; remove data_args\.dataset_type"):
        read_rows([path], dataset_type="hub")
    with pytest.raises(DataError, match=r"a data file has no split; remove data_args\.split"):
        read_rows([path], split="train")
