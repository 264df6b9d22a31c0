"""Settings of the backends: what loads, what is refused with which fix, and what follows from them."""

from __future__ import annotations

import pytest
from config_samples import AGENTIC, MIXED, PURE, RL, changed

from roll_opd.configs import build_config, launch_blockers, launch_warnings
from roll_opd.configs.backends import SETTINGS, backend_settings
from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.errors import ConfigError

OPD = "onpolicy_distill"
TRAIN, INFER, TEACHER = ("student_train", "student_infer", "teacher")
ARGS, CONFIG = "strategy_args", "strategy_args.strategy_config"
SERVER = {"base_url": "http://10.0.0.7:8000"}
TOPK = {"opd_args": {"objective": "direct", "support": "teacher_topk"}}
VIEW = {"context_template": "{{ prompt }} {{ hint }}"}


def role(path, strategy, **settings):
    """Changes that give the role ``path`` a backend with ``settings``."""
    return {f"{path}.{ARGS}": {"strategy_name": strategy, "strategy_config": settings}}


def load(changes, base=PURE, launcher=OPD):
    return build_config(changed(base, changes), launcher)


# ---- each setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (role(INFER, "vllm", gpu_memory_utilisation=0.8), "gpu_memory_utilisation", "mean 'gpu_memory_utilization'"),
        (role(INFER, "vllm", gpu_memory_utilization=1.2), "gpu_memory_utilization", "must be > 0 and <= 1, got 1.2"),
        (role(INFER, "vllm", tensor_parallel_size="2"), "tensor_parallel_size", "expected a whole number, got '2'"),
        (role(INFER, "vllm", tensor_model_parallel_size=2), "tensor_model_parallel_size", "'tensor_parallel_size'"),
        (role(INFER, "vllm", sleep_level=3), "sleep_level", "3 is not one of: 1, 2"),
        (role(INFER, "vllm", kv_cache_dtype="fp8"), "kv_cache_dtype", "belongs under 'engine_args'"),
        (role(INFER, "vllm", engine_args=["x"]), "engine_args", "expected a mapping"),
        (role(TRAIN, "megatron_train", tensor_parallel_size=2), "tensor_parallel_size", "'tensor_model_parallel_size'"),
        (role(TRAIN, "megatron_train", recompute_granularity="fully"), "recompute_granularity", "did you mean 'full'"),
        (role(TRAIN, "megatron_train", pipeline_model_parallel_size=0), "pipeline_model_parallel_size", ">= 1"),
        (role(TRAIN, "fsdp2_train", reshard_after_forwrad=True), "reshard_after_forwrad", "'reshard_after_forward'"),
        (role(TRAIN, "fsdp2_train", offload_policy="cpu"), "offload_policy", "true or false"),
        (role(TRAIN, "fsdp2_train", tensor_parallel_size=2), "tensor_parallel_size", "it is a setting of vllm"),
        (role(TEACHER, "hf_infer", load_in_8bit=True), "load_in_8bit", "unknown key"),
        (role(TEACHER, "hf_infer", tensor_parallel_siz=2), "tensor_parallel_siz", "'tensor_parallel_size'"),
        (role(TEACHER, "remote", base_url=8000), "base_url", "expected text"),
        (role(TEACHER, "remote", **SERVER, timeout=0), "timeout", "must be > 0"),
        (role(TEACHER, "remote", **SERVER, api_key="x"), "api_key", "mean 'api_key_env'"),
    ],
)  # fmt: skip
def test_each_setting_is_checked(changes, key, words):
    path = next(iter(changes)).removesuffix(f".{ARGS}")
    with pytest.raises(ConfigError) as caught:
        load(changes)
    assert caught.value.field == f"{path}.{CONFIG}.{key}"
    assert words in caught.value.problem


