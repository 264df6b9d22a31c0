"""What becomes of every key of ROLL's configs here: the loader and ``docs/roll_compatibility.md`` read this one table.

A key that ROLL has is the same here, has a fixed behaviour, is ignored with one warning, or loads for a plan only. Keys
of pipelines that we do not have are refused, and a key that is in neither table nor dataclass is an error. The classes
are ours; where ROLL's is called otherwise, ``ROLL_CLASSES`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["same", "fixed", "ignored", "planned"]


@dataclass(frozen=True)
class RollKey:
    """What happens to one key."""

    status: Status
    """`same` and `fixed` are fields of our class; `ignored` and `planned` are not."""
    note: str = ""
    """How the behaviour was fixed, or why the key is ignored or only planned."""
    harmless: tuple[Any, ...] = ()
    """Values of a `planned` key that ask for nothing: a launch goes on. Null is always one. A mapping stands for every
    mapping that agrees with it where both have a key."""
    inner: tuple[str, ...] = ()
    """Keys of an ignored or planned block, so that a typo in them is found."""

    def asks(self, value: Any) -> bool:
        """True when ``value`` wants something that only a plan can promise."""
        if self.status != "planned" or value is None or value in self.harmless:
            return False
        if isinstance(value, Mapping):
            blocks = [harmless for harmless in self.harmless if isinstance(harmless, Mapping)]
            return bool(value) and not any(
                all(value.get(key, off) == off for key, off in block.items()) for block in blocks
            )
        return True


def split_names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _same(names: str) -> dict[str, RollKey]:
    return {name: RollKey("same") for name in names.split()}


def _fixed(**notes: str) -> dict[str, RollKey]:
    return {name: RollKey("fixed", note) for name, note in notes.items()}


def _ignored(note: str, names: str) -> dict[str, RollKey]:
    return {name: RollKey("ignored", note) for name in names.split()}


def _planned(note: str, *harmless: Any, names: str, inner: str = "") -> dict[str, RollKey]:
    return {name: RollKey("planned", note, harmless, tuple(inner.split())) for name in names.split()}


def _ignored_block(note: str, name: str, inner: str) -> dict[str, RollKey]:
    return {name: RollKey("ignored", note, inner=tuple(inner.split()))}


_UNREAD = "ROLL's own code never reads it"
_UNKNOWN_THERE = "a word of ROLL's YAML files that is no field there; ROLL drops it"
_ENGINE = "how requests are spread over engines is not the user's business here; results do not depend on it"
_MEDIA = "pictures, video and sound are out of scope"
_LOGS = "no profiler and no second log folder here"
_SPEED = "a matter of speed or memory, which this version decides by itself"
_MORE = "a matter of speed or memory; `engine_args` hands a setting to vLLM as it is"
_DTYPE = "`model_args.dtype` decides; a launch refuses another value"
_OFFLOAD = "decided by the placement: roles that share devices are offloaded around their turn"

_WORKER_REST = {
    **_ignored("off; ROLL forces it to false as well", "offload_nccl"),
    **_ignored("our rows are never padded", "use_remove_padding sequence_length_round_in_train"),
    **_ignored("our rows are never padded", "sequence_length_round_in_infer"),
    **_ignored("every loss is a sum over the whole batch, so there is nothing to undo", "apply_loss_scale"),
    **_planned("weights are synced at every step", 1, names="model_update_frequency"),
    **_ignored("follows from what the actor does", "max_concurrency"),
    **_planned("another policy loss than the pipeline's", names="pg_variant"),
    **_planned("weighs TOPR's parts", 1, 1.0, names="topr_positive_weight topr_negative_weight"),
    **_planned("multi-token prediction is not trained", "disabled", names="mtp_training_mode"),
    **_planned("expert choices are not replayed", {"mode": "disable"}, names="router_replay", inner="mode"),
}

# By the name of our class; a subclass also has what its bases have.
ROLL_KEYS: dict[str, dict[str, RollKey]] = {
    "BaseConfig": {
        **_same("exp_name seed rpc_timeout rollout_dump_dir tracker_kwargs max_steps save_steps max_ckpt_to_keep"),
        **_same("logging_steps eval_steps rollout_batch_size val_batch_size sequence_length system_envs"),
        **_same("model_update_buffer_size_mb num_nodes"),
        **_fixed(
            output_dir="the run's folder as it is written, without a time stamp, so that a run is found again",
            logging_dir="one log file a process in this folder itself; `output_dir`/logs when left out",
            track_with="several trackers at once as a list; an unknown name is refused",
            resume_from_checkpoint="`true` finds the newest complete checkpoint, because folders have no time stamp; "
            "and is an error when there is none",
            checkpoint_config="`output_dir` is taken as it is written, without a time stamp; keys of storage services "
            "are reported as having no effect",
            prompt_length="longer prompts are dropped and counted, never cut",
            response_length="kept beside `sequence_length`, and bounds the response",
            num_gpus_per_node="taken as written for the plan; the live cluster decides at launch",
        ),
        **_ignored(_UNREAD, "base_dir local_rank report_length_and_rewards length_profiler_dir"),
        **_ignored(_LOGS, "profiler_timeline profiler_memory profiler_output_dir otlp_output_dir"),
        **_ignored(_OFFLOAD, "is_offload_states is_offload_optimizer_states_in_train_step"),
        **_ignored("a model is a folder or a hub name; `HF_ENDPOINT` chooses the hub", "model_download_type"),
        **_planned("validation has the lengths of training", names="val_prompt_length val_sequence_length"),
        **_ignored(_ENGINE, "generate_opt_level is_num_return_sequences_expand max_running_requests"),
        **_ignored_block(_ENGINE, "router_args", "router_name router_config max_running_requests"),
        **_ignored_block("data travels through Ray's object store", "transfer_backend", "backend_name backend_config"),
        **_planned("a loop of ROLL's own classes", names="user_defined_rollout_loop_cls"),
        **_planned(
            "recording and replaying rollouts", {"enable": False}, names="rollout_mock", inner="enable mode dump_dir"
        ),
    },
    "PipelineConfig": {
        **_same(
            "reward_pretrain actor_train actor_infer student_train student_infer async_generation_ratio ppo_epochs"
        ),
        **_same("max_grad_norm lambd pg_clip use_pg_clip_range pg_clip_low pg_clip_high value_clip target_kl"),
        **_same("kl_horizon advantage_clip norm_mean_type norm_std_type critic_warmup entropy_loss_coef"),
        **_same("dual_clip_loss pure_opd_pipeline_type"),
        **_fixed(
            pretrain="the student's roles fall back on it one by one; a teacher never does",
            reference="refused beside a teacher in mixed mode, which takes its place; needed only where something "
            "reads it",
            critic="built for `gae` only; without a path of its own it takes `reward_pretrain`, else the student's",
            teacher="an explicit path is never replaced by `pretrain`, and a teacher without one is refused; a "
            "mapping is read as one worker config or as several by its keys; a list is refused; works beside LoRA",
            is_pure_opd="`student_*` together with `actor_*` is refused; rewards are optional and only monitor",
            use_opd="the teacher's term joins the advantage after whitening (`opd_args.apply_to`), with "
            "log-probabilities of the student from the trainer",
            kl_penalty="an unknown value is refused; beside a teacher it is an alias of `opd_args`, and `abs`, `mse` "
            "and `full` are refused as a policy-gradient score",
            loss_agg_mode="an unknown value is refused; all modes count over the whole batch, so that micro-batches "
            "and ranks do not change the loss; `seq-mean-token-sum-norm` divides by the number of sequences times the "
            "length limit, where ROLL divides by the padded length alone",
            reward_clip="bounds the external reward before it is normalised, and nothing else; ROLL bounds the "
            "normalised reward, and the token rewards once more after the KL",
            adv_estimator="an unknown value is refused; pure distillation uses plain `reinforce`; `gae` without a "
            "critic is refused",
            gamma="pure distillation uses 0",
            whiten_advantages="never in pure distillation, where it would cancel `opd_kl_coef`",
            whiten_rewards="never in pure distillation, where it would cancel `opd_kl_coef`",
            init_kl_coef="no effect in pure distillation, and none that only switches a reference on",
            add_token_level_kl="off in pure distillation",
            use_kl_loss="off in pure distillation; without it, or without a reference, `kl_loss_coef` does nothing",
            kl_loss_coef="off in pure distillation",
            train_infer_correction="the weight and the filters compare trainer and engine on the sampled tokens only",
        ),
        **_ignored(_UNREAD, "l2 reward"),
        **_ignored("a reference runs where something reads it", "enable_reference"),
        **_ignored(
            "`opd_args.student_logprob_source` decides; the trainer's forward is the default",
            "enable_old_logprobs_recompute force_disable_old_logprobs_recompute",
        ),
    },
    "RLVRConfig": {
        **_same(
            "num_return_sequences_in_group is_use_additional_prompts max_additional_running_prompts dataset_filter"
        ),
        **_same("difficulty_loss_weight length_loss_weight use_topr_neg_loss_coef use_policy_loss_type use_topr_loss"),
        **_same("rl_loss_coef importance_sampling max_len_mask mask_type difficulty_mask difficulty_low_threshold"),
        **_same("difficulty_high_threshold error_max_len_threshold"),
        **_same("use_reward_scaling use_reward_norm add_len_reward"),
        **_fixed(
            postive_loss_coef="`positive_loss_coef` is the same key; ROLL drops it",
            error_max_len_clip="leaves out long responses with a score of 0 or less; ROLL keeps a score of exactly 1, "
            "and of exactly 0 for a short response, and leaves out every other one",
            rewards="optional in pure distillation, where they never filter, delay or stop training",
            validation="`data_args` and `generating_args` count; devices and model are the student's",
            global_template="the tokenizer's own chat template is used, and a warning says so",
            tag_to_template="the tokenizer's own chat template is used, and a warning says so",
        ),
        **_ignored(_UNREAD, "val_greedy val_n_sample balance_length minibatch_data_iter_num"),
        **_ignored(_UNKNOWN_THERE, "reward_norm reward_shift reward_scale"),
        **_ignored(_LOGS, "save_logging_board_dir"),
        **_planned("a cluster of judge models", names="reward_model"),
    },
    "AgenticConfig": {
        **_same(
            "custom_envs train_env_manager val_env_manager render_save_dir reward reward_normalization env_monitor"
        ),
        **_same("use_token_reward episode_reward_weight step_reward_weight step_reward_gamma ratio_type"),
        **_fixed(
            norm_mean_type="refused; `reward_normalization` decides",
            norm_std_type="refused; `reward_normalization` decides",
            batch_adjust_mode="no row is trained twice and none is left out: a rollout that does not divide ends in a "
            "smaller optimizer step",
        ),
        **_ignored(_UNREAD, "dirty_data_mask open_feedback_turn use_reward_scaling use_reward_norm add_len_reward"),
        **_ignored("environments bring the prompts", "is_use_additional_prompts max_additional_running_prompts"),
        **_ignored("follows from the placement", "partial_gpu_mode"),
        **_ignored("episodes are tokens from the start, so no system prompt is mocked", "skip_mock_system_prompt"),
        **_planned("a mode of ROLL's sandbox environments", "train", names="exp_mode"),
        **_planned("environments of ROLL that parse tool calls", False, names="parse_tool_call_parameter_to_dict"),
        **_ignored(_UNKNOWN_THERE, "reward_norm reward_shift reward_scale"),
    },
    "WorkerConfig": {
        **_same("name model_args training_args data_args generating_args strategy_args infer_batch_size"),
        **_same("backend_timeout system_envs use_dynamic_batching_in_train max_tokens_per_microbatch_in_train"),
        **_same(
            "use_dynamic_batching_in_infer max_tokens_per_microbatch_in_infer sequence_packing_args logits_in_fp32"
        ),
        **_fixed(
            worker_cls="`roll.` paths resolve to ours",
            device_mapping="`list(range(0,8))` and the like are parsed, never evaluated; a list and a range work too",
            world_size="follows from `device_mapping`; counts CPU processes without one",
            num_gpus_per_worker="set by the strategy where it decides: vLLM's parallel sizes, 1 for trainers",
            use_sequence_packing="rows are always packed without padding; `true` adds the limits of "
            "`sequence_packing_args`",
        ),
        **_WORKER_REST,
        **_ignored("read for teachers and rewards only", "opd_kl_coef tag_included"),
    },
    "TeacherConfig": _same("opd_kl_coef tag_included"),
    "RewardConfig": {
        **_same("code_url use_local judge_prompt judge_model_type judge_model_name judge_api_url judge_api_key"),
        **_same("format_pattern reward_type response_length_penalty_coef tag_included"),
        **_fixed(
            query_filter_config="never filters in pure distillation",
            response_filter_config="never filters in pure distillation",
        ),
        **_planned("a judging service of ROLL's makers", [], names="reward_manager_config"),
    },
    "RewardFilterArguments": _same("type filter_args"),
    "ValidationConfig": {
        **_same("data_args generating_args"),
        **_ignored(
            "validation samples with the student's engine and devices",
            "name worker_cls model_args training_args strategy_args device_mapping world_size num_gpus_per_worker "
            "infer_batch_size system_envs backend_timeout logits_in_fp32 opd_kl_coef tag_included "
            "use_sequence_packing sequence_packing_args use_dynamic_batching_in_train "
            "max_tokens_per_microbatch_in_train use_dynamic_batching_in_infer max_tokens_per_microbatch_in_infer",
        ),
        **_ignored("the pipeline's `eval_steps` decides; " + _UNKNOWN_THERE, "eval_steps"),
        **_WORKER_REST,
    },
    "ModelArguments": {
        **_same("additional_target lora_alpha lora_dropout lora_rank moe_aux_loss_coef dtype model_config_kwargs"),
        **_same("disable_gradient_checkpointing freeze_module_prefix ulysses_size adapter_name_or_path"),
        **_fixed(
            model_name_or_path="a role without one falls back on its own, and never changes another role's",
            lora_target="works with a teacher; `all-linear` takes every linear layer",
            attn_implementation="`auto` and null take the fastest kernel that the machine has",
        ),
        **_ignored("set by the trainer", "autocast_adapter_dtype gradient_checkpointing_use_reentrant device_map"),
        **_ignored("the role decides which head a model gets", "model_type num_labels"),
        **_ignored("`attn_implementation` decides; " + _UNKNOWN_THERE, "flash_attn"),
    },
    "TrainingArguments": {
        **_same("lr_scheduler_type weight_decay adam_beta1 adam_beta2 gradient_accumulation_steps warmup_ratio"),
        **_same("warmup_steps save_hf_model"),
        **_fixed(
            learning_rate="1e-6 when left out, where ROLL has 5e-5",
            per_device_train_batch_size="1 when left out, where ROLL has 8",
        ),
        **_ignored("the pipeline's own setting decides", "output_dir max_steps seed"),
        **_ignored("a run is counted in pipeline steps", "num_train_epochs"),
        **_ignored("`model_args.dtype` decides", "fp16 bf16"),
        **_ignored(_UNREAD, "data_seed tf32"),
        **_ignored("rows are read once, at the start", "dataloader_num_workers"),
    },
    "DataArguments": {
        **_same("domain_interleave_probs preprocessing_num_workers file_name tag id"),
        **_fixed(
            template="the tokenizer's own chat template is used, and a warning says so",
            dataset_type="one format for all files of a block",
            prompt="may stand beside `messages`, which wins",
            messages="a list works as well as JSON text",
            dataset_dir="tried for a file that is not found under its own path; ROLL drops the key",
        ),
        **_ignored("there is no response column: the student writes the response", "response"),
        **_ignored("`validation.data_args.file_name` decides", "eval_file_name"),
        **_ignored("`domain_interleave_probs` decides; " + _UNKNOWN_THERE, "interleave_probs"),
        **_ignored(_MEDIA, "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_total_pixels"),
        **_ignored(_MEDIA, "video_fps video_max_frames video_resize_chunk_frames image_folder video_folder"),
        **_ignored(_MEDIA, "audio_folder custom_data_kwargs_func"),
    },
    "GeneratingArguments": {
        **_same("do_sample repetition_penalty stop_strings"),
        **_fixed(
            temperature="1 when left out, where ROLL has 0.95; log-probabilities of the loss are always at 1",
            top_p="1 when left out, where ROLL has 0.7",
            top_k="0 (all tokens) when left out, where ROLL has 50; -1 means the same",
            num_beams="must be 1: a beam is not a sample of the policy",
            max_new_tokens="`response_length` when left out, where ROLL has 8192",
            num_return_sequences="`num_return_sequences_in_group` decides in training",
            include_stop_str_in_output="true when left out: the tokens were sampled, so they are trained",
        ),
        **_ignored("`max_new_tokens` decides", "max_length"),
        **_ignored("only beam search reads it", "length_penalty"),
        **_ignored("engines always report the log-probability of what they sampled", "logprobs"),
    },
    "StrategyArguments": {
        **_fixed(
            strategy_config="checked like any other block, by the backend's own table below",
            strategy_name="`sglang` plans with a warning and is refused at launch; a strategy that cannot do the "
            "role's job is refused",
        ),
    },
    "VLLMSettings": {
        **_same("tensor_parallel_size pipeline_parallel_size gpu_memory_utilization block_size max_model_len"),
        **_same("max_num_batched_tokens max_num_seqs enforce_eager enable_prefix_caching enable_chunked_prefill"),
        **_same("sleep_level"),
        **_fixed(
            load_format="`auto` when left out, where ROLL has `dummy`",
        ),
        **_ignored(_MEDIA, "disable_mm_preprocessor_cache limit_mm_per_prompt"),
        **_ignored(_MORE, "cuda_graph_sizes cudagraph_capture_sizes optimization_level disable_custom_all_reduce"),
        **_ignored("an engine's processes belong to its worker", "distributed_executor_backend"),
        **_ignored("engines report through the run's metrics", "disable_log_stats"),
        **_ignored("V1 is the engine that vLLM has", "VLLM_USE_V1"),
        **_ignored("adapters are merged into the weights that engines get", "max_loras max_lora_rank"),
        **_planned("`device_mapping` says how many engines there are", 1, names="data_parallel_size"),
        **_planned("log-probabilities are those at temperature 1", "raw_logprobs", names="logprobs_mode"),
    },
    "MegatronSettings": {
        **_same("tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size"),
        **_same("context_parallel_size expert_model_parallel_size recompute_num_layers overlap_grad_reduce"),
        **_same("moe_grouped_gemm"),
        **_fixed(
            sequence_parallel="a warning says so where there is one tensor-parallel rank",
            use_distributed_optimizer="true when left out, where ROLL has false",
            recompute_granularity="`selective` recomputes attention",
            recompute_method="`uniform` when left out",
            moe_token_dispatcher_type="`alltoall` when left out, where ROLL has `allgather`",
        ),
        **_ignored("layers are divided evenly", "account_for_embedding_in_pipeline_split"),
        **_ignored("layers are divided evenly", "account_for_loss_in_pipeline_split pipeline_model_parallel_layout"),
        **_ignored("`recompute_granularity` decides", "recompute_modules moe_layer_recompute"),
        **_ignored(_SPEED, "bias_activation_fusion apply_rope_fusion cross_entropy_loss_fusion overlap_p2p_comm"),
        **_ignored(_SPEED, "delay_grad_reduce overlap_param_gather ddp_bucket_size ddp_average_in_collective"),
        **_ignored(_SPEED, "moe_shared_expert_overlap moe_permute_fusion expert_tensor_parallel_size compile_warmup"),
        **_ignored(_SPEED, "optimizer_cpu_offload optimizer_offload_fraction transformer_impl cuda_graph_impl"),
        **_ignored(_SPEED, "cuda_graph_scope"),
        **_ignored("sequences always have their own lengths", "variable_seq_lengths sequence_packing"),
        **_ignored("every loss is a sum over the whole batch", "calculate_per_token_loss"),
        **_ignored("gradients are always reduced in fp32", "accumulate_allreduce_grads_in_fp32"),
        **_ignored("a gradient that is not finite always stops the run", "check_for_nan_in_loss_and_grad"),
        **_ignored("checkpoints have one format", "ckpt_format ckpt_d2h_non_blocking distrib_optim_fully_reshardable"),
        **_ignored("checkpoints have one format", "distrib_optim_fully_reshardable_mem_efficient save_merged_model"),
        **_ignored("`training_args.save_hf_model` decides", "save_hf_model"),
        **_ignored(_DTYPE, "bf16 fp16"),
        **_ignored("the pipeline's `max_grad_norm` decides; a launch refuses another value", "max_grad_norm"),
        **_planned("`training_args.optimizer` decides", "adam", names="optimizer"),
        **_planned("the load-balancing loss of experts is not trained", 0, 0.0, names="moe_aux_loss_coeff"),
        **_planned(
            "experts take all of their tokens",
            False,
            "probs",
            names="moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy",
        ),
        **_planned("expert choices are not replayed", False, names="moe_enable_routing_replay"),
        **_planned("routers compute in fp32", "fp32", names="moe_router_dtype"),
        **_planned("multi-token prediction is not trained", 0, names="mtp_num_layers"),
        **_planned("no fp8", False, names="fp8 fp8_recipe fp8_param"),
        **_planned("further settings of Megatron-core", names="additional_configs"),
    },
    "FSDP2Settings": {
        **_same("reshard_after_forward offload_policy"),
        **_ignored("weights are spread over all ranks of the role", "fsdp_size efsdp_size ep_size"),
        **_ignored("each layer is a unit", "wrap_policy"),
        **_ignored(_SPEED, "moe_use_grouped_mm apply_expert_patch apply_tiled_mlp tiled_num_shards model_type"),
        **_ignored(_SPEED, "use_batched_model_update reduce_scatter_during_grad_accumulation"),
        **_ignored("gradients are always reduced in fp32", "reduce_dtype"),
        **_ignored("a checkpoint is always whole, and waited for", "async_save_ckpt save_only_model"),
        **_ignored(_DTYPE, "param_dtype"),
    },
    "SequencePackingArguments": _same(
        "algorithm max_packed_sequence_length_forward max_packed_sequence_length_train min_num_micro_batches_forward "
        "min_num_micro_batches_train"
    ),
    "TrainInferCorrectionArguments": _same("is_weight filters"),
    "TrainInferWeightArguments": _same("enabled weight_type upper_bound detach"),
    "TrainInferFilterArguments": _same(
        "enabled agg_type ratio_enabled ratio_low ratio_high diff_enabled diff_low diff_high"
    ),
    "EnvManagerConfig": {
        **_same("num_env_groups group_size group_size_redundancy format_penalty max_env_num_per_worker"),
        **_fixed(
            llm_proxy="only `policy` runs",
            tags="no default, where ROLL has `SimpleSokoban`; without tags in `val_env_manager` there is no validation",
            num_groups_partition="shared out evenly when left out, where ROLL has `[128]`; what does not add up to "
            "`num_env_groups` is refused",
            max_traj_per_env="checked against the batch, and otherwise without effect",
            group_filter_cls="ROLL's default, which keeps every group, is null here",
        ),
    },
    "EnvironmentConfig": {
        **_same("env_config max_steps max_tokens_per_step use_thread_lock history_length agent_system_template"),
        **_same("max_env_step_concurrent tool_wrapper"),
        **_fixed(
            env_type="the short names of environments that exist here, `gym:<id>`, `gem:<id>`, GEM's own names, or the "
            "import path of a class; an unknown one is refused at launch",
            env_manager_cls="`TrajEnvManager` and `StepEnvManager` choose `episode_mode`; other managers are planned "
            "only",
            agent_runner_cls="planned only",
            agent_template="an unknown field, or none that shows the observation, is refused",
        ),
        **_planned(_MEDIA, "", names="pre_step_template next_step_template"),
    },
    "ToolWrapperConfig": _same("wrapper_args tool_configs"),
    "ToolWrapperArguments": _same("tool_reward tool_success_reward max_tool_uses"),
    "ToolConfig": {
        **_same("tool_args"),
        **_fixed(tool_id="`python_code`, or the import path of a class; `search` and `mcp` are refused"),
    },
    "EnvRewardConfig": _same("llm_proxy"),
    "LLMProxyArguments": _same("proxy_type proxy_config"),
    "RewardNormalizationArguments": {
        **_same("grouping method norm_mean_type norm_std_type"),
        **_ignored(_UNREAD, "global_scale_factor global_shift_value"),
    },
    "EnvMonitorArguments": _same("enable monitor_interval hung_timeout"),
    "CheckpointArguments": {
        **_same("type"),
        **_fixed(output_dir="taken as it is written, without a time stamp"),
        **_ignored("a step waits until its checkpoint is complete", "async_upload"),
    },
}

# Which backend reads each table of settings.
BACKENDS: dict[str, str] = {"VLLMSettings": "vllm", "MegatronSettings": "megatron", "FSDP2Settings": "fsdp2"}
# A role that changes to `hf_infer`, on the command line say, leaves the other backend's settings behind.
ROLL_KEYS["HFSettings"] = {
    name: RollKey("ignored", "a setting of another backend: `hf_infer` has none")
    for cls in BACKENDS
    for name in ROLL_KEYS[cls]
}

# ROLL's names of the classes above, where they differ.
ROLL_CLASSES: dict[str, str] = {
    "BaseConfig": "BaseConfig, ScheduleConfig",
    "PipelineConfig": "PPOConfig",
    "TeacherConfig": "WorkerConfig as `teacher`",
    "RewardFilterArguments": "RewardFilterConfig",
    "ValidationConfig": "WorkerConfig as `validation`",
    "ModelArguments": "ModelArguments, LoraArguments",
    "VLLMSettings": "vLLM's `EngineArgs`",
    "MegatronSettings": "`mcore_adapter.TrainingArguments`",
    "FSDP2Settings": "a plain mapping",
    "HFSettings": "a plain mapping",
    "SequencePackingArguments": "SequencePackingConfig",
    "TrainInferCorrectionArguments": "TrainInferCorrectionConfig",
    "TrainInferWeightArguments": "TrainInferISWeightConfig",
    "TrainInferFilterArguments": "TrainInferFilterConfig",
    "EnvRewardConfig": "RewardConfig of the agentic pipeline",
    "LLMProxyArguments": "LLMProxyConfig",
    "RewardNormalizationArguments": "RewardNormalizationConfig",
    "EnvMonitorArguments": "EnvMonitorConfig",
    "EnvironmentConfig": "an entry of `custom_envs`, a plain mapping in ROLL",
    "ToolWrapperConfig": "`tool_wrapper`, a plain mapping in ROLL",
    "ToolWrapperArguments": "`tool_wrapper.wrapper_args`, a plain mapping in ROLL",
    "ToolConfig": "`tool_wrapper.tool_configs`, plain mappings in ROLL",
    "CheckpointArguments": "`checkpoint_config`, a plain mapping in ROLL",
}

# Another spelling of a field, by the name of our class.
SPELLINGS: dict[str, dict[str, str]] = {"RLVRConfig": {"positive_loss_coef": "postive_loss_coef"}}

# A key of ROLL's other pipelines, which do not exist here: the pipeline's name.
OTHER_PIPELINES: dict[str, str] = {
    "sft_train": "supervised fine-tuning",
    "student": "distillation from a teacher's own text",
    "chosen_key": "preference optimisation",
    "reward_system_config": "video",
}

# Blocks that are handed on as they are, and words that are usual in them: a near miss of one is a typo, another key is
# the recipient's business. By the name of the field.
HANDED_ON: dict[str, frozenset[str]] = {
    "tracker_kwargs": split_names("log_dir api_key project name notes tags"),
    "filter_args": split_names("threshold_up threshold_down std_threshold"),
}

# Variables at the top of ROLL's files, for its fragments to read. One that nothing reads is reported as ignored.
ROLL_VARIABLES = split_names("""
    model_name default_history_length offload_nccl max_tokens_per_step max_actions_per_traj env_manager_cls
    agent_runner_cls agent_system_template agent_template action_pattern think_action_pattern all_response_pattern
    sokoban_format_penalty frozen_format_penalty agent_config_common
