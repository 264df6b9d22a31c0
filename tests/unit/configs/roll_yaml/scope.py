"""Which of ROLL's example files belong to the pipelines that exist here, and which launcher they are written for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# ROLL's launchers: ours, or None for a pipeline that we do not have.
LAUNCHERS: dict[str, str | None] = {
    "onpolicy_distill": "onpolicy_distill",
    "rlvr": "rlvr",
    "rlvr_rollout": "rlvr",
    "agentic": "agentic",
    "agentic_rollout": "agentic",
    "rlvr_vl": None,
    "sft": None,
    "dpo": None,
    "distill": None,
    "distill_vl": None,
}
# What only files of other pipelines have, for folders without a script.
_OTHERS = re.compile(r"^(sft_train|chosen_key|student_pretrain|reward_system_config):|rlvr_vlm|vl_traj_envs", re.M)
_AGENTS = re.compile(r"^(custom_envs|train_env_manager):", re.M)
# `defaults` of the one names a file that ROLL does not ship; the other is an empty file.
_EXEMPT = ("agentic_demo/atropos_gsm8k_grpo_qwen25_0.5b.yaml", "qwen2.5-0.5B-agentic/agentic_val_webshop.yaml")


@dataclass(frozen=True)
class Example:
    """A YAML file of ROLL."""

    path: Path
    launcher: str
    in_scope: bool


def examples(checkout: Path) -> list[Example]:
    """Every YAML file under ``examples`` of a checkout of ROLL, without the fragments."""
    root = checkout / "examples"
    files = sorted(path for path in root.rglob("*.yaml") if path.parent != root / "config")
    return [_example(root, path) for path in files]


def _example(root: Path, path: Path) -> Example:
    scripts = " ".join(script.read_text(encoding="utf-8") for script in sorted(path.parent.glob("*.sh")))
    started = dict.fromkeys(re.findall(r"start_(\w+)_pipeline\.py", scripts))
    text = path.read_text(encoding="utf-8")
    if started:
        ours = [LAUNCHERS[name] for name in started]
        launcher = next((name for name in ours if name), None)
    else:
        launcher = "agentic" if _AGENTS.search(text) else "rlvr"
    exempt = str(path.relative_to(root)) in _EXEMPT
    in_scope = launcher is not None and not exempt and not _OTHERS.search(text)
    return Example(path, launcher or "rlvr", in_scope)
