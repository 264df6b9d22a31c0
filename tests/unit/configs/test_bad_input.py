"""Tables of bad input: each row states the field the message must name and words it must contain."""

from __future__ import annotations

import pytest
from config_samples import DELETE, MIXED, PURE, REWARD, RL, changed

from roll_opd.algorithms.reward_shaping import QUERY_FILTERS, query_filter
from roll_opd.configs import build_config
from roll_opd.configs.checks import FILTER_ARGS
from roll_opd.errors import ConfigError

SINGLE = {"model_args": {"model_name_or_path": "m"}}
OPD = "onpolicy_distill"

UNKNOWN_KEYS = [
    ({"rollout_batchsize": 4}, "rollout_batchsize", "did you mean 'rollout_batch_size'"),
    ({"student_train.trainning_args": {}}, "student_train.trainning_args", "did you mean 'training_args'"),
    ({"student_train.training_args.learning_rat": 1}, "student_train.training_args.learning_rat", "'learning_rate'"),
    ({"student_train.learning_rate": 1e-4}, "student_train.learning_rate", "training_args.learning_rate"),
    ({"student_infer.generating_args.temprature": 1}, "student_infer.generating_args.temprature", "'temperature'"),
    ({"teacher.opd_kl_coeff": 1}, "teacher.opd_kl_coeff", "'opd_kl_coef'"),
    ({"teacher": {"model_arg": {"model_name_or_path": "m"}}}, "teacher.model_arg", "'model_args'"),
    ({"teacher": {"a": SINGLE, "b": {**SINGLE, "tags": []}}}, "teacher.b.tags", "unknown key"),
    ({"opd_args": {"divergense": "jsd"}}, "opd_args.divergense", "'divergence'"),
    ({"rewards": {"math": {**REWARD, "tag_include": []}}}, "rewards.math.tag_include", "'tag_included'"),
    ({"zzzz": 1}, "zzzz", "unknown key"),
    ({"teachers": {"a": SINGLE}}, "teachers", "write 'teacher:'"),
    ({"pipeline": "rlvr"}, "pipeline", "unknown key"),
]

WRONG_TYPES = [
    ({"max_steps": "ten"}, "max_steps", "expected a whole number, got 'ten'"),
    ({"max_steps": 1.5}, "max_steps", "expected a whole number, got 1.5"),
    ({"max_steps": True}, "max_steps", "expected a whole number, got True"),
    ({"student_train.training_args.learning_rate": "fast"}, "student_train.training_args.learning_rate", "a number"),
    ({"student_train.training_args.learning_rate": True}, "student_train.training_args.learning_rate", "a number"),
    ({"student_train.use_sequence_packing": "yes"}, "student_train.use_sequence_packing", "true or false"),
    ({"exp_name": 7}, "exp_name", "write it in quotes"),
    ({"student_train.training_args": [1]}, "student_train.training_args", "a mapping"),
    ({"tag_to_template": ["a"]}, "tag_to_template", "a mapping"),
    ({"teacher": {**SINGLE, "tag_included": "math"}}, "teacher.tag_included", "expected a list"),
    ({"student_train.data_args.file_name": [1]}, "student_train.data_args.file_name[0]", "text"),
    ({"resume_from_checkpoint": 3}, "resume_from_checkpoint", "true or false or text"),
    ({"is_pure_opd": "true"}, "is_pure_opd", "true or false"),
    ({"opd_kl_coef": float("inf")}, "opd_kl_coef", "finite"),
    ({"opd_kl_coef": float("nan")}, "opd_kl_coef", "finite"),
    ({"teacher": "Qwen/Qwen3-32B"}, "teacher", "worker config"),
    ({"teacher": [SINGLE, SINGLE]}, "teacher", "list"),
    ({"teacher": {"math": "Qwen/Qwen3-32B"}}, "teacher.math", "not a worker config"),
]

