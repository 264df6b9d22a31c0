"""Reverse KL over the whole vocabulary, forward and backward: the chunked head against the naive computation.

Each variant runs in a fresh process on the same inputs and reports its time, its peak of resident memory beyond what
both need (inputs, and the gradients of hidden states and head), its loss and its gradients. One run measures all, and
the fastest of ``--repeats`` counts:

- ``ahead``: the product, :func:`roll_opd.algorithms.chunked_head.head_outputs`, told what each token weighs in the
  loss: gradients are made in the forward pass
- ``recompute``: the same without being told: the logits are made again in the backward pass
- ``naive``: both logit tensors, both log-softmaxes, autograd
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from roll_opd.algorithms.chunked_head import FullTarget, Head, head_outputs

VARIANTS = ("ahead", "recompute", "naive")


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, the teacher's (a perturbed student), and the sampled tokens."""
    generator = torch.Generator().manual_seed(0)
    scale = 3.0 / args.hidden**0.5
    hidden = torch.randn(args.tokens, args.hidden, generator=generator)
    head = torch.randn(args.vocab, args.hidden, generator=generator).mul_(scale)
    teacher_hidden = torch.randn(args.tokens, args.hidden, generator=generator).mul_(0.5).add_(hidden)
    teacher_head = torch.randn(args.vocab, args.hidden, generator=generator).mul_(0.3 * scale).add_(head)
    targets = torch.randint(args.vocab, (args.tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, targets


def naive(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the mean divergence; its backward pass is autograd's. All four matrices live until the end."""
    logits = hidden @ head.T
    teacher_logits = teacher_hidden @ teacher_head.T
    student = torch.log_softmax(logits, dim=-1)
    teacher = torch.log_softmax(teacher_logits, dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1).mean()


def measure(args: argparse.Namespace) -> None:
    """Run one variant in this process; leave numbers and gradients in files."""
    torch.set_num_threads(args.threads)
    hidden, head, teacher_hidden, teacher_head, targets = inputs(args)
    # Threads and kernels start up outside the measurement.
    small = torch.randn(256, 256, requires_grad=True)
    (small @ small.T).log_softmax(-1).sum().backward()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    if args.variant == "naive":
        loss = naive(hidden, head, teacher_hidden, teacher_head)
    else:
        weights = torch.full((args.tokens,), 1 / args.tokens) if args.variant == "ahead" else None
        target = FullTarget("reverse_kl", teacher_hidden, Head(teacher_head), weights_m=weights)
        loss = head_outputs(hidden, Head(head), targets, [target], chunk_tokens=args.chunk_tokens).divergences[0].mean()
    middle = time.perf_counter()
    loss.backward()
    end, cpu_end = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients = (hidden.numel() + head.numel()) * 4
    torch.save({"hidden": hidden.grad, "head": head.grad}, args.out.with_suffix(".pt"))
    result = {
        "forward": middle - start,
        "backward": end - middle,
        "seconds": end - start,
        "cpu": cpu_end - cpu,
        "extra": (peak - baseline) * 1024 - gradients,
        "loss": loss.item(),
    }
    args.out.with_suffix(".json").write_text(json.dumps(result))


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk_tokens", type=int, help="logits' rows held at a time; left out: as the product does")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure(args)
        return
    chunks = args.chunk_tokens or "the product's choice"
    print(f"H={args.hidden} V={args.vocab} T={args.tokens} fp32, {args.threads} threads, chunks: {chunks}")
    with tempfile.TemporaryDirectory() as folder:
        results, paths = {}, {name: Path(folder) / name for name in args.variants}
        # Turn by turn, so that what else the machine does hits all variants, and the fastest run of each counts.
        for _ in range(args.repeats):
            for name, path in paths.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--variant", name, "--out", str(path)]
                subprocess.run(command, check=True)
                found = json.loads(path.with_suffix(".json").read_text())
                print(f"{name}: {found['seconds']:.1f} s, {found['cpu']:.1f} CPU s, load {os.getloadavg()[0]:.1f}")
                results[name] = min(results.get(name, found), found, key=lambda run: run["seconds"])
        report(results, paths)


def report(results: dict[str, dict[str, float]], paths: dict[str, Path]) -> None:
    base_name = "naive" if "naive" in results else next(iter(results))
    base = results[base_name]
    base_grads = torch.load(paths[base_name].with_suffix(".pt"), mmap=True)
    columns = ("forward s", "backward s", "total s", "ratio", "cpu s", "ratio", "extra MB", "ratio")
    errors = ("loss", "loss err", "d hidden", "d head")
    print(" " * 12 + "".join(f"{c:>11}" for c in columns + errors))
    for name, row in results.items():
        grads = torch.load(paths[name].with_suffix(".pt"), mmap=True)
        numbers = [row["forward"], row["backward"]]
        for key, unit in (("seconds", 1.0), ("cpu", 1.0), ("extra", 1e6)):
            numbers += [row[key] / unit, row[key] / base[key]]
        wrong = [abs(row["loss"] / base["loss"] - 1)] + [relative(grads[k], base_grads[k]) for k in ("hidden", "head")]
        print(
            f"{name:12}"
            + "".join(f"{x:11.3f}" for x in numbers)
            + f"{row['loss']:11.6f}"
            + "".join(f"{x:11.1e}" for x in wrong)
        )


if __name__ == "__main__":
    main()
