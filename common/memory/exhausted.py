"""Memory that is full: telling it from other errors, and what is said of it."""

from collections.abc import Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size

# What CUDA and its libraries say when they cannot allocate, beside what accelerate knows.
HOST_PERHAPS = "error: out of memory"  # of pinned memory, of the context, or of the driver
ALLOCATION_FAILURES = (
    HOST_PERHAPS,
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for its handle
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",  # likewise
    "ALLOCATION_FAILED",  # the end of cuDNN's newer names
    "unable to find an engine",  # no convolution of cuDNN's got its workspace
)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of torch says that memory is full, the device's or the host's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # Torch's classes alone: an error of ours may quote one.
    if type(error).__name__ not in ("RuntimeError", "AcceleratorError"):
        return False
    return should_reduce_batch_size(error) or any(
        failure in str(error) for failure in ALLOCATION_FAILURES
    )


def first_line(error: Exception) -> str:
    """Return what an error about memory says, in one line."""
    said = (str(error).splitlines() or ["out of memory"])[0]
    if HOST_PERHAPS in said:
        said += " (perhaps host memory: what is offloaded is pinned there)"
    return said


def full_memory_line(what: str, error: Exception, remedies: Sequence[str]) -> str:
    """Return the line that tells what did not fit, and what helps.

    Args:
        what: did not fit, in words.
        error: that was raised.
        remedies: in words, the best first.
    """
    return f"{what}: memory is full ({first_line(error)}). What helps: {'; '.join(remedies)}."


def device_remedies(device: torch.device) -> list[str]:
    """Return what helps on any device, in words."""
    if device.type == "cpu":
        return ["ending other programs", "a machine with more memory"]
    return ["a device that nothing else uses", "--device cpu"]
