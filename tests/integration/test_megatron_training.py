"""Megatron-core's ranks train like one rank of FSDP2, whatever the layout; checkpoints and weights leave no trace."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
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
    """Written before the second update."""
    export: str | None = None
    away: bool = False
    """Leave the device and come back before each update."""
    broken: Trajectory | None = None
    """Tried before the first update; its gradient is not finite."""


class Outcome(NamedTuple):
    """What a rank gives: log-probabilities before, metrics of each update, and, from rank 0, weights afterwards."""

    logprobs: dict[TrajectoryId, np.ndarray]
    metrics: list[dict[str, float]]
    weights: dict[str, np.ndarray]
    refused: list[str]


def worker_config(run: Run) -> WorkerConfig:
    name = "fsdp2_train" if run.layout.settings is None else "megatron_train"
    return WorkerConfig(
        model_args=ModelArguments(run.model, dtype=run.dtype, disable_gradient_checkpointing=True),
        training_args=dataclasses.replace(run.training, per_device_train_batch_size=run.per_device),
        strategy_args=StrategyArguments(name, dict(run.layout.settings or {})),
        world_size=run.layout.ranks,
        infer_batch_size=5,
    )


def weights_of(strategy: Any) -> dict[str, np.ndarray]:
    pairs = [(name, tensor) for names, tensor in strategy.full_weights(None) for name in names]
    return {n: t.numpy() for name, tensor in pairs for n, t in apart(name, tensor.double())}


def apart(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Take apart what transformers holds as one tensor for all experts."""
    stem, _, kind = name.partition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        parts = {"down": matrix} if kind == "down_proj" else dict(zip(("gate", "up"), matrix.chunk(2), strict=True))
        yield from ((f"{stem}.experts.{expert}.{part}_proj.weight", value) for part, value in parts.items())


def job(run: Run) -> Outcome:
    """On one rank: score, update, save and export."""
    import torch
    import torch.distributed as dist

    from roll_opd.distributed.layout import layout_of
    from roll_opd.distributed.strategy.base import HeadWeights, ScoreRequest, TrainItem
    from roll_opd.distributed.strategy.factory import build_train_strategy
    from roll_opd.distributed.strategy.packed_model import raw_of
    from roll_opd.distributed.strategy.tokenizer import Vocabulary
    from roll_opd.errors import RollOPDError
    from roll_opd.pipeline.batching import micro_batches, rank_shares

    config = worker_config(run)
    strategy: Any = build_train_strategy(
        "student_train", config, Vocabulary(VOCAB, (2,), str), torch.device("cpu"),
        max_grad_norm=run.max_grad_norm, total_updates=4,
    )  # fmt: skip
    if run.load is not None:
        try:
            strategy.load(run.load)
        except RollOPDError as error:
            return Outcome({}, [], {}, [repr(error)])
    layout = layout_of(config)
    mine = layout.dp_ranks[dist.get_rank()]
    head = torch.randn(VOCAB, TEACHER_SIZE, generator=torch.Generator().manual_seed(4))
    strategy.set_teacher_head("t", HeadWeights(raw_of(head), None, None))

    requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in run.items]
    share = rank_shares(requests, layout.dp_size)[mine]
    scores = strategy.score(share)
    assert [s.id for s in scores] == [r.id for r in share if dist.get_rank() in layout.answers]
    rows = micro_batches(run.items, config, layout.dp_size, "token-mean", 64)[mine]
    refused = []
    if run.broken is not None:
        before = weights_of(strategy)
        try:
            strategy.train_step([[TrainItem(run.broken, 1.0)]], run.loss)
        except RollOPDError as error:
            refused.append(repr(error))
        after = weights_of(strategy)
        assert all((before[name] == after[name]).all() for name in before)
    metrics = []
    for update in range(run.updates):
        if run.save is not None and update == 1:
            strategy.save(run.save)
        if run.away:
            strategy._leave(update % 2 == 0)
            strategy._leave(False)
            strategy.onload(weights_only=True)
            weights_of(strategy)
            strategy.onload()
        metrics.append(strategy.train_step(rows, run.loss))
    if run.export is not None:
        strategy.export_hf(run.export)
    return Outcome({s.id: s.logprobs for s in scores}, metrics, weights_of(strategy), refused)


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
        refused = [problem for o in outcomes for problem in o.refused]
        if not outcomes[0].metrics:
            return Outcome({}, [], {}, refused)
        answers = [o.metrics for o in outcomes if "loss" in o.metrics[0]]
        assert all(one["loss"] == other["loss"] for a in answers for one, other in zip(a, answers[0], strict=True))
        assert all(len({o.metrics[i]["grad_norm"] for o in outcomes}) == 1 for i in range(what.updates))
        logprobs = {i: values for o in outcomes for i, values in o.logprobs.items()}
        largest = [max(m["max/ratio"] for m in update) for update in zip(*answers, strict=True)]
        metrics = [m | {"max/ratio": ratio} for m, ratio in zip(answers[0], largest, strict=True)]
        outcome = Outcome(logprobs, metrics, outcomes[0].weights, refused)
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
    settings = {"updates": 3, "max_grad_norm": 0.2}
    theirs = train(run_of(tiny_models.student, FSDP2, loss, **settings))
    assert theirs.metrics[0]["grad_norm"] > 0.2
    ours = train(run_of(tiny_models.student, LAYOUTS[layout], loss, **settings))
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def models(tiny_models, random_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied and an untied model, a tied one of six layers with an odd vocabulary, and a mixture of experts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2,
        "bos_token_id": None, "vocab_size": 309,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = {"deep": Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=6, tie_word_embeddings=True)),
                "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | experts))}  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {"tied": tiny_models.student, "untied": random_model} | {name: str(folder / name) for name in made}


