"""Pinned host memory, and copies between it and a device beside the device's other work."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES, ALIGNMENT_NUMBERS = 1 << 28, 64


class HostMemory:
    """Host memory for tensors of a device, pinned if that is a GPU.

    Pinned memory is allocated in powers of two. So it is allocated in large pieces and handed out
    in parts; each piece is of one number format, as torch.save needs it.
    """

    def __init__(self) -> None:
        self._pieces: dict[torch.dtype, tuple[Tensor, int]] = {}

    def empty_like(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return contiguous host memory of a tensor's shape and format, for use by a device."""
        dtype, count = tensor.dtype, tensor.numel()
        piece, start = self._pieces.get(dtype, (torch.empty(0, dtype=dtype), 0))
        if start + count > len(piece):
            size = max(PIECE_BYTES // tensor.element_size(), count)
            piece, start = torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda"), 0
        end = start + -(-count // ALIGNMENT_NUMBERS) * ALIGNMENT_NUMBERS
        self._pieces[dtype] = piece, end
        return piece[start : start + count].view(tensor.shape)


class CopyStream:
    """Copies between pinned host memory and a device, on a stream of their own.

    Neither the host nor the device's other work waits for them, unless told to. On CPUs they are
    done at once.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda" and torch.cuda.is_available():
            self._stream = torch.cuda.Stream(device)

    @torch.no_grad()
    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Copy after all that the device has been given so far.

        So what still reads the targets, or writes the sources, is done by then. The tensors must
        be kept until the copies have been waited for.

        Args:
            pairs: targets and sources.

        Returns:
            What `wait` takes.
        """
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied

    def wait(self, copied: Any) -> None:
        """Let what the device is given from now on wait for some copies; the host goes on."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def synchronize(self, copied: Any) -> None:
        """Let the host wait for some copies."""
        if copied is not None:
            copied.synchronize()
