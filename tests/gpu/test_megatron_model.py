"""What Megatron-core's models do on a CUDA device and cannot do without one. Not run by its authors: they had none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.strategy.packed_model import load_model
from roll_opd.trajectory import PackedBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
VOCAB = 305


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    from megatron.core import parallel_state

    from roll_opd.distributed.strategy.megatron.parallel import initialize

    torch.cuda.set_device(CUDA)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    initialize(MegatronSettings(), CUDA)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = Qwen3MoeConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            norm_topk_prob=True, initializer_range=0.2,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def row() -> PackedBatch:
    random = np.random.default_rng(0)
    tokens = [random.integers(3, VOCAB, n).astype(np.int32) for n in (40, 7, 130)]
    return PackedBatch.pack(tokens, [np.arange(len(t)) > 1 for t in tokens])


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.25)])
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_log_probabilities_and_gradients_are_those_of_transformers(
    kind: str, dtype: Any, tolerance: float, row: PackedBatch, mixture: Path, tiny_models: Any
) -> None:
    """bf16 goes through flash-attention where that is installed. The all-to-all copies its counts on a stream."""
    from roll_opd.distributed.strategy.megatron.model import load_chunks

    args = ModelArguments(tiny_models.student if kind == "dense" else str(mixture), dtype=dtype)
    (chunk,) = load_chunks(args, MegatronSettings(), role="s", vocab_size=VOCAB, device=CUDA, trains=True)
    theirs = load_model(args, role="s", vocab_size=VOCAB, device=CUDA)
    assert all(parameter.is_cuda for parameter in chunk.parameters())
    gradients = []
    for model, embedding in ((chunk, chunk.embedding.word_embeddings), (theirs, theirs.lm.get_input_embeddings())):
        outputs, _ = model.token_logprobs(row)
        outputs.logprobs_n.mean().backward()
        gradients.append((outputs.logprobs_n.detach(), embedding.weight.grad.float()))
    (ours, our_gradient), (expected, gradient) = gradients
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0.0)
    cosine = torch.nn.functional.cosine_similarity(our_gradient.flatten(), gradient.flatten(), dim=0)
    assert cosine > 1 - tolerance / 10


def test_weights_come_back_bit_for_bit(mixture: Path) -> None:
    from safetensors.torch import load_file

    from roll_opd.distributed.strategy.megatron.model import load_chunks

    args = ModelArguments(str(mixture), dtype="fp32")
    chunks = load_chunks(args, MegatronSettings(), role="s", vocab_size=VOCAB, device=CUDA, trains=False)
    exported = dict(chunks[0].bridge.export(chunks))
    files = load_file(mixture / "model.safetensors")
    assert exported.keys() == files.keys()
    assert all(torch.equal(exported[name].cpu(), files[name]) for name in files)
