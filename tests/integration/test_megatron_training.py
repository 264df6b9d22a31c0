"""Megatron-core's ranks train like one rank of FSDP2, whatever the layout: same loss, gradient, weights and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.configs import ModelArguments, StrategyArguments, TrainingArguments, WorkerConfig
from roll_opd.trajectory import RawTensor, TeacherScores, Trajectory, TrajectoryId

pytestmark = pytest.mark.integration

VOCAB = 305
TEACHER_SIZE = 12


class Layout(NamedTuple):
    """Ranks and how Megatron-core uses them; FSDP2 without settings."""

    ranks: int
    settings: dict[str, Any] | None

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        if self.settings is None:
            return self.ranks
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return self.ranks // int(np.prod([self.settings.get(name, 1) for name in names]))


FSDP2 = Layout(1, None)
ONE = Layout(1, {"use_distributed_optimizer": False})
TP = Layout(2, {"tensor_model_parallel_size": 2})
SP = Layout(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True})
PP = Layout(2, {"pipeline_model_parallel_size": 2})
DP = Layout(2, {"use_distributed_optimizer": True})
REPLICAS = Layout(2, {"use_distributed_optimizer": False, "overlap_grad_reduce": True})
LAYOUTS = {"one rank": ONE, "TP": TP, "TP with SP": SP, "PP": PP, "DP": DP, "DP, replicas": REPLICAS}


class Run(NamedTuple):
    """What a job does: some updates of a model, from a checkpoint or the start, with one loss."""

    model: str
    layout: Layout
    training: TrainingArguments
    items: list[Trajectory]
    loss: Loss
    updates: int = 1
    per_device: int = 4
    dtype: str = "fp32"
    max_grad_norm: float = 0.0
    load: str | None = None
    save: str | None = None
    save_after: int = 0
    export: str | None = None


class Outcome(NamedTuple):
    """What a rank gives: log-probabilities before, metrics of each update, and, from rank 0, weights afterwards."""

    logprobs: dict[TrajectoryId, np.ndarray]
    metrics: list[dict[str, float]]
    weights: dict[str, np.ndarray]


def worker_config(run: Run) -> WorkerConfig:
    name = "fsdp2_train" if run.layout.settings is None else "megatron_train"
    return WorkerConfig(
        model_args=ModelArguments(run.model, dtype=run.dtype, disable_gradient_checkpointing=True),
        training_args=dataclasses.replace(run.training, per_device_train_batch_size=run.per_device),
        strategy_args=StrategyArguments(name, dict(run.layout.settings or {})),
        world_size=run.layout.ranks,
        infer_batch_size=5,
    )


def job(run: Run) -> Outcome:
    """On one rank: score, update, save and export."""
    import torch
    import torch.distributed as dist

    from roll_opd.distributed.layout import layout_of
    from roll_opd.distributed.strategy.base import HeadWeights, ScoreRequest
    from roll_opd.distributed.strategy.factory import build_train_strategy
    from roll_opd.distributed.strategy.packed_model import raw_of
    from roll_opd.distributed.strategy.tokenizer import Vocabulary
    from roll_opd.pipeline.batching import micro_batches, rank_shares

    torch.manual_seed(3)
    config = worker_config(run)
    vocabulary = Vocabulary(VOCAB, frozenset({2}), lambda ids: "")
    strategy = build_train_strategy(
        "student_train", config, vocabulary, torch.device("cpu"), max_grad_norm=run.max_grad_norm, total_updates=4
    )
    if run.load is not None:
        strategy.load(run.load)
    layout = layout_of(config)
    mine = layout.dp_ranks[dist.get_rank()]
    head = torch.randn(VOCAB, TEACHER_SIZE, generator=torch.Generator().manual_seed(4))
    strategy.set_teacher_head("t", HeadWeights(raw_of(head), None, None))

    requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in run.items]
    scores = strategy.score(rank_shares(requests, layout.dp_size)[mine])
    assert bool(scores) == (dist.get_rank() in layout.answers)
    rows = micro_batches(run.items, config, layout.dp_size, "token-mean", 64)[mine]
    metrics = []
    for update in range(run.updates):
        if run.save is not None and update == run.save_after:
            strategy.save(run.save)
        metrics.append(strategy.train_step(rows, run.loss))
    if run.export is not None:
        strategy.export_hf(run.export)
    weights = {
        name: torch.from_numpy(raw).view(getattr(torch, dtype)).double().numpy().reshape(shape)
        for bucket in strategy.export_weights(None, 1 << 14)
        for name, dtype, shape, raw in bucket.tensors
    }
    return Outcome({s.id: s.logprobs for s in scores}, metrics, weights)


# ---- trajectories ----------------------------------------------------------------------------------------------------


def trajectories(count: int, *, taught: bool = False) -> list[Trajectory]:
    """Sequences of very different lengths, with random advantages or a random teacher's hidden states."""
    random = np.random.default_rng(0)
    out = []
    for i in range(count):
        prompt, response = int(random.integers(3, 30)), int(random.integers(1, 40))
        length = prompt + response
        mask = np.arange(length) >= prompt
        trajectory = Trajectory(
            id=TrajectoryId(i, 0),
            tag="t",
            tokens=random.integers(0, VOCAB, length).astype(np.int32),
            response_mask=mask,
            infer_logprobs=np.zeros(length, np.float32),
            old_logprobs=(-5.0 * mask).astype(np.float32),
            weight_version=np.where(mask, 0, -1).astype(np.int32),
            advantages=(random.normal(size=length) * mask).astype(np.float32),
        )
        if taught:
            hidden = random.normal(size=(response, TEACHER_SIZE)).astype(np.float32)
            details = RawTensor("float32", hidden.shape, hidden.reshape(-1).view(np.uint8))
            trajectory = dataclasses.replace(
                trajectory,
                advantages=np.zeros(length, np.float32),
                teacher_scores={"t": TeacherScores(np.zeros(length, np.float32), details)},
                divergence_weights={"t": mask.astype(np.float32)},
            )
        out.append(trajectory)
    return out


