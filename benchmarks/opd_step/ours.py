"""Our side: the real pipeline, with its loop paused between two steps; and what only our side can work out."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from benchmarks.opd_step.side import Ended, Side, checksum, private_stdout
from benchmarks.opd_step.workload import MAX_STEPS, Job, gate_responses, read_prompts
from roll_opd.algorithms.chunked_head import FullTarget
from roll_opd.configs import load_config
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.distributed.runtime import ray_session, stop_on_signals
from roll_opd.distributed.strategy.base import GenerateRequest, Sampling, ScoreRequest
from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
from roll_opd.distributed.strategy.hf import HFStrategy
from roll_opd.distributed.strategy.loss_inputs import row_loss
from roll_opd.distributed.strategy.packed_model import head_of, tensor_of
from roll_opd.distributed.strategy.tokenizer import Vocabulary, vocabulary_of
from roll_opd.pipeline.batching import micro_batches
from roll_opd.pipeline.rlvr.rlvr_pipeline import RLVRPipeline
from roll_opd.pipeline.role_clusters import want_of
from roll_opd.pipeline.signal import Signal
from roll_opd.pipeline.student import loss_of
from roll_opd.pipeline.trajectory_stream import Batch
from roll_opd.trajectory import PackedBatch, RawTensor, TeacherScores, Trajectory, TrajectoryId
from roll_opd.utils.logging import configure_logging

TEACHER = "default"
CPU = torch.device("cpu")


def config_of(job: Job) -> LoadedConfig:
    """``ours.yaml`` with what ``job`` says."""
    regime = job.regime
    values = {
        "student_model": job.student,
        "teacher_model": job.teacher,
        "prompts": job.prompts,
        "dtype": regime.dtype,
        "seed": job.seed,
        "output_dir": f"{job.folder}/run",
        "max_steps": MAX_STEPS,
        "rollout_batch_size": regime.sequences,
        "response_length": regime.max_new_tokens,
        "student_infer.generating_args.ignore_eos": regime.fixed_length,
        "opd_args.objective": regime.objective,
        "opd_args.support": "full" if regime.objective == "direct" else "sampled",
    } | {f"optimizer.{name}": value for name, value in dataclasses.asdict(regime.optimizer).items()}
    overrides = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return load_config("onpolicy_distill", str(Path(__file__).parent), "ours.yaml", overrides)


# ---- steps -----------------------------------------------------------------------------------------------------------


class PacedPipeline(RLVRPipeline):
    """The pipeline of a user's run, which waits for the driver before each step."""

    def __init__(self, loaded: LoadedConfig) -> None:
        super().__init__(loaded)
        self._side = Side(self._write_weights)
        versions = {module.__name__: module.__version__ for module in (torch, transformers, ray)}
        self._side.greet(versions=versions)
        self._metrics = self.report.folder.metrics

    def _run_step(self, step: int) -> None:
        self._side.wait_for_turn()
        began = time.perf_counter()
        super()._run_step(step)
        seconds = time.perf_counter() - began
        metrics = _last_row(self._metrics)
        phases = {name.removeprefix("time/"): s for name, s in metrics.items() if name.startswith("time/")}
        phases.pop("tokens_per_second")
        # "rollout" ends with the last score, "generate" with the last token.
        phases["teacher"] = phases.pop("rollout") - phases["generate"]
        phases["other"] = seconds - sum(phases.values())
        prompts = [t.tokens[: int(t.response_mask.argmax())].tolist() for t in self._batch.trajectories]
        self._side.step_done(
            {
                "seconds": seconds,
                "tokens": int(metrics["rollout/response_tokens"]),
                "loss": metrics["train/loss"],
                "phases": phases,
                "prompts": checksum(prompts),
            }
        )

    def collect(self) -> Batch:
        self._batch = super().collect()
        return self._batch

    def _write_weights(self, folder: str) -> None:
        self.clusters.train.call_all("export_hf", folder)


def _last_row(path: Path) -> dict[str, float]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return dict(json.loads(file.read().splitlines()[-1]))


def run(job: Job) -> None:
    """Train, a few steps at a time, until the driver has had enough, as ``roll_opd.pipeline.launch`` does."""
    torch.set_num_threads(1)
    with stop_on_signals():
        pipeline = PacedPipeline(config_of(job))
        configure_logging(log_file=pipeline.report.folder.logs / "driver.log", process="driver")
        pipeline.check()
        with ray_session(pipeline.config.ray_args), stop_on_signals():
            try:
                pipeline.run()
            except Ended:
                return


# ---- one process, no Ray ---------------------------------------------------------------------------------------------