def test_every_role_is_checked():
    """Also those that no launch starts, and those that are no role of a model."""
    bad = {"strategy_args": {"strategy_name": "vllm", "strategy_config": {"sleep_levle": 1}}}
    judge = {"worker_cls": "a.B", **bad}
    for path, base, changes in (
        ("teacher.b", PURE, {"teacher": {"a": PURE["teacher"], "b": {**PURE["teacher"], **bad}}}),
        ("rewards.judge", RL, {"rewards": {"judge": judge}}),
        ("reference", RL, {"reference": bad}),
        ("critic", RL, {"critic": bad}),
        ("actor_infer", RL, {"actor_infer": bad}),
    ):
        with pytest.raises(ConfigError) as caught:
            load(changes, base, OPD if base is PURE else "rlvr")
        assert caught.value.field == f"{path}.{CONFIG}.sleep_levle"


def test_the_config_keeps_what_the_user_wrote_and_its_reader_gets_types():
    loaded = load(role(INFER, "vllm", max_model_len=512, disable_log_stats=True))
    written = loaded.config.actor_infer.strategy_args
    assert written.strategy_config == {"max_model_len": 512, "disable_log_stats": True}
    assert backend_settings(written).max_model_len == 512
    for name in SETTINGS:
        assert type(backend_settings(StrategyArguments(strategy_name=name))) is SETTINGS[name]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (role(INFER, "vllm", disable_log_stats=False, distributed_executor_backend="ray"), "disable_log_stats"),
        (role(TRAIN, "megatron_train", apply_rope_fusion=True, bf16=True), "apply_rope_fusion"),
        (role(TRAIN, "fsdp2_train", fsdp_size=16, param_dtype="bf16", reduce_dtype="float32"), "fsdp_size"),
        # Left behind by a role that has changed its backend.
        (role(INFER, "hf_infer", load_format="auto", gpu_memory_utilization=0.8), "load_format"),
        (role(TEACHER, "hf_infer", tensor_model_parallel_size=4), "tensor_model_parallel_size"),
    ],
)
def test_settings_of_roll_without_effect_make_one_warning(changes, told):
    loaded = load(changes)
    (warning,) = loaded.warnings
    assert warning.startswith("settings of ROLL without effect here: ") and f"{CONFIG}.{told}" in warning
    assert launch_blockers(loaded) == []


def test_settings_of_sglang_are_nobodys():
    loaded = load(role(INFER, "sglang", mem_fraction_static=0.7))
    assert [blocker.field for blocker in launch_blockers(loaded)] == [f"{INFER}.{ARGS}.strategy_name"]


# ---- rules across settings -------------------------------------------------------------------------------------------

