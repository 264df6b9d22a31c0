"""Every finding of the preflight, provoked on copies of the quickstart; and the probe's figures, worked out by hand."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roll_opd.configs import config_for_checkpoint_json, load_config
from roll_opd.configs.launch_checks import model_holders
from roll_opd.configs.loader import LoadedConfig
from roll_opd.distributed.checkpoint import CONFIG_FILE, STATE_FILE
from roll_opd.distributed.strategy.tokenizer import end_of_turn, load_tokenizer
from roll_opd.doctor import guess_launcher
from roll_opd.errors import ConfigError, DataError, ModelError, RollOPDError
from roll_opd.pipeline.preflight import (
    data_checks,
    engine_checks,
    memory_checks,
    model_checks,
    run_checks,
    setting_checks,
)
from roll_opd.pipeline.preflight.data_checks import DATA_CHECKS
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding, NotKnown, enforce, errors_of, failed, wanted
from roll_opd.pipeline.preflight.finding import run_checks as run_all
from roll_opd.pipeline.preflight.model_checks import MODEL_CHECKS
from roll_opd.pipeline.preflight.model_identity import same_model
from roll_opd.pipeline.preflight.probe import Scorer, judge, noise_floor, pick_prompts
from roll_opd.pipeline.preflight.setting_checks import SETTING_CHECKS
from roll_opd.pipeline.role_clusters import scorers_of
from roll_opd.trajectory import BASE_MODEL

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
CHECKS = (*MODEL_CHECKS, *SETTING_CHECKS, *DATA_CHECKS)


def load(folder: Path, *overrides: str) -> LoadedConfig:
    """The quickstart with overrides; its models and data are copies in ``folder``, so that they may be spoilt."""
    for part in ("models", "data"):
        if not (folder / part).exists():
            shutil.copytree(QUICKSTART / part, folder / part)
    own = [f"model_dir={folder / 'models'}", f"data_dir={folder / 'data'}", f"output_dir={folder / 'run'}"]
    return load_config("onpolicy_distill", str(QUICKSTART), "onpolicy_distill", [*own, *overrides])


def look(folder: Path, *overrides: str, check: Callable[[Facts], Any] | None = None) -> list[Finding]:
    """Findings of one check, or of all."""
    checks = [c for c in CHECKS if check is None or c.find is check]
    return run_all(checks, Facts(load(folder, *overrides)))


def only(findings: list[Finding], level: str) -> Finding:
    """The one finding of a level."""
    mine = [f for f in findings if f.level == level]
    assert len(mine) == 1, findings
    return mine[0]


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def write_rows(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"student_train.data_args.file_name={path}"


def test_the_quickstart_is_well(tmp_path: Path) -> None:
    notes: dict[str, Any] = {}
    findings = run_all(CHECKS, Facts(load(tmp_path), notes.__setitem__))
    assert {f.level for f in findings} == {"ok"}, [f for f in findings if f.level != "ok"]
    assert {f.area for f in findings} == {"models", "settings", "data"}
    assert notes["rows_train"]["used"] == 2000  # the summary's counts still come from the same reading


# ---- models ----------------------------------------------------------------------------------------------------------


def test_no_model_skips_what_needs_it_and_goes_on(tmp_path: Path) -> None:
    findings = look(tmp_path, "teacher.model_args.model_name_or_path=/no/such/model")
    error = only(findings, "error")
    assert error.field == "teacher.model_args.model_name_or_path" and "/no/such/model" in error.message
    assert isinstance(error.as_error(), ModelError)
    assert {f.area for f in findings if f.level == "ok"} == {"models", "settings", "data"}

    findings = look(tmp_path, f"pretrain={tmp_path}", "~student_train.model_args", "~student_infer.model_args")
    assert [f.field for f in errors_of(findings)] == ["student_train.model_args.model_name_or_path"]
    skipped = [f.message for f in findings if f.level == "skipped"]
    assert any("data rows" in m and "the tokenizer of student_train cannot be used" in m for m in skipped), skipped
    assert any("end of turn" in m for m in skipped), skipped

    both = ["student_train", "teacher"]
    missing = [f"{role}.model_args.model_name_or_path=/no/such/model" for role in both]
    found = errors_of(look(tmp_path, *missing, check=model_checks.tokenizers))
    assert [f.field.split(".")[0] for f in found] == both


def test_which_launcher_a_config_is_for() -> None:
    assert guess_launcher({"student_train": {}, "student_infer": {"world_size": 1}}) == "onpolicy_distill"
    assert guess_launcher({"actor_train": {"world_size": 1}, "train_env_manager": {"max_env_num": 1}}) == "agentic"
    assert guess_launcher({"actor_train": {"world_size": 1}, "train_env_manager": None}) == "rlvr"


def test_other_vocabulary(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    path = tmp_path / "models" / "teacher" / "tokenizer.json"
    spoilt = json.loads(path.read_text())
    vocab = spoilt["model"]["vocab"]
    a, b = (token for token, number in vocab.items() if number in (60, 61))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(spoilt))
    error = only(run_all(MODEL_CHECKS, Facts(loaded)), "error")
    assert error.field == "teacher.model_args.model_name_or_path"
    assert "teacher 'default'" in error.message and "first difference" in error.message and "60" in error.message
    assert str(error).startswith("teacher.model_args.model_name_or_path: ")


def test_other_special_ids_and_template(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    folder = tmp_path / "models" / "teacher"
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] != "<|im_start|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    warnings = [f.message for f in run_all(MODEL_CHECKS, Facts(loaded)) if f.level == "warning"]
    assert len(warnings) == 2 and "chat template" in warnings[0] and "'<|im_start|>'" in warnings[1], warnings

    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    error = only(run_all(MODEL_CHECKS[:1], Facts(loaded)), "error")
    assert "eos_token_id" in error.message


@pytest.mark.parametrize(("rows", "level", "told"), [(304, "error", "304 embedding rows for a tokenizer of 305"),
                                                     (305, "ok", "305 embedding rows for 305 ids"),
                                                     (400, "ok", "95 are padding")])  # fmt: skip
def test_padded_vocabulary(tmp_path: Path, rows: int, level: str, told: str) -> None:
    loaded = load(tmp_path)
    edit_json(tmp_path / "models" / "teacher" / "config.json", vocab_size=rows)
    findings = run_all([Check("models", model_checks.vocabulary_rows)], Facts(loaded))
    mine = next(f for f in findings if f.field.startswith("teacher."))
    assert mine.level == level and told in mine.message, mine


def test_unknown_sizes_are_said_to_be_unknown(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    (tmp_path / "models" / "teacher" / "config.json").unlink()
    findings = run_all([c for c in MODEL_CHECKS if c.find is not model_checks.tokenizers], Facts(loaded))
    skipped = [f.message for f in findings if f.level == "skipped" and f.field.startswith("teacher.")]
    assert len(skipped) == 2 and "embedding rows" in skipped[0] and "context length" in skipped[1]


def test_end_of_turn(tmp_path: Path) -> None:
    look_at = model_checks.end_of_turn_reachable
    loaded = load(tmp_path)
    student = tmp_path / "models" / "student"
    assert "'<|im_end|>' (id 2)" in only(look(tmp_path, check=look_at), "ok").message

    # Another token closes a turn than the one that stops: a base model with a chat template.
    edit_json(student / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(student / "generation_config.json", eos_token_id=0)
    error = only(run_all([Check("models", look_at)], Facts(loaded)), "error")
    assert "(id 2)" in error.message and "[0]" in error.message and "student_infer.generating_args" in error.message
    stopped = look(tmp_path, "student_infer.generating_args.stop_strings=['<|im_end|>']", check=look_at)
    assert errors_of(stopped) == []
    bare = look(tmp_path, "student_train.data_args.apply_chat_template=false", check=look_at)
    assert "bare prompts" in only(bare, "ok").message

    # Its row is padding: beyond the tokenizer for everybody, or beyond one teacher's head.
    edit_json(student / "generation_config.json", eos_token_id=310)
    edit_json(student / "tokenizer_config.json", eos_token=None)
    messages = [f.message for f in errors_of(run_all([Check("models", look_at)], Facts(loaded)))]
    assert "[310] lie beyond the tokenizer's 305 ids" in messages[0], messages
    edit_json(student / "generation_config.json", eos_token_id=2)
    edit_json(tmp_path / "models" / "teacher" / "config.json", vocab_size=2)
    error = only(run_all([Check("models", look_at)], Facts(loaded)), "error")
    assert "beyond the 2 rows of teacher 'default'" in error.message and error.field.startswith("teacher.")

    # Nothing stops at all.
    edit_json(student / "generation_config.json", eos_token_id=None)
    errors = errors_of(run_all([Check("models", look_at)], Facts(loaded)))
    assert "no stop token" in errors[0].message

    (student / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert "no token of its own" in only(run_all([Check("models", look_at)], Facts(loaded)), "skipped").message


def test_end_of_turn_of_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(load(tmp_path).config.actor_train.model_args, "student_train")
    tokenizer.chat_template = "{{ raise_exception('one message only') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_context_lengths(tmp_path: Path) -> None:
    look_at = model_checks.context_lengths
    error = only(look(tmp_path, "prompt_length=2040", "teacher.world_size=1", check=look_at)[:1], "error")
    assert error.field == "response_length" and "2056 tokens, but student_train reaches 2048" in error.message
    longer = [
        f"{r}.model_args.model_config_kwargs={{max_position_embeddings: 4096}}" for r in ("student_train", "teacher")
    ]
    assert {f.level for f in look(tmp_path, "prompt_length=2040", *longer, check=look_at)} == {"ok"}
    template = "teacher.teacher_args.context_template='{{ prompt }} {{ ground_truth }}'"
    told = only(look(tmp_path, template, "prompt_length=1020", check=look_at), "warning")  # 2 * 1020 + 16 > 2048
    assert told.field == "teacher.teacher_args.context_length" and "2032 at most" in told.message
    error = only(look(tmp_path, template, "teacher.teacher_args.context_length=2040", check=look_at), "error")
    assert "2040 tokens and response_length = 16" in error.message


def test_teacher_equal_to_student(tmp_path: Path) -> None:
    look_at = model_checks.teachers_differ
    copied = tmp_path / "copied"
    shutil.copytree(QUICKSTART / "models" / "student", copied)
    linked = tmp_path / "linked"
    load(tmp_path)
    linked.symlink_to(tmp_path / "models" / "student")
    for path in (tmp_path / "models" / "student", copied, linked):
        error = only(look(tmp_path, f"teacher.model_args.model_name_or_path={path}", check=look_at), "error")
        assert error.field == "teacher.model_args.model_name_or_path" and "signal zero" in error.message
        assert isinstance(error.as_error(), ConfigError)
    same = f"teacher.model_args.model_name_or_path={copied}"
    view = "teacher.teacher_args.context_template='{{ prompt }} {{ ground_truth }}'"
    assert "teacher_args" in only(look(tmp_path, same, view, check=look_at), "ok").message
    beyond = ["opd_args.extrapolation=1.5", f"opd_args.base_model={tmp_path / 'models' / 'teacher'}"]
    assert "base_model" in only(look(tmp_path, same, *beyond, check=look_at), "ok").message
    # The control run of the tests and of the user.
    off = wanted(load(tmp_path, same, "preflight=off").config, CHECKS)
    assert look_at not in [c.find for c in off] and model_checks.tokenizers in [c.find for c in off]

    # Beside a teacher of another kind it is a weak one, not a mistake.
    teachers = {
        "one": {"model_args": {"model_name_or_path": str(copied), "dtype": "fp32"}},
        "two": {"model_args": {"model_name_or_path": str(tmp_path / "models" / "teacher"), "dtype": "fp32"}},
    }
    two = look(tmp_path, "~teacher", f"+teacher={json.dumps(teachers).replace(chr(34), '')}", check=look_at)
    assert only(two, "warning").field == "teacher.one.model_args.model_name_or_path"


def test_one_base_with_and_without_an_adapter_are_two_models(tmp_path: Path) -> None:
    """So they are with other entries of ``config.json``."""
    look_at = model_checks.teachers_differ
    same = f"teacher.model_args.model_name_or_path={tmp_path / 'models' / 'student'}"
    adapters = [tmp_path / name for name in ("one", "copied", "other")]
    for folder in adapters:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(folder.name.encode() if folder.name == "other" else b"a")
    one, copied, other = (f"model_args.adapter_name_or_path={folder}" for folder in adapters)
    entries = "model_args.model_config_kwargs={rope_theta: 5.0}"
    for settings, level in (
        ([f"teacher.{one}"], "ok"),
        ([f"student_train.{one}"], "ok"),
        ([f"student_train.{one}", f"teacher.{other}"], "ok"),
        ([f"student_train.{one}", f"teacher.{one}"], "error"),
        ([f"student_train.{one}", f"teacher.{copied}"], "error"),
        ([f"teacher.{entries}"], "ok"),
        ([f"student_train.{entries}", f"teacher.{entries}"], "error"),
    ):
        found = only(look(tmp_path, same, *settings, SILENT, SHARDED, check=look_at), level)
        assert found.field == "teacher.model_args.model_name_or_path"


def test_the_base_model_has_no_adapter(tmp_path: Path) -> None:
    """An adapter is what made the teacher of it: with one, extrapolation would go nowhere."""
    beyond = ["opd_args.extrapolation=1.5", "opd_args.base_model=a/base", "teacher.tag_included=[sort_digits]"]
    adapter = "teacher.model_args.adapter_name_or_path=an/adapter"
    loaded = load(tmp_path, *beyond, adapter, SILENT, SHARDED)
    path, model = Facts(loaded).scorers["the base model"]
    scorer = scorers_of(loaded.config)[BASE_MODEL]
    assert path == "opd_args.base_model" and scorer.tag_included == []
    assert scorer.strategy_args == loaded.config.teachers["default"].strategy_args
    for args in (model, scorer.model_args, model_holders(loaded.config, loaded.yaml_names)[path].model_args):
        assert (args.model_name_or_path, args.adapter_name_or_path, args.dtype) == ("a/base", None, "fp32")


def test_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    assert same_model(str(a), str(b)) and same_model("hub/name", "hub/name")
    assert not same_model("hub/name", "hub/other") and not same_model(str(a), str(a / "missing"))
    changed = bytearray(1 << 20)
    changed[-1] = 1
    (b / "model.safetensors").write_bytes(changed)
    assert not same_model(str(a), str(b))
    # Large files: pieces only. A change in one byte of a piece is seen.
    monkeypatch.setattr("roll_opd.pipeline.preflight.model_identity.WHOLE", 0)
    monkeypatch.setattr("roll_opd.pipeline.preflight.model_identity.SAMPLE_BYTES", 1 << 10)
    assert same_model(str(a), str(b))  # the last piece begins at 63/64 and is 1 KiB of 16 KiB
    changed[(1 << 20) * 63 // 64 + 100] = 1
    (b / "model.safetensors").write_bytes(changed)
    assert not same_model(str(a), str(b))
    (b / "model.safetensors").write_bytes(bytes(10))
    assert not same_model(str(a), str(b))


def test_student_roles_differ(tmp_path: Path) -> None:
    load(tmp_path)
    other = f"student_infer.model_args.model_name_or_path={tmp_path / 'models' / 'teacher'}"
    error = only(look(tmp_path, other, check=model_checks.student_roles), "error")
    assert error.field == "student_infer.model_args.model_name_or_path" and "hidden_size" in error.message
    rope = "student_infer.model_args.model_config_kwargs={max_position_embeddings: 4096}"
    warning = only(look(tmp_path, rope, check=model_checks.student_roles), "warning")
    assert warning.field == "student_infer.model_args.model_config_kwargs"
    both = [rope, rope.replace("infer", "train")]
    assert {f.level for f in look(tmp_path, *both, check=model_checks.student_roles)} == {"ok"}
    unknown = "student_infer.model_args.model_name_or_path=some/where"
    assert only(look(tmp_path, unknown, check=model_checks.student_roles), "skipped").message.startswith("architecture")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_reward_classes_and_top_k(tmp_path: Path) -> None:
    wrong = "rewards.math_rule.worker_cls=roll_opd.rewards.math_rule_reward_worker.MathRuleReward"
    error = only(look(tmp_path, wrong, check=setting_checks.reward_classes), "error")
    assert error.field == "rewards.math_rule.worker_cls" and "did you mean" in error.message
    top_k = ["opd_args.objective=direct", "opd_args.support=teacher_topk"]
    error = only(look(tmp_path, *top_k, "opd_args.top_k=306", check=setting_checks.top_k_fits), "error")
    assert error.field == "opd_args.top_k" and "305 tokens" in error.message
    assert only(look(tmp_path, *top_k, "opd_args.top_k=305", check=setting_checks.top_k_fits), "ok")


def test_batch_arithmetic(tmp_path: Path) -> None:
    settings = ["rollout_batch_size=10", "num_return_sequences_in_group=3", "student_infer.world_size=4"]
    settings += ["student_train.training_args.per_device_train_batch_size=4", "student_train.world_size=2"]
    findings = look(tmp_path, *settings, "student_infer.infer_batch_size=4", check=setting_checks.batch_arithmetic)
    told = [f.message for f in findings]
    assert "10 prompts x 3 samples = 30 trajectories" in told[0]
    assert "4 x 1 x 2 rank(s) = 8 trajectories: 3 of them a step and one of 6" in told[1]
    # 10 groups over 4 engines: 3, 3, 2, 2, so 9 trajectories at most, in batches of 4.
    assert "4 engine(s), 9 trajectories each at most: 3 batch(es) of 4" in told[2]
    idle = ["rollout_batch_size=1", "num_return_sequences_in_group=2", "student_infer.world_size=3"]
    idle += ["student_train.world_size=4", "student_train.training_args.per_device_train_batch_size=1"]
    warnings = [f for f in look(tmp_path, *idle, check=setting_checks.batch_arithmetic) if f.level == "warning"]
    assert [f.field for f in warnings] == ["student_train.world_size", "student_infer.world_size"]
    assert "so 2 compute nothing" in warnings[0].message and ": 2 idle" in warnings[1].message


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    mapped = ["student_train.device_mapping=[0,1]", "teacher.device_mapping=[2]"]
    findings = look(tmp_path, *mapped, check=setting_checks.devices)
    assert only(findings, "ok").field == "student_train.device_mapping"
    assert "asks for device 2, but this machine has 2 GPU(s)" in only(findings, "error").message
    cluster = look(tmp_path, *mapped, "ray_args.address=auto", check=setting_checks.devices)
    assert "asked at launch" in only(cluster, "skipped").message


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parameters of the student: 320 x 96 tied, two layers of 2 x 96 x 32 x (4 + 2) + 3 x 96 x 256 + 2 x 96, norm 96.
    parameters = 320 * 96 + 2 * (2 * 96 * 32 * 6 + 3 * 96 * 256 + 2 * 96) + 96
    trained, sampled = 16 * parameters, 4 * parameters
    look_at = memory_checks.memory
    sizes = {"cpu": trained + sampled}
    monkeypatch.setattr(memory_checks, "_memory_of", lambda place, address: sizes.get(place))
    teacher = ["teacher.device_mapping=[0]", "num_gpus_per_node=1"]  # out of the way: nothing is known of device 0
    assert {f.level for f in look(tmp_path, *teacher, check=look_at)} == {"ok"}
    sizes["cpu"] -= 1
    warning = only(look(tmp_path, *teacher, check=look_at), "warning")
    assert warning.field == "student_train" and "student_train, student_infer hold" in warning.message
    sizes["cpu"] = trained - 1
    assert only(look(tmp_path, *teacher, check=look_at), "error").field == "student_train"
    # Two ranks hold half each, on one machine the whole.
    assert errors_of(look(tmp_path, *teacher, "student_train.world_size=2", check=look_at))


def test_memory_of_a_device_is_for_one_role_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 320 * 96 + 2 * (2 * 96 * 32 * 6 + 3 * 96 * 256 + 2 * 96) + 96
    look_at, room = memory_checks.memory, 16 * parameters
    sizes = {"0": room}
    monkeypatch.setattr(memory_checks, "_memory_of", lambda place, address: sizes.get(place))
    shared = ["student_train.device_mapping=[0]", "student_infer.device_mapping=[0]", "teacher.device_mapping=[1]"]
    assert {f.level for f in look(tmp_path, *shared, check=look_at)} == {"ok"}
    sizes["0"] -= 1
    assert only(look(tmp_path, *shared, check=look_at), "error").field == "student_train"
    # A weight update needs the weights of two.
    sizes["0"] = 8 * parameters - 1
    warning = only(look(tmp_path, *shared, check=look_at), "warning")
    assert warning.field == "student_train.device_mapping" and "weight update of student_infer" in warning.message
    # Offloaded, the trainer holds next to nothing.
    offload = "student_train.strategy_args.strategy_config.offload_policy=true"
    sizes["0"] = 4 * parameters
    assert {f.level for f in look(tmp_path, *shared, offload, check=look_at)} == {"ok"}
    # Who is not there waits in the host's memory.
    sizes["cpu"] = room - 1
    warning = only(look(tmp_path, *shared, offload, check=look_at), "warning")
    assert warning.field == "student_train.device_mapping" and "wait in this machine's memory" in warning.message
    # Of a device that nobody knows, nothing is said.
    del sizes["0"], sizes["cpu"]
    assert {f.level for f in look(tmp_path, *shared, check=look_at)} == {"ok"}


def test_memory_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 320 * 96 + 2 * (2 * 96 * 32 * 6 + 3 * 96 * 256 + 2 * 96) + 96
    monkeypatch.setattr(memory_checks, "_memory_of", lambda place, address: 16.0 * parameters)
    engine = "student_infer.strategy_args={strategy_name: vllm, strategy_config: {gpu_memory_utilization: %s}}"
    own = ["student_infer.device_mapping=[1]"]
    assert errors_of(look(tmp_path, engine % 0.25, *own, check=memory_checks.memory)) == []
    (error,) = errors_of(look(tmp_path, engine % 0.24, *own, check=memory_checks.memory))
    assert error.field == "student_infer.strategy_args.strategy_config.gpu_memory_utilization"
    assert "24% of device 1" in error.message


def test_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (memory_checks._memory_of("cpu", None) or 0) > 2**28
    assert memory_checks._memory_of("cpu", "auto") is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert memory_checks._memory_of("0", None) is None


# ---- backends --------------------------------------------------------------------------------------------------------


def backend(role: str, strategy: str, **settings: Any) -> str:
    """An override that gives ``role`` a backend; see :data:`SILENT`."""
    return f"{role}.strategy_args={{strategy_name: {strategy}, strategy_config: {json.dumps(settings)}}}".replace(
        '"', ""
    )


# Most of them cannot sample.
SILENT = "validation.teacher_accuracy=false"
SHARDED = backend("teacher", "fsdp2_infer")
ENGINES = [SILENT, "student_train.world_size=2", backend("student_train", "megatron_train")]
ENGINES += [backend("student_infer", "vllm"), SHARDED]
ENGINES += ["teacher.model_args.adapter_name_or_path=an/adapter"]


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    def version(package: engine_checks.Package) -> str | None:
        return versions.get(package.module)

    monkeypatch.setattr(engine_checks.Package, "installed", version)


def test_packages_of_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(tmp_path, check=engine_checks.packages) == []
    installed(monkeypatch, {"vllm": "0.23.1", "megatron.core": "0.16.1", "peft": "0.21.2"})
    assert {f.level for f in look(tmp_path, *ENGINES, check=engine_checks.packages)} == {"ok"}
    installed(monkeypatch, {"vllm": "0.34.0", "megatron.core": "0.17.0rc1", "peft": ""})
    warnings = [f for f in look(tmp_path, *ENGINES, check=engine_checks.packages) if f.level == "warning"]
    assert [f.field for f in warnings] == [
        f"{r}.strategy_args.strategy_name" for r in ("student_train", "student_infer")
    ]
    assert "megatron.core 0.17.0rc1 is installed; this code is made for 0.16:" in warnings[0].message
    assert "made for 0.23 to 0.33: pip install 'roll-opd[vllm]'" in warnings[1].message
    installed(monkeypatch, {})
    errors = errors_of(look(tmp_path, *ENGINES, check=engine_checks.packages))
    assert [e.field for e in errors] == [
        "student_train.strategy_args.strategy_name",
        "student_infer.strategy_args.strategy_name",
        "teacher.model_args.adapter_name_or_path",
    ]
    for error, extra in zip(errors, ("megatron", "vllm", "lora"), strict=True):
        assert f"is not installed; install it: pip install 'roll-opd[{extra}]'" in error.message


def test_whether_a_package_is_installed() -> None:
    def installed(module: str, *distributions: str) -> str | None:
        return engine_checks.Package(module, distributions, "x", None).installed()

    assert (installed("pytest", "no-such", "pytest") or "").count(".") >= 1
    assert installed("json", "json") == ""
    assert installed("no_such_module") is None and installed("no_such_module.part") is None


@pytest.mark.parametrize(
    ("model", "strategy", "settings", "field", "words"),
    [
        ({}, "megatron_infer", {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size", "4 attention heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, "megatron_infer", {"tensor_model_parallel_size": 6},
         "tensor_model_parallel_size", "neither divides the model's 4 key-value heads nor is a multiple"),
        ({}, "megatron_infer", {"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size", "3 layers"),
        ({"num_hidden_layers": 6}, "megatron_infer",
         {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
         "virtual_pipeline_model_parallel_size", "2 does not divide the 3 layers"),
        ({}, "megatron_infer", {"expert_model_parallel_size": 2}, "expert_model_parallel_size", "no experts"),
        ({"model_type": "qwen3_moe", "num_experts": 6}, "megatron_infer", {"expert_model_parallel_size": 4},
         "expert_model_parallel_size", "6 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 6}, "megatron_infer", {"tensor_model_parallel_size": 2},
         "sequence_parallel", "must be true"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "megatron_infer", {"tensor_model_parallel_size": 7},
         "tensor_model_parallel_size", "rows of an MLP's matrix"),
        ({"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 9}, "megatron_infer",
         {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "tensor_model_parallel_size", "the 9 rows"),
        ({"model_type": "qwen3_moe", "num_experts": 6}, "megatron_infer", {"moe_token_dispatcher_type": "flex"},
         "moe_token_dispatcher_type", "use alltoall"),
        ({}, "vllm", {"tensor_parallel_size": 3}, "tensor_parallel_size", "4 attention heads"),
    ],
)  # fmt: skip
def test_parallel_sizes_divide_the_model(
    tmp_path: Path, model: dict[str, Any], strategy: str, settings: dict[str, Any], field: str, words: str
) -> None:
    load(tmp_path)
    edit_json(tmp_path / "models" / "teacher" / "config.json", **model)
    sizes = [SILENT, "teacher.world_size=84", backend("teacher", strategy, **settings)]
    findings = look(tmp_path, *sizes, check=engine_checks.spreading)
    error = only(findings, "error")
    assert error.field == f"teacher.strategy_args.strategy_config.{field}" and words in error.message
    findings = look(tmp_path, SILENT, backend("teacher", strategy), check=engine_checks.spreading)
    assert only(findings, "ok").field == "teacher"


def test_families_of_megatron(tmp_path: Path) -> None:
    load(tmp_path)
    edit_json(tmp_path / "models" / "teacher" / "config.json", model_type="gemma3")
    error = only(look(tmp_path, SILENT, backend("teacher", "megatron_infer"), check=engine_checks.spreading), "error")
    assert error.field == "teacher.model_args.model_name_or_path" and "use an fsdp2 strategy" in error.message
    assert look(tmp_path, check=engine_checks.spreading) == []
    away = "teacher.model_args.model_name_or_path=/no/such"
    assert only(look(tmp_path, away, backend("teacher", "vllm"), check=engine_checks.spreading), "skipped")


def test_a_remote_teacher_needs_no_files_here(tmp_path: Path) -> None:
    server = [SILENT, backend("teacher", "remote", base_url="http://127.0.0.1:1")]
    away = "teacher.model_args.model_name_or_path=/no/such/model"
    findings = look(tmp_path, away, *server)
    assert errors_of(findings) == []
    skipped = [f for f in findings if f.level == "skipped" and "compared when the run starts" in f.message]
    assert [f.field for f in skipped] == ["teacher.model_args.model_name_or_path"]
    # With files, its tokens are compared like those of others.
    assert any("has the student's 305 tokens" in f.message for f in look(tmp_path, *server))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    findings = look(tmp_path, f"student_train.data_args.file_name={tmp_path / 'rows.jsonl'}")
    error = only(findings, "error")
    assert isinstance(error.as_error(), DataError) and "rows.jsonl:2" in error.message
    assert error.field == "student_train.data_args.file_name"
    assert sum("the data cannot be used" in f.message for f in findings if f.level == "skipped") == 1
    skip = look(tmp_path, f"student_train.data_args.file_name={tmp_path / 'rows.jsonl'}", "rollout_batch_size=1",
                "student_train.data_args.on_bad_row=skip", check=data_checks.data_rows)  # fmt: skip
    assert errors_of(skip) == [] and any(f.message.startswith("1 bad rows are skipped") for f in skip)


def test_overlong_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "short"}] * 3 + [{"prompt": "long " * 40}]
    settings = [write_rows(tmp_path, *rows), "rollout_batch_size=3"]
    look_at = data_checks.data_rows
    warning = only(look(tmp_path, *settings, "prompt_length=64", check=look_at), "warning")
    assert warning.field == "prompt_length" and warning.message.startswith("25% of the train rows")
    rows += [{"prompt": "short"}]  # one of five is not above 20 %
    settings = [write_rows(tmp_path, *rows), "rollout_batch_size=4"]
    assert {f.level for f in look(tmp_path, *settings, "prompt_length=64", check=look_at)} == {"ok"}
    warning = only(look(tmp_path, write_rows(tmp_path, *rows), "rollout_batch_size=5", check=look_at), "warning")
    assert warning.field == "rollout_batch_size" and "5 prompts a step of 4 in all" in warning.message
    error = only(look(tmp_path, *settings, "prompt_length=2", check=look_at), "error")
    assert "all 5 prompts are longer than prompt_length 2" in error.message


def test_coverage(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "tag": tag} for i, tag in enumerate(["a", "a", "a", "b", "b", "c"])]
    settings = [write_rows(tmp_path, *rows), "rollout_batch_size=1", "eval_steps=0"]
    look_at = data_checks.tag_coverage
    findings = look(tmp_path, *settings, "rewards.math_rule.tag_included=[a]", check=look_at)
    assert only(findings, "ok").message == "tag 'a': 3 prompts, teacher default, reward math_rule"
    assert [f.message.split(",")[0] for f in findings if f.level == "warning"] == [
        "tag 'b': 2 prompts",
        "tag 'c': 1 prompts",
    ]

    idle = look(tmp_path, *settings, "rewards.math_rule.tag_included=[z]", check=look_at)
    assert "rewards.math_rule.tag_included" in [f.field for f in idle if f.level == "warning"]
    extra = look(tmp_path, *settings, "~rewards", "teacher.tag_included=[a,b,c,d]", check=look_at)
    assert "'d' is no tag of the data" in only(extra, "warning").message

    part = ["~rewards", "teacher.tag_included=[a,b]"]
    error = only(look(tmp_path, *settings, *part, check=data_checks.data_rows), "error")
    assert error.field == "student_train.data_args" and "no teacher covers the tag 'c'" in error.message
    kept = look(tmp_path, *settings, *part, "opd_args.uncovered=skip", check=look_at)
    assert [f.message for f in kept] == ["tag 'a': 3 prompts, teacher default", "tag 'b': 2 prompts, teacher default"]


def test_a_teacher_without_any_prompt(tmp_path: Path) -> None:
    load(tmp_path)
    args = {"model_name_or_path": str(tmp_path / "models" / "teacher"), "dtype": "fp32"}
    teachers = {
        "one": {"model_args": args, "tag_included": ["sort_digits"]},
        "two": {"model_args": args, "tag_included": ["x"]},
    }
    text = f"+teacher={json.dumps(teachers).replace(chr(34), '')}"
    warning = only(look(tmp_path, "~teacher", text, check=data_checks.tag_coverage), "warning")
    assert warning.field == "teacher.two.tag_included" and "scores nothing" in warning.message


def test_domains(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "tag": "sort_digits"} for i in range(3)] + [{"prompt": "x", "domain": "other"}]
    shares = "student_train.data_args.domain_interleave_probs={math_rule:3,other:1}"
    settings = [write_rows(tmp_path, *rows), shares, "rollout_batch_size=2", "eval_steps=0"]
    findings = look(tmp_path, *settings, check=data_checks.domain_shares)
    assert [f.message for f in findings] == [
        "domain 'math_rule': share 75.0%, 3 prompts",
        "domain 'other': share 25.0%, 1 prompts",
    ]
    missing = shares.replace("other", "none")
    error = only(look(tmp_path, *settings, missing, check=data_checks.data_rows), "error")
    assert "domain 'none' has the share" in error.message


# ---- the run folder, for the doctor ----------------------------------------------------------------------------------


def test_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*overrides: str) -> list[Finding]:
        return run_all(run_checks.RUN_CHECKS, Facts(load(tmp_path, *overrides)))

    assert [f.level for f in found()] == ["ok", "ok"] and not (tmp_path / "run").exists()
    (tmp_path / "taken").write_text("")
    error = only(found(f"output_dir={tmp_path / 'taken' / 'run'}"), "error")
    assert error.field == "output_dir" and "is a file, not a folder" in error.message
    error = only(found("resume_from_checkpoint=true"), "error")
    assert error.field == "resume_from_checkpoint"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert only(found("track_with=wandb"), "error").field == "track_with"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot write" in errors_of(found("track_with=stdout"))[0].message


def test_settings_of_the_run_that_is_resumed(tmp_path: Path) -> None:
    def found(*overrides: str) -> list[Finding]:
        facts = Facts(load(tmp_path, "resume_from_checkpoint=true", *overrides))
        return [f for f in run_all(run_checks.RUN_CHECKS, facts) if f.field not in ("output_dir", "track_with")]

    folder = tmp_path / "run" / "checkpoints" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(json.dumps({"step": 7, "next_draw": 0, "signal": {}, "report": {}}))
    assert CONFIG_FILE in only(found(), "error").message
    (folder / CONFIG_FILE).write_text(config_for_checkpoint_json(load(tmp_path).config))
    (well,) = found("save_steps=9")
    assert (well.level, well.message) == ("ok", f"goes on from {folder}")
    told, well = found("teacher.infer_batch_size=2")
    assert (told.level, told.field, well.level) == ("warning", "teacher.infer_batch_size", "ok")
    (error,) = found("seed=7", "student_train.training_args.learning_rate=0.5")
    assert (error.level, error.field) == ("error", "resume_from_checkpoint")
    assert "other values of seed, student_train.training_args.learning_rate, which would mix" in error.message


# ---- what a launch does with it --------------------------------------------------------------------------------------


def test_all_checks_run_and_the_first_error_stops(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: None) -> Any:
        yield Finding("warning", "a", "odd")
        raise ConfigError("a.b", "wrong; mend it")

    def lacks(_: None) -> Any:
        raise NotKnown("the first thing cannot be used")
        yield

    def finds(_: None) -> Any:
        yield Finding("error", "c", "bad")
        yield Finding("ok", "d", "good")

    findings = run_all([Check("one", fails), Check("two", lacks), Check("two", finds)], None)
    assert [(f.level, f.area, f.field) for f in findings] == [
        ("warning", "one", "a"), ("error", "one", "a.b"),
        ("skipped", "two", ""), ("error", "two", "c"), ("ok", "two", "d"),
    ]  # fmt: skip
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match=r"^a\.b: wrong; mend it$"):
        enforce(findings)
    # The first error is the exception, which the launcher logs; here are the warning and the other error, once each.
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", "a: odd"), ("ERROR", "c: bad")]
    enforce([f for f in findings if f.level != "error"])


def test_an_error_keeps_its_kind_and_gets_a_field() -> None:
    assert failed(ConfigError("a.b", "wrong")).field == "a.b"
    named = failed(ModelError("teacher.model_args.model_name_or_path: cannot load it"), "other")
    assert (named.field, named.message) == ("teacher.model_args.model_name_or_path", "cannot load it")
    given = failed(DataError("rows.jsonl:3: no prompt"), "student_train.data_args")
    assert given.field == "student_train.data_args" and isinstance(given.as_error(), DataError)
    assert str(given.as_error()) == "student_train.data_args: rows.jsonl:3: no prompt"
    assert str(failed(RollOPDError("no field at all"))) == "no field at all"


def test_yaml_spells_off_as_false(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare ``off`` as a boolean."""
    assert load(tmp_path, "preflight=false").config.preflight == "off"
    assert load(tmp_path).config.preflight == "full"
    with pytest.raises(ConfigError, match="preflight"):
        load(tmp_path, "preflight=true")