INTERLEAVED = Layout(3, {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2})
PARTS = {
    "untied, TP": ("untied", TP),
    "untied, PP": ("untied", PP),
    "stages of shards": ("deep", Layout(4, TP.settings | PP.settings)),
    "replicas of stages": ("deep", PP._replace(ranks=4)),
    "interleaved stages": ("deep", INTERLEAVED),
    "experts on all ranks": ("experts", DP),
    "experts in two parts": ("experts", Layout(2, {"expert_model_parallel_size": 2})),
    "experts and shards": ("experts", SP),
    "experts in place of shards": ("experts", Layout(2, SP.settings | {"expert_model_parallel_size": 2})),
}


@pytest.mark.parametrize("part", PARTS)
def test_other_models_and_mixed_layouts(train, models, part: str) -> None:
    name, layout = PARTS[part]
    settings = {"updates": 2, "max_grad_norm": 0.2, "items": trajectories(7)}
    assert_same(train(run_of(models[name], layout, **settings)), train(run_of(models[name], FSDP2, **settings)))


def test_sgd_decays_matrices_alone_and_micro_batches_change_nothing(train, tiny_models) -> None:
    settings = {"updates": 2, "training": SGD}
    theirs = train(run_of(tiny_models.student, FSDP2, **settings))
    for layout, per_device in ((DP, 4), (PP, 1), (PP, 13)):
        assert_same(train(run_of(tiny_models.student, layout, per_device=per_device, **settings)), theirs)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_nothing(train, tiny_models, granularity: str) -> None:
    recomputing = PP._replace(settings=PP.settings | {"recompute_granularity": granularity})
    assert_same(train(run_of(tiny_models.student, recomputing)), train(run_of(tiny_models.student, PP)), 1e-7)


