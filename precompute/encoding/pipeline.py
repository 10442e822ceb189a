"""From planned shards to written ones: what is loaded and encoded runs ahead of what is written.

Threads load (decode, resize, tokenize) batches ahead; one more thread encodes them, also ahead; the
caller's thread writes. All three leave Python's lock for most of their time, so they overlap, and
on a GPU the copy to the host overlaps as well.

A record's bytes depend on its content, its slot and the size of the batches, never on what else is
in the batch: a batch is a fixed run of slots, and the places of those that are not encoded hold
zeros. So a record that stands where it stood is taken over from the old shard, and nobody can tell.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from common.device import AsyncHostCopy
from common.errors import ShardError
from common.prefetch import prefetch
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.shard_build import Work
from shards.format import sidecar
from shards.format.members import Members
from shards.format.records import Record

Loaded = TypeVar("Loaded")
# Encoded batches that may wait while a full shard is being committed.
BATCHES_AHEAD = 8


@dataclass(eq=False)
class Batch:
    """A run of a shard's slots.

    Attributes:
        work: the shard.
        size: slots in the run, and items in the encoder's batch.
        positions: of the items in these slots, among the shard's.
    """

    work: Work
    size: int
    positions: Sequence[int]

    @property
    def wanted(self) -> dict[int, int]:
        """Return the items to encode: position in the shard -> place in the batch."""
        rows = self.work.plan.rows
        return {at: int(rows[at]) % self.size for at in self.positions if at in self.work.wanted}


@dataclass
class Encoded(Generic[Loaded]):
    """A batch, what was loaded for it and, if there was anything, what came of it."""

    batch: Batch
    loaded: Loaded
    tensors: AsyncHostCopy | None


class EncoderClock:
    """How long encoders computed.

    Args:
        device: where they do; a GPU's own clock counts there.

    Attributes:
        began: when the first of them did, by `time.perf_counter`; 0 before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = 0.0
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the time until what the block asks for is computed."""
        start = time.perf_counter()
        self.began = self.began or start
        if self.device.type != "cuda":
            yield
            self._seconds += time.perf_counter() - start
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._running.append(events)
        while self._running[0][1].query() and len(self._running) > 1:
            self._count_first()

    def _count_first(self) -> None:
        first, last = self._running.popleft()
        self._seconds += first.elapsed_time(last) / 1000

    @property
    def seconds(self) -> float:
        """How long they have computed so far."""
        if self._running:
            torch.cuda.synchronize(self.device)
        while self._running:
            self._count_first()
        return self._seconds


def batches_of(work: Work, size: int) -> Iterator[Batch]:
    """Yield a shard's batches; at least one, which may be empty.

    Args:
        work: the shard.
        size: of the encoder's batches; never more than a shard has slots.
    """
    slots = work.product.layout.slots(work.plan.shard)
    size = min(size, slots.stop - slots.start)
    runs = itertools.groupby(range(len(work.plan.items)), lambda at: work.plan.rows[at] // size)
    found = [list(positions) for _, positions in runs]
    for positions in found or [[]]:
        yield Batch(work, size, positions)


def encode_ahead(
    works: Iterable[Work],
    load: Callable[[Batch], Loaded],
    encode: Callable[[Loaded], AsyncHostCopy | None],
    *,
    batch_size: BatchSize,
    num_threads: int,
    busy: EncoderClock,
) -> Iterator[tuple[Work, Iterator[Encoded[Loaded]]]]:
    """Yield each shard's work with its batches, encoded; the batches are to be consumed.

    Args:
        works: the shards to make.
        load: reads what a batch needs; called in threads.
        encode: computes, or returns None where nothing of what was loaded is to be encoded; called
            in a thread of its own.
        batch_size: of the encoder.
        num_threads: that load.
        busy: counts the time spent encoding.
    """

    def loading(batch: Batch) -> tuple[Batch, Loaded]:
        return batch, load(batch)

    def encoding(found: tuple[Batch, Loaded]) -> Encoded[Loaded]:
        batch, loaded = found
        with busy():
            return Encoded(batch, loaded, encode(loaded))

    batches = (batch for work in works for batch in batches_of(work, batch_size.now))
    with (
        ThreadPoolExecutor(num_threads, "load") as loaders,
        ThreadPoolExecutor(1, "encode") as encoder,
        contextlib.closing(prefetch(loaders, loading, batches, num_threads + 1)) as loaded,
        contextlib.closing(prefetch(encoder, encoding, loaded, BATCHES_AHEAD)) as encoded,
    ):
        yield from itertools.groupby(encoded, key=lambda one: one.batch.work)


def in_order(
    encoded: Iterator[Encoded[Any]],
    records: Callable[[Encoded[Any]], Iterator[Record]],
    bar: "tqdm[Any]",
) -> Iterator[Record | Members]:
    """Yield the records of a shard by their rows, those that are kept in between.

    Args:
        encoded: the shard's batches.
        records: makes records of a batch.
        bar: moves on a batch at a time.

    Raises:
        ShardError: a record that was to be kept is damaged.
    """
    with contextlib.ExitStack() as tar_of_old:
        tar = None
        for found in encoded:
            work = found.batch.work
            made = {record.key: record for record in records(found)}
            for at in found.batch.positions:
                if at in work.kept:
                    tar = tar or tar_of_old.enter_context(
                        sidecar.tar_path(work.product.folder, work.plan.shard).open("rb")
                    )
                    members = work.kept[at].read(tar)
                    if members is None:
                        raise ShardError(
                            f"{tar.name}: changed while precompute was running; run again"
                        )
                    yield members
                elif work.keys[at] in made:
                    yield made[work.keys[at]]
            bar.update(len(found.batch.positions))
