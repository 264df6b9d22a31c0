"""Real data through the launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]


def test_three_steps_on_gsm8k(launch, tmp_path: Path) -> None:
    """The converter's output, byte-like tokens of the tiny tokenizer, and counts that add up."""
    original = tmp_path / "original.jsonl"
    rows = [json.loads(line) for line in (REPO / "data" / "gsm8k_sample.jsonl").read_text().splitlines()]
    prompt = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    original.write_text(
        "".join(
            json.dumps(
                {
                    "question": row["messages"][-1]["content"].removesuffix(prompt),
                    "answer": f"#### {row['ground_truth']}",
                }
            )
            + "\n"
            for row in rows
        )
    )
    converted = tmp_path / "gsm8k.jsonl"
    command = [sys.executable, str(REPO / "data" / "convert_gsm8k.py"), str(original), str(converted)]
    subprocess.run(command, check=True, capture_output=True)

    folder = tmp_path / "run"
    launched = launch(
        f"output_dir={folder}",
        "max_steps=3",
        "eval_steps=0",
        "rollout_batch_size=4",
        "prompt_length=320",
        "response_length=48",
        f"student_train.data_args.file_name={converted}",
        "rewards.math_rule.tag_included=[math_rule]",
    )
    assert launched.finish(240) == 0, launched.log.read_text()[-3000:]
    assert launched.left_behind() == []
    counts = json.loads((folder / "summary.json").read_text())["rows_train"]
    assert counts["read"] == len(rows) == counts["kept"] + counts["bad"]
    assert counts["kept"] == counts["used"] + counts["dropped_overlong"]
    assert counts["used"] > 0 and counts["dropped_overlong"] > 0
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    assert all(step["reward/graded"] == 1.0 and step["rollout/num_trajectories"] == 16 for step in steps)
