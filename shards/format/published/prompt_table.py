"""All prompts of a cache: where each record lies, and the words, which wait in a file."""

import mmap
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.errors import ShardError
from shards.format.keys import slot_of
from shards.format.sidecar import Sidecar, tar_path

TEXT = Path("text")
# More than any shard and slot make.
BEHIND_ALL = (1 << 64) - 1
PLACE = pa.struct(
    [
        ("prompt", pa.string()),
        ("key", pa.string()),
        ("file", pa.string()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class PromptTable:
    """Finds text records by key; takes some 40 bytes a prompt of memory.

    Args:
        shards: sidecar and prompts of each text shard, all of them, in order; iterated once.
        words: an empty file for the prompts themselves, which together may fill the memory.
    """

    def __init__(self, shards: Iterable[tuple[Sidecar, Sequence[str]]], words: IO[bytes]) -> None:
        ids, contents, offsets, sizes = array("Q"), array("Q"), array("q"), array("q")
        ends, firsts = array("q", [0]), array("q")
        for sidecar, prompts in shards:
            firsts.append(len(ids))
            for key, (offset, size, *_), prompt in zip(
                sidecar.keys, sidecar.spans, prompts, strict=True
            ):
                place, content = _parsed(key)
                ids.append(place)
                contents.append(content)
                offsets.append(offset)
                sizes.append(size)
                ends.append(ends[-1] + words.write(prompt.encode()))
        ids.append(BEHIND_ALL)
        contents.append(0)
        words.flush()
        self._ids, self._contents = np.asarray(ids), np.asarray(contents)
        self._offsets, self._sizes = np.asarray(offsets), np.asarray(sizes)
        self._ends, self._firsts = np.asarray(ends), np.asarray(firsts)
        self._words = mmap.mmap(words.fileno(), 0, access=mmap.ACCESS_READ) if ends[-1] else b""

    def places(self, keys: Sequence[str]) -> pa.StructArray:
        """Return prompt, key, file, row, offset and size of text records, as `PLACE` says.

        Raises:
            ShardError: the cache does not have one of them.
        """
        parsed = np.array([_parsed(key) for key in keys], np.uint64).reshape(-1, 2)
        found = np.searchsorted(self._ids, parsed[:, 0])
        is_there = (self._ids[found] == parsed[:, 0]) & (self._contents[found] == parsed[:, 1])
        if not is_there.all():
            key = keys[int(np.argmin(is_there))]
            raise ShardError(f"text: a caption's record {key} is missing; run shards verify")
        shards = np.searchsorted(self._firsts, found, side="right") - 1
        columns = [
            pa.array(self._prompts(found), pa.string()),
            pa.array(keys, pa.string()),
            pa.array([tar_path(TEXT, shard).as_posix() for shard in shards.tolist()], pa.string()),
            pa.array((found - self._firsts[shards]).astype(np.int32)),
            pa.array(self._offsets[found]),
            pa.array(self._sizes[found]),
        ]
        return pa.StructArray.from_arrays(columns, fields=list(PLACE))

    def _prompts(self, found: NDArray[np.int64]) -> list[bytes]:
        starts, ends = self._ends[found].tolist(), self._ends[found + 1].tolist()
        return [self._words[start:end] for start, end in zip(starts, ends, strict=True)]


def _parsed(key: str) -> tuple[int, int]:
    """Return shard and slot of a key as one number that ascends with both, and its content."""
    shard, slot = slot_of(key)
    return shard << 32 | slot, int(key.rpartition("-")[2], 16)
