"""How weights can travel follows from where the two roles lie."""

from __future__ import annotations

import pytest

from roll_opd.configs import StrategyArguments, WorkerConfig
from roll_opd.configs.transports import transports
from roll_opd.distributed.weight_sync import senders, way_of


def role(strategy: str, devices: list[int] | None, each: int = 1) -> WorkerConfig:
    return WorkerConfig(
        strategy_args=StrategyArguments(strategy_name=strategy), device_mapping=devices, num_gpus_per_worker=each
    )


@pytest.mark.parametrize(
    ("trains", "theirs", "mine", "way", "sending"),
    [
        ("fsdp2_train", None, None, "host", [0]),
        ("fsdp2_train", [0, 1], None, "host", [0]),
        ("fsdp2_train", None, [0, 1], "host", [0]),
        ("fsdp2_train", [0, 1], [0, 1], "handles", [0, 1]),
        ("fsdp2_train", [4, 5, 6, 7], [6, 5], "handles", [1, 2]),
        ("fsdp2_train", [0, 1], [1, 2], "host", [0]),
        ("fsdp2_train", [0, 1], [2, 3], "group", [0]),
        ("megatron_train", [0, 1], [0, 1], "host", [0]),
        ("megatron_train", [0, 1], [2, 3], "group", [0]),
    ],
)
def test_the_fastest_way_that_is_open(trains, theirs, mine, way, sending) -> None:
    train, infer = role(trains, theirs), role("vllm", mine)
    assert way_of(train, infer) == way
    assert senders(train, way, infer.device_mapping or ()) == sending
    assert way_of(train, infer, "host") == "host"
    problems = transports(train, infer)
    assert list(problems) == ["ipc", "nccl", "host"]
    assert not problems[{"handles": "ipc", "group": "nccl", "host": "host"}[way]]
    assert bool(problems["ipc"]) == (way != "handles") and bool(problems["nccl"]) == (way != "group")


def test_who_has_no_receiver_sends_nothing() -> None:
    """One engine alone was replaced; ranks with two devices each; no engine is left."""
    train = role("fsdp2_train", [4, 5, 6, 7])
    assert senders(train, "handles", [6]) == [2]
    assert senders(role("fsdp2_train", [4, 5, 6, 7], each=2), "handles", [6]) == [1]
    assert senders(train, "handles", []) == []
    assert senders(role("fsdp2_train", None), "handles", []) == [0]
