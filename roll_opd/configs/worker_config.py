"""One role: its model, its backend, its devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.data_args import DataArguments
from roll_opd.configs.device_mapping import parse_device_mapping
from roll_opd.configs.field_spec import MAX_SEED, parse_with, ranged
from roll_opd.configs.generating_args import GeneratingArguments
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.roll_compat import resolve_class_path
from roll_opd.configs.strategy_args import SequencePackingArguments, StrategyArguments
from roll_opd.configs.training_args import TrainingArguments


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of one role (a cluster of worker processes)."""

    name: str | None = None
    """Name in logs and process titles; filled at load."""
    worker_cls: str | None = field(default=None, metadata=parse_with(resolve_class_path))
    """Import path of the worker class; null: the role's own. Paths of ROLL (`roll.…`) resolve to ours."""
    model_args: ModelArguments = field(default_factory=ModelArguments)
    """Model and precision."""
    training_args: TrainingArguments = field(default_factory=TrainingArguments)
    """Optimizer and batch sizes; used by trained roles."""
    data_args: DataArguments | None = None
    """Prompts; used by the trained role and by validation."""
    generating_args: GeneratingArguments | None = None
    """Sampling; used by the generating role and by validation."""
    strategy_args: StrategyArguments | None = None
    """Backend; after load the main roles always have one."""
    world_size: int | None = ranged(None, ge=1)
    """Processes. Follows from a device_mapping (devices / num_gpus_per_worker); without one, 1 by default."""
    device_mapping: list[int] | None = field(default=None, metadata=parse_with(parse_device_mapping))
    """Devices over the whole cluster in node order; null runs on CPU processes. Text forms are parsed, never run."""
    num_gpus_per_worker: int = ranged(1, ge=1)
    """Devices of one worker. vLLM: tensor x pipeline parallel size, set at load; training backends: 1."""
    infer_batch_size: int = ranged(16, ge=1)
    """Sequences per forward pass in scoring and generation, per worker."""
    use_sequence_packing: bool = False
    """Kept from ROLL. Our rows are always packed without padding; true adds the limits of `sequence_packing_args`."""
    sequence_packing_args: SequencePackingArguments = field(default_factory=SequencePackingArguments)
    """Limits of packed rows."""
    use_dynamic_batching_in_train: bool = False
    """Form training micro-batches by tokens instead of by sequences."""
    max_tokens_per_microbatch_in_train: int = ranged(0, ge=0)
    """Tokens of a training micro-batch at most; 0: no limit."""
    use_dynamic_batching_in_infer: bool = False
    """Form scoring micro-batches by tokens instead of by sequences."""
    max_tokens_per_microbatch_in_infer: int | None = ranged(None, ge=1)
    """Tokens of a scoring micro-batch at most; null: no limit."""
    logits_in_fp32: bool = False
    """Compute logits in fp32 before the softmax."""
    system_envs: dict[str, Any] = field(default_factory=dict)
    """Environment variables of this role's processes, on top of the pipeline's."""
    cpu_threads: int | None = ranged(None, ge=1)
    """Threads per process for tensor work on CPU; null shares the machine's cores among the processes."""
    backend_timeout: float = ranged(30, gt=0)
    """Minutes that a collective operation may take (ROLL's unit)."""


@dataclass(frozen=True)
class TeacherArguments:
    """What the teacher sees besides the student's tokens."""

    context_template: str | None = None
    """Jinja text that replaces the last user message (of an episode: the first) for the teacher alone; it may use the
    row's fields, such as `{{ prompt }}`, `{{ ground_truth }}` and `{{ hint }}`, or what the environment's reset tells.
    Null: the student's own prompt."""
    context_length: int | None = ranged(None, ge=1)
    """Tokens of that prompt at most; null: twice the pipeline's `prompt_length` (of an episode: `sequence_length`)."""
    self_teacher: Literal["frozen", "ema", "live"] | None = None
    """The teacher is the student itself: as it was at the start, its adapter included, a moving average of it, or as it
    is. Null: a model of its own."""
    ema_decay: float = ranged(0.99, ge=0, lt=1)
    """Share of the old weights that an `ema` teacher keeps at each step."""


