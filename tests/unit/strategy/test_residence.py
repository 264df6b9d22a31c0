"""Memory that leaves and comes back: values, views and sizes."""

from __future__ import annotations

import pytest
import torch

from roll_opd.distributed.strategy.residence import Residence


def test_views_keep_their_values_and_memory_is_freed_meanwhile() -> None:
    buffer = torch.arange(12.0)
    weight, bias = torch.nn.Parameter(buffer[:8].view(2, 4)), torch.nn.Parameter(buffer[8:])
    other, scratch = torch.ones(3, dtype=torch.bfloat16), torch.full((5,), 7.0)
    residence = Residence()
    residence.leave([weight.data, bias.data, other], [scratch])
    assert residence.away
    assert all(t.untyped_storage().nbytes() == 0 for t in (buffer, weight, bias, other, scratch))
    residence.come_back()
    assert not residence.away
    assert weight.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and bias.tolist() == [8, 9, 10, 11]
    assert other.tolist() == [1, 1, 1] and scratch.tolist() == [0] * 5
    buffer[0] = 5  # still one memory
    assert weight[0, 0] == 5
    (weight.sum() + bias.sum()).backward()
    assert weight.grad is not None and weight.grad.eq(1).all()


def test_values_of_each_stay_are_the_latest() -> None:
    """The host's buffers are used again; they must not bring back what they held the last time."""
    first, second = torch.zeros(4), torch.zeros(6)
    residence = Residence()
    for tensors in ([first, second], [second, first], [first]):
        for tensor in tensors:
            tensor += 1
        before = [tensor.tolist() for tensor in tensors]
        residence.leave(tensors)
        residence.come_back()
        assert [tensor.tolist() for tensor in tensors] == before
    assert first.tolist() == [3] * 4 and second.tolist() == [2] * 6


def test_coming_back_twice_is_nothing_and_leaving_twice_a_defect() -> None:
    tensor, residence = torch.ones(2), Residence()
    residence.come_back()
    residence.leave([tensor])
    with pytest.raises(AssertionError, match="left already"):
        residence.leave([tensor])
    residence.come_back()
    residence.come_back()
    assert tensor.tolist() == [1, 1]
