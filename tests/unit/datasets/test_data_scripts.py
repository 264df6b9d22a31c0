"""The scripts in data/: the converter by hand, and the committed samples as the script makes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from roll_opd.datasets.rows import read_rows

DATA = Path(__file__).parents[3] / "data"
LINES = [
    {"question": "One?", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
    {"question": " Two? \n", "answer": "#### 1,234,567 "},
    {"question": "Three?", "answer": "below zero\n#### -5"},
]


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DATA / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_conversion_by_hand(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [LINES[0], "", *LINES[1:]]), tmp_path / "out.jsonl"
    result = run("convert_gsm8k.py", source, target)
    assert result.returncode == 0 and result.stdout == ""
    assert f"3 rows read from {source}, 3 rows written to {target}" in result.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["ground_truth"] for row in rows] == ["2", "1234567", "-5"]
    assert [row["id"] for row in rows] == ["gsm8k-1", "gsm8k-3", "gsm8k-4"]
    content = "Two?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert rows[1]["messages"] == [{"role": "user", "content": content}]
    assert {(row["source"], row["tag"]) for row in rows} == {("gsm8k", "math_rule")}
    read, report = read_rows([target])
    assert (report.kept, report.bad) == (3, 0)
    assert [row.ground_truth for row in read] == ["2", "1234567", "-5"]


def test_limit_tag_and_prefix(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [*LINES, "broken"]), tmp_path / "out.jsonl"
    result = run("convert_gsm8k.py", source, target, "--limit", 2, "--tag", "m", "--id_prefix", "t")
    assert result.returncode == 0, result.stderr
    assert [(row.id, row.tag) for row in read_rows([target])[0]] == [("t-1", "m"), ("t-2", "m")]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        {"question": "q"},
        {"question": "q", "answer": "no mark"},
        {"question": "q", "answer": "#### "},
        {"question": "", "answer": "#### 1"},
        {"question": 1, "answer": "#### 1"},
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(tmp_path, bad):
    source, target = write(tmp_path / "in.jsonl", [LINES[0], bad]), tmp_path / "out.jsonl"
    result = run("convert_gsm8k.py", source, target)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {source}:2: ") and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_missing_empty_and_same_file(tmp_path):
    result = run("convert_gsm8k.py", tmp_path / "no.jsonl", tmp_path / "out.jsonl")
    assert result.returncode == 1 and "no.jsonl" in result.stderr and "Traceback" not in result.stderr
    empty = write(tmp_path / "empty.jsonl", [])
    result = run("convert_gsm8k.py", empty, tmp_path / "out.jsonl")
    assert result.returncode == 1 and "no rows" in result.stderr
    assert run("convert_gsm8k.py", empty, empty).returncode == 2


def test_the_committed_samples_are_what_the_script_makes(tmp_path):
    result = run("make_samples.py", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [
        "code_sample.jsonl",
        "messages_list_sample.jsonl",
        "messages_string_sample.jsonl",
        "prompt_sample.jsonl",
    ]
    for name in made:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_the_gsm8k_sample_of_a_file(tmp_path):
    source = write(tmp_path / "train.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(1, 121)])
    out = tmp_path / "out"
    out.mkdir()
    assert run("make_samples.py", "--gsm8k", source, "--output_dir", out).returncode == 1  # its licence is missing
    (tmp_path / "LICENSE").write_text("free")
    assert run("make_samples.py", "--gsm8k", source, "--output_dir", out).returncode == 0
    rows, _ = read_rows([out / "gsm8k_sample.jsonl"])
    # 120 rows, 50 wanted: every second one from the first.
    assert [row.ground_truth for row in rows] == [str(number) for number in range(1, 101, 2)]
    assert (out / "LICENSE.gsm8k").read_text() == "free"


def test_the_committed_gsm8k_sample():
    rows, _ = read_rows([DATA / "gsm8k_sample.jsonl"])
    assert len(rows) == 50
    assert all(re.fullmatch(r"-?\d+", row.ground_truth or "") for row in rows)
    assert all("\\boxed{}" in (row.messages or ())[0]["content"] for row in rows)
    assert "Copyright (c) 2021 OpenAI" in (DATA / "LICENSE.gsm8k").read_text()


def test_the_readme_names_every_file():
    readme = (DATA / "README.md").read_text()
    for path in DATA.iterdir():
        if path.is_file() and path.name != "README.md":
            assert path.name in readme
