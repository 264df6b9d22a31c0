"""A whole run with every role on one GPU: turns, vLLM's sleep mode, weights by IPC handles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REPO = Path(__file__).parents[2]
QUICKSTART = REPO / "examples" / "quickstart"
OVERRIDES = [
    "student_train.device_mapping=[0]",
    "student_infer.device_mapping=[0]",
    "teacher.device_mapping=[0]",
    "student_infer.strategy_args.strategy_name=vllm",
    "+student_infer.strategy_args.strategy_config.gpu_memory_utilization=0.3",
    "num_gpus_per_node=1",
]


def test_the_quickstart_learns_on_one_gpu(tmp_path: Path) -> None:
    launcher = REPO / "examples" / "start_onpolicy_distill_pipeline.py"
    command = [sys.executable, str(launcher), "--config_path", str(QUICKSTART), "--config_name", "onpolicy_distill"]
    subprocess.run([*command, f"output_dir={tmp_path}", *OVERRIDES], check=True, cwd=REPO, timeout=900)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy_last"] - summary["accuracy_first"] >= 0.30, summary
    assert summary["reverse_kl_last"] <= 0.5 * summary["reverse_kl_first"], summary