BAD_VALUES = [
    ({"adv_estimator": "reinfroce"}, "adv_estimator", "did you mean 'reinforce'"),
    ({"kl_penalty": "k4"}, "kl_penalty", "kl, abs, mse, k3, full"),
    ({"loss_agg_mode": "mean"}, "loss_agg_mode", "token-mean"),
    ({"pure_opd_pipeline_type": "rlrv"}, "pure_opd_pipeline_type", "did you mean 'rlvr'"),
    ({"track_with": "tensorbord"}, "track_with[0]", "did you mean 'tensorboard'"),
    ({"student_train.model_args.dtype": "float32"}, "student_train.model_args.dtype", "fp32, bf16, fp16"),
    ({"teacher.strategy_args.strategy_name": "hf"}, "teacher.strategy_args.strategy_name", "hf_infer"),
    ({"student_train.training_args.learning_rate": 0}, "student_train.training_args.learning_rate", "must be > 0"),
    ({"student_train.training_args.adam_beta2": 1}, "student_train.training_args.adam_beta2", "< 1"),
    ({"rollout_batch_size": 0}, "rollout_batch_size", "must be >= 1"),
    ({"seed": 2**63}, "seed", "must be >= 0 and <= 9223372036854775807, got 9223372036854775808"),
    ({"seed": -1}, "seed", "must be >= 0"),
    ({"validation": {"seed": 2**64}}, "validation.seed", "<= 9223372036854775807"),
    ({"max_grad_norm": 0}, "max_grad_norm", "must be > 0"),
    ({"rewards": {"math": {**REWARD, "reward_args": [1]}}}, "rewards.math.reward_args", "expected a mapping"),
    ({"student_infer.world_size": 0}, "student_infer.world_size", "must be >= 1"),
    ({"teacher.world_size": 0}, "teacher.world_size", "must be >= 1"),
    ({"teacher.opd_kl_coef": -0.5}, "teacher.opd_kl_coef", "must be >= 0"),
    ({"student_infer.generating_args.temperature": 0}, "student_infer.generating_args.temperature", "must be > 0"),
    ({"student_infer.generating_args.top_p": 0}, "student_infer.generating_args.top_p", "> 0 and <= 1"),
    ({"student_infer.generating_args.top_p": 1.1}, "student_infer.generating_args.top_p", "> 0 and <= 1"),
    ({"student_infer.generating_args.top_k": -2}, "student_infer.generating_args.top_k", ">= 0"),
    ({"validation": {"generating_args": {"top_k": -2}}}, "validation.generating_args.top_k", ">= 0"),
    ({"student_infer.generating_args.num_beams": 4}, "student_infer.generating_args.num_beams", "must be 1"),
    ({"student_infer.generating_args.do_sample": False}, "student_infer.generating_args.do_sample", "must be true"),
    ({"gamma": 1.5}, "gamma", "<= 1"),
    ({"opd_args": {"jsd_beta": 1}}, "opd_args.jsd_beta", "< 1"),
    ({"student_train.data_args.on_bad_row": "drop"}, "student_train.data_args.on_bad_row", "error, skip"),
]