POLICY_GRADIENT = Loss()
FULL_KL = Loss(divergence=DivergenceLoss("reverse_kl", "full"))
ADAM = TrainingArguments(
    learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1, adam_epsilon=1e-4
)


@pytest.fixture(scope="module")
def train(torch_ranks) -> Callable[[Run], Outcome]:
    """Run a job on the ranks of its layout, and put their answers together."""

    def run(what: Run) -> Outcome:
        outcomes: list[Outcome] = torch_ranks.run(what.layout.ranks, job, what)
        logprobs = {i: values for o in outcomes for i, values in o.logprobs.items()}
        answers = [o.metrics for o in outcomes if "loss" in o.metrics[0]]
        assert all(m[0]["loss"] == answers[0][0]["loss"] for m in answers)
        return Outcome(logprobs, answers[0], outcomes[0].weights)

    return run


def start(model: str, layout: Layout, loss: Loss, **settings: Any) -> Run:
    return Run(model, layout, ADAM, trajectories(13, taught=loss.divergence is not None), loss, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x(train, tiny_models, layout):
    a = train(start(tiny_models.student, FSDP2, POLICY_GRADIENT, updates=3))
    b = train(start(tiny_models.student, LAYOUTS[layout], POLICY_GRADIENT, updates=3))
    print(a.metrics, b.metrics)
    for i, x in a.logprobs.items():
        print(np.abs(b.logprobs[i] - x).max(), end=" ")
    print({n: float(np.abs(b.weights[n] - w).max()) for n, w in a.weights.items()})
    d = np.abs(b.weights["lm_head.weight"] - a.weights["lm_head.weight"])
    print(np.argwhere(d > 1e-5)[:50], (d > 1e-5).sum())
    assert 0
