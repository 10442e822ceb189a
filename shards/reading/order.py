"""The order of training samples: a pure function of seed, epoch, shards, window and group.

A run is an endless sequence of places 0, 1, 2, …, epoch after epoch. Each epoch permutes the
shards, takes `window` of them at a time and permutes the records in the window, so that every
record comes exactly once an epoch. Ranks share places, not shards: the sequence is the same on any
number of ranks, and a run resumes from a place.

If shards are of several buckets, the samples of an optimiser step must be of one bucket. So the
records of each bucket in a window are permuted and cut into groups of `group`; the last group is
filled up with the bucket's first records; and the groups are permuted. Every record then comes at
least once an epoch.

Records are permuted place by place, never in a table: memory and the time to the first sample do
not depend on the number of records.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, groupby
from threading import Lock
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

# An even number. Measured: with 8 rounds the 120 orders of five records are not uniform
# (chi-squared 1472, 119 expected); with 16 the 720 orders of six are (673, 719 expected).
ROUNDS = 16


class _Epoch(NamedTuple):
    """The shards in an epoch's order; in a window those of one bucket form a run.

    Attributes:
        shards: numbers of the shards.
        ends: record at which each shard ends.
        runs: position in `shards` at which each run begins, and at which the last one ends.
        run_ends: group at which each run ends.
        window_ends: place in the epoch at which each window ends.
    """

    shards: Sequence[int]
    ends: Sequence[int]
    runs: Sequence[int]
    run_ends: Sequence[int]
    window_ends: Sequence[int]


class Order:
    """Maps places to records.

    Args:
        shard_records: number of records of each shard; shards without records are left out.
        seed: of the permutations, at least 0.
        window: shards mixed at a time; None mixes all.
        shard_buckets: each shard's bucket; by default all are of one.
        group: number of successive places, from any multiple of it on, that are of one bucket;
            without effect if there is only one bucket.
        skipped: records at the beginning of each shard that do not count; by default none.
    """

    def __init__(
        self,
        shard_records: Sequence[int],
        *,
        seed: int,
        window: int | None = None,
        shard_buckets: Sequence[int] = (),
        group: int = 1,
        skipped: Sequence[int] = (),
    ) -> None:
        self.sizes = list(shard_records)
        self.num_records = sum(self.sizes)
        self.seed = seed
        self.shards = [shard for shard, size in enumerate(self.sizes) if size]
        self.window = window or len(self.shards) or 1
        self.skipped = list(skipped) or [0] * len(self.sizes)
        self.buckets = list(shard_buckets) or [0] * len(self.sizes)
        assert len(self.buckets) == len(self.sizes), "a bucket for each shard"
        self.several_buckets = len({self.buckets[shard] for shard in self.shards}) > 1
        self.group = group if self.several_buckets else 1
        self._epoch = lru_cache(2)(self._arrange)
        # Windows of several buckets are filled up, in each epoch differently. Otherwise all epochs
        # have the same length, and `_starts` is not needed.
        self._equal_epochs = not self.several_buckets or self.window >= len(self.shards)
        self._starts = [0]
        self._counting = Lock()

    def record(self, place: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of the record at a place."""
        number, place_in_epoch = self.epoch(place)
        epoch = self._epoch(number)
        window = bisect_right(epoch.window_ends, place_in_epoch)
        first = _end(epoch.window_ends, window - 1) // self.group
        last = epoch.window_ends[window] // self.group
        group, place_in_group = divmod(place_in_epoch, self.group)
        key = self._key(number, window + 1)
        record = first + permuted(group - first, last - first, key)
        if self.several_buckets:
            record = self._record_of_group(record, place_in_group, number, window)
        position = bisect_right(epoch.ends, record)
        shard, index = epoch.shards[position], record - _end(epoch.ends, position - 1)
        return shard, self.skipped[shard] + index

    def _record_of_group(self, group: int, place_in_group: int, number: int, window: int) -> int:
        """Return the record at a place of a group.

        Groups and records are counted over epoch `number`, in the order of its shards.
        """
        epoch = self._epoch(number)
        run = bisect_right(epoch.run_ends, group)
        start, end = (_end(epoch.ends, epoch.runs[at] - 1) for at in (run, run + 1))
        place_in_run = (group - _end(epoch.run_ends, run - 1)) * self.group + place_in_group
        bucket = self.buckets[epoch.shards[epoch.runs[run]]]
        key = self._key(number, f"{window + 1}/{bucket}")
        return start + permuted(place_in_run % (end - start), end - start, key)

    def windows(self, place: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (place at which it ends, shards) of each window from the one at `place` on."""
        while True:
            number, place_in_epoch = self.epoch(place)
            epoch = self._epoch(number)
            window = bisect_right(epoch.window_ends, place_in_epoch)
            place = self.start(number) + epoch.window_ends[window]
            yield place, list(epoch.shards[window * self.window : (window + 1) * self.window])

    def epoch(self, place: int) -> tuple[int, int]:
        """Return the epoch of a place, and the place in that epoch."""
        assert self.num_records, "no place without records"
        if self._equal_epochs:
            return divmod(place, self.start(1))
        while self._starts[-1] <= place:
            self.start(len(self._starts))
        epoch = bisect_right(self._starts, place) - 1
        return epoch, place - self._starts[epoch]

    def start(self, epoch: int) -> int:
        """Return the first place of an epoch."""
        if not self.several_buckets:
            return epoch * self.num_records
        if self._equal_epochs:
            return epoch * self._num_places(0)
        with self._counting:
            while len(self._starts) <= epoch:
                last = len(self._starts) - 1
                self._starts.append(self._starts[last] + self._num_places(last))
        return self._starts[epoch]

    def epochs(self, place: int) -> float:
        """Return how many epochs are done when the run has come to a place."""
        epoch, place_in_epoch = self.epoch(place)
        return epoch + place_in_epoch / (self.start(epoch + 1) - self.start(epoch))

    def _num_places(self, epoch: int) -> int:
        ends = self._epoch(epoch).window_ends
        return _end(ends, len(ends) - 1)

    def _arrange(self, epoch: int) -> _Epoch:
        key = self._key(epoch, 0)
        order = sorted(self.shards, key=lambda shard: xxh3_64_intdigest(b"%d" % shard, seed=key))
        windows = [
            sorted(order[at : at + self.window], key=self.buckets.__getitem__)
            for at in range(0, len(order), self.window)
        ]
        shards = list(chain.from_iterable(windows))
        runs, run_ends, window_ends = array("q", [0]), array("q"), array("q")
        groups = 0
        for window in windows:
            for _, run in groupby(window, key=self.buckets.__getitem__):
                sizes = [self.sizes[shard] for shard in run]
                groups += -(-sum(sizes) // self.group)
                runs.append(runs[-1] + len(sizes))
                run_ends.append(groups)
            window_ends.append(groups * self.group)
        ends = array("q", accumulate(self.sizes[shard] for shard in shards))
        return _Epoch(shards, ends, runs, run_ends, window_ends)

    def _key(self, epoch: int, stream: int | str) -> int:
        return xxh3_64_intdigest(f"{self.seed}/{epoch}/{stream}".encode())


def permuted(place: int, size: int, key: int) -> int:
    """Return the image of a place in a pseudo-random permutation of range(size).

    A Feistel network on a x b >= size numbers, repeated until the result is below size. Takes
    constant time. Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), with
    XXH3-64 as round function.

    Args:
        place: at least 0, below size.
        size: number of places.
        key: 64 bits that determine the permutation.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = place % a, place // a
        for number in range(ROUNDS):
            mixed = xxh3_64_intdigest(b"%d %d" % (number, right), seed=key)
            left, right = right, (left + mixed) % (b if number % 2 else a)
        place = a * right + left
        if place < size:
            return place


def _end(ends: Sequence[int], position: int) -> int:
    return ends[position] if position >= 0 else 0
