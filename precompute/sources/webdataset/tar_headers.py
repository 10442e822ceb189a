"""The members of a tar: where each lies, and whether the tar is whole.

`tarfile.TarFile` takes a damaged header for the end of the tar, and says nothing. Here a tar must
end as tars do.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

BLOCK = tarfile.BLOCKSIZE
NAME, SIZE, CHECKSUM, MAGIC, PREFIX = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(257, 262),
    slice(345, 346),
)
TYPE = 156
# Records before a member's own header that say nothing of its name or size.
TIMES = re.compile(rb"(?:\d+ (?:mtime|atime|ctime)=[^\n]*\n)+")
CHUNK_BYTES = 1 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class DamagedTar(ValueError):
    """A tar is not whole: says at which offset, and why."""


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: as in the tar; bytes that are no UTF-8 are surrogates.
        offset: of its first byte in the tar.
        size: in bytes.
        kind: "file", "folder", or "other": a link, a sparse file, a device.
    """

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "other"] = "file"


def members(path: Path) -> Iterator[Member]:
    """Yield the members of a tar, in their order.

    Raises:
        DamagedTar: it is cut, damaged or compressed.
        OSError: it cannot be read.
    """
    with contextlib.ExitStack() as resources:
        file = resources.enter_context(path.open("rb", buffering=0))
        descriptor = file.fileno()
        num_bytes = os.fstat(descriptor).st_size
        if kind := COMPRESSED.get(os.pread(descriptor, 2, 0)):
            raise DamagedTar(f"is compressed with {kind}; unpack it to a plain .tar")
        tar: tarfile.TarFile | None = None
        offset = 0
        while True:
            blocks = os.pread(descriptor, 3 * BLOCK, offset)
            found = _plain_member(blocks, offset)
            if found is not None:
                end = found.offset + _padded(found.size)
            elif _is_end(descriptor, offset, blocks, num_bytes):
                return
            else:  # of another kind
                tar = tar or resources.enter_context(_open_tar(path))
                found, end = _any_member(tar, offset)
            if found.offset + found.size > num_bytes:
                raise DamagedTar(
                    f"is cut: {found.name!r}, whose header is at byte {offset}, would end at byte "
                    f"{found.offset + found.size}, and the tar ends at {num_bytes}"
                )
            yield found
            offset = end


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plain_member(blocks: bytes, offset: int) -> Member | None:
    """Return the member whose header begins the blocks; None if `tarfile` must look at it.

    As most are: a file with a short name, perhaps after a pax header with times. Ten million
    headers take `tarfile` ten minutes.

    Args:
        blocks: three blocks of the tar, or what is left of it.
        offset: of the first, in the tar.
    """
    header, start = blocks[:BLOCK], BLOCK
    if header[TYPE : TYPE + 1] == b"x" and _has_checksum(header):
        size = _octal(header[SIZE])
        if not 0 < size <= BLOCK or not TIMES.fullmatch(blocks[BLOCK : BLOCK + size]):
            return None
        header, start = blocks[2 * BLOCK :], 3 * BLOCK
    if header[TYPE : TYPE + 1] != b"0" or header[MAGIC] != b"ustar" or header[PREFIX] != b"\0":
        return None
    size = _octal(header[SIZE])
    if size < 0 or not _has_checksum(header):
        return None
    name = header[NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return Member(name, offset + start, size)


def _octal(field: bytes) -> int:
    """Return a number of a header; -1 if it is not written in octal digits."""
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        return -1


def _has_checksum(header: bytes) -> bool:
    if len(header) < BLOCK:
        return False
    without = sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ")
    return without == _octal(header[CHECKSUM])


def _is_end(descriptor: int, offset: int, blocks: bytes, num_bytes: int) -> bool:
    """Tell whether a tar ends here as tars do: with blocks of zeros, and nothing after them.

    Raises:
        DamagedTar: it ends otherwise.
    """
    if not blocks:
        raise DamagedTar(f"is cut: it ends at byte {num_bytes} without a tar's end mark")
    if len(blocks) < BLOCK:
        raise DamagedTar(f"is cut within the header at byte {offset}")
    if any(blocks[:BLOCK]):
        return False
    while chunk := os.pread(descriptor, CHUNK_BYTES, offset):
        if any(chunk):
            raise DamagedTar(
                f"ends at byte {offset}, and there is more after that: are these several tars in "
                "one file?"
            )
        offset += len(chunk)
    return True


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", errors="surrogateescape", encoding="utf-8")
    except tarfile.TarError as error:
        raise DamagedTar(f"is no tar: no header at byte 0 ({error})") from error


def _any_member(tar: tarfile.TarFile, offset: int) -> tuple[Member, int]:
    """Return the member whose headers begin at an offset, of whatever kind, and where it ends.

    Raises:
        DamagedTar: there is no whole header.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(offset)
    tar.offset = offset
    try:
        found = tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTar(f"is damaged: no tar header at byte {offset} ({error})") from error
    if found.isreg() and not found.issparse():
        return Member(found.name, found.offset_data, found.size), tar.offset
    kind: Literal["folder", "other"] = "folder" if found.isdir() else "other"
    return Member(found.name, found.offset_data, 0, kind), tar.offset
