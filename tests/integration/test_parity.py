"""Ranks, rows and micro-batches change nothing; neither does the way weights take to the generator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from roll_opd.algorithms.loss import DivergenceLoss, Loss
from roll_opd.configs import (
    ModelArguments,
    SequencePackingArguments,
    StrategyArguments,
    TrainingArguments,
    WorkerConfig,
)
from roll_opd.trajectory import DetailsRef, Trajectory, TrajectoryId

pytestmark = pytest.mark.integration

STUDENT = Path(__file__).parents[2] / "examples" / "quickstart" / "models" / "student"
MODEL = ModelArguments(model_name_or_path=str(STUDENT), dtype="fp32", disable_gradient_checkpointing=True)
SCALE = 1.0e4
"""Advantages are this large so that, with SGD at rate 1, new - old weights give the gradient to fp32 accuracy."""


def train_config(world_size: int, per_device: int = 4, packed: int | None = None) -> WorkerConfig:
    return WorkerConfig(
        name="student_train",
        model_args=MODEL,
        training_args=TrainingArguments(
            optimizer="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=1,
        ),
        strategy_args=StrategyArguments(strategy_name="fsdp2_train"),
        world_size=world_size,
        use_sequence_packing=packed is not None,
        sequence_packing_args=SequencePackingArguments(max_packed_sequence_length_train=packed),
    )


def trajectories(count: int) -> list[Trajectory]:
    """Sequences of very different lengths, with random tokens, advantages and slightly off old log-probabilities."""
    random = np.random.default_rng(0)
    out = []
    for i in range(count):
        prompt, response = int(random.integers(3, 40)), int(random.integers(1, 60))
        length = prompt + response
        mask = np.arange(length) >= prompt
        out.append(
            Trajectory(
                id=TrajectoryId(i, 0),
                tag="t",
                tokens=random.integers(0, 300, length).astype(np.int32),
                response_mask=mask,
                infer_logprobs=np.zeros(length, np.float32),
                weight_version=np.where(mask, 0, -1).astype(np.int32),
                advantages=(SCALE * random.normal(size=length) * mask).astype(np.float32),
            )
        )
    return out


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Real clusters on one Ray, which ends with this file."""
    from roll_opd.configs import RayArguments
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement
    from roll_opd.distributed.runtime import ray_session

    logs = str(tmp_path_factory.mktemp("logs"))
    with ray_session(RayArguments()):

        def start(role: str, worker_cls: type, config: WorkerConfig) -> Cluster:
            placement = Placement({role: config}, {})
            return Cluster(
                role, config, worker_cls, placement=placement, threads=1, log_dir=logs, seed=0, system_envs={}
            )

        yield start


