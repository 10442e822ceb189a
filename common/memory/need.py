"""What a stage needs of a machine's memory, and what a device must have free for it."""

from dataclasses import dataclass

GB = 1e9
GIB = 2**30
# CUDA's context, its libraries' kernels and their workspaces, which no account of tensors sees.
CUDA_BYTES = 500_000_000
# Of these, the context, which is there when a process asks what is free.
CONTEXT_BYTES = 300_000_000
# Of a card's memory as it is sold: a display, the driver, error correction.
RESERVED_SHARE = 0.04
# Of the tensors: what the allocator loses between them.
LOST_SHARE = 0.05


@dataclass(frozen=True)
class Need:
    """The memory that a stage takes when it takes the most, in bytes.

    Attributes:
        device: of tensors on the device.
        host: of weights and what else is offloaded, in host memory; the process itself, some
            2 GB, not counted.
        chosen: what `auto` became, as it is given on a command line; empty without `auto`.
    """

    device: int
    host: int = 0
    chosen: str = ""

    @property
    def free(self) -> int:
        """Free device memory with which the stage surely runs."""
        return round(self.device * (1 + LOST_SHARE)) + CUDA_BYTES

    def fits(self, free: int) -> bool:
        """Return whether a device with so many bytes free has room."""
        return self.free <= free


def card_bytes(gigabytes: float) -> int:
    """Return how many bytes are free on an idle card that is sold with some GB, which are GiB."""
    return round(gigabytes * GIB * (1 - RESERVED_SHARE))
