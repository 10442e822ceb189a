"""T5 in little device memory: its layers stay in host memory and visit the device one by one.

On a GPU a layer is copied on a stream of its own while the one before it computes. Each layer
computes what it computes where all are on the device.
"""

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as torch aligns tensors itself


def bring_in_groups(t5: Any, device: torch.device) -> None:
    """Make a T5 encoder, which is in host memory, bring its layers to a device in turn.

    The token embedding and the last norm are on the device while it computes, and of the layers
    two at most: the one that computes, and the next.

    Args:
        t5: a `T5EncoderModel`.
        device: where it computes.
    """
    from diffusers.hooks import apply_group_offloading

    on_gpu = device.type == "cuda"
    if on_gpu:
        for layer in t5.encoder.block:
            _pin(layer)
    apply_group_offloading(
        t5.encoder,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
    )
    if on_gpu:
        # The first pass notes the order of the layers; a memory that runs out must not disturb it.
        with torch.no_grad():
            t5(torch.zeros(1, 1, dtype=torch.long, device=device))


def _pin(layer: torch.nn.Module) -> None:
    """Move a layer's weights into one block of pinned memory.

    Pinned memory is handed out in powers of two: weight by weight, T5-XXL would take half as much
    again. Layer by layer, so that there are never two copies of all.
    """
    weights = list(layer.parameters())
    starts, end = [], 0
    for weight in weights:
        starts.append(end)
        end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for weight, start in zip(weights, starts, strict=True):
        weight.data = _view(block, start, weight).copy_(weight)


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a part of a block of bytes as a tensor like another."""
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)
