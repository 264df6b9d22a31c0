r"""Answers made by hand, right and wrong, and hostile ones."""

import asyncio
import json
import pickle
import subprocess
import sys
import time

import psutil
import pytest

from roll_opd.errors import ConfigError
from roll_opd.rewards.base import RewardItem
from roll_opd.rewards.math_rule_reward_worker import (
    MathRuleRewardWorker,
    compare_cheaply,
    extract_boxed,
    grade_math,
    reference_answer,
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{72}", "72"),
        (r"first \boxed{1}, then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}$ done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x }", r"\left\{ x"),  # the escaped brace opens no group
        (r"\boxed{a \\}", r"a \\"),  # an escaped backslash escapes nothing
        (r"\boxed {3}", "3"),
        (r"\fbox{4} \boxed{5}", "5"),
        ("72", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed 7", None),
        (r"\boxed{1} and then \boxed{2", None),  # cut while answering: 1 was an intermediate result
        (r"\boxed{\boxed{8}}", "8"),
        ("\\boxed{" * 20_000, None),
    ],
)
def test_extract_boxed(text, content):
    started = time.monotonic()
    assert extract_boxed(text) == content
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("raw", "answer"),
    [("72", "72"), (r"\boxed{72}", "72"), (r"$\boxed{72}$", "72"), (" $72$ ", "72"), (r"\frac{1}{2}", r"\frac{1}{2}")],
)
def test_reference_answer(raw, answer):
    assert reference_answer(raw) == answer


@pytest.mark.parametrize("raw", ["", "  ", "$$"])
def test_empty_reference_is_refused(raw):
    with pytest.raises(ValueError, match="empty"):
        reference_answer(raw)


