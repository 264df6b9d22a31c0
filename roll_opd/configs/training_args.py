"""Optimizer, schedule and batch sizes of a trained role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_opd.configs.field_spec import ranged


@dataclass(frozen=True)
class TrainingArguments:
    """One optimizer step sees `per_device_train_batch_size x gradient_accumulation_steps x dp` samples."""

    learning_rate: float = ranged(1e-6, gt=0)
    """Peak learning rate. 1e-6 is usual for full-weight reinforcement learning of pretrained models."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the schedule over all optimizer steps of the run; `linear` is ROLL's default, so its files keep
    their meaning. `constant` has no warm-up (a warning says so); `constant_with_warmup` has."""
    warmup_steps: int = ranged(0, ge=0)
    """Optimizer steps of linear warm-up; when above 0 it wins over `warmup_ratio`."""
    warmup_ratio: float = ranged(0.0, ge=0, le=1)
    """Warm-up as a share of all optimizer steps, 0 to 1."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has no state and no momentum; it serves memory-bound runs and the zero-signal controls."""
    weight_decay: float = ranged(0.0, ge=0)
    """Decoupled weight decay per step, before the learning rate's factor."""
    adam_beta1: float = ranged(0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = ranged(0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_epsilon: float = ranged(1e-8, gt=0)
    """Added to Adam's denominator."""
    per_device_train_batch_size: int = ranged(1, ge=1)
    """Samples (trajectories) per data-parallel rank and micro-batch."""
    gradient_accumulation_steps: int = ranged(1, ge=1)
    """Micro-batches per optimizer step on each data-parallel rank."""
    save_hf_model: bool = False
    """Every checkpoint also holds the model in Hugging Face format, as the last one always does."""
