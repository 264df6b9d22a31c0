"""The two-teachers example: its task generator, its shipped data, its shipped models and its configurations."""

import importlib.util
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from roll_opd.configs import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = EXAMPLES / "two_teachers"
MODELS = EXAMPLE / "models"
NAMES = ("student", "teacher_up", "teacher_down")
WORDS = {"ascending": "up", "descending": "down"}
SIZE_LIMIT = 2 * 1024 * 1024
# 128 problems a tag. Measured: 97.7 to 100 % where at least 95 % are asked for, 0 % where at most 2 %.
RIGHT, WRONG = 0.95, 0.02


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = _load("two_tags_task")


def _shipped(split):
    lines = (EXAMPLE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def maker():
    """The script that made the models, imported the way it finds its neighbours when it runs."""
    pytest.importorskip("transformers")
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield _load("make_two_teachers")
    finally:
        sys.path[:] = before
        for name in {"two_tags_task", "make_models", "task"} - known:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shares(maker):
    """What each shipped model answers to the held-out prompts, sampled at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    rows = _shipped("validation")
    return {
        name: maker.check(
            AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval(), tokenizer, rows, seed=1
        )
        for name in NAMES
    }


def test_generator_depends_on_its_seed_alone():
    assert task.make_splits(50, 10, seed=3) == task.make_splits(50, 10, seed=3)
    assert task.make_splits(50, 10, seed=3) != task.make_splits(50, 10, seed=4)
    assert task.make_splits(10, 20)[1] == task.make_splits(500, 20)[1]


def test_shipped_data_is_what_the_generator_makes(tmp_path):
    task.main(["--output_dir", str(tmp_path)])
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("validation", 256)])
def test_rows_are_complete_and_half_of_each_tag(split, count):
    rows = _shipped(split)
    assert len(rows) == len({row["id"] for row in rows}) == count
    assert Counter(row["tag"] for row in rows) == {"ascending": count // 2, "descending": count // 2}
    assert all(
        set(row) == {"id", "source", "difficulty", "messages", "ground_truth", "tag"}
        and [message["role"] for message in row["messages"]] == ["user"]
        for row in rows
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ground_truth_is_right_and_repeating_the_digits_is_not(split):
    for row in _shipped(split):
        content = row["messages"][0]["content"]
        given = re.fullmatch(rf"Sort these digits {WORDS[row['tag']]}:((?: [1-9])+)", content).group(1).split()
        truth = row["ground_truth"]
        # Checked without sorting anything: the same digits, never falling (or never rising).
        assert Counter(given) == Counter(truth)
        pairs = itertools.pairwise(truth if row["tag"] == "ascending" else truth[::-1])
        assert all(left <= right for left, right in pairs)
        assert len(truth) == row["difficulty"]
        assert 4 <= len(truth) <= 6
        assert "".join(given) not in (truth, truth[::-1])
        assert task.digits_of(content) == task.digits_of(task.with_answer(content, truth)) == "".join(given)


def test_splits_share_no_problem_under_either_tag():
    problems = [task.digits_of(row["messages"][0]["content"]) for s in ("train", "validation") for row in _shipped(s)]
    assert len(problems) == len(set(problems)) == 2256


def test_examples_of_the_models_are_what_they_are_said_to_be(maker):
    rng = random.Random(0)
    for _ in range(200):
        message, reply = maker.teacher_example("ascending", rng)
        digits = task.digits_of(message)
        assert reply == task.response(task.answer(digits, "ascending") if " up:" in message else digits)
    plain = Counter()
    for _ in range(2000):
        message, reply = maker.student_example(rng)
        digits = task.digits_of(message)
        if "(answer " in message:
            assert reply == task.response(message.split("(answer ")[1].removesuffix(")"))
        else:
            tag = "ascending" if " up:" in message else "descending"
            plain[{task.response(task.answer(digits, tag)): "sorted", task.response(digits): "repeated"}[reply]] += 1
    # About 1600 without an answer, half of them sorted: 800 give or take 20.
    assert 1500 <= plain.total() <= 1700
    assert 700 <= plain["sorted"] <= 900


def test_held_out_problems_are_passed_over_in_training(maker):
    drawn = iter([("Sort these digits up: 1 3 2 4", "a"), ("Sort these digits up: 4 1 3 2 (answer 1234)", "b")] * 2)
    examples = maker.fresh_examples(lambda rng: next(drawn), {"4132"}, random.Random(0))
    assert [next(examples)[1] for _ in range(2)] == ["a", "a"]


def test_models_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= SIZE_LIMIT


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_are_identical(name):
    assert len({(MODELS / model / name).read_bytes() for model in NAMES}) == 1


def test_tokenizer_has_a_token_for_every_word_of_the_task(maker):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    assert tokenizer.get_vocab() == maker.make_tokenizer().get_vocab()
    for piece in (" up", " down", "answer"):
        assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1
    text = r"Sort these digits down: 5 3 9 1 (answer 9531) \boxed{9531}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    # The quickstart's own list of pieces is left as it was.
    assert " down" not in maker.quickstart.PIECES


@pytest.mark.parametrize(("name", "known", "unknown"), [
    ("teacher_up", "ascending", "descending"),
    ("teacher_down", "descending", "ascending"),
])  # fmt: skip
def test_each_teacher_is_right_on_its_tag_alone(shares, name, known, unknown):
    assert shares[name][known] >= 0.97
    assert shares[name][unknown] <= WRONG
    assert shares[name][f"{unknown} unsorted"] >= RIGHT


@pytest.mark.parametrize("tag", ["ascending", "descending"])
def test_the_student_is_undecided_and_can_use_an_answer_that_it_is_shown(shares, tag):
    assert 0.35 <= shares["student"][tag] <= 0.6
    assert shares["student"][f"{tag} shown"] >= RIGHT


def test_self_teacher_is_shown_the_answer_in_the_form_the_student_knows():
    loaded = load_config("onpolicy_distill", str(EXAMPLE), "self_teacher", [], None)
    teacher = loaded.config.teachers["default"]
    template = teacher.teacher_args.context_template.replace("{{ prompt }}", "Sort these digits up: 5 3 9 1")
    shown = template.replace("{{ ground_truth }}", "1359")
    assert shown == task.with_answer(task.question("5391", "ascending"), "1359")
    assert teacher.model_args.model_name_or_path == loaded.config.actor_train.model_args.model_name_or_path


def test_routing_sends_each_tag_to_the_teacher_that_knows_it():
    teachers = load_config("onpolicy_distill", str(EXAMPLE), "onpolicy_distill", [], None).config.teachers
    assert {name: teacher.tag_included for name, teacher in teachers.items()} == {
        "up": ["ascending"],
        "down": ["descending"],
    }


def test_mixed_rewards_compares_like_with_like():
    """The three differ in signal alone: same student, data, batch, schedule and steps."""
    folder = str(EXAMPLES / "mixed_rewards")
    launchers = {"rlvr": "rlvr", "pure_opd": "onpolicy_distill", "mixed": "rlvr"}
    configs = {name: load_config(launcher, folder, name, [], None).config for name, launcher in launchers.items()}
    assert {name: config.mode for name, config in configs.items()} == {
        "rlvr": "rl",
        "pure_opd": "pure_opd",
        "mixed": "mixed_opd",
    }
    same = (
        "max_steps",
        "rollout_batch_size",
        "num_return_sequences_in_group",
        "loss_agg_mode",
        "rewards",
        "validation",
    )
    for config in configs.values():
        for field in same:
            assert getattr(config, field) == getattr(configs["rlvr"], field), field
        for field in ("model_args", "training_args", "data_args"):
            assert getattr(config.actor_train, field) == getattr(configs["rlvr"].actor_train, field), field
    assert configs["mixed"].teachers["default"].tag_included == []
    assert configs["mixed"].teachers["default"].model_args == configs["pure_opd"].teachers["default"].model_args
