"""Choosing the device that a stage computes on, and making the most of a CPU."""

import ctypes
import platform

import torch

from shards.errors import ConfigError

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
