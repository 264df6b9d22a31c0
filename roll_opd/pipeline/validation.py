"""What both pipelines share when they measure the student on held-out tasks."""

from __future__ import annotations

from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.distributed.strategy.base import Sampling
from roll_opd.pipeline.metrics import episodes_of, reverse_kl, reward_metrics
from roll_opd.trajectory import Trajectory


def validation_metrics(samples: list[Trajectory], sampling: Sampling) -> dict[str, float]:
    """Accuracy, reward, lengths, and reverse KL (student's log-probabilities from the engine) of validation samples.

    The mean log-ratio is a KL only on samples of the student's own distribution: other sampling gives none. Rewards
    count episodes, lengths trajectories: as :func:`~roll_opd.pipeline.metrics.rollout_metrics` of a training batch.
    """
    metrics = {k.removeprefix("/"): v for k, v in reward_metrics(samples, "").items()}
    names = sorted({name for t in samples for name in t.teachers})
    if not sampling.truncates:
        for name in names:
            metrics[f"reverse_kl/teacher/{name}"] = reverse_kl(samples, name, "infer_logprobs")
        if names:
            metrics["reverse_kl"] = reverse_kl(samples, None, "infer_logprobs")
    metrics["num_samples"] = float(len(episodes_of(samples)))
    metrics["response_length"] = sum(t.response_length for t in samples) / len(samples)
    metrics["truncated"] = sum(t.finish_reason == "length" for t in samples) / len(samples)
    return metrics


def sampling_of(args: GeneratingArguments | None, response_length: int | None) -> Sampling:
    """Sampling settings of a role; ``max_new_tokens`` is bounded by ``response_length``."""
    args = args or GeneratingArguments()
    limit = min(n for n in (args.max_new_tokens, response_length, 1 << 30) if n is not None)
    return Sampling(
        temperature=args.temperature or 1.0,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=limit,
        greedy=not args.do_sample or args.temperature == 0,
        stop_strings=tuple(args.stop_strings or ()),
        ignore_eos=args.ignore_eos,
    )