@dataclass(frozen=True)
class TeacherConfig(WorkerConfig):
    """A worker that scores the student's tokens."""

    tag_included: list[str] = field(default_factory=list)
    """Tags of the samples this teacher scores; empty: all of them."""
    opd_kl_coef: float | None = ranged(None, ge=0)
    """Weight of this teacher's term; null: the pipeline's `opd_kl_coef`, else 1. 0 for every teacher is refused in pure
    distillation."""
    teacher_args: TeacherArguments = field(default_factory=TeacherArguments)
    """The teacher's own view of the prompt."""
    request_timeout: float = ranged(600.0, gt=0)
    """Seconds that one scoring request may take before another replica is tried."""
    max_retries: int = ranged(2, ge=0)
    """Further attempts at a failed scoring request."""
    failure_budget: int = ranged(8, ge=0)
    """Failed requests in the whole run after which it stops and names the teacher."""


@dataclass(frozen=True)
class RewardFilterArguments:
    """Which groups of samples a reward keeps for training."""

    type: Literal["no_filter", "mean_filter", "std_filter"] = "no_filter"
    """Filter on the mean or on the standard deviation of a group's scores."""
    filter_args: dict[str, Any] = field(default_factory=dict)
    """Thresholds of the filter."""


@dataclass(frozen=True)
class RewardConfig(WorkerConfig):
    """A worker that grades finished responses. In pure OPD rewards only monitor and validate."""

    worker_cls: str | None = field(default=None, metadata=parse_with(resolve_class_path))
    """Import path of the reward's class. Paths of ROLL (`roll.pipeline.rlvr.rewards.…`) resolve to ours."""
    reward_args: dict[str, Any] = field(default_factory=dict)
    """Settings that are handed to the reward's class, such as `num_processes` and `memory_mb` of the math reward."""
    tag_included: list[str] = field(default_factory=list)
    """Tags of the samples this reward grades; empty: all of them."""
    reward_timeout: float = ranged(5.0, gt=0)
    """Seconds for one response; a grading process that takes longer is killed and the response stays ungraded."""
    query_filter_config: RewardFilterArguments = field(default_factory=RewardFilterArguments)
    """Drops whole prompts by their group's scores."""
    response_filter_config: RewardFilterArguments = field(default_factory=RewardFilterArguments)
    """Drops single responses."""
    response_length_penalty_coef: float = 0.0
    """Weight of a penalty on long responses."""
    reward_type: str | None = None
    """Variant of a reward class that has several, such as `soft`."""
    format_pattern: str | None = None
    """Regular expression that a response must match."""
    code_url: str | None = None
    """Address of a code sandbox."""
    use_local: bool = True
    """Run code in a local sandbox instead of `code_url`."""
    judge_prompt: str | None = None
    """Name of the judge's prompt."""
    judge_model_type: str | None = None
    """How the judge runs: `api` or `inference`."""
    judge_model_name: str | None = None
    """Model name at the judge's server."""
    judge_api_url: str | None = None
    """Address of the judge's server."""
    judge_api_key: str | None = field(default=None, repr=False)
    """Key for the judge's server. Prefer an interpolation such as `${oc.env:JUDGE_KEY}`."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out prompts, sampled every `eval_steps`."""

    data_args: DataArguments = field(default_factory=DataArguments)
    """Held-out files; no file means no validation."""
    generating_args: GeneratingArguments = field(default_factory=GeneratingArguments)
    """Sampling in validation; `num_return_sequences` samples per prompt."""
    teacher_accuracy: bool = False
    """Also sample from the teacher once, and report its accuracy. Needs a teacher that can generate."""
    seed: int = ranged(1234, ge=0, le=MAX_SEED)
    """Seed of validation sampling: fixed, so that steps compare."""
    max_prompts: int | None = ranged(None, ge=1)
    """Use only the first prompts of the files; null: all."""
