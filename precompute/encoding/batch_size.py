"""How many items an encoder takes at a time: as told, or as many as the GPU's memory holds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 256
FULL = 0.85  # of the device's memory


class BatchSize:
    """The size of an encoder's batches.

    Attributes:
        now: the size at present.
        may_shrink: whether it steps back where memory runs out.
    """

    def __init__(self, now: int, *, may_shrink: bool = False) -> None:
        self.now = now
        self.may_shrink = may_shrink


def find_batch_size(
    given: int | str, usual: int, device: torch.device, attempt: Callable[[int], object]
) -> BatchSize:
    """Return the size that was asked for, or the largest power of two that memory takes.

    Args:
        given: a number, or `auto`.
        usual: what `auto` means where memory is not a GPU's.
        device: where the encoder runs.
        attempt: encodes a batch of so many.
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
    """Return what a batch gives, computed in parts of the present size.

    Args:
        compute: takes parts of the inputs, returns tensors [B, ...].
        inputs: of the batch, [B, ...] each.
        size: halved where memory runs out, if it may shrink.
    """
    while True:
        try:
            splits = zip(*(one.split(size.now) for one in inputs), strict=True)
            parts = [compute(*part) for part in splits]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        except torch.OutOfMemoryError:
            if not size.may_shrink or size.now == 1:
                raise
        # Behind the handler: the error's traceback holds the tensors of the attempt.
        size.now //= 2
        torch.cuda.empty_cache()
