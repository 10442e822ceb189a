"""A shard's sidecar as reading needs it: compact, since many are held at once."""

import numpy as np
from numpy.typing import NDArray

from shards.records import place_of
from shards.sidecar import Sidecar


class ShardIndex:
    """Where the records of a shard lie and what their bytes hash to; about 150 bytes a record.

    Args:
        card: the shard's sidecar.

    Attributes:
        spans: offset and size of each record's tensors and of its JSON, in bytes, [records, 4].
        checksums: XXH3-64 of the same, [records, 2].
    """

    def __init__(self, card: Sidecar) -> None:
        self.num_records = card.num_records
        self.spans: NDArray[np.int64] = np.array(card.spans, dtype=np.int64).reshape(-1, 4)
        checksums = [[int(one, 16) for one in pair] for pair in card.checksums]
        self.checksums: NDArray[np.uint64] = np.array(checksums, dtype=np.uint64).reshape(-1, 2)
        self._keys = np.array(card.keys, dtype=np.bytes_)
        self._rows = np.array([place_of(key)[1] for key in card.keys], dtype=np.int64)
        self._prompts = np.array([key for keys in card.prompts for key in keys], dtype=np.bytes_)
        self._prompt_ends = np.cumsum([len(keys) for keys in card.prompts], dtype=np.int64)

    def key(self, index: int) -> str:
        """Return the key of record `index`."""
        return bytes(self._keys[index]).decode()

    def find(self, key: str) -> int | None:
        """Return the index of the record with a key, or None."""
        index = int(np.searchsorted(self._rows, place_of(key)[1]))
        return index if index < self.num_records and self.key(index) == key else None

    def prompts(self, index: int) -> list[str]:
        """Return the keys of the prompts that caption record `index`; none but for latents."""
        if not len(self._prompt_ends):
            return []
        start = int(self._prompt_ends[index - 1]) if index else 0
        return [bytes(key).decode() for key in self._prompts[start : self._prompt_ends[index]]]

    def shards_of_prompts(self) -> list[int]:
        """Return the text shards in which the prompts of these records lie, ascending."""
        return sorted({place_of(bytes(key).decode())[0] for key in self._prompts})
