"""Settings of the run: names, folders, lengths, schedules, the cluster. Algorithm and roles are in pipeline_config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import MAX_SEED, as_list, parse_with, ranged


def _off_is_text(value: Any, path: str) -> Any:
    """YAML 1.1 reads a bare ``off`` as false."""
    return "off" if value is False else value


TrackerName = Literal["tensorboard", "wandb", "swanlab", "trackio", "stdout"]


@dataclass(frozen=True)
class CheckpointArguments:
    """Where checkpoints go."""

    type: Literal["file_system"] = "file_system"
    """Kind of storage."""
    output_dir: str | None = None
    """Folder of the checkpoints; null: `output_dir`/checkpoints of the run."""


@dataclass(frozen=True)
class RayArguments:
    """How the Ray cluster is started or found."""

    address: str | None = None
    """Address of a running cluster, or `auto`; null starts a local one that ends with the run."""
    include_dashboard: bool = False
    """Start Ray's dashboard: off, it costs memory and a port."""
    dashboard_port: int | None = ranged(None, ge=1, le=65535)
    """Port of the dashboard; null: Ray's choice."""
    num_cpus: int | None = ranged(None, ge=1)
    """CPU slots of a local cluster; null: Ray counts the cores."""
    object_store_memory_mb: int | None = ranged(None, ge=80)
    """MiB of the shared object store of a local cluster; null: Ray's choice."""
    node_ip: str = "127.0.0.1"
    """Address that a local cluster binds to. Loopback, because Ray lets anyone who reaches its ports run code."""


@dataclass(frozen=True)
class BaseConfig:
    """What every pipeline needs, whatever it trains."""

    exp_name: str = "roll_opd"
    """Name of the run in trackers and in its summary."""
    seed: int = ranged(42, ge=0, le=MAX_SEED)
    """Seed from which every other one is derived."""
    output_dir: str = "./output"
    """The run's folder: logs, TensorBoard, samples, summary."""
    logging_dir: str | None = None
    """Folder of one log file per process; null: `output_dir`/logs."""
    rollout_dump_dir: str | None = None
    """Folder that receives every rollout as JSON lines; null: none are written."""
    checkpoint_config: CheckpointArguments = field(default_factory=CheckpointArguments)
    """Where checkpoints go."""
    track_with: list[TrackerName] = field(default_factory=lambda: ["tensorboard"], metadata=parse_with(as_list))
    """Trackers that receive the metrics; one name or a list."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the trackers."""
    max_steps: int = ranged(500, ge=1)
    """Pipeline steps (rollout + update) of the run."""
    save_steps: int = 50
    """Save on positive multiples of this step count, and at the end; 0 or less: only at the end."""
    max_ckpt_to_keep: int = ranged(0, ge=0)
    """Newest checkpoints that are kept; 0 keeps all."""
    logging_steps: int = ranged(1, ge=1)
    """Steps between two lines of metrics."""
    eval_steps: int = 10
    """Validate when step is a multiple of this, step 0 included; 0 or less: never."""
    resume_from_checkpoint: bool | str = False
    """True: the newest complete checkpoint, and an error when there is none; text: the path of one."""
    preflight: Literal["full", "static", "off"] = field(default="full", metadata=parse_with(_off_is_text))
    """Checks before the first step. `static`: files, models, data and settings. `full`: also a few samples from the
    loaded models. `off`: only what a run cannot do without; for a control such as teacher = student."""
    html_samples: int = ranged(16, ge=0)
    """Trajectories (agentic: episodes) on the HTML page of samples; 0: no page."""
    rollout_batch_size: int = ranged(128, ge=1)
    """Prompts per step; agentic: episodes per step."""
    val_batch_size: int = ranged(128, ge=1)
    """Prompts per batch in validation. Agentic: without effect, `val_env_manager` says how many episodes there are."""
    prompt_length: int = ranged(1024, ge=1)
    """Tokens of a prompt at most; longer ones are dropped and counted."""
    response_length: int | None = ranged(None, ge=1)
    """Tokens of a response at most; null: what `sequence_length` leaves, else 1024. Always set after load."""
    sequence_length: int | None = ranged(None, ge=1)
    """Tokens of prompt and response together; null: their sum. Always set after load."""
    num_nodes: int = ranged(1, ge=1)
    """Machines of the cluster; used to check the mappings, the live cluster decides."""
    num_gpus_per_node: int = ranged(8, ge=0)
    """Devices per machine."""
    system_envs: dict[str, Any] = field(default_factory=dict)
    """Environment variables of all worker processes."""
    rpc_timeout: float = ranged(3600, gt=0)
    """Seconds that one call to a worker (loading, scoring, training, weight transfer) and a silent engine may take."""
    model_update_buffer_size_mb: int = ranged(1024, ge=1)
    """MiB of weights that travel at once from training to generation."""
    model_update_transport: Literal["auto", "host", "ipc", "nccl"] = "auto"
    """How weights travel from training to generation, and to teachers that follow the student. `host`: through Ray's
    object store, from anywhere to anywhere. `ipc`: handles of the trainer's GPU memory, to roles on the trainer's own
    devices; needs `fsdp2_train`. `nccl`: from GPU to GPU, to roles on other devices than the trainer's; an engine that
    dies during such an update ends the run, with the others it is replaced. `auto`: for each role `ipc` or `nccl` where
    it can be, else `host`."""
    ray_args: RayArguments = field(default_factory=RayArguments)
    """The Ray cluster."""
