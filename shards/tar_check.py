"""Comparing a tar's own headers and padding with its sidecar, which all reading goes by.

Headers are parsed one by one with `tarfile.TarInfo`. A `TarFile` would not do: it follows pax and
GNU headers, which no shard has and which can claim any amount of memory; it takes a damaged header
for the end of the tar; and it does not look at padding.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shards.format.members import SUFFIXES
from shards.format.sidecar import Sidecar, tar_path

CHUNK_BYTES = 1 << 20
Member = tuple[str, int, int]  # name, offset of the data, size


def faults(folder: Path, sidecar: Sidecar) -> Iterator[str]:
    """Yield the first difference between a tar, in a product's folder, and its sidecar."""
    path = tar_path(folder, sidecar.shard)
    end = 0
    with path.open("rb") as file:
        for name, start, size in _members(sidecar):
            fault = _member_fault(file, end, (name, start, size))
            if fault:
                yield f"{path}: {fault}"
                return
            end = start + size
        file.seek(end)
        rest = sidecar.tar_bytes - end
        zeros = all(not any(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))
    if sidecar.tar_bytes % tarfile.RECORDSIZE or rest < 2 * tarfile.BLOCKSIZE or not zeros:
        yield f"{path}: does not end as a tar does, or holds more than the sidecar lists"


def _members(sidecar: Sidecar) -> Iterator[Member]:
    for key, (start, size, metadata_start, metadata_size) in zip(
        sidecar.keys, sidecar.spans, strict=True
    ):
        tensors, metadata = (key + suffix for suffix in SUFFIXES)
        yield tensors, start, size
        yield metadata, metadata_start, metadata_size


def _member_fault(file: IO[bytes], end: int, member: Member) -> str:
    """Return how the tar, behind offset `end`, differs from a listed member; "" if it does not."""
    name, start, size = member
    gap = start - tarfile.BLOCKSIZE - end
    if not 0 <= gap < tarfile.BLOCKSIZE:
        return f"{name} is said to begin at {start}, {gap} bytes behind the last"
    file.seek(end)
    padding, header = file.read(gap), file.read(tarfile.BLOCKSIZE)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        return f"no tar header for {name} at {start - len(header)} ({error})"
    if (found.name, found.size) != (name, size) or not found.isreg() or any(padding):
        return f"the sidecar lists {name} of {size} bytes, the tar has {found.name}"
    return ""
