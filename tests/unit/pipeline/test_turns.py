"""Turns of roles that share devices; a spy in place of each cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from roll_opd.distributed.turns import Turns
from roll_opd.errors import EngineDiedError, WorkerDiedError, WorkerError


class Spy:
    """A cluster of two workers that writes down what it is told; each worker may answer with an error."""

    def __init__(self, name, devices, log) -> None:
        self.config = SimpleNamespace(device_mapping=devices)
        self.name, self.log = name, log
        self.answers: list[BaseException | None] = [None, None]

    def start_all(self, method, *args):
        self.log.append((self.name, method, *args))
        return self.answers

    def wait(self, answer, method):
        if answer is not None:
            raise answer


def turns_of(spare=(), **devices):
    log: list[tuple] = []
    return Turns({name: Spy(name, mapping, log) for name, mapping in devices.items()}, spare), log


def test_roles_of_their_own_devices_are_never_touched() -> None:
    turns, log = turns_of(train=[0, 1], infer=[2, 3], teacher=[4], cpu=None)
    for names in (["train"], ["infer", "teacher", "cpu"], ["train"]):
        turns.take(*names)
    turns.take("train", "infer", weights_only=True)
    turns.left("teacher")
    assert log == [] and turns.sharing == []


def test_a_step_of_three_roles_on_one_device() -> None:
    turns, log = turns_of(train=[0], infer=[0], teacher=[0])
    for name in turns.sharing:
        turns.left(name)
    assert log == [(name, "offload", False) for name in ("train", "infer", "teacher")]
    log.clear()
    turns.take("train", "infer", weights_only=True)
    assert sorted(log) == [("infer", "onload", True), ("train", "onload", True)]
    log.clear()
    turns.take("infer")
    assert log == [("train", "offload", False), ("infer", "onload", False)]
    log.clear()
    turns.take("teacher")
    assert log == [("infer", "offload", False), ("teacher", "onload", False)]
    log.clear()
    turns.take("train")
    turns.take("train")
    assert log == [("teacher", "offload", False), ("train", "onload", False)]
    log.clear()
    # The optimizer leaves before the generator's weights come.
    turns.take("infer", "train", weights_only=True)
    assert log == [("train", "offload", True), ("infer", "onload", True)]


def test_what_shrinks_does_so_before_anything_grows() -> None:
    turns, log = turns_of(train=[0, 1], infer=[0], teacher=[1])
    turns.take("infer", "teacher")
    log.clear()
    turns.take("train", "infer", weights_only=True)
    assert log == [("infer", "offload", True), ("teacher", "offload", False), ("train", "onload", True)]


def test_a_guest_comes_beside_whoever_is_there_and_leaves() -> None:
    turns, log = turns_of(train=[0], infer=[0], far=[1])
    turns.take("infer")
    log.clear()
    with turns.guest("train"):
        assert log == [("train", "onload", True)]
    assert log[1:] == [("train", "offload", False)]
    log.clear()
    # There already, or never away.
    for name in ("infer", "far"):
        with turns.guest(name):
            pass
    assert log == []


def test_devices_that_overlap_in_part() -> None:
    turns, log = turns_of(train=[0, 1, 2, 3], infer=[0, 1], teacher=[2, 3], far=[4])
    assert turns.sharing == ["train", "infer", "teacher"]
    assert turns.share("train", "teacher") and not turns.share("infer", "teacher")
    turns.take("infer", "teacher")
    assert log == [("train", "offload", False)]
    turns.take("train")
    assert sorted(log[1:3]) == [("infer", "offload", False), ("teacher", "offload", False)]


@pytest.mark.parametrize(
    ("devices", "names", "waves"),
    [
        # Beside the generator: who shares nothing with it.
        ({"infer": [0], "a": [1], "b": [2]}, ["a", "b"], [["a", "b"]]),
        ({"infer": [0], "a": [0], "b": [1]}, ["a", "b"], [["b"], ["a"]]),
        ({"infer": [0], "a": [0], "b": [0]}, ["a", "b"], [[], ["a"], ["b"]]),
        # Two teachers that share with each other alone: one beside the generator, the other afterwards.
        ({"infer": [0], "a": [1], "b": [1]}, ["a", "b"], [["a"], ["b"]]),
        ({"infer": [0, 1], "a": [0], "b": [1], "c": [0, 1]}, ["a", "b", "c"], [[], ["a", "b"], ["c"]]),
        ({"infer": None, "a": None}, ["a"], [["a"]]),
        ({"infer": [0]}, [], [[]]),
    ],
)
def test_waves(devices, names, waves) -> None:
    turns, _ = turns_of(**devices)
    assert turns.waves(["infer"], names) == waves


def test_roles_that_share_are_never_there_together() -> None:
    turns, _ = turns_of(a=[0], b=[0])
    with pytest.raises(AssertionError, match="share devices"):
        turns.take("a", "b")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_role_that_cannot_be_moved_stops_the_run() -> None:
    turns, _ = turns_of(train=[0], infer=[0])
    failure = RayTaskError("offload", "Traceback ...", RuntimeError("host memory is full"))
    turns.clusters["train"].answers = [None, failure]
    with pytest.raises(WorkerError, match=r"train could not leave its devices: RuntimeError\('host memory is full'\)"):
        turns.take("infer")


def test_a_dead_worker_stops_the_run_unless_another_can_do_its_work() -> None:
    for spare, deaths, fatal in (((), 1, True), (("teacher",), 1, False), (("teacher",), 2, True)):
        turns, log = turns_of(spare, train=[0], teacher=[0])
        turns.take("train")
        turns.clusters["teacher"].answers = [WorkerDiedError("gone")] * deaths + [None] * (2 - deaths)
        if fatal:
            with pytest.raises(WorkerDiedError, match="gone"):
                turns.take("teacher")
        else:
            turns.take("teacher")
            turns.take("train")
            assert log[-2:] == [("teacher", "offload", False), ("train", "onload", False)]
    # What is not known to be dead may still be on the device.
    turns, _ = turns_of(["teacher"], train=[0], teacher=[0])
    turns.clusters["teacher"].answers = [WorkerError("no answer"), None]
    with pytest.raises(WorkerError, match="no answer"):
        turns.take("train")


def test_an_engine_that_died_is_left_to_whoever_asks_it_next() -> None:
    turns, log = turns_of(train=[0], infer=[0])
    turns.clusters["infer"].answers = [EngineDiedError("killed"), None]
    turns.take("train")
    turns.take("infer")
    assert log == [("infer", "offload", False), ("train", "offload", False), ("infer", "onload", False)]
