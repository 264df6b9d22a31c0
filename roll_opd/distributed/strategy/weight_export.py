"""From a stream of whole tensors to what travels to another engine, or to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roll_opd.distributed.strategy.base import WeightBucket
from roll_opd.distributed.strategy.packed_model import as_bytes


def weight_buckets(
    tensors: Iterable[tuple[str, Tensor]],
    aliases: Mapping[str, Sequence[str]],
    dtype: str | None,
    bucket_bytes: int,
) -> Iterator[WeightBucket]:
    """Group tensors, in their order, into buckets of about ``bucket_bytes``.

    Args:
        tensors: names and values.
        aliases: further names of tied tensors; they are sent under each.
        dtype: rounded to this, as torch names it; ``None``: as they are.
        bucket_bytes: a bucket is closed once it holds as much.
    """
    bucket: list[tuple[str, str, tuple[int, ...], np.ndarray[Any, Any]]] = []
    size = 0
    for name, tensor in tensors:
        sent = tensor.to(getattr(torch, dtype)) if dtype else tensor
        raw = as_bytes(sent)
        for alias in [name, *aliases.get(name, [])]:
            bucket.append((alias, str(sent.dtype).removeprefix("torch."), tuple(sent.shape), raw))
        size += raw.nbytes
        if size >= bucket_bytes:
            yield WeightBucket.of(bucket)
            bucket, size = [], 0
    if bucket:
        yield WeightBucket.of(bucket)
