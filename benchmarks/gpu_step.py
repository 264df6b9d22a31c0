"""One step of on-policy distillation on one GPU: seconds of each phase beside what the device needs at least.

    python -m benchmarks.gpu_step            # without a GPU: the roofline on paper, and what the planner says
    python -m benchmarks.gpu_step --tiny     # the whole path with tiny models on this machine's CPU

Student and teacher have the shapes of Qwen3-0.6B and Qwen3-4B and random weights, made on the spot; nothing is
downloaded. The pipeline is the product's own, started by its launcher: trainer, sampler and teacher take turns on the
device, the objective is the reverse KL over the whole vocabulary, responses run to their full length (but for the few
that draw the end-of-sequence token). The roofline is that of :mod:`benchmarks.roofline`, with rates measured just
before: a large matrix product, a copy in device memory, a copy between page-locked host memory and the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import Machine, Phase, Shape, Step, paper, table
from roll_opd.algorithms.projection import CHUNK_TOKENS
from roll_opd.configs import load_config, render_plan_text
from roll_opd.configs.memory import WEIGHT_BYTES, show_size

REPO = Path(__file__).resolve().parents[1]
LAUNCHER = REPO / "examples" / "start_onpolicy_distill_pipeline.py"
WORK = REPO / "benchmarks" / ".work" / "gpu_step"
RESULT = REPO / "benchmarks" / "results" / "gpu_step.json"
CONFIG_NAME = "gpu_step"
SEED = 20

# Vendor's data sheets of the SXM modules. They print 1,979 TFLOP/s for bf16 with sparsity, which is twice the dense
# rate, and 128 GB/s of PCIe Gen5 for both ways together.
DATA_SHEETS = (
    Machine("H200 data sheet", flops=989.5e12, memory=4.8e12, link=64e9),
    Machine("H100 data sheet", flops=989.5e12, memory=3.35e12, link=64e9),
)


@dataclass(frozen=True)
class Setup:
    """What is run: two models, how much of it, and where."""

    student: dict[str, int]
    teacher: dict[str, int]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    row_tokens: int
    dtype: str
    engine: str
    steps: int
    on_gpu: bool

    def step(self) -> Step:
        """One step of it, for the roofline."""
        student, teacher = (Shape.of(model_config(shape, self.dtype)) for shape in (self.student, self.teacher))
        return Step(
            student,
            teacher,
            sequences=self.prompts,
            prompt=self.prompt_tokens,
            new=self.new_tokens,
            row=self.row_tokens,
            chunk=CHUNK_TOKENS,
            size=WEIGHT_BYTES[self.dtype],
            turns=self.on_gpu,
        )


def _shape(
    hidden: int, layers: int, heads: int, kv: int, head_dim: int, intermediate: int, vocab: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }


FULL = Setup(
    student=_shape(1024, 28, 16, 8, 128, 3072, 151_936),  # Qwen3-0.6B
    teacher=_shape(2560, 36, 32, 8, 128, 9728, 151_936),  # Qwen3-4B
    prompts=256,
    prompt_tokens=64,
    new_tokens=1024,
    row_tokens=16_384,
    dtype="bf16",
    engine="hf_infer",
    steps=4,
    on_gpu=True,
)
TINY = Setup(
    student=_shape(64, 2, 4, 2, 32, 128, 512),
    teacher=_shape(96, 3, 4, 2, 32, 256, 512),
    prompts=8,
    prompt_tokens=8,
    new_tokens=16,
    row_tokens=96,
    dtype="fp32",
    engine="hf_infer",
    steps=3,
    on_gpu=False,
)


# --- models, prompts and config on disk -------------------------------------------------------------------------------


def model_config(shape: dict[str, int], dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` of a model of this shape."""
    return {
        **shape,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rope_theta": 1_000_000,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        # Ids of the tokenizer below.
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


def write_config(setup: Setup, folder: Path) -> None:
    """Write the run's YAML and the models' ``config.json``: all that a plan reads."""
    for name, shape in (("student", setup.student), ("teacher", setup.teacher)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(model_config(shape, setup.dtype)), encoding="utf-8")
    # JSON is YAML.
    (folder / f"{CONFIG_NAME}.yaml").write_text(json.dumps(pipeline_config(setup, folder), indent=2), encoding="utf-8")


def pipeline_config(setup: Setup, folder: Path) -> dict[str, Any]:
    """Return the product's settings of the run."""
    rows = {
        "use_sequence_packing": True,
        "sequence_packing_args": {
            "algorithm": "load_balance",
            "max_packed_sequence_length_train": setup.row_tokens,
            "max_packed_sequence_length_forward": setup.row_tokens,
        },
    }

    def role(model: str, strategy: str, **more: Any) -> dict[str, Any]:
        where = {"device_mapping": "list(range(0,1))"} if setup.on_gpu else {"world_size": 1}
        args = {"model_name_or_path": str(folder / model), "dtype": setup.dtype}
        backend: dict[str, Any] = {"strategy_name": strategy}
        if strategy == "vllm" and setup.on_gpu:
            # The rest is for the CUDA contexts of the other processes.
            backend["strategy_config"] = {"gpu_memory_utilization": 0.8}
        return {"model_args": args, "strategy_args": backend, **where, **more}

    # One optimizer step of all trajectories; rows are bounded by their tokens alone.
    batch = {"per_device_train_batch_size": setup.prompts, "gradient_accumulation_steps": 1, "learning_rate": 1e-6}
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    engine = {"infer_batch_size": setup.prompts, "generating_args": sampling}
    return {
        "exp_name": "gpu-step",
        "output_dir": str(folder / "run"),
        "seed": SEED,
        "num_gpus_per_node": int(setup.on_gpu),
        "max_steps": setup.steps,
        "eval_steps": 0,
        "save_steps": 0,
        "html_samples": 0,
        "preflight": "off",
        "rollout_batch_size": setup.prompts,
        "num_return_sequences_in_group": 1,
        "prompt_length": setup.prompt_tokens,
        "response_length": setup.new_tokens,
        "opd_args": {"objective": "direct", "support": "full", "divergence": "reverse_kl"},
        "student_train": role(
            "student",
            "fsdp2_train",
            training_args=batch,
            data_args={"file_name": str(folder / "prompts.jsonl"), "messages": "messages"},
            **rows,
        ),
        "student_infer": role("student", setup.engine, **engine),
        "teacher": role("teacher", "hf_infer", **rows),
    }


def write_inputs(setup: Setup, folder: Path, device: torch.device) -> None:
    """Write models with random weights, a tokenizer of as many words as the models know, and prompts of such words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    size = setup.student["vocab_size"]
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(3, size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for seed, (name, shape) in enumerate((("student", setup.student), ("teacher", setup.teacher))):
        torch.manual_seed(SEED + seed)
        config = Qwen3Config(**model_config(shape, setup.dtype))
        with device:
            model = Qwen3ForCausalLM(config)
        if setup.dtype == "bf16":
            model = model.bfloat16()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(SEED)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as sink:
        for i in range(setup.prompts):
            content = " ".join(rng.choices(words[3:], k=setup.prompt_tokens))
            sink.write(json.dumps({"id": str(i), "messages": [{"role": "user", "content": content}]}) + "\n")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(device: torch.device, dtype: str) -> Machine:
    """Measure the rates of the device: the best of several repeats each, because they are to be upper bounds."""
    on_gpu = device.type == "cuda"
    width, count = (8192, 2**30) if on_gpu else (1024, 2**26)

    def best(work: Callable[[], object], calls: int) -> float:
        found = []
        for _ in range(6):
            began = time.perf_counter()
            for _ in range(calls):
                work()
            if on_gpu:
                torch.cuda.synchronize()
            found.append((time.perf_counter() - began) / calls)
        # The first one also starts the kernels.
        return min(found[1:])

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    left, right = (torch.randn(width, width, device=device, dtype=kind) for _ in range(2))
    out = torch.empty_like(left)
    flops = 2 * width**3 / best(lambda: torch.mm(left, right, out=out), 10)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    # What is copied is read and written.
    memory = 2 * count / best(lambda: target.copy_(source), 5)
    if not on_gpu:
        return Machine(platform.processor() or platform.machine(), flops, memory)
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=True)
    link = count / min(best(lambda: target.copy_(host), 2), best(lambda: host.copy_(target), 2))
    return Machine(torch.cuda.get_device_name(device), flops, memory, link)


def run_pipeline(folder: Path) -> list[dict[str, float]]:
    """Run the product on the config in ``folder``; return the rows of ``metrics.jsonl``, one for each step."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, str(LAUNCHER), "--config_path", str(folder), "--config_name", CONFIG_NAME]
    subprocess.run(command, check=True, cwd=REPO, stdout=sys.stderr)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "time/train" in row]


