"""Where workers go, on a cluster whose GPUs are only counted."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from roll_opd.configs import WorkerConfig
from roll_opd.errors import ConfigError

pytestmark = pytest.mark.integration


class Probe:
    """A worker that tells what it was given."""

    def __init__(self, spec) -> None:
        self.spec = spec

    def look(self) -> tuple:
        return self.spec.rank, self.spec.gpu_ids, os.environ["OMP_NUM_THREADS"], os.environ.get("FROM_CONFIG")


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    import ray

    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def config(name: str, devices: list[int] | None, per_worker: int = 1, **more) -> WorkerConfig:
    return WorkerConfig(name=name, device_mapping=devices, num_gpus_per_worker=per_worker, **more)


def test_devices_are_shared_out_and_shared(four_gpus) -> None:
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement

    roles = {
        "train": config("train", [0, 1, 2, 3]),
        "infer": config("infer", [0, 1, 2, 3], per_worker=2, system_envs={"FROM_CONFIG": 1}),
        "teacher": config("teacher", None, world_size=2),
    }
    placement = Placement(roles, {})
    seen = {}
    for name, role in roles.items():
        cluster = Cluster(name, role, Probe, placement=placement, threads=3, log_dir="", seed=0, system_envs={})
        seen[name] = cluster.call_all("look")
        cluster.stop()
    placement.release()
    assert seen["train"] == [(rank, (rank,), "3", None) for rank in range(4)]
    assert seen["infer"] == [(0, (0, 1), "3", "1"), (1, (2, 3), "3", "1")]
    assert seen["teacher"] == [(0, (), "3", None), (1, (), "3", None)]


def test_more_devices_than_the_cluster_has(four_gpus) -> None:
    from roll_opd.distributed.placement import Placement

    with pytest.raises(ConfigError, match=r"student_train\.device_mapping.*device 4.*4 GPU"):
        Placement({"actor_train": config("actor_train", [3, 4])}, {"actor_train": "student_train"})
