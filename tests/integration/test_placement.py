"""Where workers go, on a cluster of two nodes that count 2 and 3 GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from roll_opd.configs import WorkerConfig
from roll_opd.errors import ConfigError, LaunchError

pytestmark = pytest.mark.integration


Place = tuple[str, int]
"""A node and one of its GPUs."""


class Probe:
    """A worker that tells where it is and what it was given."""

    def __init__(self, spec) -> None:
        self.spec = spec

    def look(self) -> tuple[list[Place], str, str | None]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        places = [(node, gpu) for gpu in self.spec.gpu_ids or (-1,)]
        return places, os.environ["OMP_NUM_THREADS"], os.environ.get("FROM_CONFIG")


@pytest.fixture(scope="module")
def devices(ray_nodes) -> Iterator[list[Place]]:
    """The cluster's devices in their order."""
    import ray

    with ray_nodes(2, 3) as address:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        # All nodes have one address, so their ids decide.
        nodes = sorted((n["NodeID"], int(n["Resources"]["GPU"])) for n in ray.nodes())
        yield [(node, gpu) for node, gpus in nodes for gpu in range(gpus)]
        ray.shutdown()


@pytest.fixture(scope="module")
def second(devices) -> int:
    """The first device of the second node."""
    return devices.index((devices[-1][0], 0))


def config(name: str, devices: list[int] | None, per_worker: int = 1, **more) -> WorkerConfig:
    return WorkerConfig(name=name, device_mapping=devices, num_gpus_per_worker=per_worker, **more)


def look(roles: dict[str, WorkerConfig]) -> dict[str, list]:
    """What the workers of each role see."""
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement

    placement = Placement(roles, {})
    clusters = {
        name: Cluster(name, role, Probe, placement=placement, threads=3, log_dir="", seed=0, system_envs={})
        for name, role in roles.items()
    }
    seen = {name: cluster.call_all("look") for name, cluster in clusters.items()}
    for cluster in clusters.values():
        cluster.stop()
    placement.release()
    return seen


def free_gpus() -> float:
    import ray

    return ray.available_resources().get("GPU", 0.0)


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_devices_are_counted_over_the_nodes(devices, second) -> None:
    import ray

    roles = {
        "train": config("train", [4, 1, 0, 2]),
        "infer": config("infer", [0, 1, second, second + 1], per_worker=2, system_envs={"FROM_CONFIG": 1}),
        "teacher": config("teacher", None, world_size=1),
    }
    here = ray.get_runtime_context().get_node_id()
    # The same device is the same place for everybody, whether or not others of its node are mapped.
    assert look(roles) == {
        "train": [([devices[d]], "3", None) for d in (4, 1, 0, 2)],
        "infer": [(devices[:2], "3", "1"), (devices[second : second + 2], "3", "1")],
        "teacher": [([(here, -1)], "3", None)],
    }
    assert look({"train": config("train", [4])}) == {"train": [([devices[4]], "3", None)]}


def test_one_worker_cannot_span_nodes(second) -> None:
    from roll_opd.distributed.placement import Placement

    spans = config("actor_infer", [second - 1, second], per_worker=2)
    with pytest.raises(
        ConfigError, match=rf"student_infer\.device_mapping: devices {second - 1}-{second} of one worker"
    ):
        Placement({"actor_infer": spans}, {"actor_infer": "student_infer"})


def test_more_devices_than_the_cluster_has(devices) -> None:
    from roll_opd.distributed.placement import Placement

    with pytest.raises(ConfigError, match=r"student_train\.device_mapping: .*device 5.*5 GPU.* on 127\.0\.0\.1"):
        Placement({"actor_train": config("actor_train", [4, 5])}, {"actor_train": "student_train"})


def test_gpus_that_something_else_holds(devices, second) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from roll_opd.distributed.placement import Placement

    @ray.remote(num_cpus=0, num_gpus=1)
    class Hog:
        def here(self) -> None: ...

    hog = Hog.options(scheduling_strategy=NodeAffinitySchedulingStrategy(devices[0][0], soft=False)).remote()
    ray.get(hog.here.remote())
    with pytest.raises(LaunchError, match="not all free within 0 s"):
        Placement({"train": config("train", [0])}, {}, timeout=0.2)
    # The other node is not concerned, and is taken as a whole until it is released.
    placement = Placement({"train": config("train", [4])}, {}, timeout=10)
    wait_until(lambda: free_gpus() == second - 1)
    placement.release()
    ray.kill(hog)
    wait_until(lambda: free_gpus() == 5)
    Placement({"train": config("train", [0])}, {}, timeout=10).release()


def test_ranks_find_each_other_across_nodes(devices, tmp_path) -> None:
    from roll_opd.distributed.cluster import Cluster
    from roll_opd.distributed.placement import Placement
    from roll_opd.distributed.worker import Worker

    class Rank(Worker):
        def __init__(self, spec) -> None:
            import torch

            # What `ray start` was given a part of its GPUs leaves behind.
            os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,7"
            super().__init__(spec)
            self.device = torch.device("cpu")

        def total(self) -> tuple[float, str, str]:
            import torch
            import torch.distributed as dist

            number = torch.tensor(10.0**self.spec.rank)
            dist.all_reduce(number)
            return number.item(), os.environ["GLOO_SOCKET_IFNAME"], os.environ["CUDA_VISIBLE_DEVICES"]

    role = config("train", [1, 4])
    placement = Placement({"train": role}, {})
    cluster = Cluster(
        "train", role, Rank, placement=placement, threads=1, log_dir=str(tmp_path), seed=0, system_envs={}
    )
    try:
        cluster.connect_ranks()
        last = "457"[devices[4][1]]
        assert cluster.call_all("total") == [(11.0, "lo", "5"), (11.0, "lo", last)]
    finally:
        cluster.stop()
        placement.release()