def seconds_of(row: dict[str, float]) -> dict[str, float]:
    """Return a step's seconds by phase of the roofline; ``advantages`` has none."""
    times = {name: row[f"time/{name}"] for name in ("weight_sync", "generate", "old_logprobs", "advantages", "train")}
    return times | {"score": row["time/rollout"] - row["time/generate"]}


def report(phases: Sequence[Phase], machine: Machine, measured: dict[str, float]) -> str:
    """Seconds of each phase beside its roofline, as a Markdown table."""
    least = {phase.name: phase.seconds(machine) for phase in phases}

    def line(name: str, took: float, needs: float) -> list[str]:
        return [name, f"{took:.4f}", f"{needs:.4f}", f"{needs / took:.3f}"]

    rows = [line(name, measured[name], needs) for name, needs in least.items()]
    rows += [[name, f"{took:.4f}", "-", "-"] for name, took in measured.items() if name not in least]
    rows.append(line("step", sum(measured.values()), sum(least.values())))
    return table(["phase", "seconds", "roofline, s", "fraction"], rows)


def versions() -> dict[str, str]:
    """Versions of what did the work; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "flash-attn", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


# --- command line -----------------------------------------------------------------------------------------------------


def on_paper(setup: Setup, folder: Path, every_part: bool) -> str:
    """The roofline of data sheets, and the planner's memory."""
    write_config(setup, folder)
    plan = render_plan_text(load_config("onpolicy_distill", str(folder), CONFIG_NAME, [], folder))
    memory = plan[plan.index("estimated memory") :].split("\n\n")[0].rstrip()
    step = setup.step()
    cache = f"  key-value cache of {step.sequences} whole sequences: {show_size(step.cache())}"
    return "\n".join([paper(step.phases(), DATA_SHEETS, every_part=every_part), "", memory, cache])