def _vocabulary(job: Job, config: PipelineConfig) -> Vocabulary:
    return vocabulary_of(AutoTokenizer.from_pretrained(job.student), config.actor_train.model_args)


def _trajectory(number: int, prompt: Sequence[int], response: Sequence[int]) -> Trajectory:
    tokens = np.array([*prompt, *response], dtype=np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    mask = np.arange(len(tokens)) >= len(prompt)
    return Trajectory(
        TrajectoryId(number, 0), "", tokens, mask, zeros, np.zeros(len(tokens), np.int32), old_logprobs=zeros
    )


def _requests(trajectories: Sequence[Trajectory]) -> list[ScoreRequest]:
    return [ScoreRequest(t.id, t.tokens, t.response_mask) for t in trajectories]


def gate(job: Job) -> None:
    """Write our loss and gradients on given responses as ``gate.safetensors``: what the roles compute, without Ray."""
    config = config_of(job).config
    vocabulary = _vocabulary(job, config)
    tokenizer = AutoTokenizer.from_pretrained(job.student)
    responses = gate_responses(vocabulary.size)
    prompts = tokenizer(read_prompts(job.prompts)[: len(responses)])["input_ids"]
    trajectories = [_trajectory(i, p, r) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    teacher = HFStrategy("teacher", config.teachers[TEACHER], vocabulary, CPU, generates=False)
    results = teacher.score(_requests(trajectories), want_of(config))
    trajectories = [
        dataclasses.replace(t, teacher_scores={TEACHER: TeacherScores(r.logprobs, r.details)})
        for t, r in zip(trajectories, results, strict=True)
    ]
    trajectories, _ = Signal(config)(trajectories, 0)
    student = FSDP2Strategy(
        "student_train", config.actor_train, vocabulary, CPU, max_grad_norm=config.max_grad_norm, total_updates=1
    )
    heads = {TEACHER: head_of(teacher.head(), CPU)}
    total = 0.0
    shares = micro_batches(trajectories, config.actor_train, 1, config.loss_agg_mode, config.response_length or 1)
    for row in shares[0]:
        loss, _ = row_loss(student.model, row, loss_of(config), heads, CPU)
        loss.backward()
        total += float(loss.detach())
    tensors = {"loss": torch.tensor([total], dtype=torch.float64)}
    for name, parameter in student.model.lm.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            tensors[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    save_file(tensors, Path(job.folder) / "gate.safetensors")
    dist.destroy_process_group()


@torch.inference_mode()
def held_out(job: Job) -> None:
    """Answer each ``{"weights": folder}`` on standard input with the exact reverse KL of that student to the teacher.

    Nats per token, over the whole vocabulary, on responses that those weights sample to ``job.prompts`` with seeds that
    are the same for all folders. In fp32.
    """
    answers = private_stdout()
    config = config_of(job).config
    vocabulary = _vocabulary(job, config)
    prompts = AutoTokenizer.from_pretrained(job.student)(read_prompts(job.prompts))["input_ids"]
    sampling = Sampling(max_new_tokens=job.regime.max_new_tokens)
    teacher = HFStrategy("teacher", config.teachers[TEACHER], vocabulary, CPU, generates=False)
    for line in sys.stdin:
        folder = json.loads(line)["weights"]
        model = dataclasses.replace(config.actor_infer.model_args, model_name_or_path=folder)
        infer = dataclasses.replace(config.actor_infer, model_args=model)
        student = HFStrategy("student_infer", infer, vocabulary, CPU, generates=True)
        requests = [
            GenerateRequest(TrajectoryId(i, 0), tuple(p), TrajectoryId(i, 0).seed(job.seed), sampling)
            for i, p in enumerate(prompts)
        ]
        kl, tokens, size = 0.0, 0, config.actor_infer.infer_batch_size
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            responses = {r.id: r.response_ids for r in student._loop.run(batch, 0)}
            trajectories = [_trajectory(q.id.draw, q.prompt_ids, responses[q.id].tolist()) for q in batch]
            scores = teacher.score(_requests(trajectories), want_of(config))
            hidden = torch.cat([tensor_of(s.details, CPU) for s in scores if isinstance(s.details, RawTensor)])
            target = FullTarget("reverse_kl", hidden, teacher.model.head())
            row = PackedBatch.pack([t.tokens for t in trajectories], [t.response_mask for t in trajectories])
            outputs, _ = student.model.token_logprobs(row, [target])
            kl += float(outputs.divergences[0].double().sum())
            tokens += len(outputs.divergences[0])
        answers.write(json.dumps({"kl": kl / tokens, "mean_length": tokens / len(prompts)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    what, path = sys.argv[1:]
    {"run": run, "gate": gate, "held_out": held_out}[what](Job.read(path))
