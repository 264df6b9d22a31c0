"""Taking over a trainer's weights, whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from roll_opd.distributed.strategy.pretrained import own_part
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket
from roll_opd.errors import GenerationError


class WeightUpdate:
    """One update of the parameters of a transformers model, in place.

    Args:
        parameters: by name, tied ones under each of their names.
        end: where buckets arrive.
        mix: share of the new weights in what is then held; below 1 it is a moving average.
    """

    def __init__(self, parameters: Mapping[str, Tensor], end: TransferEnd, mix: float = 1.0) -> None:
        self._parameters, self._end, self._mix = parameters, end, mix
        self._mixed: set[int] = set()

    @torch.no_grad()
    def take(self, bucket: WeightBucket) -> dict[str, int]:
        """Take over this rank's part of the tensors of ``bucket``; return the checksums that its sender gave.

        Raises:
            GenerationError: there is no such parameter, or it has another shape.
        """
        for name, whole in self._end.tensors_of(bucket):
            held = self._parameters.get(name)
            if held is None:
                raise GenerationError(f"weight update: the generating model has no parameter {name!r}")
            if whole.shape != held.shape:
                raise GenerationError(
                    f"weight update: {name!r} is {tuple(whole.shape)} in training, {tuple(held.shape)} in generation; "
                    f"both student roles must name the same model"
                )
            # A tied weight comes under each of its names, but must be mixed once.
            if id(held) in self._mixed:
                continue
            self._mixed.add(id(held))
            own, rows = own_part(held)
            new = whole[rows].to(own)
            own.lerp_(new, self._mix) if self._mix < 1.0 else own.copy_(new)
        return dict(bucket.checksums)