STRATEGY = f"{TEACHER}.{ARGS}.strategy_name"
RULES = [
    (role(TEACHER, "remote"), f"{TEACHER}.{CONFIG}.base_url", "missing: it is the address"),
    ({**role(TEACHER, "remote", **SERVER), "teacher.device_mapping": [0]}, "teacher.device_mapping", "remove it"),
    (role(TRAIN, "megatron_train", virtual_pipeline_model_parallel_size=2),
     f"{TRAIN}.{CONFIG}.virtual_pipeline_model_parallel_size", "remove it"),
    ({**role(TRAIN, "megatron_train", expert_model_parallel_size=3), f"{TRAIN}.world_size": 4},
     f"{TRAIN}.{CONFIG}.expert_model_parallel_size", "3 does not divide the 4 ranks"),
    ({**role(TRAIN, "megatron_train", expert_model_parallel_size=4, pipeline_model_parallel_size=2),
      f"{TRAIN}.world_size": 4}, f"{TRAIN}.{CONFIG}.expert_model_parallel_size", "4 does not divide the 2 ranks"),
    (role(TRAIN, "megatron_train", recompute_method="block"), f"{TRAIN}.{CONFIG}.recompute_method", "remove it"),
    (role(TRAIN, "megatron_train", recompute_granularity="selective", recompute_num_layers=2),
     f"{TRAIN}.{CONFIG}.recompute_num_layers", "remove it"),
    ({f"{TRAIN}.use_dynamic_batching_in_train": True}, f"{TRAIN}.max_tokens_per_microbatch_in_train", "set it"),
    ({"teacher.use_dynamic_batching_in_infer": True}, "teacher.max_tokens_per_microbatch_in_infer",
     "or use_dynamic_batching_in_infer: false"),
    ({**role(INFER, "vllm"), f"{INFER}.generating_args": {"temperature": 2.5}}, f"{INFER}.generating_args.temperature",
     "from 0.01 to 2.0, got 2.5"),
    ({**role(INFER, "vllm"), "validation": {"generating_args": {"temperature": 0.001}}},
     "validation.generating_args.temperature", "or hf_infer"),
    (role(INFER, "vllm", enable_chunked_prefill=True), f"{INFER}.{CONFIG}.enable_chunked_prefill", "remove it"),
    (role(TEACHER, "vllm", pipeline_parallel_size=2), f"{TEACHER}.{CONFIG}.pipeline_parallel_size", "use 1"),
    (role(TEACHER, "vllm", sleep_level=2), f"{TEACHER}.{CONFIG}.sleep_level", "use 1"),
    (role(INFER, "vllm", engine_args={"max_num_seqs": 4}), f"{INFER}.{CONFIG}.engine_args.max_num_seqs",
     "is a setting of its own: write student_infer.strategy_args.strategy_config.max_num_seqs"),
    ({"teacher": {"teacher_args": {**VIEW, "self_teacher": "live"}, ARGS: {
        "strategy_name": "vllm", "strategy_config": {"sleep_level": 2}}}}, f"{TEACHER}.{CONFIG}.sleep_level", "use 1"),
    (role(TEACHER, "vllm", load_format="dummy"), f"{TEACHER}.{CONFIG}.load_format", "use auto"),
    ({"validation": {"teacher_accuracy": True}, **role(TEACHER, "remote", **SERVER)}, "validation.teacher_accuracy",
     "teacher runs on 'remote'; use hf_infer or vllm"),
    ({"validation": {"teacher_accuracy": True}, **role(TEACHER, "megatron_infer")}, "validation.teacher_accuracy",
     "use hf_infer or vllm"),
    # A teacher that samples, of a student on another engine.
    ({"validation": {"teacher_accuracy": True, "generating_args": {"temperature": 3.0}}, **role(TEACHER, "vllm")},
     "validation.generating_args.temperature", "vLLM, on which teacher runs, samples at temperatures from 0.01 to 2.0"),
    ({"opd_args": {"base_model": "m", "extrapolation": 1.5}, **role(TEACHER, "remote", **SERVER)},
     "opd_args.base_model", "put a teacher that runs here first"),
] + [
    ({"teacher": {"teacher_args": {**VIEW, "self_teacher": kind}, "model_args": {"dtype": "fp32"},
                  ARGS: {"strategy_name": strategy, "strategy_config": settings}}}, STRATEGY, words)
    for kind, strategy, settings, words in (
        ("ema", "vllm", {}, "use hf_infer or fsdp2_infer"),
        ("ema", "remote", SERVER, "use hf_infer"),
        ("ema", "megatron_infer", {}, "use hf_infer"),
        ("frozen", "remote", SERVER, "nobody can say to be the student"),
        ("live", "remote", SERVER, "self_teacher: live asks; use hf_infer, fsdp2_infer, megatron_infer or vllm"),
    )
]  # fmt: skip


STUDENT = f"{TRAIN}.model_args"
ADAPTER, ENTRIES = f"{STUDENT}.adapter_name_or_path", f"{STUDENT}.model_config_kwargs"


def themselves(kind, strategy="hf_infer", **model):
    """Changes that make a self-teacher."""
    return {"teacher": {"teacher_args": {**VIEW, "self_teacher": kind}, "model_args": {"dtype": "fp32", **model},
                        ARGS: {"strategy_name": strategy}}}  # fmt: skip


