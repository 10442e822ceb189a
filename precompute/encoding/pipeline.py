"""From planned shards to written ones: loading, encoding and writing overlap.

Threads load batches ahead (decode, resize, tokenize). One thread encodes them, also ahead. The
caller's thread collects the records of a shard, and one more thread writes the shard. All of them
release Python's lock for most of their time, so they overlap; on a GPU, so does the copy to the
host. Beside the batches ahead, two shards at most are in memory: one being collected and one being
written.

A record's bytes depend on its content, its slot and the size of the batches, never on the rest of
its batch: a batch is a fixed run of slots, and those that are not encoded hold zeros. So a record
that keeps its slot can be taken from the old shard: encoding it again gives the same bytes.

The first batch of each pass is encoded once more, before anything is written, and must come out the
same.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from common.device import AsyncHostCopy, use_device
from common.interruption import StopCheck
from common.prefetch import prefetch
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.first_batch import compare
from precompute.encoding.shard_build import ShardBuild
from precompute.encoding.shard_writer import ShardWriter
from precompute.planning.bad_rows import BadRows
from shards.format.members import Members
from shards.format.records import Record, to_members

Loaded = TypeVar("Loaded")
# Encoded batches that may wait for the caller's thread.
BATCHES_AHEAD = 8


@dataclass(eq=False)
class Batch:
    """A run of a shard's slots.

    Attributes:
        build: the shard.
        size: slots in the run, and items in the encoder's batch.
        positions: of the items in these slots, among the items of the shard.
    """

    build: ShardBuild
    size: int
    positions: Sequence[int]

    @cached_property
    def to_encode(self) -> dict[int, int]:
        """The items to encode: position among the shard's items -> index in the batch."""
        slots = self.build.plan.slots
        return {
            position: int(slots[position]) % self.size
            for position in self.positions
            if position in self.build.to_encode
        }


class EncodingPass(Protocol[Loaded]):
    """How the records of one product are made.

    Attributes:
        name: of what is made, for messages.
        device: where the encoder runs.
        batch_size: of the encoder.
        num_loaders: how many threads may call `load` at once.
    """

    name: str
    device: torch.device
    batch_size: BatchSize
    num_loaders: int

    def prepare(self, shard: int) -> ShardBuild:
        """Return the build of a shard: what it keeps, encodes and leaves out."""
        ...

    def load(self, batch: Batch) -> Loaded:
        """Return the encoder's input for a batch; called in threads."""
        ...

    def encode(self, loaded: Loaded) -> dict[str, Tensor] | None:
        """Return the encoder's output, or None if the batch has nothing to encode.

        Called in one thread; the output is on the device.
        """
        ...

    def records(
        self,
        batch: Batch,
        loaded: Loaded,
        tensors: dict[str, Tensor],
        finite: dict[str, Tensor],
    ) -> Iterator[Record]:
        """Yield the records of a batch.

        Args:
            batch: the batch.
            loaded: what `load` returned for it.
            tensors: the encoder's output, [batch size, ...] each; empty without output.
            finite: for each of them, which items have finite numbers alone, [batch size].
        """
        ...


@dataclass
class EncodedBatch(Generic[Loaded]):
    """A batch with the input and the output of its encoder.

    Attributes:
        batch: the batch.
        loaded: the encoder's input.
        output: the encoder's output.
        finite: for each tensor of it, which items have finite numbers alone, [batch size].
    """

    batch: Batch
    loaded: Loaded
    output: AsyncHostCopy | None
    finite: AsyncHostCopy | None


