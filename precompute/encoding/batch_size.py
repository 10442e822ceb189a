"""The size of an encoder's batches: a given number, or as many items as the GPU's memory holds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import RunError
from common.memory.exhausted import full_memory_line, is_out_of_memory

LARGEST = 256
FULL = 0.85  # of the device's memory


class BatchSize:
    """The size of an encoder's batches.

    Attributes:
        given: the size at first.
        now: the current size.
        may_shrink: whether the size is halved when memory runs out.
    """

    def __init__(self, now: int, *, may_shrink: bool = True) -> None:
        self.given = self.now = now
        self.may_shrink = may_shrink

    def describe(self, items: str) -> list[str]:
        """Return a line if the size has shrunk."""
        if self.now == self.given:
            return []
        return [f"memory ran out at {self.given} {items} a batch; {self.now} were encoded at once"]


def find_batch_size(
    given: int | str,
    usual: int,
    device: torch.device,
    attempt: Callable[[int], object],
    *,
    most: int = LARGEST,
) -> BatchSize:
    """Return the given size, or the largest power of two that fits into the GPU's memory.

    Args:
        given: a number, or `auto`.
        usual: the size that `auto` gives on other devices than a GPU.
        device: where the encoder runs.
        attempt: encodes a batch of the size that it is called with, whole.
        most: no more are needed.
    """
    if given != "auto":
        return BatchSize(int(given))
    if device.type != "cuda":
        return BatchSize(usual)
    total = torch.cuda.get_device_properties(device).total_memory
    size = 1
    while size < min(LARGEST, most):
        torch.cuda.reset_peak_memory_stats(device)
        try:
            attempt(2 * size)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if torch.cuda.max_memory_reserved(device) > FULL * total:
            break
        size *= 2
    torch.cuda.empty_cache()
    return BatchSize(size)


def in_parts(
    compute: Callable[..., dict[str, Tensor]],
    inputs: Sequence[Tensor],
    size: BatchSize,
    *,
    item: str,
    remedies: Sequence[str],
) -> dict[str, Tensor]:
    """Return the encoder's output for a batch, computed in parts of the current size.

    Args:
        compute: the encoder; takes parts of the inputs and returns tensors [part, ...].
        inputs: of the batch, [B, ...] each.
        size: of the parts; it is halved when memory runs out, if it may shrink.
        item: what is encoded, in words.
        remedies: what helps where a single one does not fit, in words.

    Raises:
        RunError: memory is full with a single item.
        torch.OutOfMemoryError: memory is full, and the size may not shrink.
    """
    while True:
        try:
            splits = zip(*(tensor.split(size.now) for tensor in inputs), strict=True)
            parts = [compute(*part) for part in splits]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        except RuntimeError as error:
            if not is_out_of_memory(error) or not size.may_shrink:
                raise
            if size.now == 1:
                raise RunError(full_memory_line(f"a single {item}", error, remedies)) from error
        # After the handler, since the error's traceback holds the tensors of the attempt.
        size.now //= 2
        torch.cuda.empty_cache()
