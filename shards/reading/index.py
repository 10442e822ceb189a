"""A shard's sidecar as reading needs it: compact, since many are at hand at once."""

import mmap
import os
import struct
import sys
import tempfile
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

from common.errors import ShardError
from shards.format.keys import slot_of
from shards.format.sidecar import Sidecar

# Numbers of records and of prompts, and bytes of the longest key of each.
HEADER = struct.Struct("=4q")
# Of the temporary file at a time; a multiple of a page.
MAPPED_BYTES = 1 << 24


class MemberSpan(NamedTuple):
    """Where a tar member's data lies.

    Attributes:
        start: its first byte in the tar.
        size: in bytes.
        checksum: XXH3-64 of the bytes.
    """

    start: int
    size: int
    checksum: int


def pack(sidecar: Sidecar) -> bytes:
    """Return a sidecar's lists as bytes, some 120 a record, for `ShardIndex`."""
    prompts = list(chain.from_iterable(sidecar.prompts))
    checksums = array("Q", bytes.fromhex("".join(sidecar.checksums)))
    if sys.byteorder == "little":
        checksums.byteswap()
    keys, key_bytes = _side_by_side(sidecar.keys)
    prompt_keys, prompt_bytes = _side_by_side(prompts)
    return b"".join(
        [
            HEADER.pack(sidecar.num_records, len(prompts), key_bytes, prompt_bytes),
            array("q", (slot_of(key)[1] for key in sidecar.keys)),
            array("q", chain.from_iterable(sidecar.spans)),
            checksums,
            array("q", accumulate(map(len, sidecar.prompts), initial=0)) if prompts else b"",
            keys,
            prompt_keys,
        ]
    )


def _side_by_side(strings: Sequence[str]) -> tuple[bytes, int]:
    """Return ASCII strings of about equal length in one piece, and the length of each there."""
    width = max(map(len, strings), default=0)
    return "".join([string.ljust(width) for string in strings]).encode("ascii"), width


class ShardIndex:
    """Where the records of a shard lie and what their checksums are.

    Args:
        data: as `pack` returns it; it is not copied.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        count, num_prompts, self._key_bytes, self._prompt_bytes = HEADER.unpack_from(data)
        self.num_records = count
        self._data = view = memoryview(data)
        at = HEADER.size

        def numbers(kind: Literal["q", "Q"], length: int) -> memoryview:
            nonlocal at
            start, at = at, at + 8 * length
            return view[start:at].cast(kind)

        self._slots = numbers("q", count)
        self._spans = numbers("q", 4 * count)
        self._checksums = numbers("Q", 2 * count)
        self._prompt_ends = numbers("q", count + 1 if num_prompts else 0)
        self._keys_at = at
        self._prompts_at = at + count * self._key_bytes

    def key(self, index: int) -> str:
        """Return the key of record `index`."""
        return self._string(self._keys_at + index * self._key_bytes, self._key_bytes)

    def tensors(self, index: int) -> MemberSpan:
        """Return where the tensors of record `index` lie."""
        return self._member(2 * index)

    def metadata(self, index: int) -> MemberSpan:
        """Return where the metadata of record `index` lies."""
        return self._member(2 * index + 1)

    def find(self, key: str) -> int | None:
        """Return the index of the record with a key, or None."""
        index = bisect_left(self._slots, slot_of(key)[1])
        return index if index < self.num_records and self.key(index) == key else None

    def prompts(self, index: int) -> list[str]:
        """Return the keys of the prompts that caption record `index`; only latents have some."""
        if not self._prompt_ends:
            return []
        return [self._prompt(at) for at in range(*self._prompt_ends[index : index + 2])]

    def shards_of_prompts(self) -> set[int]:
        """Return the text shards in which the prompts of these records lie."""
        count = self._prompt_ends[-1] if self._prompt_ends else 0
        return {slot_of(self._prompt(at))[0] for at in range(count)}

    def _member(self, member: int) -> MemberSpan:
        start, size = self._spans[2 * member : 2 * member + 2]
        return MemberSpan(start, size, self._checksums[member])

    def _prompt(self, at: int) -> str:
        return self._string(self._prompts_at + at * self._prompt_bytes, self._prompt_bytes)

    def _string(self, start: int, size: int) -> str:
        return str(self._data[start : start + size], "ascii").rstrip()


class PackedIndexes:
    """Packed indexes in a temporary file, so that each sidecar is parsed once.

    Of a large cache more are read than memory should hold: in a full shuffle each sample comes from
    another shard. To parse a sidecar of a thousand records takes some milliseconds, to find it here
    some microseconds, and the system may drop what was not used for long. Safe to share between
    threads.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="shard-indexes-", buffering=0)  # noqa: SIM115
        self._views: dict[int, memoryview] = {}
        self._maps_end = self._end = 0
        self._map = memoryview(b"")
        self._lock = threading.Lock()

    def add(self, shard: int, data: bytes) -> None:
        """Keep the packed index of a shard.

        Raises:
            ShardError: there is no room.
        """
        with self._lock:
            if self._end + len(data) > self._maps_end:
                self._map_more(len(data))
            start, self._end = self._end, self._end + len(data)
            place = start - (self._maps_end - len(self._map))
            view = self._map[place : place + len(data)]
        try:  # not through the map: there, a full disk would end the process
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], start + written)
        except OSError as error:
            raise ShardError(
                f"{tempfile.gettempdir()}: has no room for the cache's indexes, some 120 bytes a "
                f"record ({error.strerror}); set TMPDIR to a folder on another disk"
            ) from error
        self._views[shard] = view

    def find(self, shard: int) -> memoryview | None:
        """Return the packed index of a shard, or None if it was not added."""
        return self._views.get(shard)

    def _map_more(self, least: int) -> None:
        size = -(-least // MAPPED_BYTES) * MAPPED_BYTES
        os.ftruncate(self._file.fileno(), self._maps_end + size)
        self._map = memoryview(
            mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=self._maps_end)
        )
        self._end, self._maps_end = self._maps_end, self._maps_end + size