@pytest.fixture(scope="module")
def trainers(cluster, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One trainer of 1 rank and one of 2, and the checkpoint from which both are reset."""
    from roll_opd.pipeline.workers import TrainWorker

    made = {}
    for ranks in (1, 2):
        made[ranks] = cluster("actor_train", TrainWorker, train_config(ranks))
        made[ranks].connect_ranks()
        made[ranks].call_all("setup", "student_train", train_config(ranks), MODEL, 0.0, 10)
    start = tmp_path_factory.mktemp("start") / "state"
    start.mkdir()
    made[1].call_all("save", str(start))
    return made | {"start": str(start)}


def weights_of(trainer) -> dict[str, np.ndarray]:
    import ray

    refs = [w.export_weights.options(num_returns="streaming").remote(None, 1 << 30, "host") for w in trainer.workers]
    buckets = [ray.get(ref) for stream in refs for ref in stream]
    pairs = [pair for b in buckets for pair in zip(b.specs, b.raw, strict=True)]
    return {name: raw.view(np.float32).astype(np.float64) for spec, raw in pairs for name in spec.names}


def scored(trainer, items: list[Trajectory]) -> list[Trajectory]:
    from roll_opd.distributed.strategy.base import ScoreRequest
    from roll_opd.pipeline.batching import rank_shares, undeal

    requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in items]
    results = undeal(trainer.call_each("score", [(s,) for s in rank_shares(requests, len(trainer))]))
    return [dataclasses.replace(t, old_logprobs=r.logprobs) for t, r in zip(items, results, strict=True)]


def one_step(trainers: dict, ranks: int, items: list[Trajectory], mode: str, per_device: int = 4,
             packed: int | None = None, loss: Loss | None = None) -> tuple[float, np.ndarray, float]:  # fmt: skip
    """Return loss, gradient and gradient norm of one optimizer step from the common start."""
    from roll_opd.pipeline.batching import micro_batches

    loss = loss or Loss()

    trainer = trainers[ranks]
    trainer.call_all("load", trainers["start"])
    before = weights_of(trainer)
    config = train_config(ranks, per_device, packed)
    rows = micro_batches(items, config, ranks, mode, 64)
    if loss.divergence is not None and loss.divergence.support != "sampled":
        assert trainer.call_each("fetch_details", [(details_of(r),) for r in rows]) == [[]] * ranks
    (metrics, _), *_ = trainer.call_each("train_step", [(r, loss, False) for r in rows])
    after = weights_of(trainer)
    gradient = np.concatenate([(before[name] - after[name]).ravel() for name in sorted(before)])
    return metrics["loss"], gradient, metrics["grad_norm"]


def details_of(rows: list) -> dict:
    return {
        (item.trajectory.id, name): scores.details
        for row in rows
        for item in row
        for name, scores in item.trajectory.teacher_scores.items()
    }


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("count", [16, 13])  # 13: one rank runs out of work before the other
def test_ranks_and_rows_agree(trainers: dict, count: int, mode: str) -> None:
    trainers[1].call_all("load", trainers["start"])
    noise = np.random.default_rng(1)
    items = [
        dataclasses.replace(t, old_logprobs=t.old_logprobs + noise.normal(0, 0.1, len(t)).astype(np.float32))
        for t in scored(trainers[1], trajectories(count))
    ]
    mean_advantage = float(np.mean(np.abs(np.concatenate([t.advantages[t.response_mask] for t in items]))))
    loss, gradient, norm = one_step(trainers, 1, items, mode)
    # The norm is taken in fp64 and belongs to this gradient; tied weights are exported twice, hence not equal.
    assert norm > 0 and np.isfinite(gradient).all()
    variants = {
        "2 ranks": one_step(trainers, 2, items, mode),
        "one sequence a row": one_step(trainers, 1, items, mode, per_device=1),
        "one row": one_step(trainers, 1, items, mode, per_device=count),
        "rows by tokens": one_step(trainers, 1, items, mode, packed=200),
        "2 ranks, one sequence a row": one_step(trainers, 2, items, mode, per_device=1),
    }
    for name, (other_loss, other_gradient, other_norm) in variants.items():
        assert abs(other_loss - loss) <= 1e-5 * mean_advantage, name
        assert np.linalg.norm(other_gradient - gradient) <= 1e-5 * np.linalg.norm(gradient), name
        assert abs(other_norm - norm) <= 1e-5 * norm, name


@pytest.fixture(scope="module")
def teacher(cluster):
    """The quickstart's teacher as a real scoring process."""
    from roll_opd.configs import TeacherConfig
    from roll_opd.pipeline.workers import InferWorker

    model = dataclasses.replace(MODEL, model_name_or_path=str(STUDENT.with_name("teacher")))
    config = TeacherConfig(
        name="teacher",
        model_args=model,
        strategy_args=StrategyArguments(strategy_name="hf_infer"),
        world_size=1,
        infer_batch_size=5,
    )
    started = cluster("teacher", InferWorker, config)
    started.call_all("setup", "teacher", config, MODEL, False, 128)
    yield config, started
    started.stop()


def taught(teacher, items: list[Trajectory], want) -> list[Trajectory]:
    """Have the real pool score ``items``; every third is not covered, as with routing by tag."""
    import asyncio

    from roll_opd.pipeline.teacher_pool import TeacherPool

    config, started = teacher
    pool = TeacherPool({"t": (config, started.replicas)}, {"t": want})
    random = np.random.default_rng(3)
    items = [
        dataclasses.replace(
            t,
            advantages=np.zeros(len(t), np.float32),
            top_ids=np.argsort(random.random((t.response_length, 300)), axis=1)[:, :4].astype(np.int32),
        )
        for t in items
    ]
    covered = [t for i, t in enumerate(items) if i % 3]
    scores = dict(zip([t.id for t in covered], asyncio.run(pool.score(covered)), strict=True))
    weight = np.float32(SCALE)
    return [
        dataclasses.replace(
            t,
            teacher_scores=scores[t.id],
            divergence_weights={"t": np.where(t.response_mask, weight, 0).astype(np.float32)},
        )
        if t.id in scores
        else t
        for t in items
    ]


OBJECTIVES = [
    ("reverse_kl", "sampled"),
    ("forward_kl", "sampled"),
    *((d, s) for d in ("reverse_kl", "forward_kl", "jsd")
      for s in ("full", "teacher_topk", "student_topk", "union_topk")),
]  # fmt: skip


@pytest.mark.parametrize(("divergence", "support"), OBJECTIVES)
def test_every_direct_objective_agrees_over_ranks_rows_and_order(
    trainers: dict, teacher, divergence: str, support: str
) -> None:
    from roll_opd.distributed.strategy.base import ScoreWant

    want = ScoreWant(
        top_k=4 if support in ("teacher_topk", "union_topk") else 0,
        given=support in ("student_topk", "union_topk"),
        hidden=support == "full",
    )
    if support == "full":
        head = teacher[1].workers[0].head.remote()
        for ranks in (1, 2):
            trainers[ranks].call_all("set_teacher_head", "t", head)
    trainers[1].call_all("load", trainers["start"])
    items = taught(teacher, scored(trainers[1], trajectories(13)), want)
    loss = Loss(divergence=DivergenceLoss(divergence, support))
    value, gradient, norm = one_step(trainers, 1, items, "token-mean", loss=loss)
    assert norm > 0 and np.isfinite(gradient).all()
    assert value > 0 or support == "sampled"
    variants = {
        "2 ranks, rows by tokens": one_step(trainers, 2, items, "token-mean", packed=200, loss=loss),
        "one row, another order": one_step(trainers, 1, items[::-1], "token-mean", per_device=13, loss=loss),
    }
    for name, (other_value, other_gradient, other_norm) in variants.items():
        assert abs(other_value - value) <= 1e-5 * abs(value), name
        assert np.linalg.norm(other_gradient - gradient) <= 1e-5 * np.linalg.norm(gradient), name
        assert abs(other_norm - norm) <= 1e-5 * norm, name


def test_lost_details_are_named_before_anything_is_computed(trainers: dict, teacher) -> None:
    """What a dead node held is gone; every rank says so at once, and nobody waits in a collective for ever."""
    import ray

    from roll_opd.distributed.strategy.base import ScoreWant

    @ray.remote(num_cpus=0)
    class Mortal:
        def put(self) -> list:
            return [ray.put([np.zeros(1 << 20)])]

    items = [t for t in taught(teacher, scored(trainers[1], trajectories(6)), ScoreWant(top_k=4)) if t.teacher_scores]
    refs = {(t.id, "t"): t.teacher_scores["t"].details for t in items}
    assert trainers[1].call_each("fetch_details", [(refs,)]) == [[]]
    mortal = Mortal.remote()
    lost = items[0].id, "t"
    refs[lost] = DetailsRef(*ray.get(mortal.put.remote()), 0)
    ray.kill(mortal)
    deadline = time.monotonic() + 30  # the death of an object's owner takes Ray a moment to notice
    while (found := trainers[1].call_each("fetch_details", [(refs,)])) == [[]] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found == [[lost]]


def test_scores_do_not_depend_on_ranks(trainers: dict) -> None:
    for trainer in (trainers[1], trainers[2]):
        trainer.call_all("load", trainers["start"])
    items = trajectories(13)
    for a, b in zip(scored(trainers[1], items), scored(trainers[2], items), strict=True):
        np.testing.assert_allclose(a.old_logprobs, b.old_logprobs, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_generator_equals_trainer_after_weight_sync(cluster, trainers: dict, ranks: int) -> None:
    """The weights have moved far from the shipped ones; both sides must give the same tokens the same probability."""
    import ray

    from roll_opd.distributed.strategy.base import GenerateRequest, Sampling, ScoreRequest
    from roll_opd.distributed.weight_sync import WeightSync
    from roll_opd.pipeline.workers import InferWorker

    trainer = trainers[ranks]
    trainer.call_all("load", trainers["start"])
    items = [dataclasses.replace(t, advantages=t.advantages * np.float32(20 / SCALE)) for t in trajectories(8)]
    config = WorkerConfig(name="student_infer", model_args=MODEL, world_size=1, infer_batch_size=3,
                          strategy_args=StrategyArguments(strategy_name="hf_infer"))  # fmt: skip
    infer = cluster("actor_infer", InferWorker, config)
    infer.call_all("setup", "student_infer", config, MODEL, True, 64)

    def engine_scores() -> list[np.ndarray]:
        requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in items]
        return [r.logprobs for r in infer.call_all("score", requests)[0]]

    before = engine_scores()
    one_step(trainers, ranks, scored(trainer, items), "token-mean")
    sync = WeightSync(trainer, infer, bucket_bytes=1 << 16)  # many buckets
    sync.sync(1)
    after, trained = engine_scores(), [t.old_logprobs for t in scored(trainer, items)]
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 0.1
    for ours, theirs in zip(after, trained, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    # What the engine reports while sampling is what the trainer computes afterwards.
    requests = [
        GenerateRequest(t.id, tuple(int(x) for x in t.tokens[~t.response_mask]), 7 + i, Sampling(max_new_tokens=12))
        for i, t in enumerate(items)
    ]
    stream = infer.workers[0].generate.options(num_returns="streaming").remote(requests)
    results = {r.id: r for batch in map(ray.get, stream) for r in batch}
    assert all((r.weight_version == 1).all() for r in results.values())
    sampled = []
    for t in items:
        result = results[t.id]
        prompt = t.tokens[~t.response_mask]
        mask = np.arange(len(prompt) + len(result.response_ids)) >= len(prompt)
        sampled.append(dataclasses.replace(t, tokens=np.concatenate([prompt, result.response_ids]), response_mask=mask))
    for t in scored(trainer, sampled):
        np.testing.assert_allclose(t.old_logprobs[t.response_mask], results[t.id].infer_logprobs, atol=1e-4)
    infer.stop()


def test_weights_that_do_not_travel_as_bytes(cluster, trainers: dict) -> None:
    """Two ranks train. Handles of their memory, and a process group with the generator, both twice, and anew."""
    from roll_opd.distributed.strategy.base import ScoreRequest
    from roll_opd.distributed.weight_sync import WeightSync
    from roll_opd.pipeline.workers import InferWorker

    trainer, items = trainers[2], trajectories(8)
    config = WorkerConfig(name="student_infer", model_args=MODEL, world_size=2, infer_batch_size=8,
                          strategy_args=StrategyArguments(strategy_name="hf_infer"))  # fmt: skip
    infer = cluster("actor_infer", InferWorker, config)
    infer.call_all("setup", "student_infer", config, MODEL, True, 64)
    requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in items]

    def move() -> list[np.ndarray]:
        changed = [dataclasses.replace(t, advantages=t.advantages * np.float32(20 / SCALE)) for t in items]
        trainer.call_all("load", trainers["start"])
        one_step(trainers, 2, scored(trainer, changed), "token-mean")
        return [t.old_logprobs for t in scored(trainer, items)]

    def back() -> list[np.ndarray]:
        trainer.call_all("load", trainers["start"])
        return [t.old_logprobs for t in scored(trainer, items)]

    for way in ("handles", "group"):
        sync = WeightSync(trainer, infer, bucket_bytes=1, way=way)  # the trainer would be ahead, were it let
        for version, change in enumerate((move, back, move)):
            expected = change()
            if version == 2:
                sync._group = []  # as after an engine was replaced
            before = infer.call_all("score", requests)
            sync.sync(version)
            for old, new in zip(before, infer.call_all("score", requests), strict=True):
                for result, theirs in zip(new, expected, strict=True):
                    np.testing.assert_allclose(result.logprobs, theirs, atol=1e-4)
                moved = max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(old, new, strict=True))
                assert moved > 0.1 or (way, version) == ("group", 0)  # there already
    infer.stop()