CROSS_FIELD = [
    ({"student_train": DELETE}, "student_train", "missing role"),
    ({"student_infer": DELETE}, "student_infer", "missing role"),
    ({"teacher": DELETE}, "teacher", "missing role"),
    ({"teacher": None}, "teacher", "missing role"),
    ({"student_train": DELETE, "stduent_train": {"infer_batch_size": 1}}, "stduent_train", "mean 'student_train'"),
    ({"actor_train": RL["actor_train"]}, "actor_train", "two names of the student"),
    ({"use_opd": True}, "use_opd", "contradicts this launcher"),
    ({"reference": {"model_args": {"model_name_or_path": "m"}}}, "reference", "beside a teacher"),
    ({"teacher": {"infer_batch_size": 1}}, "teacher.model_args.model_name_or_path", "never used for it"),
    ({"teacher": {"a": SINGLE, "b": {"infer_batch_size": 1}}}, "teacher.b.model_args.model_name_or_path", "model"),
    ({"teacher": {"a/b": SINGLE}}, "teacher.a/b", "letters"),
    ({"pretrain": DELETE}, "student_train.model_args.model_name_or_path", "no model"),
    ({"student_train.data_args": DELETE}, "student_train.data_args.file_name", "no training prompts"),
    ({"student_train.strategy_args": {"strategy_name": "vllm"}}, "student_train.strategy_args.strategy_name", "train"),
    ({"teacher.strategy_args": {"strategy_name": "sglang"}}, "teacher.strategy_args.strategy_name", "cannot score"),
    ({"sequence_length": 90}, "sequence_length", "prompt_length + response_length = 96"),
    ({"response_length": DELETE, "sequence_length": 64}, "sequence_length", "no room"),
    ({"rewards": {"math": {"world_size": 1}}}, "rewards.math.worker_cls", "missing"),
    ({"student_train.device_mapping": "[0,1,2]", "student_train.model_args.ulysses_size": 2},
     "student_train.device_mapping", "3 ranks do not divide by 2"),
    ({"student_infer.device_mapping": "[0,1,2]", "student_infer.strategy_args": {
        "strategy_name": "vllm", "strategy_config": {"tensor_parallel_size": 2}}},
     "student_infer.device_mapping", "3 devices do not divide into workers of 2"),
    ({"student_infer.strategy_args": {"strategy_name": "vllm", "strategy_config": {"tensor_parallel_size": 0}}},
     "student_infer.strategy_args.strategy_config.tensor_parallel_size", ">= 1"),
    ({"teacher.device_mapping": "range(4)", "teacher.strategy_args": {
        "strategy_name": "megatron_infer", "strategy_config": {"tensor_model_parallel_size": 8}}},
     "teacher.device_mapping", "4 ranks do not divide by 8"),
]  # fmt: skip

OBJECTIVES = [
    ({"opd_args": {"support": "full"}}, "opd_args.support", "zero expected gradient"),
    ({"opd_args": {"support": "teacher_topk"}}, "opd_args.support", "objective: direct"),
    ({"opd_args": {"objective": "direct", "apply_to": "reward"}}, "opd_args.apply_to", "objective 'direct'"),
    ({"opd_args": {"objective": "direct", "divergence": "jsd"}}, "opd_args.divergence", "support: full"),
    ({"opd_args": {"uncovered": "reward_only"}}, "opd_args.uncovered", "no"),
    ({"kl_penalty": "mse"}, "kl_penalty", "pushes every sampled token down"),
    ({"kl_penalty": "k3"}, "kl_penalty", "pushes every sampled token down"),
    ({"kl_penalty": "abs"}, "kl_penalty", "use 'kl'"),
    ({"kl_penalty": "full"}, "kl_penalty", "zero expected gradient"),
    ({"kl_penalty": "kl", "opd_args": {"objective": "direct"}}, "kl_penalty", "zero expected gradient as a loss"),
    ({"kl_penalty": "kl", "opd_args": {"divergence": "reverse_kl"}}, "kl_penalty", "keep one"),
    ({"kl_penalty": "kl", "opd_args": {"support": "sampled"}}, "kl_penalty", "keep one"),
    ({"opd_args": {"student_logprob_source": "infer"}, "student_infer.generating_args.temperature": 0.9},
     "opd_args.student_logprob_source", "student_infer.generating_args"),
    ({"opd_args": {"student_logprob_source": "infer"}, "student_infer.generating_args.top_p": 0.9},
     "opd_args.student_logprob_source", "top_p 1"),
    ({"opd_args": {"student_logprob_source": "infer"}, "student_infer.generating_args.top_k": 100},
     "opd_args.student_logprob_source", "top_k 0"),
    ({"opd_args": {"objective": "direct", "support": "full"}, "teacher.strategy_args": {"strategy_name": "vllm"}},
     "teacher.strategy_args.strategy_name", "sampled and teacher_topk only"),
    ({"kl_penalty": "full", "opd_args": {"objective": "direct"}, "teacher.strategy_args": {"strategy_name": "vllm"}},
     "teacher.strategy_args.strategy_name", "sampled and teacher_topk only"),
    ({"teacher": {"a": SINGLE, "b": {**SINGLE, "strategy_args": {
        "strategy_name": "remote", "strategy_config": {"base_url": "http://a:1"}}}},
      "opd_args": {"objective": "direct", "support": "union_topk"}},
     "teacher.b.strategy_args.strategy_name", "needs union_topk; use hf_infer"),
    ({"kl_penalty": "abs", "opd_args": {"objective": "direct"}}, "kl_penalty", "use 'mse', 'k3' or 'full'"),
    ({"opd_args": {"entropy_keep": 0.2, "student_logprob_source": "infer"}}, "opd_args.entropy_keep",
     "use student_logprob_source: train"),
]  # fmt: skip

