"""What FSDP2 does on a CUDA device and cannot do without one. Not run by its authors: they had none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from roll_opd.algorithms.loss import Loss
from roll_opd.configs import ModelArguments, StrategyArguments, TrainingArguments, WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.pipeline.batching import micro_batches
from roll_opd.trajectory import Trajectory, TrajectoryId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STUDENT = Path(__file__).parents[2] / "examples" / "quickstart" / "models" / "student"
CUDA = torch.device("cuda:0")
VOCABULARY = Vocabulary(305, frozenset({2}), lambda ids: "")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(dtype: str = "fp32", fsdp2: dict[str, Any] | None = None, **model: Any) -> WorkerConfig:
    return WorkerConfig(
        model_args=ModelArguments(str(STUDENT), dtype=dtype, **model),  # type: ignore[arg-type]
        training_args=TrainingArguments(
            learning_rate=1e-3, lr_scheduler_type="constant", per_device_train_batch_size=4
        ),
        strategy_args=StrategyArguments("fsdp2_train", fsdp2 or {}),
    )


def trainer(device: torch.device = CUDA, **settings: Any) -> FSDP2Strategy:
    return FSDP2Strategy("s", config_of(**settings), VOCABULARY, device, max_grad_norm=1.0, total_updates=4)


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


@pytest.fixture(scope="module")
def requests(items) -> list[ScoreRequest]:
    return [ScoreRequest(t.id, t.tokens, t.response_mask) for t in items]


def step(strategy: FSDP2Strategy, items: list[Trajectory]) -> dict[str, float]:
    (rows,) = micro_batches(items, strategy.config, 1, "token-mean", 64)
    return strategy.train_step(rows, Loss())


def distance(one: list[Any], other: list[Any]) -> float:
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(one, other, strict=True))


def test_a_gpu_computes_what_a_cpu_computes(items, requests) -> None:
    there, here = trainer(), trainer(torch.device("cpu"))
    assert distance(there.score(requests), here.score(requests)) < 1e-3
    ours, theirs = step(there, items), step(here, items)
    for name in ("loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"lora_target": "all-linear"}], ids=["whole", "adapters"])
def test_a_trainer_gives_its_memory_back_and_goes_on(items, requests, settings) -> None:
    stayed, moved = trainer(**settings), trainer(**settings)
    for strategy in (stayed, moved):
        step(strategy, items)
    torch.cuda.synchronize()
    there = torch.cuda.memory_allocated()
    moved.offload()
    gone = there - torch.cuda.memory_allocated()
    held = 4 * sum(p.numel() for p in moved.model.parameters())
    assert gone >= held
    moved.onload(weights_only=True)
    assert torch.cuda.memory_allocated() < there or settings
    assert list(moved.full_weights("bfloat16"))
    moved.offload()
    moved.onload()
    assert abs(torch.cuda.memory_allocated() - there) <= held / 10
    assert distance(stayed.score(requests), moved.score(requests)) == 0.0
    assert step(moved, items)["loss"] == pytest.approx(step(stayed, items)["loss"], rel=1e-6)


def test_parameters_may_stay_in_host_memory(items, requests) -> None:
    away, here = trainer(fsdp2={"offload_policy": True}), trainer()
    assert all(p.to_local().device.type == "cpu" and p.to_local().is_pinned() for p in away.model.parameters())
    assert distance(away.score(requests), here.score(requests)) < 1e-5
    for _ in range(2):
        ours, theirs = step(away, items), step(here, items)
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert distance(away.score(requests), here.score(requests)) < 1e-3


@pytest.fixture(params=["auto", "fa2", "sdpa", "flex"])
def attention(request) -> str:
    from transformers.utils import is_flash_attn_2_available

    if request.param == "fa2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    return str(request.param)


def test_every_attention_scores_and_trains_in_bf16(attention: str, items, requests) -> None:
    ours, exact = trainer(dtype="bf16", attn_implementation=attention), trainer()
    assert distance(ours.score(requests), exact.score(requests)) < 0.5
    assert step(ours, items)["grad_norm"] == pytest.approx(step(exact, items)["grad_norm"], rel=0.2)


@pytest.mark.parametrize("backend", ["hf_infer", "fsdp2_infer"])
def test_scorers_leave_and_come_back(backend: str, requests) -> None:
    scorer: HFStrategy | FSDP2InferStrategy
    if backend == "hf_infer":
        scorer = HFStrategy("t", config_of("bf16"), VOCABULARY, CUDA, generates=False)
    else:
        scorer = FSDP2InferStrategy("t", config_of("bf16"), VOCABULARY, CUDA)
    before = scorer.score(requests, ScoreWant(hidden=True))
    scorer.offload()
    scorer.onload()
    assert distance(before, scorer.score(requests, ScoreWant(hidden=True))) == 0.0
