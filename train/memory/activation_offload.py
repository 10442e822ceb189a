"""Activations in host memory between the forward pass and the backward pass."""

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from train.optim.host_memory import CopyStream

MIN_OFFLOADED_BYTES = 1 << 20  # smaller tensors stay on the device
MOST_LEAVING, MOST_ARRIVING = 4, 4  # tensors at a time


class OnHost:
    """A tensor in host memory.

    Attributes:
        number: its place in the order in which tensors left.
        host: the tensor.
        used: whether the backward pass has had it.
    """

    def __init__(self, number: int, host: Tensor) -> None:
        self.number, self.host, self.used = number, host, False


class OffloadedActivations(saved_tensors_hooks):
    """While entered, moves what is saved for the backward pass to pinned host memory.

    Tensors leave on a stream of their own while the forward pass goes on, and the backward pass
    has them brought back in reverse, ahead of their use. It ends before this is entered again.

    Args:
        networks: their weights stay on the device; their device is that of the activations.
    """

    def __init__(self, *networks: Any) -> None:
        self._weights = {
            tensor.untyped_storage().data_ptr()
            for network in networks
            for tensor in (*network.parameters(), *network.buffers())
        }
        self._device = next(networks[0].parameters()).device
        self._departures, self._arrivals = CopyStream(self._device), CopyStream(self._device)
        self._on_host: list[weakref.ref[OnHost]] = []
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._arriving: dict[int, tuple[Tensor, Any]] = {}
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        """Begin a forward pass."""
        # Of a backward pass that did not need them all.
        for _, copied in self._arriving.values():
            self._arrivals.wait(copied)
        self._arriving.clear()
        self._on_host.clear()
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        """End the forward pass; the device waits until all has left."""
        super().__exit__(*args)
        while self._leaving:
            self._let_one_leave()

    def _pack(self, tensor: Tensor) -> Tensor | OnHost:
        small = tensor.nbytes < MIN_OFFLOADED_BYTES
        if small or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        # The strides are kept: another layout might select another kernel.
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        packed = OnHost(len(self._on_host), host)
        self._on_host.append(weakref.ref(packed))
        self._leaving.append((tensor.detach(), self._departures.copy([(host, tensor)])))
        if len(self._leaving) > MOST_LEAVING:
            self._let_one_leave()
        return packed

    def _let_one_leave(self) -> None:
        """Give back the device's memory of the tensor that has been leaving the longest."""
        _, copied = self._leaving.popleft()
        self._departures.wait(copied)

    def _unpack(self, packed: Tensor | OnHost) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        for number in range(packed.number, max(packed.number - MOST_ARRIVING, -1), -1):
            other = self._on_host[number]()
            if other is not None and number not in self._arriving and not other.used:
                self._fetch(other)
        packed.used = True
        if packed.number not in self._arriving:
            self._fetch(packed)  # once more
        tensor, copied = self._arriving.pop(packed.number)
        self._arrivals.wait(copied)
        return tensor

    def _fetch(self, packed: OnHost) -> None:
        tensor = torch.empty_like(packed.host, device=self._device)
        self._arriving[packed.number] = tensor, self._arrivals.copy([(tensor, packed.host)])
