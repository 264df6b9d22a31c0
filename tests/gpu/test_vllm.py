"""What a vLLM engine does on a CUDA device and cannot do without one. Not run by its authors: they had none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from roll_opd.configs import ModelArguments, StrategyArguments, WorkerConfig
from roll_opd.distributed.strategy.base import GenerateRequest, GenerateResult, Sampling
from roll_opd.distributed.strategy.tokenizer import vocabulary_of
from roll_opd.distributed.strategy.vllm.strategy import VLLMStrategy
from roll_opd.distributed.strategy.weight_transfer import pack
from roll_opd.errors import GenerationError
from roll_opd.trajectory import TrajectoryId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STUDENT = str(Path(__file__).parents[2] / "examples" / "quickstart" / "models" / "student")
PROMPT = tuple(range(5, 45))
KEPT, FORGOTTEN = 1, 2


@pytest.fixture(scope="module", params=[KEPT, FORGOTTEN], ids=["weights kept", "weights forgotten"])
def engine(request: pytest.FixtureRequest) -> Iterator[VLLMStrategy]:
    """One that shares its device: it takes a third of the memory, and CUDA graphs are captured."""
    settings = {"sleep_level": request.param, "gpu_memory_utilization": 0.3}
    model = ModelArguments(STUDENT, dtype="fp32")
    config = WorkerConfig(model_args=model, strategy_args=StrategyArguments("vllm", settings))
    vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(STUDENT), model)
    strategy = VLLMStrategy("student_infer", config, vocabulary, torch.device("cuda:0"), generates=True, max_length=256)
    yield strategy
    strategy.close()


@pytest.fixture(scope="module")
def changed() -> PreTrainedModel:
    """The student, a little further on."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += (
                0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    return model


def respond(engine: VLLMStrategy) -> GenerateResult:
    name = TrajectoryId(0, 0)

    async def first() -> GenerateResult:
        one = GenerateRequest(name, PROMPT, name.seed(1), Sampling(max_new_tokens=32))
        (result,) = [result async for result in engine.generate([one])]
        return result

    return asyncio.run(first())


def update(engine: VLLMStrategy, model: PreTrainedModel, version: int) -> None:
    """Checksums are read back from the device's memory, where fused layers lie as they are computed with."""
    entries = [([name], parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    engine.begin_weight_update(version)
    sent = engine.load_weights(pack(entries, "host")[0])
    assert engine.finish_weight_update(version) == sent


def check_against(model: PreTrainedModel, result: GenerateResult) -> None:
    tokens = torch.tensor([[*PROMPT, *result.response_ids.tolist()]])
    with torch.no_grad():
        logprobs = model(input_ids=tokens).logits[0, len(PROMPT) - 1 : -1, :305].log_softmax(-1)
    chosen = logprobs[range(len(result.response_ids)), result.response_ids.tolist()]
    np.testing.assert_allclose(result.infer_logprobs, chosen.numpy(), atol=5e-3, rtol=0)


def test_an_engine_leaves_its_device_and_comes_back(engine, changed) -> None:
    """As in a step of a colocated run: away, weights for the update, all for the rollout, weights, away, ..."""

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    plain = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    before = respond(engine)
    check_against(plain, before)
    at_home = free()
    engine.offload()
    engine.offload()
    assert free() > at_home + 2**30, "the key-value cache alone is more than that"
    engine.onload(weights_only=True)
    update(engine, changed, 1)
    assert free() > at_home + 2**30
    engine.onload()
    engine.onload()
    after = respond(engine)
    check_against(changed, after)
    assert (after.weight_version == 1).all() and after.response_ids.tolist() != before.response_ids.tolist()
    engine.offload(keep_weights=True)
    engine.onload()
    assert respond(engine).response_ids.tolist() == after.response_ids.tolist()
    engine.offload(keep_weights=True)
    engine.offload()
    engine.onload()
    if engine.settings.sleep_level == FORGOTTEN:
        with pytest.raises(GenerationError, match="no weights that could be served"):
            respond(engine)
        update(engine, changed, 2)
    assert respond(engine).response_ids.tolist() == after.response_ids.tolist()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_engine_over_two_devices(changed) -> None:
    """Each holds a part of every matrix; the checksums are those of the whole."""
    settings = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3}
    model = ModelArguments(STUDENT, dtype="fp32")
    config = WorkerConfig(model_args=model, strategy_args=StrategyArguments("vllm", settings))
    vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(STUDENT), model)
    engine = VLLMStrategy("student_infer", config, vocabulary, torch.device("cuda:0"), generates=True, max_length=256)
    try:
        update(engine, changed, 1)
        check_against(changed, respond(engine))
    finally:
        engine.close()
