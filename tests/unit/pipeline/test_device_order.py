"""Devices are counted over the nodes in the order of their addresses; no Ray."""

from __future__ import annotations

from roll_opd.distributed.placement import _gpu_nodes


def node(name: str, address: str, gpus: float | None, alive: bool = True) -> dict:
    resources = {"CPU": 8.0} if gpus is None else {"CPU": 8.0, "GPU": gpus}
    return {"NodeID": name, "NodeManagerAddress": address, "Resources": resources, "Alive": alive}


def test_by_address_then_by_id() -> None:
    nodes = [
        node("a", "10.0.0.10", 4.0),
        node("c", "10.0.0.9", 2.0),
        node("b", "10.0.0.9", 3.0),
        node("head", "10.0.0.1", None),
        node("e", "9.255.0.1", 8.0, alive=False),
    ]
    for given in (nodes, nodes[::-1]):
        found = [(n.id, n.address, n.first, n.gpus) for n in _gpu_nodes(given)]
        # As numbers: 9 comes before 10. The head has no GPU, and one node is dead.
        assert found == [("b", "10.0.0.9", 0, 3), ("c", "10.0.0.9", 3, 2), ("a", "10.0.0.10", 5, 4)]


def test_no_gpus() -> None:
    assert _gpu_nodes([node("head", "127.0.0.1", None)]) == []
