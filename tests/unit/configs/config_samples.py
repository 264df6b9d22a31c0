"""Raw configs that the tests of this folder start from."""

from __future__ import annotations

import copy
from typing import Any

PURE: dict[str, Any] = {
    "pretrain": "models/student",
    "rollout_batch_size": 4,
    "prompt_length": 64,
    "response_length": 32,
    "student_train": {
        "data_args": {"file_name": "train.jsonl"},
        "training_args": {"learning_rate": 1e-4, "per_device_train_batch_size": 4},
    },
    "student_infer": {"generating_args": {"temperature": 1.0}},
    "teacher": {"model_args": {"model_name_or_path": "models/teacher"}},
}
REWARD = {"worker_cls": "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker"}
RL: dict[str, Any] = {
    "pretrain": "models/student",
    "adv_estimator": "reinforce",
    "rollout_batch_size": 4,
    "actor_train": {"data_args": {"file_name": "train.jsonl"}},
    "actor_infer": {"infer_batch_size": 8},
    "rewards": {"math_rule": REWARD},
}
MIXED: dict[str, Any] = {**RL, "use_opd": True, "teacher": PURE["teacher"]}

LAKE: dict[str, Any] = {"env_type": "frozen_lake", "agent_template": "{observation}"}
AGENTIC: dict[str, Any] = {
    "pretrain": "models/student",
    "adv_estimator": "reinforce",
    "rollout_batch_size": 4,
    "sequence_length": 64,
    "actor_train": {"infer_batch_size": 8},
    "actor_infer": {"generating_args": {"max_new_tokens": 8}},
    "train_env_manager": {"num_env_groups": 2, "group_size": 2, "tags": ["Lake"]},
    "custom_envs": {"Lake": LAKE, "Pond": {**LAKE}},
}

DELETE = object()


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` with dotted paths set; the value DELETE removes one."""
    result = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if value is DELETE:
            del node[last]
        else:
            node[last] = value
    return result