BASE = "opd_args.base_model"
EXTRAPOLATION = [
    ({"opd_args": {"extrapolation": 1.5}}, "opd_args.extrapolation", "name that model in opd_args.base_model"),
    ({"opd_args": {"extrapolation": 0.5}}, "opd_args.extrapolation", "name that model in opd_args.base_model"),
    ({"opd_args": {"base_model": "m"}}, BASE, "set opd_args.extrapolation above 1"),
    ({"opd_args": {"base_model": "m", "extrapolation": 1.5, "objective": "direct"}}, BASE,
     "use objective: policy_gradient"),
    ({"opd_args": {"base_model": "m", "extrapolation": 1.5, "divergence": "jsd"}}, BASE, "divergence: reverse_kl"),
    ({"opd_args": {"base_model": "m", "extrapolation": 1.5, "objective": "direct", "support": "full"}}, BASE,
     "or remove base_model"),
]  # fmt: skip

SELF = "teacher.teacher_args.self_teacher"
SELF_TEACHERS = [
    ({"teacher": {"teacher_args": {"self_teacher": kind}, "model_args": {"dtype": "fp32"}}}, SELF,
     "give it a context_template")
    for kind in ("live", "ema", "frozen")
] + [
    ({"teacher": {"a": SINGLE, "b": {"teacher_args": {"self_teacher": "live"}}}},
     "teacher.b.teacher_args.self_teacher", "the student itself, and its signal zero"),
    ({"teacher": {**SINGLE, "teacher_args": {"self_teacher": "live", "context_template": "x"}}},
     "teacher.model_args.model_name_or_path", "'m' is not the student ('models/student')"),
    ({"teacher": {"model_args": {"dtype": "bf16"}, "teacher_args": {"self_teacher": "ema", "context_template": "x"}}},
     "teacher.model_args.dtype", "use fp32, or self_teacher: live or frozen"),
    ({"teacher": {**SINGLE, "teacher_args": {"self_teacher": "emma"}}}, SELF, "did you mean 'ema'"),
    ({"teacher": {**SINGLE, "teacher_args": {"self_teacher": "ema", "ema_decay": 1.0}}},
     "teacher.teacher_args.ema_decay", "< 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    UNKNOWN_KEYS + WRONG_TYPES + BAD_VALUES + CROSS_FIELD + OBJECTIVES + EXTRAPOLATION + SELF_TEACHERS,
)
def test_pure_mode_names_field_and_fix(changes, field, words):
    with pytest.raises(ConfigError) as caught:
        build_config(changed(PURE, changes), OPD)
    assert caught.value.field == field
    assert words in caught.value.problem


GROUP = "num_return_sequences_in_group"
OTHER_LAUNCHERS = [
    (RL, "rlvr", {"teacher": SINGLE}, "teacher", "distillation is off"),
    (RL, "rlvr", {"use_opd": True}, "teacher", "missing role"),
    (RL, "rlvr", {"rewards": DELETE}, "rewards", "missing"),
    (RL, "rlvr", {"adv_estimator": "gae"}, "adv_estimator", "needs a critic"),
    (RL, "rlvr", {"student_train": {"infer_batch_size": 1}}, "student_train", "two names of the student"),
    (RL, "rlvr", {"is_pure_opd": True, "use_opd": True}, "use_opd", "exclude each other"),
    (RL, "rlrv", {}, "launcher", "did you mean 'rlvr'"),
    (PURE, "rlvr", {}, "student_train", "rename it to actor_train"),
    (RL, OPD, {"teacher": SINGLE}, "student_train", "rename actor_train to student_train"),
    (MIXED, "rlvr", {"reference": {"infer_batch_size": 1}}, "reference", "beside a teacher"),
    (MIXED, "rlvr", {"teacher": [SINGLE]}, "teacher", "list"),
    (MIXED, "rlvr", {"use_kl_loss": True, "kl_loss_coef": 0.1}, "use_kl_loss", "whose place the teacher has taken"),
    (MIXED, "rlvr", {"add_token_level_kl": True}, "add_token_level_kl", "remove it: the teacher's term is opd_kl_coef"),
    (MIXED, "rlvr", {"teacher": {"teacher_args": {"self_teacher": "live"}}}, SELF, "give it a context_template"),
    (MIXED, "rlvr", {"opd_args": {"objective": "direct", "apply_to": "reward"}}, "opd_args.apply_to", "remove"),
    (RL, "rlvr", {"use_kl_loss": True, "kl_loss_coef": 0.1}, "use_kl_loss", "add 'reference:'"),
    (RL, "rlvr", {"add_token_level_kl": True}, "add_token_level_kl", "add 'reference:'"),
    (RL, "rlvr", {"add_token_level_kl": True, "kl_penalty": "full", "reference": {"infer_batch_size": 1}}, "kl_penalty",
     "use kl, abs, mse or k3"),
    (RL, "rlvr", {"adv_estimator": "gigpo"}, "adv_estimator", "use reinforce"),
    (RL, "rlvr", {"adv_estimator": "grpo"}, GROUP, "is always 0; use at least 2, or adv_estimator: reinforce"),
    (RL, "rlvr", {"adv_estimator": "rloo"}, GROUP, "rloo compares samples of one prompt with each other"),
    (RL, "rlvr", {"norm_mean_type": "group", "norm_std_type": "group"}, GROUP,
     "every reward becomes 0; use at least 2, or norm_mean_type and norm_std_type: batch"),
    (RL, "rlvr", {"norm_std_type": "group"}, GROUP, "norm_std_type group compares"),
]  # fmt: skip


FILTERS = "train_infer_correction.filters"
MEAN = "rewards.math.query_filter_config.filter_args"


def filtered(**settings):
    return {"train_infer_correction": {"filters": [{"enabled": False}, {"enabled": True, **settings}]}}


def mean_filter(**bounds):
    return {"rewards": {"math": {**REWARD, "query_filter_config": {"type": "mean_filter", "filter_args": bounds}}},
            GROUP: 2}  # fmt: skip


OTHER_LAUNCHERS += [
    (RL, "rlvr", filtered(ratio_low=1.1, ratio_high=0.9), f"{FILTERS}[1].ratio_low", "1.1 is not below ratio_high (0."),
    # Against the other one's default.
    (RL, "rlvr", filtered(ratio_low=1.2), f"{FILTERS}[1].ratio_low", "1.2 is not below ratio_high (1.2)"),
    (RL, "rlvr", filtered(ratio_high=0.5), f"{FILTERS}[1].ratio_low", "0.8 is not below ratio_high (0.5)"),
    (RL, "rlvr", filtered(diff_enabled=True, diff_low=0.3), f"{FILTERS}[1].diff_low", "not below diff_high (0.2)"),
    (PURE, OPD, filtered(diff_enabled=True, diff_high=-0.2), f"{FILTERS}[1].diff_low", "raise diff_high"),
    (RL, "rlvr", {"difficulty_mask": True, "difficulty_low_threshold": 1.0, GROUP: 2}, "difficulty_low_threshold",
     "1 is not below difficulty_high_threshold (1)"),
    (MIXED, "rlvr", {"difficulty_mask": True, "difficulty_high_threshold": 0.0, GROUP: 2}, "difficulty_low_threshold",
     "raise difficulty_high_threshold"),
    (RL, "rlvr", mean_filter(threshold_down=0.9, threshold_up=0.1), f"{MEAN}.threshold_down",
     "0.9 is not below threshold_up (0.1)"),
    (RL, "rlvr", mean_filter(threshold_up=-1), f"{MEAN}.threshold_down", "-1 is not below threshold_up (-1)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({}, []),
        ({"ratio_low": 0.0, "ratio_high": 2.0}, []),
        ({"diff_low": -0.1}, ["[1].diff_low: no effect, because diff_enabled is off"]),
        # What says the default asks for nothing.
        ({"diff_low": -0.2, "diff_high": 0.2}, []),
        ({"ratio_enabled": False, "ratio_high": 0.5, "diff_enabled": True, "diff_low": -0.1},
         ["[1].ratio_high: no effect, because ratio_enabled is off"]),
        ({"ratio_enabled": False, "ratio_high": 0.5},
         ["[1]: no effect, because it tests nothing; set ratio_enabled or diff_enabled"]),
        ({"enabled": False, "ratio_low": 9.0}, []),
    ],
)  # fmt: skip
def test_bounds_without_their_switch_are_mentioned(settings, warnings):
    assert build_config(changed(RL, filtered(**settings)), "rlvr").warnings == [f"{FILTERS}{w}" for w in warnings]


@pytest.mark.parametrize(
    ("base", "launcher", "changes"),
    [
        (RL, "rlvr", {"difficulty_low_threshold": 2.0, GROUP: 2}),
        # Rewards only monitor.
        (PURE, OPD, {"difficulty_mask": True, "difficulty_low_threshold": 2.0, GROUP: 2}),
        (RL, "rlvr", mean_filter(threshold_up=1)),
    ],
)
def test_bounds_that_are_not_in_force_or_do_not_cross_load(base, launcher, changes):
    build_config(changed(base, changes), launcher)


@pytest.mark.parametrize(("base", "launcher", "changes", "field", "words"), OTHER_LAUNCHERS)
def test_other_launchers_name_field_and_fix(base, launcher, changes, field, words):
    with pytest.raises(ConfigError) as caught:
        build_config(changed(base, changes), launcher)
    assert caught.value.field == field
    assert words in caught.value.problem


ACCEPTED = [
    (
        {"student_train.training_args.learning_rate": "5e-7"},
        lambda c: c.actor_train.training_args.learning_rate == 5e-7,
    ),
    ({"student_train.training_args.weight_decay": 1}, lambda c: c.actor_train.training_args.weight_decay == 1.0),
    ({"student_infer.generating_args.top_k": -1}, lambda c: c.actor_infer.generating_args.top_k == 0),
    ({"student_infer.model_args": None}, lambda c: c.actor_infer.model_args.model_name_or_path == "models/student"),
    ({"max_steps": None}, lambda c: c.max_steps == 500),
    ({"seed": 2**63 - 1}, lambda c: c.seed == 2**63 - 1),
    (
        {"student_train.training_args": {"lr_scheduler_type": "constant", "warmup_steps": 0}},
        lambda c: c.actor_train.training_args.lr_scheduler_type == "constant",
    ),
    (
        {"student_train.training_args": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}},
        lambda c: c.actor_train.training_args.warmup_steps == 5,
    ),
    (
        {"rewards": {"math": {**REWARD, "reward_args": {"num_processes": 2}}}},
        lambda c: c.rewards["math"].reward_args == {"num_processes": 2},
    ),
    ({"track_with": "stdout"}, lambda c: c.track_with == ["stdout"]),
    ({"opd_args": {"objective": "direct"}, "kl_penalty": "mse"}, lambda c: c.kl_penalty == "kl"),
    ({"opd_args": {"student_logprob_source": "infer"}}, lambda c: c.opd_args.student_logprob_source == "infer"),
    ({"opd_args": {"base_model": "m", "extrapolation": 1.5}}, lambda c: c.opd_args.extrapolation == 1.5),
    (
        {"teacher": {"teacher_args": {"self_teacher": "live", "context_template": "x"}}},
        lambda c: c.teachers["default"].model_args.model_name_or_path == "models/student",
    ),
    (
        {
            "teacher": {
                "model_args": {"dtype": "fp32"},
                "teacher_args": {"self_teacher": "ema", "context_template": "x"},
            }
        },
        lambda c: c.teachers["default"].teacher_args.ema_decay == 0.99,
    ),
]


