"""T5 in little device memory: its layers stay in host memory and visit the device one by one.

On a GPU a layer is copied on a stream of its own while the one before it computes. Each layer
computes what it computes where all are on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as torch aligns tensors itself
PIECE_BYTES = 1 << 30  # of pinned memory


def bring_in_groups(t5: Any, device: torch.device, *, rest_stays: bool = False) -> None:
    """Make a T5 encoder, which is in host memory, bring its layers to a device in turn.

    The token embedding and the last norm are on the device while it computes, and of the layers
    two at most: the one that computes, and the next. If it fails, they leave the device as well.

    Args:
        t5: a `T5EncoderModel`.
        device: where it computes.
        rest_stays: whether the embedding and the norm stay on the device for good; else they come
            and go with each batch, while the host waits.
    """
    from diffusers.hooks import HookRegistry, apply_group_offloading

    on_gpu = device.type == "cuda"
    if on_gpu:
        _pin(sorted(t5.encoder.block.parameters(), key=lambda weight: weight.nbytes))
    apply_group_offloading(
        t5.encoder,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
    )
    rest, *layers = (
        HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading").group
        for module in (t5.encoder, *t5.encoder.block)
    )
    if rest_stays:
        for module in rest.modules:
            module.to(device)
        rest.modules = []  # nothing is left to come and go

    def leave_after_error(_: Any, __: Any, output: Any) -> None:
        # diffusers offloads a layer when it has computed: with these, the next try needs more.
        if output is None:
            for group in (rest, *layers):
                group.offload_()

    t5.encoder.register_forward_hook(leave_after_error, always_call=True)
    if on_gpu:
        # The first pass notes the order of the layers; a memory that runs out must not disturb it.
        with torch.no_grad():
            t5(torch.zeros(1, 1, dtype=torch.long, device=device))


class Piece(NamedTuple):
    """A block of pinned memory.

    Attributes:
        num_bytes: its size, a power of two.
        starts: where each of its weights begins, in bytes.
    """

    num_bytes: int
    starts: list[int]


def share_out(sizes: Sequence[int]) -> list[Piece]:
    """Share weights out to pieces of pinned memory, in their order.

    Pinned memory is handed out in powers of two: weight by weight or layer by layer, T5-XXL would
    take up to half as much again.

    Args:
        sizes: of the weights, in bytes.
    """
    pieces: list[Piece] = []
    starts: list[int] = []
    end = 0
    for size in sizes:
        if starts and end + size > PIECE_BYTES:
            pieces.append(Piece(_power_of_two(end), starts))
            starts, end = [], 0
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return [*pieces, Piece(_power_of_two(end), starts)] if starts else pieces


def host_peak(sizes: Sequence[int]) -> int:
    """Return the most host memory that weights take while they move into pinned memory, in bytes.

    A piece's weights leave their old place once the piece is full.

    Args:
        sizes: of the weights, in bytes.
    """
    sizes = sorted(sizes)
    standing = most = sum(sizes)
    moved = 0
    for piece in share_out(sizes):
        standing += piece.num_bytes
        most = max(most, standing)
        standing -= sum(sizes[moved : moved + len(piece.starts)])
        moved += len(piece.starts)
    return most


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _pin(weights: Sequence[Tensor]) -> None:
    """Move weights into pinned memory piece by piece: there are never two copies of all."""
    left = iter(weights)
    for piece in share_out([weight.nbytes for weight in weights]):
        block = torch.empty(piece.num_bytes, dtype=torch.uint8, pin_memory=True)
        for start, weight in zip(piece.starts, left, strict=False):
            weight.data = _view(block, start, weight).copy_(weight)


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a part of a block of bytes as a tensor like another."""
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)