# ---- the probe -------------------------------------------------------------------------------------------------------


def scored(fakes: Any, old: list[float], infer: list[float], **teachers: list[float]) -> Any:
    """Two prompt tokens, then a response with these log-probabilities."""
    n = len(old)
    blank = [0.0, 0.0]
    return fakes.trajectory(
        response=n,
        old_logprobs=np.array(blank + old, dtype=np.float32),
        infer_logprobs=np.array(blank + infer, dtype=np.float32),
        teacher_scores={
            name.replace("_", " "): fakes.TeacherScores(np.array(blank + values, dtype=np.float32))
            for name, values in teachers.items()
        },
    )


def test_noise_floor(fakes: Any) -> None:
    # |-1 + 1.5| = 0.5, |-2 + 2| = 0; and |-3 + 2.75| = 0.25: mean 0.25 over three tokens, largest 0.5.
    batch = [scored(fakes, [-1, -2], [-1.5, -2]), scored(fakes, [-3], [-2.75])]
    floor = noise_floor(batch)
    assert (floor.mean, floor.max, floor.tokens) == (0.25, 0.5, 3)


@pytest.mark.parametrize(("dtype", "gap", "level"), [
    ("fp32", 0.0, "ok"), ("fp32", 5e-5, "warning"), ("fp32", 1e-3, "error"),
    ("bf16", 5e-4, "ok"), ("bf16", 5e-2, "warning"), ("bf16", 0.5, "error"),
])  # fmt: skip
def test_repeated_scores(fakes: Any, dtype: str, gap: float, level: str) -> None:
    first = [scored(fakes, [-1.0, -1.0], [-1.0, -1.0], t=[-2.0, -2.0])]
    again = [scored(fakes, [-1.0, -1.0], [-1.0, -1.0], t=[-2.0, -2.0 + gap])]
    found = list(judge(first, again, {"t": Scorer("teacher.t", dtype)}, pure=True))
    assert found[0].level == level and found[0].field == "teacher.t", found
    assert level == "ok" or dtype in found[0].message


