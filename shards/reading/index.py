"""A shard's sidecar as reading needs it: compact, since many are in memory at once."""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

from shards.format.keys import slot_of
from shards.format.sidecar import Sidecar


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


class ShardIndex:
    """Where the records of a shard lie and what their checksums are; about 150 bytes a record.

    Args:
        sidecar: the shard's.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        self.num_records = sidecar.num_records
        self._keys = _Strings(sidecar.keys)
        self._slots = array("q", (slot_of(key)[1] for key in sidecar.keys))
        self._spans = array("q", chain.from_iterable(sidecar.spans))
        self._checksums = array("Q", bytes.fromhex("".join(sidecar.checksums)))
        if sys.byteorder == "little":
            self._checksums.byteswap()
        self._prompts = _Strings(list(chain.from_iterable(sidecar.prompts)))
        self._prompt_ends = array("q", accumulate(map(len, sidecar.prompts), initial=0))

    def key(self, index: int) -> str:
        """Return the key of record `index`."""
        return self._keys[index]

    def tensors(self, index: int) -> MemberSpan:
        """Return where the tensors of record `index` lie."""
        return self._member(2 * index)

    def metadata(self, index: int) -> MemberSpan:
        """Return where the metadata of record `index` lies."""
        return self._member(2 * index + 1)

    def _member(self, member: int) -> MemberSpan:
        start, size = self._spans[2 * member : 2 * member + 2]
        return MemberSpan(start, size, self._checksums[member])

    def find(self, key: str) -> int | None:
        """Return the index of the record with a key, or None."""
        index = bisect_left(self._slots, slot_of(key)[1])
        return index if index < self.num_records and self._keys[index] == key else None

    def prompts(self, index: int) -> list[str]:
        """Return the keys of the prompts that caption record `index`; only latents have some."""
        if len(self._prompt_ends) == 1:
            return []
        return [self._prompts[at] for at in range(*self._prompt_ends[index : index + 2])]

    def shards_of_prompts(self) -> set[int]:
        """Return the text shards in which the prompts of these records lie."""
        return {slot_of(self._prompts[at])[0] for at in range(self._prompt_ends[-1])}


class _Strings:
    """ASCII strings of about equal length, side by side in one piece of memory."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.width = max(map(len, strings), default=0)
        self.bytes = "".join([string.ljust(self.width) for string in strings]).encode("ascii")

    def __getitem__(self, index: int) -> str:
        return self.bytes[index * self.width : (index + 1) * self.width].decode().rstrip()
