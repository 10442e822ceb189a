"""The size of an encoder's batches: a given number, or as many items as the GPU's memory holds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 256
FULL = 0.85  # of the device's memory


class BatchSize:
    """The size of an encoder's batches.

    Attributes:
        now: the current size.
        may_shrink: whether the size is halved when memory runs out.
    """

    def __init__(self, now: int, *, may_shrink: bool = False) -> None:
        self.now = now
        self.may_shrink = may_shrink


def find_batch_size(
    given: int | str, usual: int, device: torch.device, attempt: Callable[[int], object]
) -> BatchSize:
    """Return the given size, or the largest power of two that fits into the GPU's memory.

    Args:
        given: a number, or `auto`.
        usual: the size that `auto` gives on other devices than a GPU.
        device: where the encoder runs.
        attempt: encodes a batch of the size that it is called with.
    """
    if given != "auto":
        return BatchSize(int(given))
    if device.type != "cuda":
        return BatchSize(usual)
    total = torch.cuda.get_device_properties(device).total_memory
    size = 1
    while size < LARGEST:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            attempt(2 * size)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if torch.cuda.max_memory_reserved(device) > FULL * total:
            break
        size *= 2
    torch.cuda.empty_cache()
    return BatchSize(size, may_shrink=True)


def in_parts(
    compute: Callable[..., dict[str, Tensor]], inputs: Sequence[Tensor], size: BatchSize
) -> dict[str, Tensor]:
    """Return the encoder's output for a batch, computed in parts of the current size.

    Args:
        compute: the encoder; takes parts of the inputs and returns tensors [part, ...].
        inputs: of the batch, [B, ...] each.
        size: of the parts; it is halved when memory runs out, if it may shrink.

    Raises:
        torch.OutOfMemoryError: memory is full, and the size may not shrink.
    """
    while True:
        try:
            splits = zip(*(tensor.split(size.now) for tensor in inputs), strict=True)
            parts = [compute(*part) for part in splits]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        except torch.OutOfMemoryError:
            if not size.may_shrink or size.now == 1:
                raise
        # After the handler, since the error's traceback holds the tensors of the attempt.
        size.now //= 2
        torch.cuda.empty_cache()
