"""Settings of `fsdp2_train` and `fsdp2_infer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FSDP2Settings:
    """How PyTorch FSDP2 shards a model."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward; false keeps them until its backward: faster, more memory."""
    offload_policy: bool = False
    """Keep parameters, gradients and optimizer state in host memory; a layer is on the device while it computes."""
