"""Stand-ins for parts of a run that need real numbers or a GPU, equal to them in memory.

Fake tensors have shapes but no numbers, and they are on the CPU.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sd3 import quantized
from sd3.quantized import replace_linear
from train.memory import activation_offload
from train.memory.streamed_base import (
    NUM_PLACES,
    place_bytes,
    streamed_numbers,
    tensors_of,
    views,
)
from train.models import cast


def build_network(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a new network of a class of diffusers, in some precision."""
    network = kind.from_config(dict(config))
    cast(network, dtype)
    return network


def network_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's weights and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def quantize(transformer: Any, kind: str) -> None:
    """Quantise a transformer as `sd3.quantized.quantize` does, without bitsandbytes.

    Args:
        transformer: an SD3 transformer, frozen.
        kind: `int8`, `fp8` or `nf4`.
    """
    if kind == "nf4":
        replace_linear(transformer, Nf4Linear)
    else:
        quantized.quantize(transformer, kind)


def stream_blocks(network: Any, count: int) -> int:
    """Put blocks of a network into two places, as `StreamedBlocks` does.

    Tensors without numbers cannot be moved, so new ones replace them.

    Returns:
        Bytes of host memory.
    """
    blocks = [
        network.transformer_blocks[k]
        for k in streamed_numbers(len(network.transformer_blocks), count)
    ]
    size = max(place_bytes(tensors_of(block)) for block in blocks)
    places = [torch.empty(size, dtype=torch.uint8) for _ in range(NUM_PLACES)]
    host = 0
    for index, block in enumerate(blocks):
        tensors = tensors_of(block)
        host += sum(tensor.nbytes for tensor in tensors)
        parts = dict(zip(map(id, tensors), views(places[index % NUM_PLACES], tensors), strict=True))
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parts[id(parameter)], requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, parts[id(buffer)])
    return host


class Nf4Linear(nn.Module):
    """As large as bitsandbytes' 4 bit layer, whose scales are themselves quantised to 8 bit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        count = linear.weight.numel()
        self.register_buffer("values", torch.empty(count // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(count // 64, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-count // (64 * 256))))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] from [..., in]."""
        return _Nf4Product.apply(inputs, self)  # type: ignore[no-untyped-call,no-any-return]


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, inputs.new_empty(layer.shape), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.layer.shape), None


class DroppedActivations(saved_tensors_hooks):
    """Drops what `OffloadedActivations` would move to the host, and creates it anew when needed.

    As many tensors as may be leaving or arriving at a time are held.

    Args:
        is_weight: whether a tensor is a network's, and so stays.
        count_host: called with the bytes of pinned host memory that each tensor would take.
    """

    def __init__(
        self, is_weight: Callable[[Tensor], bool], count_host: Callable[[int], None]
    ) -> None:
        dropped: list[tuple[torch.Size, torch.dtype]] = []
        arriving: dict[int, Tensor] = {}
        self.leaving: deque[Tensor] = deque(maxlen=activation_offload.MOST_LEAVING)

        def pack(tensor: Tensor) -> Tensor | int:
            if is_weight(tensor) or tensor.nbytes < activation_offload.MIN_OFFLOADED_BYTES:
                return tensor
            count_host(1 << (tensor.nbytes - 1).bit_length())  # pinned memory is in powers of two
            self.leaving.append(tensor.detach())
            dropped.append((tensor.shape, tensor.dtype))
            return len(dropped) - 1

        def unpack(packed: Tensor | int) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            for number in range(packed, max(packed - activation_offload.MOST_ARRIVING, -1), -1):
                if number not in arriving:
                    shape, dtype = dropped[number]
                    arriving[number] = torch.empty(shape, dtype=dtype)
            return arriving.pop(packed)

        super().__init__(pack, unpack)

    def __exit__(self, *args: object) -> None:
        """End the forward pass."""
        super().__exit__(*args)
        self.leaving.clear()
