"""The line that says what a run trains on: nothing that is in force is missing, and nothing else stands in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.pipeline.formula import formula

OPD = {field.name for field in dataclasses.fields(OPDArguments)}
TERM = "2 * (logprob_default - logprob_student)"
KL = {"add_token_level_kl": True, "init_kl_coef": 0.2}


def line(mode: str, *teachers: str, **settings: Any) -> str:
    """The formula of what a load makes of these settings; those of ``opd_args`` are given directly."""
    chosen: dict[str, Any] = {"adv_estimator": "reinforce"} | {k: v for k, v in settings.items() if k not in OPD}
    if mode == "pure_opd":
        chosen["gamma"] = 0.0
    config = RLVRConfig(
        is_pure_opd=mode == "pure_opd",
        use_opd=mode == "mixed_opd",
        opd_kl_coef=2.0,
        teachers={} if mode == "rl" else {name: TeacherConfig() for name in teachers or ("default",)},
        opd_args=OPDArguments(**{k: v for k, v in settings.items() if k in OPD}),
        **chosen,
    )
    return formula(config)


def test_the_whole_line() -> None:
    end = "student logprobs from the trainer; seq-mean-token-mean"
    assert line("pure_opd") == f"pure_opd: advantage A_t = {TERM} on sampled tokens; {end}"
    assert line("rl") == f"rl: advantage A_t = reinforce(reward; discount 1) on sampled tokens; {end}"
    both = f"reinforce(reward; discount 1) + {TERM}"
    assert line("mixed_opd") == f"mixed_opd: advantage A_t = {both} on sampled tokens; {end}"
    joined = f"reinforce(reward at the last token + {TERM}; discount 1)"
    assert line("mixed_opd", apply_to="reward") == f"mixed_opd: advantage A_t = {joined} on sampled tokens; {end}"
    loss = "loss L_t = L_policy(A_t) + 2 * reverse_kl(student, default) over the full vocabulary"
    direct = line("mixed_opd", objective="direct", support="full")
    assert direct == f"mixed_opd: advantage A_t = reinforce(reward; discount 1); {loss}; {end}"


def test_terms_of_several_teachers_are_whole() -> None:
    one, two = (f"2 * 0.75 log(0.25 exp(logprob_{name} - logprob_student) + 0.75)" for name in "ab")
    what = "over the teachers of the sample's tag of"
    jsd = {"divergence": "jsd", "jsd_beta": 0.25}
    assert f"A_t = sum {what} [{one}, {two}] on sampled tokens" in line("pure_opd", "a", "b", **jsd)
    mean = line("mixed_opd", "a", "b", **jsd, apply_to="reward", teacher_weighting="mean")
    assert f"reinforce(reward at the last token + mean {what} [{one}, {two}]; discount 1)" in mean


@pytest.mark.parametrize(
    ("mode", "settings", "part"),
    [
        # Whitening, wherever the teachers' term joins.
        ("rl", {"adv_estimator": "reinforce++"}, "reinforce++(reward; discount 1, whitened)"),
        ("mixed_opd", {"whiten_advantages": True}, f"reinforce(reward; discount 1, whitened) + {TERM}"),
        ("mixed_opd", {"adv_estimator": "reinforce++", "apply_to": "reward"},
         f"reinforce++(reward at the last token + {TERM}; discount 1, whitened)"),
        ("mixed_opd", {"whiten_advantages": True, "apply_to": "reward"},
         f"reinforce(reward at the last token + {TERM}; discount 1, whitened)"),
        ("rl", {"whiten_rewards": True, **KL},
         "reinforce(reward at the last token - 0.2 * kl(student, reference); discount 1, token rewards whitened)"),
        ("mixed_opd", {"whiten_rewards": True, "apply_to": "reward"}, "; discount 1, token rewards whitened)"),
        # What becomes of the reward before that.
        ("rl", {"reward_clip": 5.0}, "reinforce(reward clipped to +-5; discount 1)"),
        ("mixed_opd", {"reward_clip": 5.0, "apply_to": "reward"}, "(reward clipped to +-5 at the last token + 2 *"),
        ("rl", {"norm_mean_type": "group", "norm_std_type": "running"},
         "reinforce(reward centred over group scaled over the run so far; discount 1)"),
        ("rl", {"adv_estimator": "rloo", "norm_mean_type": "batch", "norm_std_type": "batch"},
         "rloo(reward scaled over batch; discount 1)"),
        ("rl", {"adv_estimator": "grpo", "norm_mean_type": "batch", "norm_std_type": "batch"},
         "grpo(reward; discount 1)"),
        ("rl", {"adv_estimator": "gae", "gamma": 0.9, "lambd": 0.8}, "gae(reward; discount 0.9, lambda 0.8)"),
        # Terms of the loss, and bounds.
        ("rl", {"use_kl_loss": True, "kl_loss_coef": 0.1}, "+ 0.1 * k3(student, reference) in the loss"),
        ("rl", {"entropy_loss_coef": 0.01}, "- 0.01 * entropy(student) in the loss"),
        ("pure_opd", {"entropy_loss_coef": 0.01, "objective": "direct"}, "- 0.01 * entropy(student) in the loss"),
        ("rl", {"advantage_clip": 3.0}, "advantage clipped to +-3"),
        ("mixed_opd", {"advantage_clip": 3.0, "objective": "direct"}, "advantage clipped to +-3"),
        ("pure_opd", {"log_ratio_clip": 4.0, "objective": "direct"}, "log-ratio clipped to +-4"),
    ],
)  # fmt: skip
def test_what_is_in_force_is_named(mode: str, settings: dict[str, Any], part: str) -> None:
    assert part in line(mode, **settings)


@pytest.mark.parametrize(
    ("mode", "settings", "part"),
    [
        ("rl", {"use_kl_loss": True, "kl_loss_coef": 0.0, **KL}, "in the loss"),
        ("rl", {"use_kl_loss": False, "kl_loss_coef": 0.1, **KL}, "in the loss"),
        ("rl", {}, "whitened"),
        ("mixed_opd", {"apply_to": "reward"}, "whitened"),
        ("pure_opd", {"reward_clip": 5.0, "objective": "direct", "advantage_clip": 3.0}, "clipped"),
        ("pure_opd", {"log_ratio_clip": 4.0, "objective": "direct", "support": "full"}, "clipped"),
    ],
)
def test_what_is_not_in_force_is_not_named(mode: str, settings: dict[str, Any], part: str) -> None:
    assert part not in line(mode, **settings)
