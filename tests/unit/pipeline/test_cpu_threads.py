"""Threads of the processes that are busy together never sum to more than the cores."""

from __future__ import annotations

import itertools

from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.placement import Placement, Slot, cpu_threads

PHASES = {"actor_train": "train", "actor_infer": "rollout", "teacher-a": "rollout", "teacher-b": "rollout"}


def roles(**sizes: int) -> dict[str, WorkerConfig]:
    return {name.replace("_x_", "-"): WorkerConfig(world_size=n) for name, n in sizes.items()}


def test_by_hand() -> None:
    sizes = roles(actor_train=1, actor_infer=1, teacher_x_a=1)
    assert cpu_threads(sizes, PHASES, 2) == {"actor_train": 2, "actor_infer": 1, "teacher-a": 1}
    assert cpu_threads(sizes, PHASES, 8) == {"actor_train": 8, "actor_infer": 4, "teacher-a": 4}
    assert cpu_threads(roles(actor_train=2, actor_infer=3), PHASES, 8) == {"actor_train": 4, "actor_infer": 2}


def test_the_sum_of_each_phase_is_at_most_the_cores() -> None:
    for train, infer, a, b, cores in itertools.product((1, 2, 3), (1, 2), (1, 3), (1, 2), (1, 2, 4, 7, 16)):
        given = roles(actor_train=train, actor_infer=infer, teacher_x_a=a, teacher_x_b=b)
        threads = cpu_threads(given, PHASES, cores)
        assert min(threads.values()) >= 1
        for phase in ("train", "rollout"):
            members = [name for name in given if PHASES[name] == phase]
            processes = sum(given[name].world_size for name in members)
            assert sum(threads[name] * given[name].world_size for name in members) <= max(cores, processes)


def test_processes_on_gpus_take_no_share_of_the_cpu_roles() -> None:
    given = {"actor_infer": WorkerConfig(device_mapping=[0, 1]), "teacher-a": WorkerConfig(world_size=2)}
    assert cpu_threads(given, PHASES, 8)["teacher-a"] == 4


def test_processes_on_gpus_share_the_cores_with_their_role_alone() -> None:
    given = {"actor_infer": WorkerConfig(device_mapping=[0, 1], world_size=2), "teacher-a": WorkerConfig(world_size=2)}
    assert cpu_threads(given, PHASES, 8) == {"actor_infer": 4, "teacher-a": 4}
    many = {"actor_train": WorkerConfig(device_mapping=list(range(16)), world_size=16)}
    assert cpu_threads(many, PHASES, 8) == {"actor_train": 1}


def test_the_users_own_number_wins() -> None:
    given = {"actor_infer": WorkerConfig(cpu_threads=3), "teacher-a": WorkerConfig()}
    assert cpu_threads(given, PHASES, 8)["actor_infer"] == 3


def test_the_users_own_number_is_taken_from_the_others() -> None:
    given = {"actor_infer": WorkerConfig(cpu_threads=3), "teacher-a": WorkerConfig()}
    assert sum(cpu_threads(given, PHASES, 4).values()) <= 4


def test_cpu_roles_need_no_cluster() -> None:
    given = roles(actor_train=3)
    placement = Placement(given, {})
    assert placement.slots(given["actor_train"], 2) == [Slot(None, (), 2)] * 3
    assert placement.slots(WorkerConfig(), 1) == [Slot(None, (), 1)]
    placement.release()
