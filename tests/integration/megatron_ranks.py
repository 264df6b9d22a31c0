"""One rank of the layouts that ``test_megatron_model`` compares with transformers; runs in a process of its own.

For each layout it loads the model, trains on some rows without changing a weight, exports weights and gradients, and
puts the weights back in halves. What the answering ranks and rank 0 found is written to the folder.

Usage: ``megatron_ranks.py FOLDER RANK WORLD_SIZE``; ``FOLDER/layouts.json`` says what to do.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")  # Megatron-core misses its CUDA extensions at length

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from roll_opd.algorithms.chunked_head import head_outputs  # noqa: E402
from roll_opd.configs.backends.megatron import MegatronSettings  # noqa: E402
from roll_opd.configs.model_args import ModelArguments  # noqa: E402
from roll_opd.distributed.layout import Layout  # noqa: E402
from roll_opd.distributed.strategy.megatron.model import MegatronChunk, load_chunks, whole_head  # noqa: E402
from roll_opd.distributed.strategy.megatron.parallel import initialize  # noqa: E402
from roll_opd.distributed.strategy.megatron.shim import cuda_shim  # noqa: E402
from roll_opd.trajectory import PackedBatch  # noqa: E402

VOCAB = 305


def rows_of(dp_rank: int) -> list[PackedBatch]:
    """Eight packed rows of one to three sequences; lengths differ between rows and between data-parallel ranks."""
    rng = np.random.default_rng(dp_rank)
    rows = []
    for lengths in ((9, 2, 12), (17, 4 + 2 * dp_rank), (5,), (3, 8), (6, 6), (2, 2, 3), (4,), (7, 5)):
        tokens = [rng.integers(3, VOCAB, n).astype(np.int32) for n in lengths]
        rows.append(PackedBatch.pack(tokens, [np.arange(n) > 0 for n in lengths]))
    return rows


def train(chunks: list[MegatronChunk], rows: list[PackedBatch]) -> list[dict[str, Any]]:
    """Forward and backward of ``rows`` through all stages; return what the last stage saw of each."""

    def step(data: Iterator[PackedBatch], chunk: MegatronChunk) -> tuple[Any, Any]:
        out = chunk(next(data), head_outputs)

        def loss(outputs: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            total = outputs.logprobs_n.sum() - 0.5 * outputs.entropy_n.sum()
            seen = {"logprobs": outputs.logprobs_n.detach(), "entropy": outputs.entropy_n.detach()}
            return total, torch.tensor(1), seen

        return out, loss

    with cuda_shim():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(rows) for _ in chunks],
            model=chunks,
            num_microbatches=len(rows),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )


def sum_gradients(chunks: list[MegatronChunk]) -> None:
    """What Megatron-core's finalize_model_grads does behind its gradient buffers; then put gradients for weights."""
    tensor, embedding = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_embedding_group(False)
    data, expert_data = parallel_state.get_data_parallel_group(), parallel_state.get_expert_data_parallel_group()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
                dist.all_reduce(grad, group=tensor)
            if getattr(parameter, "shared_embedding", False):
                dist.all_reduce(grad, group=embedding)
            dist.all_reduce(grad, group=data if getattr(parameter, "allreduce", True) else expert_data)
            parameter.data = grad


def run(case: dict[str, Any], folder: Path) -> None:
    settings = MegatronSettings(**case["settings"])
    path, rank = case["model"], dist.get_rank()
    initialize(settings, torch.device("cpu"))
    chunks = load_chunks(
        ModelArguments(path, dtype="fp32"),
        settings,
        role="student_train",
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        trains=True,
    )
    bridge = chunks[0].bridge
    layout = Layout.megatron(
        dist.get_world_size(), settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    )
    dp_rank = layout.dp_ranks[rank]
    rows = rows_of(dp_rank)
    weights = dict(bridge.export(chunks))
    head = whole_head(chunks[-1]).weight_VH if chunks[-1].post_process else None
    seen = train(chunks, rows)
    if layout.answers[dp_rank] == rank:
        found = {f"{name}-{i}": values for i, row in enumerate(seen) for name, values in row.items()}
        save_file(found | {"head": head}, folder / f"{case['name']}-dp{dp_rank}.safetensors")
    sum_gradients(chunks)
    gradients = dict(bridge.export(chunks))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    bridge.put(chunks, load_file(Path(path) / "model.safetensors").items(), mix=0.5)
    halves = dict(bridge.export(chunks))
    if rank == 0:
        for kind, tensors in (("weights", weights), ("gradients", gradients), ("halves", halves)):
            save_file(tensors, folder / f"{case['name']}-{kind}.safetensors")
    parallel_state.destroy_model_parallel()


def main() -> None:
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    for case in json.loads((folder / "layouts.json").read_text()):
        if case["world_size"] == world_size:
            run(case, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
