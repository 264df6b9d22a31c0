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
ONE = Layout(1, {})
TP = Layout(2, {"tensor_model_parallel_size": 2})
SP = Layout(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": False})
PP = Layout(2, {"pipeline_model_parallel_size": 2})
DP = Layout(2, {"overlap_grad_reduce": True})
REPLICAS = Layout(2, {"use_distributed_optimizer": False})
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
            tokens=random.integers(1, VOCAB, length).astype(np.int32),
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
# A large epsilon: where a gradient is next to nothing, Adam's step would be the sign of its rounding error.
ADAM = TrainingArguments(
    learning_rate=2e-3, lr_scheduler_type="cosine", warmup_ratio=0.3, weight_decay=0.1, adam_epsilon=1e-4
)
SGD = TrainingArguments(optimizer="sgd", learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.1)


def run_of(model: str, layout: Layout, loss: Loss = POLICY_GRADIENT, **settings: Any) -> Run:
    taught = loss.divergence is not None
    return Run(**{"model": model, "layout": layout, "training": ADAM, "items": trajectories(13, taught=taught),
                  "loss": loss} | settings)  # fmt: skip


@pytest.fixture(scope="module")
def train(torch_ranks) -> Callable[[Run], Outcome]:
    """Run a job on the ranks of its layout, and put their answers together; what FSDP2 gives is computed once."""
    known: dict[str, Outcome] = {}

    def run(what: Run) -> Outcome:
        if what.layout == FSDP2 and (key := str(what)) in known:
            return known[key]
        outcomes: list[Outcome] = torch_ranks.run(what.layout.ranks, job, what)
        answers = [o.metrics for o in outcomes if "loss" in o.metrics[0]]
        assert all(one["loss"] == other["loss"] for a in answers for one, other in zip(a, answers[0], strict=True))
        assert all(len({o.metrics[i]["grad_norm"] for o in outcomes}) == 1 for i in range(what.updates))
        logprobs = {i: values for o in outcomes for i, values in o.logprobs.items()}
        largest = [max(m["max/ratio"] for m in update) for update in zip(*answers, strict=True)]
        metrics = [m | {"max/ratio": ratio} for m, ratio in zip(answers[0], largest, strict=True)]
        outcome = Outcome(logprobs, metrics, outcomes[0].weights)
        if what.layout == FSDP2:
            known[key] = outcome
        return outcome

    return run


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    """Log-probabilities, metrics of all updates and final weights agree."""
    assert ours.logprobs.keys() == theirs.logprobs.keys()
    for name, values in theirs.logprobs.items():
        np.testing.assert_allclose(ours.logprobs[name], values, atol=10 * tolerance)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name] == pytest.approx(other[name], rel=tolerance), name
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        np.testing.assert_allclose(ours.weights[name], weight, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("loss", [POLICY_GRADIENT, FULL_KL], ids=["policy gradient", "full KL"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_as_fsdp2_does(train, tiny_models, layout: str, loss: Loss) -> None:
    """13 sequences: with two data-parallel ranks one of them gets an item of weight 0."""
    settings = {"updates": 3, "max_grad_norm": 0.4}
    theirs = train(run_of(tiny_models.student, FSDP2, loss, **settings))
    assert theirs.metrics[0]["grad_norm"] > 0.4
    ours = train(run_of(tiny_models.student, LAYOUTS[layout], loss, **settings))
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def models(tiny_models, random_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied and an untied model, a tied one of four layers with an odd vocabulary, and a mixture of experts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2,
        "bos_token_id": None, "vocab_size": 309,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    made = {"deep": Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=4, tie_word_embeddings=True)),
            "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | experts))}  # fmt: skip
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        torch.manual_seed(5)
        model.init_weights()
        model.save_pretrained(folder / name)
    return {"tied": tiny_models.student, "untied": random_model} | {name: str(folder / name) for name in made}


PARTS = {
    "untied, TP": ("untied", TP),
    "untied, PP": ("untied", PP),
    "interleaved stages": ("deep", Layout(2, PP.settings | {"virtual_pipeline_model_parallel_size": 2})),
    "stages of shards": ("deep", Layout(4, TP.settings | PP.settings)),
    "replicas of stages": ("deep", PP._replace(ranks=4)),
    "experts on all ranks": ("experts", DP),
    "experts in two parts": ("experts", Layout(2, {"expert_model_parallel_size": 2})),
    "experts and shards": ("experts", SP),
}


@pytest.mark.parametrize("part", PARTS)
def test_other_models_and_mixed_layouts(train, models, part: str) -> None:
    name, layout = PARTS[part]
    settings = {"updates": 2, "max_grad_norm": 0.4, "items": trajectories(7)}
    assert_same(train(run_of(models[name], layout, **settings)), train(run_of(models[name], FSDP2, **settings)))