""")

# Trackers that only ROLL's makers can reach.
PRIVATE_TRACKERS = ("ml_tracker",)

# Text where ROLL's documentation leaves a number to its reader.
PLACEHOLDER = re.compile(r"x_\d+")

_CLASS_PREFIXES = (("roll.pipeline.rlvr.rewards.", "roll_opd.rewards."), ("roll.", "roll_opd."))


def backends_with(key: Any) -> list[str]:
    """The backends that have a setting of this name."""
    return [backend for cls, backend in BACKENDS.items() if key in ROLL_KEYS[cls]]


def roll_keys(cls: type) -> dict[str, RollKey]:
    """What is known of ROLL's keys at the place of ``cls``, its bases included."""
    found: dict[str, RollKey] = {}
    for base in reversed(cls.__mro__):
        found |= ROLL_KEYS.get(base.__name__, {})
    return found


def ignored_keys(cls: type) -> frozenset[str]:
    """Keys that ROLL accepted at the place of ``cls`` and that are no field of ours: they load, and do nothing."""
    return frozenset(name for name, key in roll_keys(cls).items() if key.status in ("ignored", "planned"))


def top_level_names() -> frozenset[str]:
    """Every key that ROLL knows at the top of a YAML file of the pipelines that exist here."""
    classes = ("BaseConfig", "PipelineConfig", "RLVRConfig", "AgenticConfig")
    return frozenset().union(*(ROLL_KEYS[name] for name in classes))


def spellings(cls: type) -> dict[str, str]:
    """Other spellings of the fields of ``cls``, each with the field's name."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        found |= SPELLINGS.get(base.__name__, {})
    return found


def resolve_class_path(value: Any, path: str) -> Any:
    """Turn a class path of ROLL into ours; other values pass through."""
    if isinstance(value, str):
        for theirs, ours in _CLASS_PREFIXES:
            if value.startswith(theirs):
                return ours + value[len(theirs) :]
    return value