RULES += [
    ({**themselves("frozen"), ADAPTER: "a"}, STRATEGY,
     "'hf_infer' does not read student_train.model_args.adapter_name_or_path, without which this is not the student; "
     "use fsdp2_infer"),
    ({**themselves("frozen", "vllm"), ADAPTER: "a"}, STRATEGY, "use fsdp2_infer"),
    ({**themselves("ema", "fsdp2_infer"), ADAPTER: "a"}, f"{TEACHER}.teacher_args.self_teacher",
     "the average would start without the adapter that student_train starts from; use live, or frozen on fsdp2_infer"),
    ({**themselves("live", "megatron_infer"), ENTRIES: {"x": 1}}, STRATEGY, "use fsdp2_infer, hf_infer or vllm"),
    ({**themselves("frozen", "fsdp2_infer", adapter_name_or_path="b"), ADAPTER: "a"},
     f"{TEACHER}.model_args.adapter_name_or_path", "'b' is not what teacher_args.self_teacher: frozen starts with (a)"),
    ({**themselves("live", "fsdp2_infer", adapter_name_or_path="a"), ADAPTER: "a"},
     f"{TEACHER}.model_args.adapter_name_or_path", "live starts with (no adapter); remove it"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "strategy", "student", "teacher"),
    [
        ("frozen", "fsdp2_infer", {ADAPTER: "a"}, ("a", {})),
        ("frozen", "fsdp2_infer", {ADAPTER: "a", ENTRIES: {"x": 1}}, ("a", {"x": 1})),
        ("frozen", "hf_infer", {ENTRIES: {"x": 1}}, (None, {"x": 1})),
        # A fresh adapter computes nothing.
        ("frozen", "hf_infer", {f"{STUDENT}.lora_target": "all-linear"}, (None, {})),
        ("ema", "hf_infer", {f"{STUDENT}.lora_target": "all-linear", ENTRIES: {"x": 1}}, (None, {"x": 1})),
        # Its weights come with the adapter merged into them.
        ("live", "hf_infer", {ADAPTER: "a", ENTRIES: {"x": 1}}, (None, {"x": 1})),
        ("live", "vllm", {ADAPTER: "a"}, (None, {})),
    ],
)
def test_a_self_teacher_is_what_the_student_starts_as(kind, strategy, student, teacher):
    loaded = load({**themselves(kind, strategy), **student})
    model = loaded.config.teachers["default"].model_args
    assert (model.model_name_or_path, model.adapter_name_or_path, model.model_config_kwargs) == (
        "models/student",
        *teacher,
    )
    assert launch_blockers(loaded) == []


def test_a_self_teachers_own_entries_win():
    """A longer context than the student's may need them."""
    config = load({**themselves("frozen", model_config_kwargs={"x": 2}), ENTRIES: {"x": 1}}).config
    assert config.teachers["default"].model_args.model_config_kwargs == {"x": 2}


def test_validation_episodes_are_sampled_at_temperatures_that_the_engine_has():
    vllm = {f"actor_infer.{ARGS}": {"strategy_name": "vllm"}}
    played = {"val_env_manager": {"num_env_groups": 2, "tags": ["Lake"], "generating_args": {"temperature": 3.0}}}
    with pytest.raises(ConfigError) as caught:
        load({**vllm, **played}, AGENTIC, "agentic")
    assert caught.value.field == "val_env_manager.generating_args.temperature"
    assert "got 3.0; use one of them, or hf_infer" in caught.value.problem
    load(played, AGENTIC, "agentic")
    # Nobody plays.
    load({**vllm, **changed(played, {"val_env_manager.tags": []})}, AGENTIC, "agentic")


