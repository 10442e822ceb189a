"""Activations in host memory between the forward pass and the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Smaller ones are not worth a trip.
SMALLEST_BYTES = 1 << 20


class OffloadedActivations(saved_tensors_hooks):
    """While this is entered, what is saved for the backward pass goes to pinned host memory.

    Nobody waits for the copies: all go through the device's own stream of work, in order.

    Args:
        networks: their weights stay where they are.
    """

    def __init__(self, *networks: Any) -> None:
        weights = {
            tensor.untyped_storage().data_ptr()
            for network in networks
            for tensor in (*network.parameters(), *network.buffers())
        }

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            small = tensor.nbytes < SMALLEST_BYTES
            if small or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            # Strides and all: another layout might have another kernel compute.
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
            return tensor.device, host.copy_(tensor, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)
