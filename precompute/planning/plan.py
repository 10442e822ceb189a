"""The plan: which prompts and images go into which shard, and which shards on disk may stay.

The words that all stages use:
- row: an entry of the source; it has an image, a conditioning image and captions.
- slot: a numbered place in a shard, which holds one record or is vacant.
- record: the content of a slot: an encoded prompt, image, conditioning image or validation pair.
- sample: what training draws: the latent and conditioning latent of a row, and one of its prompts.
- place: the number of a sample in the order of a training run.

An item is a prompt or an image that the plan gives a slot; once encoded it is a record. A shard is
a pure function of the items in its slots, so the plan decides by fingerprints alone.

Axes: S slots of a product.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from precompute.planning.layout import Ids, Layout, Numbers
from shards.format import sidecar
from shards.format.json_files import digest
from shards.format.keys import record_key
from shards.format.sidecar import Summary

# Two tar headers, padding, a safetensors header and JSON.
RECORD_OVERHEAD_BYTES = 2560


@dataclass(frozen=True)
class ShardPlan:
    """What one shard is to hold.

    Attributes:
        shard: its number.
        bucket: of its images; 0 for text.
        slots: numbers of its slots that hold items, ascending.
        items: number of the item in each of these slots.
        fingerprint: digest of everything that determines the shard's bytes.
        captions: digest of which prompts caption its images; empty but for latents.
    """

    shard: int
    bucket: int
    slots: Numbers
    items: Numbers
    fingerprint: str
    captions: str

    def key(self, position: int, ids: Ids) -> str:
        """Return the key of the record of item `items[position]`."""
        return item_key(self.shard, int(self.slots[position]), ids[self.items[position]])


@dataclass(frozen=True)
class ProductPlan:
    """The shards of one product.

    Attributes:
        folder: where the shards are written.
        identity: what a record's bytes depend on besides its content; plain JSON values.
        layout: which slot each item has. A bucket number `len(record_bytes) + b` marks a shard of
            bucket b that is held out of training.
        items: number of the item in each slot, [S]; -1 in a vacant slot.
        contents: digests of all content that each item's bytes depend on, [items, 2 or 4]; the
            first 64 bits are the item's id.
        record_bytes: size of a record's tensors, by bucket.
        captions: for latents, a digest of each shard's captions; empty for other products.
    """

    folder: Path
    identity: Mapping[str, Any]
    layout: Layout
    items: Numbers
    contents: Ids
    record_bytes: Sequence[int]
    captions: Sequence[str] = ()

    @property
    def num_shards(self) -> int:
        """How many shards are planned."""
        return self.layout.num_shards

    @cached_property
    def buckets(self) -> list[int]:
        """Return the bucket of each shard."""
        return [int(bucket) for bucket in self.layout.buckets % len(self.record_bytes)]

    @property
    def held_out(self) -> list[int]:
        """Return the shards that are held out of training."""
        return np.flatnonzero(self.layout.buckets >= len(self.record_bytes)).tolist()

    @property
    def num_records(self) -> int:
        """How many records the product has if every row can be used."""
        return len(self.contents)

    @property
    def ids(self) -> Ids:
        """Return the id of each item."""
        return self.contents[:, 0]

    @cached_property
    def identity_digest(self) -> str:
        """The digest of the identity, which every sidecar holds."""
        return digest(self.identity)

    @cached_property
    def fingerprints(self) -> list[str]:
        """Return the fingerprint of each shard."""
        return [self._fingerprint(shard) for shard in range(self.num_shards)]

    def _fingerprint(self, shard: int) -> str:
        slots, items = self._slots_and_items(shard)
        return array_digest(self.identity_digest.encode(), slots, self.contents[items])

    def _slots_and_items(self, shard: int) -> tuple[Numbers, Numbers]:
        items = self.items[self.layout.slots(shard)]
        slots = np.flatnonzero(items >= 0)
        return slots, items[slots]

    def shard(self, shard: int) -> ShardPlan:
        """Return the plan of one shard."""
        return ShardPlan(
            shard,
            self.buckets[shard],
            *self._slots_and_items(shard),
            self.fingerprints[shard],
            self.captions[shard] if self.captions else "",
        )

    def count_records(self, shards: Sequence[int]) -> int:
        """Return how many records some shards have if every row can be used."""
        return sum(len(self.shard(shard).items) for shard in shards)

    def count_bytes(self, shards: Sequence[int]) -> int:
        """Return the approximate size of some shards."""
        return sum(self.shard_bytes(self.shard(shard)) for shard in shards)

    def shard_bytes(self, plan: ShardPlan) -> int:
        """Return the approximate size of a planned shard."""
        return len(plan.items) * (self.record_bytes[plan.bucket] + RECORD_OVERHEAD_BYTES)

    def finished(self, shard: int) -> Summary | None:
        """Return the summary of a shard on disk if it is the planned one.

        Its captions may be others: they are in the sidecar alone.
        """
        summary = sidecar.load_summary(self.folder, shard)
        as_planned = summary is not None and summary.fingerprint == self.fingerprints[shard]
        return summary if as_planned else None


def bytes_needed(shards: Iterable[tuple[ProductPlan, int]]) -> int:
    """Return how much room it takes to make shards, in this order.

    An old shard is there until the new one is whole, and then makes room for the next.
    """
    peak = used = 0
    for product, shard in shards:
        new, old = product.shard_bytes(product.shard(shard)), 0
        with contextlib.suppress(OSError):
            old = sidecar.tar_path(product.folder, shard).stat().st_size
        peak = max(peak, used + new)
        used += new - old
    return peak


def item_key(shard: int, slot: int, item_id: Any) -> str:
    """Return the key of the record of an item in a slot."""
    return record_key(shard, slot, f"{int(item_id) % (1 << 64):016x}")  # arrays hold it signed


def array_digest(start: bytes, *arrays: Any) -> str:
    """Return a digest of arrays of 64-bit numbers."""
    sha256 = hashlib.sha256(start)
    for array in arrays:
        sha256.update(b"%d " % array.size)
        sha256.update(np.ascontiguousarray(array).astype("<i8", copy=False).tobytes())
    return sha256.hexdigest()[:32]
