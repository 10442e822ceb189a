"""Activations in host memory between the forward pass and the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_OFFLOADED_BYTES = 1 << 20  # smaller tensors stay on the device


class OffloadedActivations(saved_tensors_hooks):
    """While entered, moves what is saved for the backward pass to pinned host memory.

    The host does not wait for the copies: the device makes them in order, between its other work.

    Args:
        networks: their weights stay on the device.
    """

    def __init__(self, *networks: Any) -> None:
        weights = {
            tensor.untyped_storage().data_ptr()
            for network in networks
            for tensor in (*network.parameters(), *network.buffers())
        }

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            small = tensor.nbytes < MIN_OFFLOADED_BYTES
            if small or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            # The strides are kept: another layout might select another kernel.
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
            return tensor.device, host.copy_(tensor, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)
