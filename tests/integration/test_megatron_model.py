"""Megatron-core's models over real ranks against transformers: log-probabilities, gradients, weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM  # isort: skip

from roll_opd.configs.model_args import ModelArguments
from roll_opd.distributed.layout import Layout
from roll_opd.distributed.strategy.packed_model import load_model

pytestmark = pytest.mark.integration
RANKS = Path(__file__).with_name("megatron_ranks.py")
VOCAB = 305

SHAPE: dict[str, Any] = {
    # 323 rows: embedding and head must be filled up, and the tokenizer's 305 tokens end inside the second shard.
    "vocab_size": 323, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
# As many layers as interleaved stages need; rounding grows with each, so weights are smaller.
DEEP = {k: v for k, v in SHAPE.items() if k != "head_dim"} | {"num_hidden_layers": 8, "initializer_range": 0.15}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, rope_parameters=LLAMA3_ROPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**DEEP)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=True)),
    "moe-unnormalised": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=False)),
}

TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    # One data-parallel rank has the whole model: what a single process computes.
    ("llama", 2, {}),
    ("qwen2", 2, {}),
    ("qwen3", 2, {}),
    ("moe", 2, {}),
    ("moe-unnormalised", 2, {}),
    ("llama", 2, TP),  # two ranks share one key-value head
    ("qwen2", 2, TP),
    ("qwen3", 2, TP),
    ("qwen3", 2, SP | FULL),
    ("qwen3", 2, PP | {"recompute_granularity": "selective"}),
    ("moe", 2, EP),
    ("moe", 2, SP),  # each expert's matrices are split
    ("moe-unnormalised", 2, SP | EP),  # the experts are dealt out, the other matrices split
    ("qwen2", 4, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}),
    ("qwen3", 4, SP | PP),
    ("moe", 4, PP | EP),
]


def name_of(model: str, world_size: int, settings: dict[str, Any]) -> str:
    short = {
        "recompute_granularity": "recompute",
        "sequence_parallel": "sp",
        "virtual_pipeline_model_parallel_size": "vpp",
    }
    words = [
        short.get(k, k.replace("_model_parallel_size", "")) for k in settings if "_method" not in k and "_num" not in k
    ]
    return "-".join([model, str(world_size), *words])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints; every weight is random, biases and norms too."""
    folders = {}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, (cls, config) in MODELS.items():
            model = cls(config).float()
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data.uniform_(0.5, 1.5)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the ranks of every layout found."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [
        {"name": name_of(*case), "model": str(models[case[0]]), "world_size": case[1], "settings": case[2]}
        for case in CASES
    ]
    (folder / "layouts.json").write_text(json.dumps(cases))
    for world_size in (2, 4):
        start_ranks(folder, world_size)
    return folder


def start_ranks(folder: Path, world_size: int) -> None:
    """Run ``megatron_ranks.py`` on each rank; when one fails, the others wait for it no longer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"{world_size}-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(RANKS), str(folder), str(rank), str(world_size)]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    deadline = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, "\n".join(log.read_text()[-2000:] for log in logs)
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(p.returncode == 0 for p in processes), "\n".join(log.read_text()[-4000:] for log in logs)


@pytest.fixture(scope="module")
def rows_of() -> Any:
    """The rows that the ranks are given."""
    spec = importlib.util.spec_from_file_location("megatron_ranks", RANKS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows_of


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], rows_of: Any) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """What transformers gives for each model and number of data-parallel ranks."""
    out = {}
    for name, folder in models.items():
        model = load_model(
            ModelArguments(str(folder), dtype="fp32"), role="reference", vocab_size=VOCAB, device=torch.device("cpu")
        )
        model.lm.zero_grad()
        found: dict[str, torch.Tensor] = {}
        for dp_rank in range(2):
            for i, row in enumerate(rows_of(dp_rank)):
                outputs, _ = model.token_logprobs(row)
                (outputs.logprobs_n.sum() - 0.5 * outputs.entropy_n.sum()).backward()
                found[f"dp{dp_rank}-logprobs-{i}"] = outputs.logprobs_n.detach()
                found[f"dp{dp_rank}-entropy-{i}"] = outputs.entropy_n.detach()
            gradients = {
                hub_name: part.clone()
                for their_name, parameter in model.lm.named_parameters()
                for hub_name, part in hub_names(their_name, parameter.grad)
            }
            out[name, dp_rank + 1] = found | gradients
    return out


def hub_names(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Take apart what transformers holds as one tensor for all experts."""
    if ".experts." not in name:
        yield name, tensor
        return
    for i, expert in enumerate(tensor):
        stem = name.rsplit(".", 1)[0] + f".{i}."
        if name.endswith("down_proj"):
            yield stem + "down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield stem + "gate_proj.weight", gate
            yield stem + "up_proj.weight", up


def dp_size(case: tuple[str, int, dict[str, Any]]) -> int:
    _, world_size, settings = case
    sizes = (settings.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    return Layout.megatron(world_size, *sizes).dp_size


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
class TestLayouts:
    def test_log_probabilities_and_entropies_are_those_of_transformers(self, case, found, expected):
        """fp32 within 1e-5, whatever the ranks share, and whatever pads a row or a vocabulary."""
        for dp_rank in range(dp_size(case)):
            ours = load_file(found / f"{name_of(*case)}-dp{dp_rank}.safetensors")
            theirs = expected[case[0], dp_size(case)]
            for i in range(8):
                for kind in ("logprobs", "entropy"):
                    torch.testing.assert_close(
                        ours[f"{kind}-{i}"], theirs[f"dp{dp_rank}-{kind}-{i}"], atol=1e-5, rtol=0.0
                    )

    def test_gradients_of_all_weights_are_those_of_transformers(self, case, found, expected):
        """Summed over rows and ranks, and brought under Hugging Face's names by the bridge."""
        ours = load_file(found / f"{name_of(*case)}-gradients.safetensors")
        theirs = expected[case[0], dp_size(case)]
        assert ours
        for name, gradient in ours.items():
            scale = float(theirs[name].abs().max())
            assert scale > 0 or "embed" in name
            torch.testing.assert_close(gradient, theirs[name], atol=2e-5 * max(scale, 1.0), rtol=0.0, msg=name)

    def test_weights_come_back_bit_for_bit(self, case, found, models):
        """Every tensor of the checkpoint, a tied head apart."""
        ours = load_file(found / f"{name_of(*case)}-weights.safetensors")
        theirs = load_file(models[case[0]] / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_tensors_that_are_put_in_are_mixed_with_what_is_held(self, case, found, models):
        """Half of the weights, put into zeros."""
        ours = load_file(found / f"{name_of(*case)}-halves.safetensors")
        theirs = load_file(models[case[0]] / "model.safetensors")
        assert all(torch.equal(ours[name], 0.5 * theirs[name]) for name in theirs)

    def test_the_whole_head_is_the_checkpoint_s(self, case, found, models):
        """Trimmed to the tokenizer's vocabulary, whatever its shards."""
        ours = load_file(found / f"{name_of(*case)}-dp0.safetensors")["head"]
        theirs = load_file(models[case[0]] / "model.safetensors")
        head = theirs.get("lm_head.weight", theirs["model.embed_tokens.weight"])
        assert torch.equal(ours, head[:VOCAB])
