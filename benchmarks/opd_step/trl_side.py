"""TRL's side: ``DistillationTrainer`` as its documentation has it used, run by TRL's own Python.

Its step is its own code: a callback only waits at its beginning, and a few of its methods are wrapped in clocks.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.opd_step.side import Ended, Side, checksum
from benchmarks.opd_step.workload import MAX_STEPS, Job, gate_responses, read_prompts


def make_trainer(job: Job, callbacks: list[TrainerCallback]) -> DistillationTrainer:
    """The trainer that ``job`` describes."""
    regime, optimizer = job.regime, job.regime.optimizer
    # bf16 is left to TRL: a student in fp32 under autocast, and the teacher in what the checkpoint says.
    dtype = {"dtype": "float32"} if regime.dtype == "fp32" else None
    config = DistillationConfig(
        output_dir=job.folder,
        seed=job.seed,
        model_init_kwargs=dtype,
        teacher_model_init_kwargs=dtype,
        bf16=regime.dtype == "bf16",
        beta=1.0,
        temperature=1.0,
        max_completion_length=regime.max_new_tokens,
        generation_kwargs={"min_new_tokens": regime.max_new_tokens} if regime.fixed_length else None,
        shuffle_dataset=False,
        per_device_train_batch_size=regime.sequences,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        max_steps=MAX_STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.student, padding_side="left", truncation_side="left")
    trainer = DistillationTrainer(
        model=job.student,
        teacher_model=job.teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in read_prompts(job.prompts)]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Pace(TrainerCallback):
    """Waits before each step, and reports it when the next one is about to begin: logging is part of a step."""

    def __init__(self) -> None:
        self.side = Side(lambda folder: self.trainer.save_model(folder))
        self.phases: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._began: float | None = None

    def attach(self, trainer: DistillationTrainer) -> None:
        """Put clocks on the trainer's parts."""
        self.trainer = trainer
        self._time(trainer, "_generate_single_turn", "generate")
        self._time(trainer, "compute_loss", "forward and loss")
        self._time(trainer.accelerator, "backward", "backward")
        self._time(trainer, "_clip_grad_norm", "optimizer")
        self._teacher_apart(trainer)
        generate = trainer._generate_single_turn

        def counted(prompt_ids: Any, *rest: Any) -> Any:
            completions = generate(prompt_ids, *rest)
            self.facts = {"tokens": sum(map(len, completions)), "prompts": prompt_ids}
            return completions

        trainer._generate_single_turn = counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self._began is not None:
            seconds = now - self._began
            phases = self.phases | {"other": seconds - sum(self.phases.values())}
            loss = next(row["loss"] for row in reversed(state.log_history) if "loss" in row)
            prompts = checksum(self.facts["prompts"])
            tokens = self.facts["tokens"]
            self.side.step_done(
                {"seconds": seconds, "tokens": tokens, "loss": loss, "phases": phases, "prompts": prompts}
            )
            state.log_history.clear()
        self.phases = {}
        self.side.wait_for_turn()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._optimizer_began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._add("optimizer", time.perf_counter() - self._optimizer_began)

    def _add(self, name: str, seconds: float) -> None:
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    def _time(self, owner: Any, method: str, name: str) -> None:
        wrapped: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(wrapped)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return wrapped(*args, **kwargs)
            finally:
                self._add(name, time.perf_counter() - began)

        setattr(owner, method, timed)

    def _teacher_apart(self, trainer: DistillationTrainer) -> None:
        """Have the teacher's forward counted by itself, and not in the loss."""
        forward = trainer._get_last_hidden_state

        def hidden(model: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = forward(model, *args, **kwargs)
            if model is not trainer.model:
                self._add("teacher", time.perf_counter() - began)
                self._add("forward and loss", began - time.perf_counter())
            return out

        trainer._get_last_hidden_state = hidden


def run(job: Job) -> None:
    """Train, a few steps at a time, until the driver has had enough."""
    pace = Pace()
    trainer = make_trainer(job, [pace])
    pace.attach(trainer)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    pace.side.greet(versions=versions, threads=torch.get_num_threads())
    try:
        trainer.train()
    except Ended:
        return


def gate(job: Job) -> None:
    """Write TRL's loss and gradients on given responses, by its own training step, as ``gate.safetensors``."""
    trainer = make_trainer(job, [])
    responses = gate_responses(trainer.model.config.vocab_size)
    inputs = [{"prompt": prompt} for prompt in read_prompts(job.prompts)[: len(responses)]]

    def given(prompts: list[str]) -> Any:
        return trainer._tokenize_prompts(prompts)[0], responses, None, None, []

    trainer._generate = given
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, inputs, None)
    tensors = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    save_file(tensors | {"loss": loss.double().reshape(1)}, Path(job.folder) / "gate.safetensors")


if __name__ == "__main__":
    {"run": run, "gate": gate}[sys.argv[1]](Job.read(sys.argv[2]))