def build_shards(
    encoding_pass: EncodingPass[Loaded],
    shards: Sequence[int],
    *,
    bad_rows: BadRows,
    clock: EncoderClock,
    check: StopCheck,
    advance: Callable[[int], object],
) -> None:
    """Encode and write shards of one product, in order; return when all are on disk.

    Args:
        encoding_pass: makes the product's records.
        shards: numbers of the shards.
        bad_rows: counts the rows that are left out.
        clock: measures the time spent encoding.
        check: called between shards; may end the run.
        advance: called after each batch with the number of its items.

    Raises:
        ShardError: too many rows are bad, or the source has changed; finished shards are kept.
        RunError: the first batch came out otherwise when it was encoded again.
        OSError: a shard cannot be written; finished shards are kept.
    """
    with (
        ShardWriter() as writer,
        contextlib.closing(_encoded_batches(encoding_pass, shards, clock)) as encoded,
    ):
        for build, batches in itertools.groupby(encoded, key=lambda one: one.batch.build):
            members: list[Members] = []
            for batch in batches:
                members += _members(encoding_pass, batch)
                advance(len(batch.batch.positions))
                writer.raise_error()
            writer.submit(build, members)
            bad_rows.add(build.skipped)
            check()


def _encoded_batches(
    encoding_pass: EncodingPass[Loaded], shards: Sequence[int], clock: EncoderClock
) -> Generator[EncodedBatch[Loaded], None, None]:
    """Yield the batches of shards, loaded and encoded ahead in threads."""
    compared = False

    def load(batch: Batch) -> tuple[Batch, Loaded]:
        return batch, encoding_pass.load(batch)

    def encode(batch_and_loaded: tuple[Batch, Loaded]) -> EncodedBatch[Loaded]:
        nonlocal compared
        batch, loaded = batch_and_loaded
        with clock.measure(len(batch.build.to_encode.intersection(batch.positions))):
            tensors = encoding_pass.encode(loaded)
            output = AsyncHostCopy(tensors) if tensors else None
            finite = AsyncHostCopy(finite_items(tensors)) if tensors else None
        if tensors and output and not compared:
            with clock.left_out():
                again = partial(encoding_pass.encode, loaded)
                compare(encoding_pass.name, tensors, output, again)
            compared = True
        return EncodedBatch(batch, loaded, output, finite)

    batches = (
        batch
        for shard in shards
        for batch in batches_of(encoding_pass.prepare(shard), encoding_pass.batch_size.now)
    )
    num_loaders, device = encoding_pass.num_loaders, encoding_pass.device
    with (
        ThreadPoolExecutor(num_loaders, "load", use_device, (device,)) as loaders,
        ThreadPoolExecutor(1, "encode", use_device, (device,)) as encoder,
        contextlib.closing(prefetch(loaders, load, batches, num_loaders + 1)) as loaded,
        contextlib.closing(prefetch(encoder, encode, loaded, BATCHES_AHEAD)) as encoded,
    ):
        yield from encoded


def finite_items(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return for each tensor, [B, ...], which items have finite numbers alone, [B]."""
    return {name: tensor.isfinite().flatten(1).all(dim=1) for name, tensor in tensors.items()}


def batches_of(build: ShardBuild, size: int) -> Iterator[Batch]:
    """Yield a shard's batches; at least one, which may be empty.

    Args:
        build: the shard.
        size: of the encoder's batches; a shard with fewer slots is one batch.
    """
    slots = build.product.layout.slots(build.plan.shard)
    size = min(size, slots.stop - slots.start)
    positions = range(len(build.plan.items))
    runs = itertools.groupby(positions, lambda position: build.plan.slots[position] // size)
    batches = [list(run) for _, run in runs]
    for batch in batches or [[]]:
        yield Batch(build, size, batch)


def _members(
    encoding_pass: EncodingPass[Loaded], encoded: EncodedBatch[Loaded]
) -> Iterator[Members]:
    """Yield the members of a batch's records, kept and encoded, by ascending slot.

    Raises:
        ShardError: a record that is to be kept is damaged.
    """
    batch, build = encoded.batch, encoded.batch.build
    tensors = encoded.output.wait() if encoded.output else {}
    finite = encoded.finite.wait() if encoded.finite else {}
    members = {
        record.key: to_members(record)
        for record in encoding_pass.records(batch, encoded.loaded, tensors, finite)
    }
    members |= {record.key: record for record in build.read_kept(batch.positions)}
    for position in batch.positions:
        if build.keys[position] in members:
            yield members[build.keys[position]]