@pytest.mark.parametrize(("changes", "field", "words"), RULES)
def test_what_cannot_work_is_refused_at_load(changes, field, words):
    with pytest.raises(ConfigError) as caught:
        load(changes)
    assert caught.value.field == field
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (role(TRAIN, "megatron_train", sequence_parallel=True), "no effect, because tensor_model_parallel_size is 1"),
        ({**role(TEACHER, "remote", **SERVER), **TOPK}, "--max-logprobs 32 or more"),
    ],
)
def test_what_looks_wrong_is_mentioned(changes, words):
    (warning,) = load(changes).warnings
    assert words in warning


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({**role(TRAIN, "megatron_train"), f"{TRAIN}.model_args.lora_target": "all-linear"},
         f"{TRAIN}.model_args.lora_target", "use strategy_name fsdp2_train"),
        ({**role(TRAIN, "megatron_train"), f"{TRAIN}.model_args.dtype": "fp16"}, f"{TRAIN}.model_args.dtype",
         "use bf16 or fp32"),
        ({f"{TEACHER}.model_args.adapter_name_or_path": "a"}, f"{TEACHER}.model_args.adapter_name_or_path",
         "hf_infer does not run this setting; use strategy_name fsdp2_infer, or remove it"),
        ({f"{TEACHER}.model_args.lora_target": "q_proj"}, f"{TEACHER}.model_args.lora_target", "use null"),
        ({**role(TRAIN, "megatron_train"), f"{TRAIN}.model_args.model_config_kwargs": {"x": 1}},
         f"{TRAIN}.model_args.model_config_kwargs", "use strategy_name fsdp2_train, or remove it"),
        ({f"{TRAIN}.model_args.lora_target": "q_proj", f"{TRAIN}.model_args.lora_dropout": 0.1},
         f"{TRAIN}.model_args.lora_dropout", "use 0"),
        ({f"{TRAIN}.model_args.additional_target": "lm_head"}, f"{TRAIN}.model_args.additional_target",
         "set lora_target too"),
        ({**role(TRAIN, "megatron_train", context_parallel_size=2), f"{TRAIN}.world_size": 2},
         f"{TRAIN}.{CONFIG}.context_parallel_size", "tensor_model_parallel_size and sequence_parallel"),
        ({**role(TRAIN, "megatron_train", pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
          f"{TRAIN}.world_size": 2}, f"{TRAIN}.{CONFIG}.virtual_pipeline_model_parallel_size", "remove it"),
        ({**role(INFER, "vllm", sleep_level=2), f"{INFER}.device_mapping": [0, 1], f"{TRAIN}.device_mapping": [1, 2]},
         f"{INFER}.{CONFIG}.sleep_level", "whenever student_train takes the devices"),
        ({"model_update_transport": "nccl"}, "model_update_transport",
         "nccl cannot carry weights from student_train to student_infer: one of them has no device_mapping"),
        ({"model_update_transport": "ipc", f"{INFER}.device_mapping": [0, 1], f"{TRAIN}.device_mapping": [1, 2]},
         "model_update_transport", "not all of its devices are the trainer's too; use auto"),
        ({"model_update_transport": "ipc", **role(TRAIN, "megatron_train"), f"{INFER}.device_mapping": [0],
          f"{TRAIN}.device_mapping": [0]}, "model_update_transport", "megatron_train does not gather whole weights"),
        ({"model_update_transport": "nccl", f"{INFER}.device_mapping": [0, 1], f"{TRAIN}.device_mapping": [1, 2]},
         "model_update_transport", "both lie on some of the same devices"),
        (role(INFER, "vllm", max_model_len=95), f"{INFER}.{CONFIG}.max_model_len",
         "95 is less than the 96 tokens of prompt_length + response_length; raise it"),
        ({**role(TEACHER, "vllm", max_model_len=159), "teacher.teacher_args": VIEW},
         f"{TEACHER}.{CONFIG}.max_model_len", "159 is less than the 160 tokens of the teacher's prompt and a response"),
        (role(TRAIN, "fsdp2_train", param_dtype="float32"), f"{TRAIN}.{CONFIG}.param_dtype",
         "'fp32' contradicts student_train.model_args.dtype: 'bf16', which decides"),
        (role(TRAIN, "megatron_train", fp16=True), f"{TRAIN}.{CONFIG}.fp16", "make them agree"),
        (role(TRAIN, "megatron_train", max_grad_norm=0.5), f"{TRAIN}.{CONFIG}.max_grad_norm",
         "0.5 contradicts max_grad_norm: 1.0"),
        (role(TRAIN, "megatron_train", moe_aux_loss_coeff=0.01), f"{TRAIN}.{CONFIG}.moe_aux_loss_coeff",
         "not trained; planned only"),
        (role(TRAIN, "megatron_train", additional_configs={"x": 1}), f"{TRAIN}.{CONFIG}.additional_configs",
         "planned only"),
        (role(INFER, "vllm", data_parallel_size=2), f"{INFER}.{CONFIG}.data_parallel_size", "device_mapping"),
    ],
)  # fmt: skip
def test_what_is_not_run_yet_is_refused_at_launch(changes, field, words):
    (blocker,) = launch_blockers(load(changes))
    assert blocker.field == field
    assert words in blocker.problem