def test_noise_against_the_signal(fakes: Any) -> None:
    scorers = {"t": Scorer("teacher.t", "fp32")}
    # Log-ratio 1 nat; noise 0.0625 is below a tenth of it, 0.125 above (numbers that float32 holds exactly).
    for noise, level in ((0.0625, "ok"), (0.125, "warning")):
        batch = [scored(fakes, [-1.0], [-1.0 + noise], t=[-2.0])]
        floor = list(judge(batch, batch, scorers, pure=True))[-1]
        assert (floor.field, floor.level) == ("probe/noise_floor", level)


def test_a_silent_teacher(fakes: Any) -> None:
    one = {"t": Scorer("teacher.t", "fp32")}
    same = [scored(fakes, [-1.0, -2.0], [-1.0, -2.0], t=[-1.0, -2.0])]

    def levels(batch: list[Any], scorers: dict[str, Scorer], **flags: bool) -> list[str]:
        return [f.level for f in judge(batch, batch, scorers, **flags) if "own probabilities" in f.message]

    assert levels(same, one, pure=True) == ["error"]
    assert levels(same, one, pure=False) == ["warning"]
    assert levels(same, one, pure=True, extrapolates=True) == []
    other = [scored(fakes, [-1.0], [-1.0], t=[-1.0 + 2**-16])]  # 1.5e-5 nats: some signal
    assert levels(other, one, pure=True) == []
    # With a second teacher that speaks, the run has a signal; a base model is no teacher.
    two = one | {"u": Scorer("teacher.u", "fp32")}
    assert levels([scored(fakes, [-1.0], [-1.0], t=[-1.0], u=[-3.0])], two, pure=True) == ["warning"]
    base = one | {BASE_MODEL: Scorer("opd_args.base_model", "fp32")}
    assert levels([scored(fakes, [-1.0], [-1.0], t=[-3.0], base_model=[-1.0])], base, pure=True) == []