@pytest.mark.parametrize(("changes", "holds"), ACCEPTED)
def test_what_is_accepted(changes, holds):
    assert holds(build_config(changed(PURE, changes), OPD).config)


@pytest.mark.parametrize(
    ("penalty", "objective", "divergence", "support"),
    [
        ("kl", "policy_gradient", "reverse_kl", "sampled"),
        ("mse", "direct", "reverse_kl", "sampled"),  # k2: the gradient of the reverse KL
        ("k3", "direct", "forward_kl", "sampled"),  # as a loss, k3 has the gradient of the forward KL
        ("full", "direct", "reverse_kl", "full"),
    ],
)
@pytest.mark.parametrize("base", [PURE, MIXED])
def test_kl_penalty_is_written_into_opd_args(base, penalty, objective, divergence, support):
    """Everything behind the config reads one place."""
    changes = {"kl_penalty": penalty, "opd_args": {"objective": objective}}
    args = build_config(changed(base, changes), OPD if base is PURE else "rlvr").config.opd_args
    assert (args.objective, args.divergence, args.support) == (objective, divergence, support)


def test_kl_penalty_without_a_teacher_is_no_alias():
    config = build_config(changed(RL, {"kl_penalty": "mse"}), "rlvr").config
    assert (config.opd_args.divergence, config.opd_args.support) == ("reverse_kl", "sampled")
    assert config.kl_penalty == "mse"


