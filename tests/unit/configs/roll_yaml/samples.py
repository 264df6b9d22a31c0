"""Small configs that use every key that ROLL has, made from the table in ``roll_compat``."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from roll_opd.configs import AgenticConfig, PipelineConfig, RewardConfig, RLVRConfig, TeacherConfig
from roll_opd.configs.backends import SETTINGS
from roll_opd.configs.builder import field_types
from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.configs.roll_compat import RollKey, roll_keys

# Where the default says nothing, or would contradict another setting.
VALUES: dict[str, Any] = {
    "adv_estimator": "reinforce",
    "device_mapping": "list(range(0,4))",
    "world_size": 4,
    "model_name_or_path": "some/model",
    "pretrain": "some/model",
    "file_name": ["train.jsonl"],
    "strategy_config": {},
    # What Megatron has a rule for.
    "virtual_pipeline_model_parallel_size": 1,
    "recompute_granularity": "full",
    "worker_cls": "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker",
    "lora_target": "all-linear",
    "stop_strings": ["</answer>"],
    "norm_mean_type": "batch",
    "norm_std_type": "batch",
    "upper_bound": 1.2,
    "moe_aux_loss_coef": 0.001,
    "num_groups_partition": [128],
    "tags": ["Lake"],
    "env_type": "frozen_lake",
    "env_manager_cls": "roll.pipeline.agentic.env_manager.traj_env_manager.TrajEnvManager",
}
_PLAIN = (int, float, str, bool)
# ROLL's words for values of keys that are nothing here.
THEIRS: dict[str, Any] = {"rollout_mock": {"enable": True, "mode": "dump", "dump_dir": "dumps"}}


def block(cls: type, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Every key that ROLL has at the place of ``cls``, with a value."""
    types = field_types(typing.cast(Any, cls))
    defaults = cls()
    return {
        key: _value(key, known, types.get(key), getattr(defaults, key, None))
        for key, known in roll_keys(cls).items()
        if key not in skip
    }


def _value(key: str, known: RollKey, hint: Any, default: Any) -> Any:
    if known.status in ("ignored", "planned"):
        return THEIRS.get(key, dict.fromkeys(known.inner, "theirs") if known.inner else "theirs")
    if key in VALUES:
        return VALUES[key]
    options = (hint, *typing.get_args(hint))
    nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if nested is not None and typing.get_origin(hint) is list:
        return [block(typing.cast(type, nested))]
    if nested is not None and typing.get_origin(hint) is not dict:
        return block(typing.cast(type, nested))
    literal = next((option for option in options if typing.get_origin(option) is typing.Literal), None)
    if default is None and literal is not None:
        return typing.get_args(literal)[0]
    if default is None and any(typing.get_origin(option) is dict for option in options):
        return {}
    if default is None:
        return {int: 8, float: 0.5, str: "text", bool: True}.get(next((o for o in options if o in _PLAIN), int))
    return default


def config(launcher: str) -> dict[str, Any]:
    """A config of ROLL for ``launcher`` (``mixed``: RLVR with a teacher) with every key."""
    cls: type[PipelineConfig] = AgenticConfig if launcher == "agentic" else RLVRConfig
    teaching = launcher in ("onpolicy_distill", "mixed")
    skip = {"teacher", "student_train", "student_infer", "is_pure_opd", "use_opd", "rewards", "critic", "reference"}
    if launcher == "agentic":
        # Refused there: `reward_normalization` has both.
        skip |= {"norm_mean_type", "norm_std_type"}
    raw = block(cls, frozenset(skip | ({"kl_penalty"} if teaching else set())))
    raw |= {"prompt_length": 64, "response_length": 64, "sequence_length": 128}
    if launcher == "agentic":
        raw["custom_envs"] = {"Lake": block(EnvironmentConfig)}
    if launcher != "agentic":
        raw["rewards"] = {"math": block(RewardConfig)}
    if launcher == "onpolicy_distill":
        raw["student_train"], raw["student_infer"] = raw.pop("actor_train"), raw.pop("actor_infer")
    else:
        raw["critic"] = block(field_types(cls)["actor_train"])
    if launcher == "mixed":
        raw["use_opd"] = True
    if teaching:
        raw["teacher"] = block(TeacherConfig)
    else:
        raw["reference"] = block(field_types(cls)["actor_train"])
    train, infer = (
        ("student_train", "student_infer") if launcher == "onpolicy_distill" else ("actor_train", "actor_infer")
    )
    chosen = {train: "megatron_train", infer: "vllm", "teacher": "megatron_infer", "reference": "fsdp2_infer"}
    for role, strategy in chosen.items():
        if role in raw:
            raw[role]["strategy_args"] = {"strategy_name": strategy, "strategy_config": block(SETTINGS[strategy])}
    return raw
