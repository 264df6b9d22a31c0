"""Taking over a trainer's weights, whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from roll_opd.distributed.strategy.base import WeightBucket
from roll_opd.distributed.strategy.packed_model import tensor_of
from roll_opd.distributed.strategy.pretrained import own_part
from roll_opd.errors import GenerationError
from roll_opd.trajectory import RawTensor


class WeightUpdate:
    """One update of the parameters of a transformers model, in place.

    Args:
        parameters: by name, tied ones under each of their names.
        mix: share of the new weights in what is then held; below 1 it is a moving average.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mix: float) -> None:
        self._parameters, self._mix = parameters, mix
        self._mixed: set[int] = set()

    @torch.no_grad()
    def take(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over this rank's part of the tensors of ``bucket``; return the checksums that its sender gave.

        Raises:
            GenerationError: there is no such parameter, or it has another shape.
        """
        for name, dtype, shape, raw in bucket.tensors:
            held = self._parameters.get(name)
            if held is None:
                raise GenerationError(f"weight update: the generating model has no parameter {name!r}")
            if tuple(shape) != tuple(held.shape):
                raise GenerationError(
                    f"weight update: {name!r} is {tuple(shape)} in training, {tuple(held.shape)} in generation; both "
                    f"student roles must name the same model"
                )
            # A tied weight comes under each of its names, but must be mixed once.
            if id(held) in self._mixed:
                continue
            self._mixed.add(id(held))
            own, rows = own_part(held)
            new = tensor_of(RawTensor(dtype, shape, raw), torch.device("cpu"))[rows].to(own)
            own.lerp_(new, self._mix) if self._mix < 1.0 else own.copy_(new)
        return dict(bucket.checksums)
