"""By which means a role can get the trainer's weights, from where the two lie."""

from __future__ import annotations

from typing import Literal

from roll_opd.configs.worker_config import WorkerConfig

Transport = Literal["ipc", "nccl", "host"]


def transports(train: WorkerConfig, infer: WorkerConfig) -> dict[Transport, str]:
    """Return for each means, fastest first, why it cannot be used between two roles; empty: it can."""
    theirs, mine = set(train.device_mapping or ()), set(infer.device_mapping or ())
    assert train.strategy_args is not None
    strategy = train.strategy_args.strategy_name
    on_cpu = "" if theirs and mine else "one of them has no device_mapping and lies on CPU processes"
    ipc = on_cpu
    if not on_cpu and strategy != "fsdp2_train":
        ipc = f"{strategy} does not gather whole weights on each of its devices"
    elif not on_cpu and not mine <= theirs:
        ipc = "not all of its devices are the trainer's too"
    nccl = on_cpu or ("both lie on some of the same devices" if mine & theirs else "")
    return {"ipc": ipc, "nccl": nccl, "host": ""}
