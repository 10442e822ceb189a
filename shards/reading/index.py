"""A shard's sidecar as reading needs it: compact, since many are held at once."""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, chain

from shards.format.records import place_of
from shards.format.sidecar import Sidecar


class ShardIndex:
    """Where the records of a shard lie and what their bytes hash to; about 150 bytes a record.

    Args:
        card: the shard's sidecar.
    """

    def __init__(self, card: Sidecar) -> None:
        self.num_records = card.num_records
        self._keys = _Strings(card.keys)
        self._rows = array("q", (int(key.split("-", 2)[1]) for key in card.keys))
        self._spans = array("q", chain.from_iterable(card.spans))
        self._checksums = array("Q", bytes.fromhex("".join(card.checksums)))
        if sys.byteorder == "little":
            self._checksums.byteswap()
        self._prompts = _Strings(list(chain.from_iterable(card.prompts)))
        self._prompt_ends = array("q", accumulate(map(len, card.prompts), initial=0))

    def key(self, index: int) -> str:
        """Return the key of record `index`."""
        return self._keys[index]

    def tensors(self, index: int) -> tuple[int, int, int]:
        """Return offset and size of a record's tensors in the tar, in bytes, and their XXH3-64."""
        return self._member(index, 0)

    def about(self, index: int) -> tuple[int, int, int]:
        """Return the same of a record's JSON."""
        return self._member(index, 1)

    def _member(self, index: int, which: int) -> tuple[int, int, int]:
        at = 2 * index + which
        return self._spans[2 * at], self._spans[2 * at + 1], self._checksums[at]

    def find(self, key: str) -> int | None:
        """Return the index of the record with a key, or None."""
        index = bisect_left(self._rows, place_of(key)[1])
        return index if index < self.num_records and self._keys[index] == key else None

    def prompts(self, index: int) -> list[str]:
        """Return the keys of the prompts that caption record `index`; none but for latents."""
        if len(self._prompt_ends) == 1:
            return []
        return [self._prompts[at] for at in range(*self._prompt_ends[index : index + 2])]

    def shards_of_prompts(self) -> set[int]:
        """Return the text shards in which the prompts of these records lie."""
        return {place_of(self._prompts[at])[0] for at in range(self._prompt_ends[-1])}


class _Strings:
    """ASCII strings of about equal length, side by side in one piece of memory."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.width = max(map(len, strings), default=0)
        self.bytes = "".join([one.ljust(self.width) for one in strings]).encode("ascii")

    def __getitem__(self, index: int) -> str:
        return self.bytes[index * self.width : (index + 1) * self.width].decode().rstrip()