def test_a_frozen_self_teacher_is_a_reference_in_the_mixed_mode():
    """Beside a reward, pulling the student back to where it was is what a KL to the reference does."""
    frozen = {"teacher": {"teacher_args": {"self_teacher": "frozen"}}}
    teacher = build_config(changed(MIXED, frozen), "rlvr").config.teachers["default"]
    assert teacher.model_args.model_name_or_path == "models/student"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 0.5, "opd_args": {"apply_to": "reward"}}, "gamma 0.5"),
        ({"gamma": 0, "whiten_advantages": True, "opd_args": {"apply_to": "reward"}}, "lets whitening rescale"),
        ({"gamma": 0, "adv_estimator": "reinforce++", "opd_args": {"apply_to": "reward"}}, "lets whitening rescale"),
    ],
)
def test_what_apply_to_reward_does_to_the_teachers_term_is_a_warning(changes, words):
    (warning,) = build_config(changed(MIXED, changes), "rlvr").warnings
    assert warning.startswith("opd_args.apply_to") and words in warning
    without = {key: value for key, value in changes.items() if key != "opd_args"}
    assert build_config(changed(MIXED, without), "rlvr").warnings == []


@pytest.mark.parametrize(
    ("args", "idle"),
    [
        ({"position_scale": 9}, ["position_scale"]),
        ({"position_scale": 9, "position_weight": "linear"}, []),
        ({"coef_end": 0.5}, ["coef_end"]),
        ({"coef_end": 0.5, "coef_schedule": "linear"}, []),
        ({"log_ratio_clip": 5, "objective": "direct", "support": "full"}, ["log_ratio_clip"]),
        ({"log_ratio_clip": 5, "objective": "direct"}, []),
        ({"jsd_beta": 0.1}, ["jsd_beta"]),
        ({"top_k": 4, "add_tail": False, "objective": "direct", "support": "full"}, ["top_k", "add_tail"]),
        ({"top_k": 4, "add_tail": False, "objective": "direct", "support": "student_topk"}, []),
    ],
)
def test_settings_without_effect_are_mentioned(args, idle):
    warnings = build_config(changed(PURE, {"opd_args": args}), OPD).warnings
    assert [w.partition(":")[0] for w in warnings] == [f"opd_args.{key}" for key in idle]


