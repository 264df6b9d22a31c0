"""What the processes of a run are set up with, without starting any."""

from __future__ import annotations

from typing import Any

import pytest

from roll_opd.configs import build_config
from roll_opd.pipeline.role_clusters import RoleClusters, scorers_of

AGENTIC: dict[str, Any] = {
    "pretrain": "models/student",
    "adv_estimator": "reinforce",
    "use_opd": True,
    "rollout_batch_size": 2,
    "sequence_length": 4096,
    "actor_train": {"infer_batch_size": 8},
    "actor_infer": {"infer_batch_size": 8},
    "train_env_manager": {"num_env_groups": 2, "tags": ["Lake"]},
    "custom_envs": {"Lake": {"env_type": "frozen_lake"}},
}
PROMPTS: dict[str, Any] = {
    "pretrain": "models/student",
    "adv_estimator": "reinforce",
    "use_opd": True,
    "rollout_batch_size": 2,
    "prompt_length": 512,
    "actor_train": {"data_args": {"file_name": "train.jsonl"}},
    "actor_infer": {"infer_batch_size": 8},
    "rewards": {"math": {"worker_cls": "roll_opd.rewards.math_rule_reward_worker.MathRuleRewardWorker"}},
}


def longest(raw: dict[str, Any], **teacher_args: Any) -> dict[str, int]:
    """Role -> tokens of the longest sequence that its model is told of."""
    teacher = {"model_args": {"model_name_or_path": "models/teacher"}, "teacher_args": teacher_args}
    loaded = build_config({**raw, "teacher": teacher}, "agentic" if "custom_envs" in raw else "rlvr")
    clusters = object.__new__(RoleClusters)
    clusters.config, clusters.scorer_configs = loaded.config, scorers_of(loaded.config)
    clusters.scorers = dict.fromkeys(clusters.scorer_configs, None)  # type: ignore[assignment]
    clusters.train = clusters.infer = clusters.critic = None  # type: ignore[assignment]
    clusters.yaml_names = {**loaded.yaml_names, "teacher-default": "teacher"}
    return {role: arguments[-1] for role, _, arguments in clusters._model_setups() if role != "actor_train"}


@pytest.mark.parametrize(
    ("raw", "teacher_args", "room"),
    [
        ({**AGENTIC, "response_length": 256}, {}, 4096),
        # Up to 1024 tokens of its own prompt, and the rest of the episode, whatever a turn may have.
        ({**AGENTIC, "response_length": 256}, {"context_template": "{{ prompt }}", "context_length": 1024}, 5120),
        (AGENTIC, {"context_template": "{{ prompt }}", "context_length": 1024}, 5120),
        ({**PROMPTS, "response_length": 256}, {}, 768),
        ({**PROMPTS, "response_length": 256}, {"context_template": "{{ prompt }}", "context_length": 1024}, 1280),
        # A teacher whose own prompt is shorter may still answer the student's, in validation.
        ({**PROMPTS, "response_length": 256}, {"context_template": "{{ prompt }}", "context_length": 64}, 768),
    ],
)
def test_scorers_have_room_for_what_they_see(raw: dict[str, Any], teacher_args: dict[str, Any], room: int) -> None:
    told = longest(raw, **teacher_args)
    assert told == {"teacher-default": room, "actor_infer": raw.get("sequence_length", 768)}
