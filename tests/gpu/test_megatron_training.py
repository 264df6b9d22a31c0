"""What training with Megatron-core does on a CUDA device. Not run by its authors: they had none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from roll_opd.algorithms.loss import Loss
from roll_opd.configs import ModelArguments, StrategyArguments, TrainingArguments, WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.pipeline.batching import micro_batches
from roll_opd.trajectory import Trajectory, TrajectoryId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
TRAINING = TrainingArguments(learning_rate=1e-3, lr_scheduler_type="constant", per_device_train_batch_size=4)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    torch.cuda.set_device(CUDA)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def items() -> list[Trajectory]:
    random = np.random.default_rng(0)
    out = []
    for i in range(9):
        prompt, response = int(random.integers(3, 30)), int(random.integers(1, 60))
        mask = np.arange(prompt + response) >= prompt
        out.append(
            Trajectory(
                id=TrajectoryId(i, 0),
                tag="",
                tokens=random.integers(4, 300, len(mask)).astype(np.int32),
                response_mask=mask,
                infer_logprobs=np.zeros(len(mask), np.float32),
                weight_version=np.where(mask, 0, -1).astype(np.int32),
                old_logprobs=np.full(len(mask), -6.0, np.float32),
                advantages=random.normal(size=len(mask)).astype(np.float32),
            )
        )
    return out


class Trainer:
    """A strategy on one GPU; Megatron-core's groups are a process's own, so one lives at a time."""

    def __init__(self, model: str, dtype: Any, backend: str = "megatron_train", **settings: Any) -> None:
        from megatron.core import parallel_state

        from roll_opd.distributed.strategy.factory import build_train_strategy

        parallel_state.destroy_model_parallel()
        self.config = WorkerConfig(
            model_args=ModelArguments(model, dtype=dtype),
            training_args=TRAINING,
            strategy_args=StrategyArguments(backend, settings),  # type: ignore[arg-type]
        )
        self.strategy: Any = build_train_strategy(
            "s", self.config, Vocabulary(305, (2,), str), CUDA, max_grad_norm=1.0, total_updates=4
        )

    def step(self, items: list[Trajectory]) -> dict[str, float]:
        (rows,) = micro_batches(items, self.config, 1, "token-mean", 64)
        metrics: dict[str, float] = self.strategy.train_step(rows, Loss())
        return metrics

    def logprobs(self, items: list[Trajectory]) -> np.ndarray:
        scores = self.strategy.score([ScoreRequest(t.id, t.tokens, t.response_mask) for t in items])
        return np.concatenate([s.logprobs for s in scores])


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
@pytest.mark.parametrize("spread", [True, False])
def test_trains_as_fsdp2_does(tiny_models, items, dtype: str, tolerance: float, spread: bool) -> None:
    ours = Trainer(tiny_models.student, dtype, use_distributed_optimizer=spread, overlap_grad_reduce=spread)
    found = [ours.step(items) for _ in range(3)]
    theirs = Trainer(tiny_models.student, dtype, backend="fsdp2_train")
    for metrics, expected in zip(found, [theirs.step(items) for _ in range(3)], strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert metrics[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 10)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gives_its_memory_back_and_goes_on(tiny_models, items, dtype: str) -> None:
    trainer = Trainer(tiny_models.student, dtype)
    trainer.step(items)
    before = trainer.logprobs(items)
    torch.cuda.synchronize()
    there = torch.cuda.memory_allocated()
    trainer.strategy.offload()
    # Weights, and fp32: gradients, two moments, and where the weights are bf16 the optimizer's own.
    count = sum(p.numel() for p in trainer.strategy.model.parameters())
    assert there - torch.cuda.memory_allocated() >= 16 * count
    trainer.strategy.onload(weights_only=True)
    assert torch.cuda.memory_allocated() < there
    assert list(trainer.strategy.full_weights("bfloat16"))
    trainer.strategy.offload()
    trainer.strategy.onload()
    assert abs(torch.cuda.memory_allocated() - there) <= 4 * count
    np.testing.assert_array_equal(trainer.logprobs(items), before)
    assert np.isfinite(trainer.step(items)["grad_norm"])


def test_resumes(tiny_models, items, tmp_path) -> None:
    trainer = Trainer(tiny_models.student, "bf16")
    trainer.step(items)
    trainer.strategy.save(str(tmp_path))
    expected = trainer.step(items), trainer.logprobs(items)
    again = Trainer(tiny_models.student, "bf16")
    again.strategy.load(str(tmp_path))
    assert again.step(items)["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    np.testing.assert_allclose(again.logprobs(items), expected[1], atol=1e-3)
