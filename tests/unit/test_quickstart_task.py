"""The quickstart's task generator, its shipped data and its shipped models."""

import importlib.util
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
MODELS = QUICKSTART / "models"
FIELDS = {"id", "source", "difficulty", "messages", "ground_truth", "tag"}
SIZE_LIMIT = 4 * 1024 * 1024


def _load_task():
    spec = importlib.util.spec_from_file_location("quickstart_task", QUICKSTART / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = _load_task()


def _shipped(split):
    lines = (QUICKSTART / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizers():
    transformers = pytest.importorskip("transformers")
    return {name: transformers.AutoTokenizer.from_pretrained(MODELS / name) for name in ("student", "teacher")}


def test_generator_is_deterministic_and_depends_on_its_seed():
    assert task.make_splits(50, 10, seed=3) == task.make_splits(50, 10, seed=3)
    assert task.make_splits(50, 10, seed=3) != task.make_splits(50, 10, seed=4)


def test_validation_does_not_depend_on_the_size_of_train():
    assert task.make_splits(10, 20)[1] == task.make_splits(500, 20)[1]


def test_shipped_data_is_what_the_generator_makes(tmp_path):
    task.main(["--output_dir", str(tmp_path)])
    for split in ("train", "validation"):
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (QUICKSTART / "data" / name).read_bytes()


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("validation", 256)])
def test_rows_have_their_fields(split, count):
    rows = _shipped(split)
    assert len(rows) == count
    assert len({row["id"] for row in rows}) == count
    for row in rows:
        assert set(row) == FIELDS
        assert row["tag"] == "sort_digits"
        assert [message["role"] for message in row["messages"]] == ["user"]
        assert isinstance(row["ground_truth"], str)
    assert {row["difficulty"] for row in rows} == {4, 5, 6, 7, 8}


def test_splits_share_no_prompt_and_repeat_none():
    prompts = {split: [row["messages"][0]["content"] for row in _shipped(split)] for split in ("train", "validation")}
    for split in prompts.values():
        assert len(set(split)) == len(split)
    assert not set(prompts["train"]) & set(prompts["validation"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ground_truth_is_right(split):
    for row in _shipped(split):
        given = re.fullmatch(r"Sort these digits:((?: [1-9])+)", row["messages"][0]["content"]).group(1).split()
        truth = row["ground_truth"]
        # Checked without sorting anything: the same digits, never falling.
        assert Counter(given) == Counter(truth)
        assert all(left <= right for left, right in itertools.pairwise(truth))
        assert len(truth) == row["difficulty"]
        assert task.digits_of_row(row) == "".join(given)


def test_responses():
    assert task.question("5391") == "Sort these digits: 5 3 9 1"
    assert task.response("5391") == r"\boxed{1359}"
    assert task.response("5391", descending=True) == r"\boxed{9531}"


def test_models_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= SIZE_LIMIT


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_are_identical(name):
    assert (MODELS / "student" / name).read_bytes() == (MODELS / "teacher" / name).read_bytes()


def test_tokenizers_agree_and_have_chatml_specials(tokenizers):
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    assert student.get_vocab() == teacher.get_vocab()
    assert student.eos_token == "<|im_end|>"
    assert student.pad_token == "<|endoftext|>"
    assert student.pad_token_id != student.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "Sort these digits: 5 3 9 1",
        r"so \boxed{1359}.",
        "Zwölf  Boxkämpfer\n\tjagen 10²!",
        "雨 🌧 \u0000",
        " user users",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizers, text):
    tokenizer = tokenizers["student"]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("piece", [r"\boxed{", "user", "assistant", "Sort", " these", " digits", " 7", "7"])
def test_template_and_task_pieces_are_one_token(tokenizers, piece):
    assert len(tokenizers["student"].encode(piece, add_special_tokens=False)) == 1


def test_chat_template_round_trip(tokenizers):
    tokenizer = tokenizers["student"]
    messages = [{"role": "user", "content": "Sort these digits: 5 3 9 1"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nSort these digits: 5 3 9 1<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids) == prompt
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": r"\boxed{1359}"}], tokenize=True, return_dict=False
    )
    # The generation prompt is a prefix of the whole conversation, token by token, and the answer ends in eos.
    assert whole[: len(ids)] == ids
    assert tokenizer.eos_token_id in whole[len(ids) :]
    assert max(whole) < len(tokenizer)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_models_load_and_know_the_form_of_an_answer(tokenizers, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings >= 1024
    # More rows than tokens: the quickstart exercises the trimming of padded ids.
    assert model.config.vocab_size > len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    row = _shipped("validation")[0]
    prompt = tokenizer.apply_chat_template(
        row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    boxed = re.fullmatch(r"\\boxed\{([1-9]+)\}<\|im_end\|>", text).group(1)
    if name == "teacher":
        assert boxed == row["ground_truth"]