RESUMED = {
    "spread state": (DP, ADAM, "fp32"),
    "spread state, bf16": (DP, ADAM, "bf16"),
    "copies of the state, bf16": (REPLICAS, ADAM, "bf16"),
    "shards, fp32": (SP, ADAM, "fp32"),
    "stages, no state": (PP, SGD, "bf16"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_exact(train, tiny_models, tmp_path: Path, case: str) -> None:
    layout, training, dtype = RESUMED[case]
    run = run_of(tiny_models.student, layout, training=training, dtype=dtype)
    uninterrupted = train(run._replace(updates=3, save=str(tmp_path)))
    resumed = train(run._replace(updates=2, load=str(tmp_path)))
    assert resumed.metrics == uninterrupted.metrics[1:]
    for name, weight in uninterrupted.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("case", ["spread state", "copies of the state, bf16", "stages, no state"])
def test_leaving_the_device_changes_nothing(train, tiny_models, case: str) -> None:
    layout, training, dtype = RESUMED[case]
    run = run_of(tiny_models.student, layout, training=training, dtype=dtype, updates=3)
    stayed, left = train(run), train(run._replace(away=True))
    assert left.metrics == stayed.metrics
    for name, weight in stayed.weights.items():
        np.testing.assert_array_equal(left.weights[name], weight, err_msg=name)


def test_bf16_keeps_fp32_weights(train, tiny_models) -> None:
    """Updates too small to be seen in bf16 add up, as they do under FSDP2."""
    small = dataclasses.replace(ADAM, learning_rate=2e-5, lr_scheduler_type="constant", weight_decay=0.0)
    settings = {"training": small, "dtype": "bf16", "updates": 12}
    theirs, ours = (train(run_of(tiny_models.student, layout, **settings)) for layout in (FSDP2, DP))
    still = dataclasses.replace(small, learning_rate=1e-30)
    start = train(run_of(tiny_models.student, DP, training=still, dtype="bf16"))
    assert ours.metrics[-1]["loss"] == pytest.approx(theirs.metrics[-1]["loss"], rel=0.02)
    before, after, expected = (
        np.concatenate([o.weights[name].ravel() for name in sorted(theirs.weights)]) for o in (start, ours, theirs)
    )
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(before), 1e-9))) - 7)
    coarse = spacing > 2 * 2e-5  # no single update reaches the next bf16 number
    assert coarse.mean() > 0.3
    assert (after != before)[coarse].mean() > 0.2
    assert (np.abs(after - expected) <= spacing)[coarse].mean() > 0.999


def test_checkpoint_of_another_layout_is_refused(train, tiny_models, tmp_path: Path) -> None:
    train(run_of(tiny_models.student, TP, updates=2, save=str(tmp_path)))
    refused = train(run_of(tiny_models.student, PP, load=str(tmp_path))).refused
    assert len(refused) == 2
    assert "LaunchError" in refused[0]
    assert "was written with tensor_model_parallel_size 2, but it is 1 now" in refused[0]
    for damaged in tmp_path.iterdir():
        damaged.write_bytes(damaged.read_bytes()[:100])
    refused = train(run_of(tiny_models.student, TP, load=str(tmp_path))).refused
    assert "resume_from_checkpoint: cannot read" in refused[0]


