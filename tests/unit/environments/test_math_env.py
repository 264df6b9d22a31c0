"""Questions made by hand, in a file; one grading process serves the whole module."""

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from roll_opd.configs.environment_config import ToolWrapperArguments
from roll_opd.environments import math_env
from roll_opd.environments.math_env import MathEnv, find_answer
from roll_opd.environments.tools import PythonCodeTool, ToolEnvironment
from roll_opd.errors import DataError, LaunchError
from roll_opd.rewards.process_pool import ProcessPool

ROWS = [
    {"problem": "What is 17 * 23?", "answer": "391"},
    {"problem": "What is 3 / 4?", "answer": r"\boxed{\frac{3}{4}}"},
    {"problem": "What is 12 + 30?", "answer": "12 + 30 = <<12+30=42>>42\n#### 42"},
    {"problem": "What is 500 * 2?", "answer": "#### 1,000"},
    {"problem": "What is 9 - 10?", "answer": -1},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        ("so\n#### 7\nand\n  ####  1,000 \n", "1,000"),
        ("#### 7\n" + r"\boxed{8}", "8"),
        ("#### 7\n" + r"\boxed{8", None),  # cut while it answered
        ("see #### 7", None),
        ("####", None),
        ("7", None),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


def test_seeds_stand_for_rows(file):
    env, same = MathEnv(file_name=file), MathEnv(dataset_name=file, max_steps=3)
    asked = [env.reset(seed=seed)[0] for seed in range(60)]
    assert asked == [same.reset(seed=seed)[0] for seed in range(60)]
    assert asked[::-1] == [env.reset(seed=seed)[0] for seed in reversed(range(60))]
    assert set(asked) == {row["problem"] for row in ROWS}
    assert asked != [MathEnv(file_name=file, seed=1).reset(seed=seed)[0] for seed in range(60)]
    in_order = MathEnv(file_name=file, mode="val")
    assert [in_order.reset(seed=seed)[0] for seed in range(7)] == [ROWS[i % 5]["problem"] for i in range(7)]
    assert [in_order.reset()[0] for _ in range(2)] == [ROWS[0]["problem"], ROWS[1]["problem"]]


@pytest.mark.parametrize(
    ("row", "action", "reward"),
    [
        (0, r"17 \cdot 23 = \boxed{391}", 1.0),
        (0, r"\boxed{392}", 0.0),
        (1, r"\boxed{0.75}", 1.0),
        (1, r"\boxed{\frac{4}{3}}", 0.0),
        (2, "12 and 30 is 42\n#### 42", 1.0),
        (3, r"\boxed{1000}", 1.0),
        (4, r"\boxed{-1}", 1.0),
    ],
)
def test_answers_end_the_episode(file, row, action, reward):
    env = MathEnv(file_name=file, mode="val", max_steps=5)
    question, info = env.reset(seed=row)
    assert question == ROWS[row]["problem"]
    assert info == {"env_instruction": "", "ground_truth": ["391", r"\frac{3}{4}", "42", "1,000", "-1"][row]}
    observation, got, terminated, truncated, info = env.step(action)
    assert (observation, got, terminated, truncated) == ("", reward, True, False)
    metrics = {"action_is_valid": True, "success": reward == 1.0}
    assert {key: info["metrics"][key] for key in metrics} == metrics
    assert not info["metrics"].get("grading_failed")
    assert info["metrics_agg_mode"] == {"action_is_valid": "mean", "success": "last"}


def test_turns_without_an_answer(file):
    env = MathEnv(file_name=file, mode="val", max_steps=2)
    for _ in range(2):
        env.reset(seed=0)
        observation, reward, terminated, truncated, info = env.step("let me think")
        assert "\\boxed{}" in observation
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert info["metrics"] == {"action_is_valid": False, "success": False}
        assert env.step("hm")[1:4] == (0.0, True, False)
    single = MathEnv(file_name=file)
    single.reset(seed=0)
    assert single.step("hm")[1:4] == (0.0, True, False)


def test_a_hostile_answer_is_wrong_and_the_next_one_is_graded(file, monkeypatch):
    env = MathEnv(file_name=file, mode="val")
    env.reset(seed=1)
    assert env.step(r"\boxed{\frac{6}{8}}")[1] == 1.0  # the grader has started
    with monkeypatch.context() as patch:
        patch.setattr(math_env._shared_grader()._pool, "_timeout", 0.3)
        env.reset(seed=1)
        started = time.monotonic()
        _, reward, terminated, _, info = env.step(r"\boxed{9^{9^{9^9}}}")
        assert time.monotonic() - started < 30
    assert (reward, terminated, info["metrics"]["grading_failed"]) == (0.0, True, True)
    env.reset(seed=1)
    assert env.step(r"\boxed{\frac{6}{8}}")[1] == 1.0


def test_threads_that_come_together_load_once(file, monkeypatch):
    read, loads = math_env._read, []

    def slowly(*arguments):
        loads.append(arguments)
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(math_env, "_read", slowly)
    with ThreadPoolExecutor(8) as threads:
        envs = list(threads.map(lambda _: MathEnv(file_name=file), range(8)))
    assert len(loads) == 1 and all(env._rows is envs[0]._rows for env in envs)


def test_a_grader_that_cannot_start_is_tried_again_by_the_next_answer(monkeypatch):
    grader, working = math_env._BlockingGrader(), math_env._shared_grader()._pool
    monkeypatch.setattr(grader, "_pool", ProcessPool("roll_opd.no_such_module.grade"))
    monkeypatch.setattr(grader, "_new_pool", lambda: working)
    with pytest.raises(LaunchError, match="cannot start"):
        grader.grade("", "")
    assert grader._pool is working


def calculator_policy(observation, instruction):
    """Calculates with the tool, then puts what it says into a box."""
    if result := re.fullmatch(r"Code execution result: (\S+)", observation):
        return rf"So it is \boxed{{{result[1]}}}."
    assert "```python" in instruction
    return f"```python\nprint({re.search('What is (.*)[?]', observation)[1]})\n```"


def test_the_optimal_policy_calculates_and_answers(file):
    tools = [PythonCodeTool(isolation="none", timeout=10)]  # the policy is ours
    env = ToolEnvironment(MathEnv(file_name=file, mode="val"), tools, ToolWrapperArguments())
    for seed in range(len(ROWS)):
        observation, info = env.reset(seed=seed)
        instruction = info["env_instruction"]
        rewards = []
        terminated = False
        while not terminated:
            observation, reward, terminated, _, info = env.step(calculator_policy(observation, instruction))
            rewards.append(reward)
        assert rewards == [0.0, 1.0]
        assert info["metrics"]["success"] is True
        assert info["metrics"]["tool_success_counter"] == 1


def test_a_random_policy_runs_through(file):
    rng = random.Random(5)
    parts = ["\\boxed{", "}", "#### ", "\n", "<python>", "```", "7", "x", "\\frac{1}{2}", " ", "{", "\u2211", "\ud800"]
    env = MathEnv(file_name=file, max_steps=3)
    for seed in range(50):
        env.reset(seed=seed)
        for turn in range(1, 4):
            _, reward, terminated, truncated, info = env.step("".join(rng.choices(parts, k=rng.randint(0, 12))))
            assert reward in (0.0, 1.0) and not truncated
            assert info["metrics"]["success"] == (reward == 1.0)
            assert terminated == (turn == 3 or info["metrics"]["action_is_valid"])
            if terminated:
                break


def test_other_formats(tmp_path):
    pa = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "questions.parquet"
    pa.write_table(pyarrow.table({"q": ["1 + 1?"], "a": ["2"]}), path)
    env = MathEnv(dataset_name=str(path), question_key="q", answer_key="a")
    assert env.reset(seed=3) == ("1 + 1?", {"env_instruction": "", "ground_truth": "2"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"problem": "a"}', r":2: column 'answer' has no text \(columns: problem\)"),
        ('{"problem": "", "answer": "1"}', ":2: column 'problem'"),
        ('{"problem": "a", "answer": "$$"}', ":2: the ground truth is empty"),
        ("{", ":2: not valid JSON"),
        ("[]", ":2: a row must be a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=problem):
        MathEnv(file_name=str(path))


def test_bad_settings(tmp_path, file):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        MathEnv(file_name=str(empty))
    with pytest.raises(DataError, match="not found"):
        MathEnv(file_name=str(tmp_path / "none.jsonl"))
    for arguments in (
        {},
        {"file_name": file, "dataset_name": file},
        {"file_name": file, "split": "test"},
        {"file_name": file, "mode": "test"},
        {"file_name": file, "max_steps": 0},
    ):
        with pytest.raises(ValueError):
            MathEnv(**arguments)
