"""What ROLL's files contain that we do not: keys we have no use for, and its class paths."""

from __future__ import annotations

from typing import Any


def split_names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_WORKER = split_names("""
    pg_variant model_update_frequency topr_positive_weight topr_negative_weight max_concurrency offload_nccl
    sequence_length_round_in_train sequence_length_round_in_infer apply_loss_scale mtp_training_mode router_replay
    reward_manager_config use_remove_padding
""")
_PIPELINE = split_names("""
    base_dir local_rank generate_opt_level is_num_return_sequences_expand max_running_requests router_args
    user_defined_rollout_loop_cls profiler_timeline profiler_memory length_profiler_dir profiler_output_dir
    otlp_output_dir report_length_and_rewards is_offload_states is_offload_optimizer_states_in_train_step
    model_download_type rollout_mock transfer_backend l2 target_kl kl_horizon enable_reference
    enable_old_logprobs_recompute force_disable_old_logprobs_recompute save_logging_board_dir val_greedy val_n_sample
    minibatch_data_iter_num val_prompt_length val_sequence_length reward reward_model balance_length reward_norm
    reward_shift reward_scale
""")

# By the name of our class; a subclass also ignores what its bases ignore.
IGNORED_KEYS: dict[str, frozenset[str]] = {
    "BaseConfig": _PIPELINE,
    "WorkerConfig": _WORKER,
    "ValidationConfig": _WORKER
    | split_names("model_args training_args strategy_args device_mapping world_size infer_batch_size eval_steps"),
    "ModelArguments": split_names("""
        autocast_adapter_dtype gradient_checkpointing_use_reentrant device_map flash_attn model_type num_labels
    """),
    "TrainingArguments": split_names("""
        output_dir max_steps num_train_epochs seed data_seed dataloader_num_workers fp16 bf16 tf32 save_hf_model
    """),
    "DataArguments": split_names("""
        response eval_file_name interleave_probs image_max_pixels image_min_pixels video_max_pixels video_min_pixels
        video_total_pixels video_fps video_max_frames video_resize_chunk_frames image_folder video_folder audio_folder
        custom_data_kwargs_func
    """),
    "GeneratingArguments": split_names("max_length length_penalty logprobs"),
    "CheckpointArguments": split_names("async_upload"),
}

_CLASS_PREFIXES = (("roll.pipeline.rlvr.rewards.", "roll_opd.rewards."), ("roll.", "roll_opd."))


def ignored_keys(cls: type) -> frozenset[str]:
    """Keys that ROLL accepted at the place of ``cls`` and that have no effect here."""
    names: frozenset[str] = frozenset()
    for base in cls.__mro__:
        names |= IGNORED_KEYS.get(base.__name__, frozenset())
    return names


def resolve_class_path(value: Any, path: str) -> Any:
    """Turn a class path of ROLL into ours; other values pass through."""
    if isinstance(value, str):
        for theirs, ours in _CLASS_PREFIXES:
            if value.startswith(theirs):
                return ours + value[len(theirs) :]
    return value