def test_a_warm_up_that_constant_does_not_have_is_a_warning():
    changes = {"student_train.training_args": {"lr_scheduler_type": "constant", "warmup_steps": 5}}
    (warning,) = (w for w in build_config(changed(PURE, changes), OPD).warnings if "warm-up" in w)
    assert warning.startswith("student_train.training_args.lr_scheduler_type") and "constant_with_warmup" in warning


@pytest.mark.parametrize("changes", [{"adv_estimator": "grpo"}, {"norm_mean_type": "group"}])
def test_groups_of_one_are_a_warning_beside_a_teacher(changes):
    (warning,) = build_config(changed(MIXED, changes), "rlvr").warnings
    assert warning.startswith("num_return_sequences_in_group: 1, but") and "the teachers alone train" in warning
    two = {**changes, "num_return_sequences_in_group": 2}
    assert build_config(changed(MIXED, two), "rlvr").warnings == []
    assert build_config(changed(RL, two), "rlvr").warnings == []


def test_groups_of_one_are_nothing_where_no_reward_trains():
    warnings = build_config(changed(PURE, {"norm_mean_type": "group"}), OPD).warnings
    assert not any("num_return_sequences_in_group" in warning for warning in warnings)


FILTER = "rewards.math.query_filter_config.filter_args"


