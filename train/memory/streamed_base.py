"""Blocks of the frozen base in host memory, each brought to the device ahead of its use.

Two blocks of device memory serve all of them in turn: while one is computed with, the next one
comes into the other. Nothing is copied back, since a frozen block never changes. A block always
comes to the same place. So what autograd keeps of its weights for the backward pass, quantised or
not, is right again as soon as the block is back.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.optim.host_memory import CopyStream, HostMemory

NUM_PLACES = 2
ALIGNMENT_BYTES = 512  # CUDA's allocator has the same, and kernels are chosen by it


def streamed_numbers(total: int, count: int) -> list[int]:
    """Return which blocks of a network are streamed: `count` of `total`, evenly spread, or all.

    Between two of them the others leave time for the copies.
    """
    count = min(count, total)
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def tensors_of(block: nn.Module) -> list[Tensor]:
    """Return all tensors that a block computes with, scales of 4 bit weights included."""
    tensors: list[Tensor] = [*block.parameters(), *block.buffers()]
    for parameter in block.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes'
        while state is not None:
            tensors.append(state.absmax)
            state = state.state2 if state.nested else None
    return tensors


def place_bytes(tensors: list[Tensor]) -> int:
    """Return the size of a place for a block's tensors."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def views(place: Tensor, tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield the parts of a place, uint8, for each of a block's tensors."""
    start = 0
    for tensor in tensors:
        yield place[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned(tensor.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class StreamedBlocks:
    """Moves a frozen network to a device, but for some blocks, and brings each ahead of its use.

    It lives as long as the network, whose hooks hold it. The blocks must be called one after
    another, as must their backward passes. The network must not be moved again.

    Args:
        network: frozen; with `transformer_blocks`.
        count: how many blocks; all if it has fewer.
        device: where the network computes.
    """

    def __init__(self, network: Any, count: int, device: torch.device) -> None:
        blocks = network.transformer_blocks
        self._numbers = streamed_numbers(len(blocks), count)
        staying = [child for child in network.children() if child is not blocks]
        staying += [block for k, block in enumerate(blocks) if k not in self._numbers]
        for module in staying:
            module.to(device)
        memory = HostMemory()
        on_host: list[list[tuple[Tensor, Tensor]]] = []
        for number in self._numbers:
            # On the device first: that is where 4 bit weights are made.
            tensors = tensors_of(blocks[number].to(device))
            on_host.append([(one, memory.empty_like(one, device).copy_(one)) for one in tensors])
            for tensor, host in on_host[-1]:
                tensor.data = host
        size = max(place_bytes([host for _, host in block]) for block in on_host)
        places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_PLACES)]
        # By streamed block, its parts of its place and what belongs there.
        self._copies: list[list[tuple[Tensor, Tensor]]] = []
        for index, block in enumerate(on_host):
            hosts = [host for _, host in block]
            parts = list(views(places[index % NUM_PLACES], hosts))
            for (tensor, _), part in zip(block, parts, strict=True):
                # A version counter of its own: copies do not look like changes to autograd.
                tensor.data = part
            self._copies.append(list(zip(parts, hosts, strict=True)))
        self._stream = CopyStream(device)
        self._held: list[int | None] = [None] * NUM_PLACES
        self._copied: list[Any] = [None] * NUM_PLACES
        self._at = -1
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))

    def _before_forward(self, number: int, *_: Any) -> None:
        self._enter(number)

    def _after_forward(self, number: int, _block: Any, _inputs: Any, outputs: Any) -> None:
        """Have the backward pass say when it comes to a block: with the gradient of an output."""

        def before_backward(_: Tensor) -> None:
            self._enter(number)

        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(before_backward)

    def _enter(self, number: int) -> None:
        """Bring a block, if it is streamed, and those that are needed next.

        All that the blocks before it compute has been given to the device by now.
        """
        if number == self._at:
            return  # within the backward pass, which computes it again
        backward = number == self._at - 1
        self._at = number
        indices = range(len(self._numbers))
        if backward:
            ahead = [index for index in reversed(indices) if self._numbers[index] <= number]
        else:
            ahead = [index for index in indices if self._numbers[index] >= number]
        for index in ahead[:NUM_PLACES]:
            place = index % NUM_PLACES
            if self._held[place] != index:
                self._copied[place] = self._stream.copy(self._copies[index])
                self._held[place] = index
            if self._numbers[index] == number:
                self._stream.wait(self._copied[place])