def test_a_critic_on_megatron_is_not_run_yet():
    changes = {"adv_estimator": "gae", **role("critic", "megatron_train")}
    (blocker,) = launch_blockers(load(changes, RL, "rlvr"))
    assert blocker.field == f"critic.{ARGS}.strategy_name" and "use fsdp2_train" in blocker.problem


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (PURE, role(INFER, "vllm", max_model_len=96, enforce_eager=True, engine_args={"kv_cache_dtype": "fp8"})),
        (PURE, role(INFER, "vllm", sleep_level=2, load_format="dummy")),
        (PURE, {**role(TRAIN, "megatron_train", tensor_model_parallel_size=2, sequence_parallel=True,
                       recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
                f"{TRAIN}.world_size": 4}),
        (PURE, {**role(TRAIN, "megatron_train", moe_aux_loss_coeff=0.0, max_grad_norm=1, additional_configs={}),
                f"{TRAIN}.world_size": 2}),
        (PURE, role(TRAIN, "fsdp2_train", offload_policy=True, param_dtype="bfloat16")),
        (PURE, {f"{TRAIN}.model_args.lora_target": "all-linear", f"{INFER}.model_args.lora_target": "q_proj",
                f"{TRAIN}.model_args.additional_target": "lm_head"}),
        (PURE, {f"{TRAIN}.model_args.adapter_name_or_path": "a", f"{TRAIN}.model_args.freeze_module_prefix": "model"}),
        (PURE, {**role(TEACHER, "fsdp2_infer"), f"{TEACHER}.model_args.adapter_name_or_path": "a"}),
        (PURE, {f"{name}.model_args.model_config_kwargs": {"x": 1} for name in (TRAIN, INFER, TEACHER)}),
        (PURE, {**role(TEACHER, "vllm"), **TOPK}),
        (PURE, role(TEACHER, "fsdp2_infer")),
        (PURE, role(TEACHER, "megatron_infer")),
        (PURE, role(TEACHER, "remote", **SERVER, api_key_env="KEY")),
        (PURE, {"validation": {"teacher_accuracy": True}, **role(TEACHER, "vllm")}),
        (PURE, {"teacher": {"teacher_args": {**VIEW, "self_teacher": "live"}, ARGS: {
            "strategy_name": "vllm", "strategy_config": {"load_format": "dummy"}}}}),
        (PURE, {**role(INFER, "vllm", sleep_level=2), f"{INFER}.device_mapping": [0], f"{TRAIN}.device_mapping": [1]}),
        (MIXED, role("actor_train", "megatron_train")),
        (RL, {"use_kl_loss": True, "kl_loss_coef": 0.1, **role("reference", "megatron_infer")}),
        # Of a critic that is not started nothing is asked.
        (RL, role("critic", "megatron_train", context_parallel_size=1)),
        (RL, {"adv_estimator": "gae", "critic.model_args": {"lora_target": "all-linear", "additional_target": "norm"}}),
    ],
)  # fmt: skip
def test_what_runs(base, changes):
    assert launch_blockers(load(changes, base, OPD if base is PURE else "rlvr")) == []


def test_an_engine_needs_room_for_an_episode_behind_a_teachers_own_prompt():
    """``response_length`` bounds a turn there: 1024 tokens of context, and behind them up to 4096."""
    lengths = {"sequence_length": 4096, "response_length": 256}
    base = changed(AGENTIC, {"use_opd": True, "teacher": PURE["teacher"], **lengths})

    def blockers(limit):
        view = {"teacher.teacher_args": {**VIEW, "context_length": 1024}}
        return launch_blockers(load({**role(TEACHER, "vllm", max_model_len=limit), **view}, base, "agentic"))

    (error,) = blockers(5119)
    assert error.field == f"{TEACHER}.{CONFIG}.max_model_len"
    assert "5119 is less than the 5120 tokens of the teacher's prompt and an episode" in error.problem
    assert blockers(5120) == []


# ---- what follows from them ------------------------------------------------------------------------------------------