@pytest.mark.parametrize(("base", "launcher"), [(RL, "rlvr"), (PURE, OPD)])
@pytest.mark.parametrize(
    ("kind", "args", "key", "words"),
    [
        ("mean_filter", {"treshold_up": 1}, "treshold_up", "did you mean 'threshold_up'"),
        ("mean_filter", {"std_threshold": 1}, "std_threshold", "mean_filter takes threshold_down and threshold_up"),
        ("std_filter", {"std_treshold": 0.1}, "std_treshold", "did you mean 'std_threshold'"),
        ("no_filter", {"threshold_up": 1}, "threshold_up", "no_filter takes no arguments"),
        ("std_filter", {"std_threshold": "high"}, "std_threshold", "expected a number, got 'high'"),
        ("std_filter", {"std_threshold": True}, "std_threshold", "expected a number, got True"),
        ("std_filter", {"std_threshold": None}, "std_threshold", "expected a number, got None"),
        ("mean_filter", {"threshold_down": 0, "threshold_up": float("nan")}, "threshold_up", "a number, got nan"),
    ],
)
def test_arguments_of_a_filter_are_checked(base, launcher, kind, args, key, words):
    reward = {**REWARD, "query_filter_config": {"type": kind, "filter_args": args}}
    with pytest.raises(ConfigError) as caught:
        build_config(changed(base, {"rewards": {"math": reward}}), launcher)
    assert caught.value.field == f"{FILTER}.{key}"
    assert words in caught.value.problem


def test_filters_take_what_the_algorithm_takes():
    assert FILTER_ARGS == QUERY_FILTERS
    for kind, args in QUERY_FILTERS.items():
        reward = {**REWARD, "query_filter_config": {"type": kind, "filter_args": {**args}}}
        raw = changed(RL, {"rewards": {"math": reward}, "num_return_sequences_in_group": 2})
        config = build_config(raw, "rlvr").config
        spec = config.rewards["math"].query_filter_config
        assert query_filter(spec.type, spec.filter_args, [0.0, 1.0])


def test_a_coefficient_of_zero_cannot_adapt() -> None:
    settings = {"reference": SINGLE, "add_token_level_kl": True, "target_kl": 0.1, "init_kl_coef": 0.0}
    with pytest.raises(ConfigError, match=r"^init_kl_coef: is 0.*start above 0"):
        build_config(changed(RL, settings), "rlvr")
    build_config(changed(RL, {**settings, "init_kl_coef": 0.1}), "rlvr")
