"""What a step must know of its trajectories before the student is updated; pure functions of the config.

Log-probabilities that nothing but reports reads are not worth a forward pass of their own: the update's own says them,
as long as it is the first with these weights.
"""

from __future__ import annotations

from roll_opd.configs.pipeline_config import PipelineConfig, RLVRConfig
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.layout import layout_of
from roll_opd.distributed.strategy.base import ScoreWant
from roll_opd.pipeline.batching import mini_batch_size


def updates_per_step(config: PipelineConfig, trained: WorkerConfig) -> int:
    """Optimizer steps that one pipeline step makes of the role ``trained``."""
    size = mini_batch_size(trained, layout_of(trained).dp_size)
    return config.ppo_epochs * -(-config.samples_per_step // size)


def needs_old_logprobs(config: PipelineConfig) -> bool:
    """Whether the student's log-probabilities and entropies must be known before the update."""
    return (
        not _trains_divergences_alone(config)
        or config.opd_args.entropy_keep is not None
        or config.corrects_mismatch
        # The forward pass of a second update is one with other weights.
        or updates_per_step(config, config.actor_train) > 1
    )


def needs_teacher_logprobs(config: PipelineConfig) -> bool:
    """Whether teachers must say the sampled tokens' log-probabilities, besides what the divergence compares with."""
    return not _trains_divergences_alone(config) or config.opd_args.support != "full"


def want_of(config: PipelineConfig) -> ScoreWant:
    """What is asked of a teacher in training."""
    args = config.opd_args
    if args.objective != "direct":
        return ScoreWant()
    return ScoreWant(
        top_k=args.top_k if args.support in ("teacher_topk", "union_topk") else 0,
        given=args.support in ("student_topk", "union_topk"),
        hidden=args.support == "full",
        logprobs=needs_teacher_logprobs(config),
    )


def _trains_divergences_alone(config: PipelineConfig) -> bool:
    """Whether the loss is made of divergences, with weights that the config and the positions decide."""
    args = config.opd_args
    return (
        config.mode == "pure_opd"
        and args.objective == "direct"
        and args.trust_region is None
        and args.base_model is None
        # What a mask leaves out has no part in the update.
        and not (isinstance(config, RLVRConfig) and config.max_len_mask)
    )