def main(argv: Sequence[str] | None = None) -> None:
    """Run, or print what can be said without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: does the path work?")
    parser.add_argument("--steps", type=int, help="the first one warms up and does not count")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--new_tokens", type=int)
    parser.add_argument("--engine", choices=("hf_infer", "vllm"), help="of the sampler; vllm on a GPU if installed")
    parser.add_argument("--parts", action="store_true", help="on paper: every part of a phase, and what bounds it")
    parser.add_argument("--work_dir", type=Path, default=WORK, help="models, config and run; 25 GB with a GPU")
    parser.add_argument("--json", type=Path, help="where the result goes; benchmarks/results/gpu_step.json with a GPU")
    args = parser.parse_args(argv)
    base = TINY if args.tiny else FULL
    given = {name: getattr(args, name) for name in ("steps", "prompts", "new_tokens", "engine")}
    if base.on_gpu and torch.cuda.is_available() and importlib.util.find_spec("vllm"):
        base = replace(base, engine="vllm")
    setup = replace(base, **{name: value for name, value in given.items() if value is not None})
    if setup.steps < 2 or setup.prompts < 1 or setup.new_tokens < 1:
        parser.error("--steps must be at least 2, --prompts and --new_tokens at least 1")
    folder = args.work_dir.resolve() / ("tiny" if args.tiny else "full")
    if setup.on_gpu and not torch.cuda.is_available():
        print("No CUDA device here: nothing is measured; the roofline on paper, from data-sheet rates:\n")
        print(on_paper(setup, folder, args.parts))
        return
    device = torch.device("cuda" if setup.on_gpu else "cpu")
    write_config(setup, folder)
    write_inputs(setup, folder, device)
    machine = measure(device, setup.dtype)
    if setup.on_gpu:
        # What this process used goes to those of the run.
        torch.cuda.empty_cache()
    rows = run_pipeline(folder)
    steps = [seconds_of(row) for row in rows]
    measured = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    phases = setup.step().phases()
    rates = f"{machine.flops / 1e12:.3f} TFLOP/s {setup.dtype}, {machine.memory / 1e9:.1f} GB/s memory"
    link = f", {machine.link / 1e9:.1f} GB/s link" if setup.on_gpu else ""
    tokens = [row["rollout/response_tokens"] for row in rows]
    print(f"{machine.name}: {rates}{link} (measured); sampler {setup.engine}")
    print(f"sampled tokens a step: {tokens}; the roofline counts {setup.step().sampled}\n")
    print(report(phases, machine, measured))
    target = args.json or (RESULT if setup.on_gpu else None)
    if target is not None:
        found = {
            "machine": asdict(machine) | {"link": machine.link if setup.on_gpu else None},
            "cores": os.cpu_count(),
            "versions": versions(),
            "setup": asdict(setup),
            "sampled_tokens": tokens,
            "seconds_by_step": steps,
            "seconds": measured,
            "roofline_seconds": {phase.name: phase.seconds(machine) for phase in phases},
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
