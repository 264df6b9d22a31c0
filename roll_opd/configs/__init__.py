"""Configs: YAML to typed, checked, immutable dataclasses with the roles mapped. Imports no torch, no ray."""

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.base_config import BaseConfig, CheckpointArguments, RayArguments
from roll_opd.configs.data_args import DataArguments
from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.configs.launch_checks import launch_blockers, launch_warnings
from roll_opd.configs.loader import (
    LoadedConfig,
    build_config,
    config_for_checkpoint_json,
    config_from_dict,
    config_to_dict,
    config_to_json,
    config_without_secrets,
    load_config,
)
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.configs.plan import plan_as_dict, render_plan_text
from roll_opd.configs.resume_checks import changed_fields, resume_conflicts
from roll_opd.configs.strategy_args import SequencePackingArguments, StrategyArguments
from roll_opd.configs.training_args import TrainingArguments
from roll_opd.configs.worker_config import RewardConfig, TeacherConfig, ValidationConfig, WorkerConfig

__all__ = [
    "AgenticConfig",
    "BaseConfig",
    "CheckpointArguments",
    "DataArguments",
    "GeneratingArguments",
    "LoadedConfig",
    "ModelArguments",
    "OPDArguments",
    "PipelineConfig",
    "RayArguments",
    "RLVRConfig",
    "RewardConfig",
    "SequencePackingArguments",
    "StrategyArguments",
    "TeacherConfig",
    "TrainingArguments",
    "ValidationConfig",
    "WorkerConfig",
    "build_config",
    "changed_fields",
    "config_for_checkpoint_json",
    "config_from_dict",
    "config_to_dict",
    "config_to_json",
    "config_without_secrets",
    "launch_blockers",
    "launch_warnings",
    "load_config",
    "plan_as_dict",
    "render_plan_text",
    "resume_conflicts",
]
