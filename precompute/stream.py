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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, Generic, NamedTuple, TypeVar

from xxhash import xxh3_64_hexdigest

from precompute.batch_size import BatchSize
from precompute.plan import ProductPlan, ShardPlan
from shards import sidecar
from shards.ahead import ahead
from shards.device import OnItsWay
from shards.errors import ShardError
from shards.records import Members, about_to_bytes
from shards.sidecar import Skipped

Loaded = TypeVar("Loaded")
# Encoded batches that may wait while a full shard is being committed.
BATCHES_AHEAD = 8


class Kept(NamedTuple):
    """A record in the shard on disk: where its two members lie, and their checksums."""

    key: str
    span: tuple[int, ...]
    checksums: str

    def read(self, tar: IO[bytes]) -> Members | None:
        """Return the record's members, or None if they are damaged."""
        parts = []
        for start, size in (self.span[:2], self.span[2:]):
            tar.seek(start)
            parts.append(tar.read(size))
        intact = "".join(map(xxh3_64_hexdigest, parts)) == self.checksums
        return Members(self.key, parts[0], parts[1]) if intact else None


@dataclass(eq=False)
class Work:
    """A shard in the making.

    Attributes:
        product: that it is of.
        plan: what it is to hold.
        keys: of its items' records.
        abouts: of its items' records, the JSON members.
        kept: records that the shard on disk has already, by position among the items.
        wanted: positions of the items that are to be encoded; the others are kept or left out.
        skipped: rows left out so far.
    """

    product: ProductPlan
    plan: ShardPlan
    keys: list[str]
    abouts: list[bytes]
    kept: dict[int, Kept] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)


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
    tensors: OnItsWay | None


class Busy:
    """How long encoders computed, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the time until the block ends."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def prepare_work(product: ProductPlan, shard: int, about: Callable[[int], dict[str, Any]]) -> Work:
    """Return a shard's work, with what the shard on disk has already.

    Args:
        product: that it is of.
        shard: its number.
        about: the JSON member of an item's record.
    """
    plan = product.shard(shard)
    ids = product.ids
    work = Work(
        product,
        plan,
        keys=[plan.key(at, ids) for at in range(len(plan.items))],
        abouts=[about_to_bytes(about(int(item))) for item in plan.items],
    )
    work.kept = _kept(work)
    work.wanted = set(range(len(plan.items))) - work.kept.keys()
    return work


def _kept(work: Work) -> dict[int, Kept]:
    """Return the records of the shard on disk that are as those to be made."""
    product = work.product
    folder, shard = product.folder, work.plan.shard
    try:
        card = sidecar.load(folder, shard)
        if card is None or card.identity != product.identity_digest:
            return {}
        positions = {key: at for at, key in enumerate(work.keys)}
        kept = {}
        with sidecar.tar_path(folder, shard).open("rb") as tar:
            for key, span, checksums in zip(card.keys, card.spans, card.checksums, strict=True):
                at = positions.get(key)
                if at is not None:
                    one = Kept(key, tuple(span), checksums)
                    members = one.read(tar)
                    if members is not None and members.about == work.abouts[at]:
                        kept[at] = one
    except (ShardError, OSError):
        return {}  # damaged: all of it is made again
    return kept


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
    encode: Callable[[Loaded], OnItsWay],
    *,
    is_empty: Callable[[Loaded], bool],
    batch_size: BatchSize,
    num_threads: int,
    busy: Busy,
) -> Iterator[tuple[Work, Iterator[Encoded[Loaded]]]]:
    """Yield each shard's work with its batches, encoded; the batches are to be consumed.

    Args:
        works: the shards to make.
        load: reads what a batch needs; called in threads.
        encode: computes; called in a thread of its own.
        is_empty: whether there is nothing to encode in what was loaded.
        batch_size: of the encoder.
        num_threads: that load.
        busy: counts the time spent encoding.
    """

    def loading(batch: Batch) -> tuple[Batch, Loaded]:
        return batch, load(batch)

    def encoding(found: tuple[Batch, Loaded]) -> Encoded[Loaded]:
        batch, loaded = found
        if is_empty(loaded):
            return Encoded(batch, loaded, None)
        with busy():
            return Encoded(batch, loaded, encode(loaded))

    batches = (batch for work in works for batch in batches_of(work, batch_size.now))
    with (
        ThreadPoolExecutor(num_threads, "load") as loaders,
        ThreadPoolExecutor(1, "encode") as encoder,
        contextlib.closing(ahead(loaders, loading, batches, num_threads + 1)) as loaded,
        contextlib.closing(ahead(encoder, encoding, loaded, BATCHES_AHEAD)) as encoded,
    ):
        yield from itertools.groupby(encoded, key=lambda one: one.batch.work)