RIGHT = [
    ("72", "72"),
    (r"\boxed{72}", "72"),
    (r"$\boxed{\frac{3}{4}}$", "0.75"),
    ("72", "72.0"),
    ("-3", "-3"),
    ("-3", "- 3"),
    ("1/2", r"\frac{1}{2}"),
    ("1/2", r"\frac12"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    (r"50\%", "50%"),
    ("50%", "0.5"),
    ("0.5", r"50\%"),
    ("50%", "50"),
    (r"12.5\%", r"\frac{1}{8}"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1234567", "1,234,567"),
    ("1000", "1{,}000"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", "(1,2)"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"),
    ("5", r"\$5"),
    ("5", r"5\text{ dollars}"),
    ("5", "x=5"),
    ("5", "{{5}}"),
    (r"\text{Monday}", r"\text{Monday}"),
    ("720", "6!"),
    ("1000", "10^3"),
]
WRONG = [
    ("72", "71"),
    ("72", "-72"),
    ("-3", "3"),
    ("1/2", r"\frac{1}{3}"),
    ("50%", "0.05"),
    ("50%", r"5\%"),
    ("1,000", "100"),
    ("1000", "1,0000"),
    (r"\sqrt{8}", r"2\sqrt{3}"),
    ("x^2+2x+1", "(x-1)^2"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("(1,2)", "(2,1)"),
    (r"\text{Monday}", r"\text{Tuesday}"),
    ("3", "three"),
    ("3", r"\badmacro{3}{"),
    ("12345678901234567890", "12345678901234567891"),
    ("3", "]["),
]


@pytest.mark.parametrize(("truth", "answer"), RIGHT)
def test_right_answers(truth, answer):
    response = rf"It is $\boxed{{{answer}}}$."
    assert grade_math(response, truth) == {"reward": 1.0, "correct": True, "answer": answer}


@pytest.mark.parametrize(("truth", "answer"), WRONG)
def test_wrong_answers(truth, answer):
    graded = grade_math(rf"It is $\boxed{{{answer}}}$.", truth)
    assert (graded["reward"], graded["correct"]) == (0.0, False)


def test_only_the_last_box_counts_and_no_box_is_wrong():
    assert grade_math(r"\boxed{72} no, \boxed{71}", "72")["correct"] is False
    assert grade_math(r"\boxed{71} no, \boxed{72}", "72")["correct"] is True
    assert grade_math("the answer is 72", "72") == {"reward": 0.0, "correct": False, "answer": None}
    assert grade_math(r"the answer is 72, \boxed{7", "72")["correct"] is False


INTEGERS = ["0", "-0", "7", "007", "-7", "71", "72", "-72", "1000", "123456789012345", "-123456789012345"]
INTEGERS += ["123456789012344", "999999999999999", "100000000000000"]


def test_the_fast_path_agrees_with_math_verify_on_plain_integers():
    for truth in INTEGERS:
        for answer in INTEGERS:
            expected = int(truth) == int(answer)
            assert compare_cheaply(answer, truth) is expected
            assert grade_math(rf"\boxed{{{answer}}}", truth)["correct"] is expected, (truth, answer)


@pytest.mark.parametrize(("truth", "answer"), RIGHT + WRONG)
def test_the_fast_path_never_contradicts_math_verify(truth, answer):
    cheap = compare_cheaply(answer, reference_answer(truth))
    assert cheap is None or cheap is grade_math(rf"\boxed{{{answer}}}", truth)["correct"]


@pytest.mark.parametrize("answer", ["72 ", "+72", "7_2", "٧٢", "1e3", "72.0", "1" * 16])
def test_the_fast_path_leaves_all_else_to_math_verify(answer):
    assert compare_cheaply(answer, "72") is None


# -- the worker -------------------------------------------------------------------------------------------------------

HOSTILE = [r"9^{9^{9^9}}", r"(10^{10})!", r"((9!)!)!", r"\binom{10^{9}}{10^8}"]


def items(*pairs, **kwargs):
    return [RewardItem(id=f"{i}/0/0", response=r, ground_truth=g, **kwargs) for i, (r, g) in enumerate(pairs)]


def graded(worker, *pairs, **kwargs):
    return asyncio.run(worker.grade(items(*pairs, **kwargs)))


@pytest.fixture(scope="module")
def others():
    """Processes of other tests' fixtures, which live until the session ends."""
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def worker(others):
    made = MathRuleRewardWorker("math_rule", {"timeout": 1.0})
    yield made
    made.close()


def child_pids(others):
    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE} - others


def test_worker_grades_in_order(worker):
    results = graded(
        worker,
        (r"\boxed{72}", "72"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("no box", "72"),
        (r"\boxed{0.3}", r"\frac{1}{2}"),
        (r"\boxed{71}", "72"),
    )
    assert [r.id for r in results] == [f"{i}/0/0" for i in range(5)]
    assert [r.reward for r in results] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [r.correct for r in results] == [True, True, False, False, False]
    assert [r.error for r in results] == [None] * 5
    assert all(0 <= r.seconds < 1 for r in results)
    assert pickle.loads(pickle.dumps(results)) == results  # noqa: S301  as Ray does


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_hostile_answer_costs_one_process_and_its_deadline(worker, others, answer):
    graded(worker, (r"\boxed{\frac{1}{2}}", "0.5"))  # a child is up
    before = child_pids(others)
    started = time.monotonic()
    (hostile,) = graded(worker, (rf"\boxed{{{answer}}}", "72"))
    elapsed = time.monotonic() - started
    assert (hostile.reward, hostile.correct, hostile.error) == (0.0, None, "timeout after 1 s")
    assert elapsed < 1.0 + 2.0
    right, wrong = graded(worker, (r"\boxed{\frac{2}{4}}", "0.5"), (r"\boxed{\frac{1}{3}}", "0.5"))
    assert (right.correct, wrong.correct) == (True, False)
    assert (right.error, wrong.error) == (None, None)
    after = child_pids(others)
    assert len(after) == len(before) == 1 and after != before


def test_hostile_ground_truth_and_fast_path(worker):
    """Equal strings need no algebra, however monstrous; a hostile reference only costs its own row."""
    same, other = graded(worker, (r"\boxed{9^{9^{9^9}}}", r"9^{9^{9^9}}"), (r"\boxed{72}", r"9^{9^{9^9}}"))
    assert (same.correct, same.error) == (True, None)
    assert (other.correct, other.error) == (None, "timeout after 1 s")


@pytest.mark.parametrize("truth", [None, "", "  ", 72])
def test_a_row_without_ground_truth_is_an_error_that_names_it(worker, truth):
    (bad, good) = graded(worker, (r"\boxed{1}", truth), (r"\boxed{1}", "1"), row={"id": "gsm8k-17"})
    assert (bad.reward, bad.correct) == (0.0, None)
    assert bad.error is not None and "'gsm8k-17'" in bad.error and "ground_truth" in bad.error
    assert good.correct is True
    (unnamed,) = graded(worker, (r"\boxed{1}", truth))
    assert unnamed.error is not None and "'0/0/0'" in unnamed.error


@pytest.mark.parametrize("truth", ["$$", r"\boxed{"])
def test_unusable_ground_truth_is_the_items_error(worker, truth):
    bad, good = graded(worker, (r"\boxed{1}", truth), (r"\boxed{1}", "1"))
    assert bad.reward == 0.0 and bad.correct is not True
    assert good.correct is True


def test_odd_text_is_graded_not_raised(worker):
    odd = ["\x00", "\ud800", "(" * 400, r"\sqrt{" * 50, "$" * 99, "%", r"\%", "=" * 50, r"\text{" + "a" * 20_000 + "}"]
    pairs = [(rf"\boxed{{{text}}}", "72") for text in odd]
    results = graded(worker, *pairs, (r"\boxed{\frac{144}{2}}", "72"))
    assert all(r.reward == 0.0 and r.correct is not True for r in results[:-1])
    assert results[-1].correct is True


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"time_out": 3}, "rewards.math_rule.time_out", "did you mean 'timeout'"),
        ({"colour": 3}, "rewards.math_rule.colour", "known settings: num_processes"),
        ({"num_processes": 0}, "rewards.math_rule.num_processes", "at least 1"),
        ({"num_processes": 1.5}, "rewards.math_rule.num_processes", "an integer"),
        ({"timeout": "5"}, "rewards.math_rule.timeout", "a number"),
        ({"timeout": True}, "rewards.math_rule.timeout", "a number"),
        ({"timeout": float("nan")}, "rewards.math_rule.timeout", "finite"),
        ({"timeout": float("inf")}, "rewards.math_rule.timeout", "finite"),
        ({"memory_mb": 10}, "rewards.math_rule.memory_mb", "at least 256"),
    ],
)
def test_bad_settings(settings, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MathRuleRewardWorker("math_rule", settings)
    assert caught.value.field == field


def test_the_smallest_memory_limit_is_enough():
    small = MathRuleRewardWorker("math_rule", {"memory_mb": 256})
    try:
        results = graded(small, *[(rf"\boxed{{\frac{{{n}}}{{2}}}}", "0.5") for n in range(20)])
    finally:
        small.close()
    assert [r.correct for r in results] == [n == 1 for n in range(20)]
    assert all(r.error is None for r in results)


def test_the_workers_own_process_stays_light():
    """It is a Ray actor beside the GPUs: no torch, no ray, no sympy of its own."""
    code = (
        "import json, sys\n"
        "import roll_opd.rewards.math_rule_reward_worker as m\n"
        "m.MathRuleRewardWorker('x', {})\n"
        "print(json.dumps([n for n in ('torch', 'ray', 'transformers', 'sympy', 'math_verify') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
