"""Domains of prompts, and which tags are covered."""

from __future__ import annotations

import logging

import pytest

from roll_opd.datasets.domains import domains_of
from roll_opd.datasets.prompts import Prompt
from roll_opd.datasets.row import Row
from roll_opd.datasets.tags import route_tags, uncovered_tags
from roll_opd.errors import DataError


def row(tag: str, **extra) -> Row:
    given = {"id": "x", "messages": None, "prompt": "p", "ground_truth": None, "source": None, "difficulty": None}
    return Row(index=0, tag=tag, test_cases=None, hint=None, file="x.jsonl", line=1, extra=extra, **given)


TAGS = {"gsm8k": "math", "aime": "math", "kodcode": "code", "other": None}


def test_rows_are_sorted_by_the_domain_of_their_tag(caplog):
    rows = [row("kodcode"), row("gsm8k"), row("aime"), row("kodcode")]
    with caplog.at_level(logging.WARNING):
        assert domains_of(rows, TAGS, {"math": 0.6, "code": 0.4}) == {"math": [1, 2], "code": [0, 3]}
    assert not caplog.records
    prompts = [Prompt(row=given, token_ids=(1,), text="p") for given in rows]
    assert domains_of(prompts, TAGS, {"math": 0.6, "code": 0.4}) == {"math": [1, 2], "code": [0, 3]}


def test_rows_of_no_domain_are_counted(caplog):
    rows = [row("gsm8k"), row("other"), row("kodcode"), row("other"), row("unheard of")]
    with caplog.at_level(logging.WARNING):
        assert domains_of(rows, TAGS, {"math": 1.0, "code": 0.0}) == {"math": [0]}
    (record,) = caplog.records
    assert record.getMessage() == (
        "4 of 5 prompts belong to no domain with a share and are never drawn: 1 with tag 'kodcode' (domain code); "
        "2 with tag 'other' (no domain); 1 with tag 'unheard of' (no domain)"
    )


def test_the_rows_own_column_wins_where_it_names_a_domain():
    rows = [row("gsm8k", domain="code"), row("gsm8k", domain="algebra"), row("kodcode", domain=3)]
    assert domains_of(rows, TAGS, {"math": 0.5, "code": 0.5}) == {"code": [0, 2], "math": [1]}


@pytest.mark.parametrize(
    ("probs", "problem"),
    [
        ({"math": 0.5, "code": 0.5}, "domain 'code' has the share 0.5 and no prompt: none has a tag of 'kodcode'"),
        ({"math": 1, "maths": 2}, r"domain 'maths' .* no tag of the data leads to .* \(tags lead to: code, math\)"),
    ],
)
def test_a_domain_without_prompts_is_refused(probs, problem):
    with pytest.raises(DataError, match=problem):
        domains_of([row("gsm8k")], TAGS, probs)


def test_uncovered_tags():
    assert uncovered_tags(["b", "a", "c", "a", ""], [["a"], ["c", "x"]]) == ["", "b"]
    assert uncovered_tags(["b", "a"], [["a"], []]) == []  # an empty list covers everything
    assert uncovered_tags(["b", "a"], []) == ["a", "b"]
    assert uncovered_tags([], [["a"]]) == []


def test_the_first_that_takes_a_tag_gets_it():
    covers = {"math": ["gsm8k", "aime"], "second": ["aime", "code"], "rest": []}
    assert route_tags(["code", "aime", "gsm8k", "zzz", "aime"], covers) == {
        "aime": "math", "code": "second", "gsm8k": "math", "zzz": "rest"
    }  # fmt: skip
    assert route_tags(["a"], {"math": ["gsm8k"]}) == {"a": None}
    assert route_tags(["a"], {}) == {"a": None}