def test_an_engine_spans_its_parallel_sizes():
    changes = role(INFER, "vllm", tensor_parallel_size=2, pipeline_parallel_size=2)
    infer = load({**changes, f"{INFER}.device_mapping": "range(8)"}).config.actor_infer
    assert (infer.num_gpus_per_worker, infer.world_size) == (4, 2)
    with pytest.raises(ConfigError, match="6 devices do not divide into workers of 4"):
        load({**changes, f"{INFER}.device_mapping": "range(6)", "num_gpus_per_node": 8})


def test_a_rank_of_a_model_has_one_device():
    changes = role(TEACHER, "megatron_infer", tensor_model_parallel_size=2)
    teacher = load({**changes, f"{TEACHER}.device_mapping": "range(4)"}).config.teachers["default"]
    assert (teacher.num_gpus_per_worker, teacher.world_size) == (1, 4)


def test_a_mini_batch_counts_data_parallel_ranks():
    changes = role(TRAIN, "megatron_train", tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    (warning,) = load({**changes, f"{TRAIN}.world_size": 8}).warnings
    assert "4 x 1 x 2" in warning


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({**role(INFER, "vllm"), f"{INFER}.infer_batch_size": 4, f"{INFER}.logits_in_fp32": True,
          f"{INFER}.model_args.attn_implementation": "fa2", f"{INFER}.use_dynamic_batching_in_infer": True,
          f"{INFER}.max_tokens_per_microbatch_in_infer": 9},
         ["use_dynamic_batching_in_infer", "max_tokens_per_microbatch_in_infer", "logits_in_fp32", "infer_batch_size",
          "model_args.attn_implementation"]),
        ({f"{INFER}.infer_batch_size": 4, f"{INFER}.logits_in_fp32": True,
          f"{INFER}.model_args.attn_implementation": "sdpa"}, []),
        ({**role(TRAIN, "megatron_train"), f"{TRAIN}.model_args.disable_gradient_checkpointing": True,
          f"{TRAIN}.use_dynamic_batching_in_train": True, f"{TRAIN}.max_tokens_per_microbatch_in_train": 9},
         ["model_args.disable_gradient_checkpointing"]),
        ({f"{TRAIN}.model_args.disable_gradient_checkpointing": True, f"{TRAIN}.use_dynamic_batching_in_infer": True,
          f"{TRAIN}.max_tokens_per_microbatch_in_infer": 9, f"{TRAIN}.logits_in_fp32": True,
          f"{TRAIN}.sequence_packing_args.algorithm": "load_balance", f"{TRAIN}.use_sequence_packing": True}, []),
        ({**role(TEACHER, "vllm"), f"{TEACHER}.infer_batch_size": 4, f"{TEACHER}.use_sequence_packing": True},
         ["use_sequence_packing"]),
        ({f"{TEACHER}.use_dynamic_batching_in_train": True, f"{TEACHER}.max_tokens_per_microbatch_in_train": 9},
         ["use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train"]),
    ],
)  # fmt: skip
def test_what_a_backend_does_not_read_is_mentioned_at_launch(changes, unread):
    loaded = load(changes)
    path = next(name for name in (INFER, TRAIN, TEACHER) if any(key.startswith(name) for key in changes))
    told = launch_warnings(loaded)
    assert launch_blockers(loaded) == [] and len(told) == bool(unread)
    assert not told or told[0].partition(": ")[2] == ", ".join(f"{path}.{key}" for key in unread)


def test_no_launch_warning_of_a_remote_teacher():
    assert launch_warnings(load(role(TEACHER, "remote", **SERVER))) == []


def test_megatron_settings_fill_in_what_follows():
    def built(**settings):
        return backend_settings(StrategyArguments(strategy_name="megatron_train", strategy_config=settings))

    full = built(recompute_granularity="full", sequence_parallel=True, virtual_pipeline_model_parallel_size=1)
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 1)
    assert (full.sequence_parallel, full.virtual_pipeline_model_parallel_size) == (False, None)
    assert built(tensor_model_parallel_size=2, sequence_parallel=True).sequence_parallel
    block = built(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    assert (block.recompute_method, block.recompute_num_layers) == ("block", 3)
    assert built(recompute_granularity="selective").recompute_method is None
