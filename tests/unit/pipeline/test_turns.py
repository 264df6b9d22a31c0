"""Turns of roles that share devices; a spy in place of each cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from roll_opd.distributed.turns import Turns


class Spy:
    """A cluster that writes down what it is told."""

    def __init__(self, name, devices, log) -> None:
        self.config = SimpleNamespace(device_mapping=devices)
        self.name, self.log = name, log

    def call_all(self, method, *args):
        self.log.append((self.name, method, *args))


def turns_of(**devices):
    log: list[tuple] = []
    return Turns({name: Spy(name, mapping, log) for name, mapping in devices.items()}), log


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
