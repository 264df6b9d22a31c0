"""Stop and go on: nothing may differ from a run that was never stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SETTINGS = {"max_steps": 10, "save_steps": 5, "eval_steps": 4, "rollout_batch_size": 16, "validation.max_prompts": 32}


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_resumed_run_equals_uninterrupted_run(run, launch, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = run(tmp_path / "whole", **SETTINGS)

    stopped = tmp_path / "stopped"
    arguments = [f"{k}={v}" for k, v in SETTINGS.items()] + [f"output_dir={stopped}"]
    first = launch(*arguments)
    first.wait_for((stopped / "checkpoints" / "checkpoint-5" / "state.json").exists, 180)
    first.process.send_signal(signal.SIGTERM)
    assert first.finish(60) == 128 + signal.SIGTERM
    assert first.left_behind() == []
    assert not (stopped / "summary.json").exists()

    second = launch(*arguments, "resume_from_checkpoint=true")
    assert second.finish(180) == 0, second.log.read_text()[-3000:]
    assert second.left_behind() == []
    assert second.log.read_text().splitlines()[-1] == str(stopped / "summary.json")
    summary = json.loads((stopped / "summary.json").read_text())

    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert without_times(rows) == without_times(whole.metrics)
    for name in ("accuracy_first", "accuracy_last", "reverse_kl_first", "reverse_kl_last", "steps"):
        assert summary[name] == whole.summary[name], name

    # Weights and optimizer, bit for bit: compare every tensor of the two distributed checkpoints.
    ours, theirs = Path(summary["checkpoint"]), Path(whole.summary["checkpoint"])
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    a, b = read_dcp(ours / "actor_train"), read_dcp(theirs / "actor_train")
    assert a.keys() == b.keys() and any("exp_avg_sq" in k for k in a)
    assert all((a[k] == b[k]).all() for k in a)


def read_dcp(folder: Path) -> dict:
    """All tensors of a torch distributed checkpoint, by name, read in one process."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat: dict = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", state)
    return flat


@pytest.mark.long
def test_resume_refuses_settings_that_would_mix_two_runs(run, tmp_path: Path) -> None:
    from roll_opd.errors import ConfigError

    settings = {"max_steps": 3, "save_steps": 1, "eval_steps": 0, "rollout_batch_size": 4}
    run(tmp_path / "run", **settings)
    changed = settings | {"max_steps": 4, "resume_from_checkpoint": True}
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*learning_rate"):
        run(tmp_path / "run", **changed, **{"student_train.training_args.learning_rate": 0.01})
    older = changed | {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoints" / "checkpoint-1")}
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*seed"):
        run(tmp_path / "run", **older, seed=7)
    # Which has moved nothing: the newest checkpoint is still the one to go on from.
    assert run(tmp_path / "run", **changed).summary["steps"] == 4


def test_a_checkpoint_with_hugging_face_files_loads_in_a_fresh_process(run, tmp_path: Path) -> None:
    import subprocess
    import sys

    settings = {"max_steps": 3, "save_steps": 1, "eval_steps": 0, "rollout_batch_size": 8}
    finished = run(tmp_path / "run", **settings, **{"student_train.training_args.save_hf_model": True})
    last = Path(finished.summary["checkpoint"])
    first = last.with_name("checkpoint-1")
    assert first != last and (last / "model.safetensors").exists()
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer as T; p = sys.argv[1]; "
        "m = AutoModelForCausalLM.from_pretrained(p); t = T.from_pretrained(p); "
        "x = t.apply_chat_template([{'role': 'user', 'content': 'Sort these digits: 3 1 2'}], "
        "add_generation_prompt=True, return_tensors='pt', return_dict=True); "
        "print(m.generate(**x, max_new_tokens=8).shape[1] > x['input_ids'].shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(first)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