def test_a_scorer_that_the_probe_missed(fakes: Any) -> None:
    batch = [scored(fakes, [-1.0], [-1.0], t=[-2.0])]
    scorers = {"t": Scorer("teacher.t", "fp32"), "u": Scorer("teacher.u", "fp32")}
    assert [f.field for f in judge(batch, batch, scorers, pure=True) if f.level == "skipped"] == ["teacher.u"]
    # Without teachers, in plain reinforcement learning, there is still a noise floor.
    assert [f.level for f in judge(batch, batch, {}, pure=False)] == ["ok"]


class _Row:
    def __init__(self, tag: str) -> None:
        self.tag = tag


class _Prompt:
    def __init__(self, tag: str) -> None:
        self.row = _Row(tag)


def test_prompts_of_the_probe_reach_every_scorer() -> None:
    prompts: list[Any] = [_Prompt(tag) for tag in "aaaaaabac"]
    assert [p.row.tag for p in pick_prompts(prompts, [["c"], ["a", "b"], []])] == ["a", "a", "a", "c"]
    assert [p.row.tag for p in pick_prompts(prompts, [])] == ["a"] * 4
    assert len(pick_prompts(prompts[:2], [["a"]])) == 2
    assert {p.row.tag for p in pick_prompts(prompts, [["a"], ["b"], ["c"], ["missing"]])} == {"a", "b", "c"}
    five: list[Any] = [_Prompt(tag) for tag in "xabcde"]
    assert [p.row.tag for p in pick_prompts(five, [[tag] for tag in "abcde"])] == list("abcde")
