"""Choosing the device that a stage computes on, and making the most of it."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from typing import Any

import torch

from common.errors import ConfigError

# Of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def pick_device(name: str | None) -> torch.device:
    """Return the device by name, or the best there is.

    Raises:
        ConfigError: torch knows no such device here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not available here ({reason}).") from error
    return device


def keep_freed_memory(device: torch.device) -> None:
    """Have a process that computes on the CPU keep freed memory for its next allocation.

    A VAE's layers allocate and free tens of megabytes each. By default glibc returns them to the
    system, which then clears their pages anew for the next layer: that took two thirds of the time
    of encoding. Elsewhere than on Linux with glibc nothing is changed.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have new tensors be of a number format, unless told otherwise, meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compile_blocks(*networks: Any) -> None:
    """Compile the blocks of networks, in place, at their first calls.

    One block is compiled for all that are alike. The transformer's and the ControlNet's are of one
    class and so share a limit of variants, which the default, 8, would have them reach.
    """
    torch._dynamo.config.recompile_limit = 64
    for network in networks:
        for block in network.transformer_blocks:
            block.compile()


class AsyncHostCopy:
    """Tensors that are being copied to the host, while the device goes on computing.

    Args:
        tensors: on the device.
        dtype: that the copies shall have.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._copied: torch.cuda.Event | None = None
        converted = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in converted.values()):
            self._tensors = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in converted.items()
            }
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._tensors = {name: tensor.cpu() for name, tensor in converted.items()}

    def wait(self) -> dict[str, torch.Tensor]:
        """Return the copies once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