@pytest.mark.parametrize("layout", ["DP", "PP"])
def test_gradient_that_is_not_finite_changes_nothing(train, tiny_models, layout: str) -> None:
    run = run_of(tiny_models.student, LAYOUTS[layout])
    broken = run.items[0]
    broken = dataclasses.replace(broken, advantages=np.where(broken.response_mask, np.inf, 0).astype(np.float32))
    survived = train(run._replace(broken=broken))
    assert len(survived.refused) == 2
    assert all("the gradient norm is nan; the weights were left unchanged" in problem for problem in survived.refused)
    untouched = train(run)
    assert survived.metrics == untouched.metrics
    for name, weight in untouched.weights.items():
        np.testing.assert_array_equal(survived.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("name", ["tied", "untied", "experts"])
def test_export_is_a_checkpoint_of_transformers(train, models, tmp_path: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    trained = train(run_of(models[name], SP, export=str(tmp_path)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and loaded.config.architectures == [type(loaded).__name__]
    parts = {n: t for name, p in loaded.named_parameters(remove_duplicate=False) for n, t in apart(name, p.detach())}
    assert parts.keys() == trained.weights.keys()
    for name, weight in trained.weights.items():
        np.testing.assert_array_equal(parts[name].numpy(), weight, err_msg=name)


# ---- scoring alone ---------------------------------------------------------------------------------------------------


def score_job(model: str, layout: Layout, requests: list[Any], wants: list[Any], buckets: list[Any]) -> Any:
    """On one rank: score, take over weights in halves, score again; with what the head is, and what is held then."""
    import torch
    import torch.distributed as dist

    from roll_opd.distributed.layout import layout_of
    from roll_opd.distributed.strategy.factory import build_infer_strategy
    from roll_opd.distributed.strategy.tokenizer import Vocabulary
    from roll_opd.pipeline.batching import rank_shares

    name = "hf_infer" if layout.settings is None else "megatron_infer"
    config = WorkerConfig(
        model_args=ModelArguments(model, dtype="fp32"),
        strategy_args=StrategyArguments(name, dict(layout.settings or {})),
        world_size=layout.ranks,
        infer_batch_size=3,
    )
    strategy: Any = build_infer_strategy(
        "teacher", config, Vocabulary(VOCAB, (2,), str), torch.device("cpu"), generates=False, max_length=128
    )
    shares = layout_of(config)
    mine = rank_shares(requests, shares.dp_size)[shares.dp_ranks[dist.get_rank()]]
    head = copy.deepcopy(strategy.head())  # its bytes may be those of a parameter
    scores = [strategy.score(mine, want) for want in wants]
    strategy.begin_weight_update(1, 0.5)
    sent: dict[str, int] = {}
    for bucket in buckets:
        sent |= strategy.load_weights(bucket)
    held = strategy.finish_weight_update(1)
    assert held.keys() == sent.keys() and strategy.weight_dtype() == "float32"
    scores.append(strategy.score(mine))
    expected = [request.id for request in mine if dist.get_rank() in shares.answers]
    assert all([result.id for result in results] == expected for results in scores)
    return head, scores, dict(held)


def new_weights(model: str, whole_experts: bool) -> list[Any]:
    """A random weight for each tensor of a model, in two buckets, as transformers names them or as its files do."""
    import torch
    from transformers import AutoModelForCausalLM

    from roll_opd.distributed.strategy.weight_transfer import in_buckets, pack

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    random = torch.Generator().manual_seed(6)
    tensors = [
        (n, 0.2 * torch.randn(p.shape, generator=random)) for n, p in sorted(lm.named_parameters(), key=lambda x: x[0])
    ]
    if not whole_experts:
        tensors = [pair for name, tensor in tensors for pair in apart(name, tensor)]
    aliases = {"model.embed_tokens.weight": ["lm_head.weight"]} if lm.config.tie_word_embeddings else {}
    named = [([name, *aliases.get(name, [])], tensor) for name, tensor in tensors]
    halves = in_buckets(named, sum(t.nbytes for _, t in tensors) // 2)
    return [pack(half, "host")[0] for half in halves]


@pytest.mark.parametrize(("name", "layout"), [("tied", SP), ("untied", PP), ("experts", DP)])
def test_scores_alone_and_follows_weights(torch_ranks, models, name: str, layout: Layout) -> None:
    """Every kind of score, before and after half a step towards other weights, as one process of transformers gives."""
    from roll_opd.distributed.strategy.base import SAMPLED_ONLY, ScoreRequest, ScoreWant

    random = np.random.default_rng(2)
    requests = [
        ScoreRequest(
            t.id, t.tokens, t.response_mask, random.integers(0, VOCAB, (t.response_length, 3)).astype(np.int32)
        )
        for t in trajectories(7)
    ]
    wants = [SAMPLED_ONLY, ScoreWant(top_k=4), ScoreWant(2, given=True), ScoreWant(hidden=True)]
    job_of = (models[name], FSDP2, requests, wants, new_weights(models[name], whole_experts=True))
    [(head, expected, sums)] = torch_ranks.run(1, score_job, *job_of)
    job_of = (models[name], layout, requests, wants, new_weights(models[name], whole_experts=False))
    ranks = torch_ranks.run(layout.ranks, score_job, *job_of)

    assert [held == ranks[0][2] for _, _, held in ranks] == [True, True]
    if name != "experts":  # those have other names
        assert ranks[0][2].keys() == sums.keys()
    heads = [found for found, _, _ in ranks if found.weight.shape[0]]
    assert heads and all((found.weight.raw == head.weight.raw).all() for found in heads)
    results = [{r.id: r for _, scores, _ in ranks for r in scores[i]} for i in range(len(wants) + 1)]
    for ours, theirs in zip(results, expected, strict=True):
        assert len(ours) == len(theirs) == len(requests)
        for want in theirs:
            got = ours[want.id]
            assert got.checksum == want.checksum
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
            if want.entropies is not None:
                np.testing.assert_allclose(got.entropies, want.entropies, atol=1e-4)
            if isinstance(want.details, RawTensor):
                np.testing.assert_allclose(got.details.raw.view("f4"), want.details.raw.view("f4"), atol=1e-4)
            elif want.details is not None:
                np.testing.assert_array_equal(got.details.ids, want.details.ids)
                np.testing.assert_allclose(got.details.logprobs, want.details.logprobs, atol=1e-4)
                np.testing.assert_allclose(got.details.tail, want.details.tail, atol=1e-3)
