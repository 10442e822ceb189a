"""The order of training samples: a pure function of seed, epoch, shard sizes and window.

A run is an endless sequence of places 0, 1, 2, … Place p lies in epoch p // num_records. Each epoch
permutes the shards, takes `window` of them at a time and permutes the records in the window, so
that every record comes exactly once an epoch. Ranks share out places, not shards; hence the
sequence is the same on any number of them, and to resume is to go on from a place.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray


class Order:
    """Maps places to records.

    Args:
        shard_records: how many records each shard has.
        seed: of the permutations, at least 0.
        window: shards mixed at a time; None mixes all.
    """

    def __init__(
        self, shard_records: Sequence[int], *, seed: int, window: int | None = None
    ) -> None:
        self.sizes: NDArray[np.int64] = np.asarray(shard_records, dtype=np.int64)
        self.num_records = int(self.sizes.sum())
        self.seed = seed
        self.window = window or len(self.sizes)
        self._epoch = lru_cache(2)(self._shuffled_shards)
        self._block = lru_cache(2)(self._shuffled_window)

    def __reduce__(self) -> tuple[Callable[..., "Order"], tuple[()]]:
        """What was computed stays behind when an order travels to a spawned worker."""
        again = partial(Order, self.sizes.tolist(), seed=self.seed, window=self.window)
        return again, ()

    def record(self, place: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of the record at a place."""
        epoch, place_in_epoch = divmod(place, self.num_records)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, place_in_epoch, side="right"))
        start = int(ends[block - 1]) if block else 0
        shards, indices = self._block(epoch, block)
        return int(shards[place_in_epoch - start]), int(indices[place_in_epoch - start])

    def _shuffled_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the epoch's order, and where each window ends in it."""
        shards = self._generator(epoch, 0).permutation(len(self.sizes))
        sizes = self.sizes[shards]
        starts = np.arange(0, len(sizes), self.window)
        return shards, np.cumsum(np.add.reduceat(sizes, starts))

    def _shuffled_window(
        self, epoch: int, block: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard and the index of each record of a window, in order."""
        shards, _ = self._epoch(epoch)
        shards = shards[block * self.window : (block + 1) * self.window]
        sizes = self.sizes[shards]
        owners = np.repeat(shards, sizes)
        indices = np.concatenate([np.arange(size) for size in sizes])
        shuffle = self._generator(epoch, block + 1).permutation(len(owners))
        return owners[shuffle], indices[shuffle]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, stream))
