"""Nobody is asked for log-probabilities that only reports read; everybody is where something else does."""

from __future__ import annotations

import dataclasses

import pytest

from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.pipeline_config import (
    PipelineConfig,
    RLVRConfig,
    TrainInferCorrectionArguments,
    TrainInferWeightArguments,
)
from roll_opd.configs.worker_config import StrategyArguments, TeacherConfig, WorkerConfig
from roll_opd.pipeline.needs import needs_old_logprobs, needs_teacher_logprobs, want_of


def config(samples: int = 8, **opd_args: object) -> PipelineConfig:
    worker = WorkerConfig(strategy_args=StrategyArguments(strategy_name="fsdp2_train"))
    training = dataclasses.replace(
        worker.training_args, per_device_train_batch_size=samples, gradient_accumulation_steps=1
    )
    args = {"objective": "direct", "divergence": "reverse_kl", "support": "full"} | opd_args
    return RLVRConfig(
        is_pure_opd=True,
        teachers={"default": TeacherConfig()},
        actor_train=dataclasses.replace(worker, training_args=training),
        opd_args=OPDArguments(**args),  # type: ignore[arg-type]
        rollout_batch_size=8,
        num_return_sequences_in_group=1,
    )


def test_a_divergence_alone_and_one_update_need_nothing_before_it() -> None:
    assert not needs_old_logprobs(config()) and not needs_teacher_logprobs(config())
    assert want_of(config()).hidden and not want_of(config()).logprobs


def test_a_second_update_has_other_weights() -> None:
    twice = config(samples=4)
    assert needs_old_logprobs(twice) and not needs_teacher_logprobs(twice)
    assert needs_old_logprobs(dataclasses.replace(config(), ppo_epochs=2))


@pytest.mark.parametrize("support", ["sampled", "teacher_topk", "student_topk"])
def test_without_whole_distributions_only_the_teacher_can_say(support: str) -> None:
    assert not needs_old_logprobs(config(support=support))
    assert needs_teacher_logprobs(config(support=support)) and want_of(config(support=support)).logprobs


def test_the_entropy_gate_reads_entropies() -> None:
    assert needs_old_logprobs(config(entropy_keep=0.5)) and not needs_teacher_logprobs(config(entropy_keep=0.5))


@pytest.mark.parametrize(
    "changes",
    [{"is_pure_opd": False, "use_opd": True}, {"max_len_mask": True}],
    ids=["rewards", "a mask"],
)
def test_whoever_reads_both_gets_both(changes: dict[str, bool]) -> None:
    changed = dataclasses.replace(config(), **changes)  # type: ignore[arg-type]
    assert needs_old_logprobs(changed) and needs_teacher_logprobs(changed)


def test_a_correction_compares_with_the_engine() -> None:
    weight = TrainInferCorrectionArguments(TrainInferWeightArguments(enabled=True))
    assert needs_old_logprobs(dataclasses.replace(config(), train_infer_correction=weight))
    own = config(student_logprob_source="infer")
    assert not needs_old_logprobs(dataclasses.replace(own, train_infer_correction=weight))


def test_an_advantage_is_made_of_both() -> None:
    sampled = config(objective="policy_gradient", support="sampled")
    assert needs_old_logprobs(sampled) and needs_teacher_logprobs(sampled) and not want_of(sampled).details
