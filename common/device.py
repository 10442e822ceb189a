"""The device that a stage computes on: choosing it, its memory, copies from it."""

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator
from typing import Any

import torch

from common.errors import ConfigError
from common.memory.need import CONTEXT_BYTES

# Of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the best that is available, and make it the thread's own.

    A GPU has its number. Each thread that works for it calls `use_device` first.

    Raises:
        ConfigError: torch has no such device on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.empty(1, device=name).device
        use_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not available here ({reason}).") from error
    return device


def free_gpu_bytes(name: str | None) -> int | None:
    """Return how much memory of a GPU is free for this process, CUDA's context included.

    None where there is no GPU, or another device is meant. `Need.free` counts the context, too.

    Args:
        name: as `pick_device` takes it.

    Raises:
        ConfigError: torch has no such GPU on this machine.
    """
    if not torch.cuda.is_available() or not (name or "cuda").startswith("cuda"):
        return None
    return int(torch.cuda.mem_get_info(pick_device(name))[0]) + CONTEXT_BYTES


def peak_device_bytes(device: torch.device) -> int | None:
    """Return the most memory of a GPU that this process's tensors took so far; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's current one; does nothing for other devices.

    A new thread's is the first GPU. Where a tensor is named, torch goes to its GPU by itself; but
    events, streams and pinned memory belong to the current one.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def keep_freed_memory(device: torch.device) -> None:
    """On CPUs, make this process keep freed memory for its next allocation.

    A VAE's layers allocate and free tens of megabytes each. By default glibc returns them to the
    system, which clears the pages again for the next layer: that took two thirds of the encoding
    time, and takes a thirtieth of a training step's. All threads share one arena, since others are
    given back whatever these settings say. Does nothing without glibc.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)


def free_memory() -> None:
    """Return the memory of what is no longer used to the device, and pinned memory to the host."""
    gc.collect()  # hooks that offload models form cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # not in the oldest torch that works
            torch.accelerator.empty_host_cache()


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
        tensors: by name, all on one device, whichever is the thread's own.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._copied: torch.cuda.Event | None = None
        (device,) = {tensor.device for tensor in tensors.values()}
        if device.type != "cuda":
            self._tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            return
        with torch.cuda.device(device):
            self._tensors = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> dict[str, torch.Tensor]:
        """Wait until the copies are complete and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
