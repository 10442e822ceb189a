"""The device that a stage computes on: choosing it, its memory, copies from it."""

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
    """Return the named device, or the best that is available.

    Raises:
        ConfigError: torch has no such device on this machine.
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
    """On CPUs, make this process keep freed memory for its next allocation.

    A VAE's layers allocate and free tens of megabytes each. By default glibc returns them to the
    system, which clears the pages again for the next layer: that took two thirds of the encoding
    time. Does nothing without glibc.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within a `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compile_blocks(*networks: Any) -> None:
    """Compile the blocks of networks, in place, at their first calls.

    Equal blocks share one compiled version. The blocks of the transformer and of the ControlNet
    are of one class and share a limit of versions; torch's default of 8 is too low for both.
    """
    torch._dynamo.config.recompile_limit = 64
    for network in networks:
        for block in network.transformer_blocks:
            block.compile()


class AsyncHostCopy:
    """A copy of tensors to the host that runs while the device computes.

    Args:
        tensors: on the device, by name.
        dtype: of the copies.
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
        """Wait until the copies are complete and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
