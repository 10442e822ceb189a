"""The plan: which prompts and images go into which shard, and which shards on disk may stay.

A shard is a pure function of what stands in its slots, so the plan decides by fingerprints alone.
Axes: N rows of the inventory, P captions, D distinct prompts, S slots.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from precompute.planning.held_out import HELD_OUT
from precompute.planning.inventory import Inventory, digest_hex, digests_of
from precompute.planning.layout import (
    EMPTY,
    Ids,
    Layout,
    Numbers,
    arrange,
    first_of_each,
    items_of_slots,
)
from shards.format import sidecar
from shards.format.json_files import digest
from shards.format.sidecar import Summary
from shards.format.tensor_spec import TensorSpec, record_bytes

SHARD_FILE = re.compile(r"(?P<shard>\d{6,9})\.(tar|json)(?P<temporary>\.tmp-[0-9a-f]+)?")
TEMPORARY_FILE = re.compile(r"[a-z.]+\.tmp-[0-9a-f]+")
# A shard is written in minutes, and its file's time moves on all the while.
ABANDONED_AFTER_S = 3600
# Two tar headers, padding, a safetensors header and JSON.
RECORD_OVERHEAD_BYTES = 2560
# Encoders take full batches, of powers of two, from large shards.
LARGE_SHARD, WHOLE_BATCHES = 64, 32
# The digest of a mirrored image is its own with these bits turned.
MIRROR = np.frombuffer(xxh3_128_digest(b"mirrored"), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be.

    Attributes:
        shard: its number.
        bucket: of its images; 0 for text.
        rows: the slots of it that hold items, ascending.
        items: number of the item in each of these.
        fingerprint: that it must have.
        captions: digest of which prompts caption its images; empty but for latents.
    """

    shard: int
    bucket: int
    rows: Numbers
    items: Numbers
    fingerprint: str
    captions: str

    def key(self, at: int, ids: Ids) -> str:
        """Return the key of the record of item `items[at]`."""
        return key(self.shard, int(self.rows[at]), ids[self.items[at]])


@dataclass(frozen=True)
class ProductPlan:
    """The shards of one product.

    Attributes:
        folder: they go into.
        identity: what a record's bytes depend on besides its content; plain JSON values.
        layout: where the items stand; its buckets from `len(record_bytes)` on are those of shards
            that are held out of training.
        items: number of the item in each slot, [S]; -1 where there is none.
        contents: all that each item's bytes depend on, as digests, [items, 2 or 4]; the first 64
            bits are the item's id.
        record_bytes: size of a record's tensors, by bucket.
        captions: see `ShardPlan`; by shard, or none.
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
        """How many shards there are to be."""
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
        """How many records there are to be, if every row can be used."""
        return len(self.contents)

    @property
    def num_bytes(self) -> int:
        """About how much the product takes on disk."""
        return sum(self.shard_bytes(self.shard(shard)) for shard in range(self.num_shards))

    @property
    def ids(self) -> Ids:
        """Return the id of each item."""
        return self.contents[:, 0]

    @cached_property
    def identity_digest(self) -> str:
        """What sidecars tell the identity by."""
        return digest(self.identity)

    @cached_property
    def fingerprints(self) -> list[str]:
        """Return the fingerprint of each shard."""
        return [self._fingerprint(shard) for shard in range(self.num_shards)]

    def _fingerprint(self, shard: int) -> str:
        rows, items = self._slots(shard)
        return array_digest(self.identity_digest.encode(), rows, self.contents[items])

    def _slots(self, shard: int) -> tuple[Numbers, Numbers]:
        items = self.items[self.layout.slots(shard)]
        rows = np.flatnonzero(items >= 0)
        return rows, items[rows]

    def shard(self, shard: int) -> ShardPlan:
        """Return the plan of one shard."""
        return ShardPlan(
            shard,
            self.buckets[shard],
            *self._slots(shard),
            self.fingerprints[shard],
            self.captions[shard] if self.captions else "",
        )

    def shard_bytes(self, plan: ShardPlan) -> int:
        """Return about how large a planned shard will be."""
        return len(plan.items) * (self.record_bytes[plan.bucket] + RECORD_OVERHEAD_BYTES)

    def finished(self, shard: int) -> Summary | None:
        """Return what the sidecar of a shard says if the shard on disk is the planned one.

        Its captions may be others: they are in the sidecar alone.
        """
        found = sidecar.load_summary(self.folder, shard)
        as_planned = found is not None and found.fingerprint == self.fingerprints[shard]
        return found if as_planned else None

    def surplus(self) -> Iterator[Path]:
        """Yield shards beyond the plan, and temporary files that nobody writes to any more."""
        for path in sorted(self.folder.glob("*")):
            name = SHARD_FILE.fullmatch(path.name)
            if name is None:
                continue
            if name["temporary"]:
                if _is_abandoned(path):
                    yield path
            elif int(name["shard"]) >= self.num_shards:
                yield path


def abandoned_files(cache: Path) -> list[Path]:
    """Return what killed workers left half-written beside the products: digests, plans."""
    return [
        path
        for path in cache.glob("*.tmp-*")
        if TEMPORARY_FILE.fullmatch(path.name) and _is_abandoned(path)
    ]


def _is_abandoned(temporary: Path) -> bool:
    """Tell whether nobody writes to a temporary file any more."""
    try:
        return time.time() - temporary.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:  # another worker has just finished it
        return False


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of an inventory; the empty one is the first.

    Attributes:
        digests: of each, [D, 2].
        first: the caption that each is, [D], counted from 1; 0 for the empty prompt.
        numbers: which of them each caption is, [P].
    """

    digests: Ids
    first: Numbers
    numbers: Numbers

    def __len__(self) -> int:
        """Return D."""
        return len(self.first)


def distinct_prompts(inventory: Inventory) -> Prompts:
    """Return the empty prompt, then each prompt once, in order of first appearance."""
    captions = np.concatenate([digests_of(iter([""])), inventory.captions])
    first, numbers = first_of_each(captions)
    return Prompts(captions[first], first, numbers[1:])


def plan_text(
    folder: Path,
    prompts: Prompts,
    identity: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    shard_mb: float,
    before: Layout = EMPTY,
) -> ProductPlan:
    """Return the plan of the text product.

    Args:
        folder: of the product.
        prompts: all there are to be.
        identity: see `ProductPlan`.
        tensors: of a record.
        shard_mb: size of a shard, in 10^6 bytes.
        before: the layout to start from.
    """
    sizes = [records_per_shard(shard_mb, tensors)]
    layout, slots = arrange(prompts.digests[:, 0], np.zeros(len(prompts), np.int64), sizes, before)
    items = items_of_slots(layout, slots)
    return ProductPlan(folder, identity, layout, items, prompts.digests, [record_bytes(tensors)])


def image_contents(inventory: Inventory, held_out: NDArray[np.bool_], *, mirrored: bool) -> Ids:
    """Return what each latent is of, [N, 2]; [2 N, 2] where each row is followed by its mirror.

    Args:
        inventory: of all rows.
        held_out: which of them are, [N].
        mirrored: whether there are mirrors.
    """
    contents = np.where(held_out[:, None], inventory.images ^ HELD_OUT, inventory.images)
    if not mirrored:
        return contents
    return np.stack([contents, contents ^ MIRROR], axis=1).reshape(-1, 2)


def plan_latents(
    folder: Path,
    contents: Ids,
    buckets: Numbers,
    held_out: NDArray[np.bool_],
    identity: Mapping[str, Any],
    tensors: Sequence[Mapping[str, TensorSpec]],
    shard_mb: float,
    before: Layout = EMPTY,
) -> ProductPlan:
    """Return the plan of the latents.

    Args:
        folder: of the product.
        contents: see `image_contents`.
        buckets: of each.
        held_out: which of them are held out of training; they get shards of their own.
        identity: see `ProductPlan`.
        tensors: of a record, by bucket.
        shard_mb: size of a shard, in 10^6 bytes.
        before: the layout to start from.
    """
    sizes = [records_per_shard(shard_mb, one) for one in tensors]
    places = buckets + len(sizes) * held_out
    layout, slots = arrange(contents[:, 0], places, [*sizes, *sizes], before)
    items = items_of_slots(layout, slots)
    return ProductPlan(
        folder, identity, layout, items, contents, [record_bytes(one) for one in tensors]
    )


def plan_conditioning(
    folder: Path, latents: ProductPlan, controls: Ids, identity: Mapping[str, Any]
) -> ProductPlan:
    """Return the plan of the conditioning latents, which stand as the latents do.

    Args:
        folder: of the product.
        latents: their plan.
        controls: digests of the conditioning images, [N, 2], one for each latent.
        identity: see `ProductPlan`.
    """
    contents = np.concatenate([latents.contents, controls], axis=1)
    return ProductPlan(
        folder, identity, latents.layout, latents.items, contents, latents.record_bytes
    )


def with_captions(latents: ProductPlan, captions: Sequence[str]) -> ProductPlan:
    """Return the plan of the latents with what `captions_of_shards` found."""
    return replace(latents, captions=captions)


def captions_of_shards(
    latents: ProductPlan, inventory: Inventory, prompts: Prompts, text: ProductPlan
) -> list[str]:
    """Return for each shard of latents a digest of which prompts caption its images."""
    addresses = text_addresses(text)
    copies = latents.num_records // max(len(inventory), 1)
    found = []
    for shard in range(latents.num_shards):
        plan = latents.shard(shard)
        rows = plan.items // copies
        starts, ends = inventory.caption_ends[rows], inventory.caption_ends[rows + 1]
        counts = ends - starts
        # Where the captions of these rows lie, one row's after the other's.
        skipped = np.repeat(starts - np.cumsum(counts) + counts, counts)
        numbers = prompts.numbers[skipped + np.arange(counts.sum())]
        found.append(array_digest(b"captions", plan.rows, counts, addresses[numbers]))
    return found


def text_addresses(text: ProductPlan) -> Numbers:
    """Return shard, row and id of each prompt's record, [D, 3]."""
    slots = np.empty(text.num_records, np.int64)
    occupied = np.flatnonzero(text.items >= 0)
    slots[text.items[occupied]] = occupied
    shards, rows = text.layout.places(slots)
    return np.stack([shards, rows, text.ids.astype(np.int64)], axis=1)


def key(shard: int, row: int, item_id: Any) -> str:
    """Return the key of the record in a slot."""
    return f"{shard:06d}-{row:05d}-{int(item_id) % (1 << 64):016x}"  # arrays hold it signed


def about_image(content: Any, *, mirrored: bool, held_out: bool) -> dict[str, Any]:
    """Return what a latent's JSON member says of its image.

    Args:
        content: see `image_contents`, [2].
        mirrored: whether it is a mirror.
        held_out: whether it is held out of training.
    """
    about: dict[str, Any] = {}
    for is_so, name, bits in ((mirrored, "mirrored", MIRROR), (held_out, "held_out", HELD_OUT)):
        if is_so:
            about[name] = True
            content = content ^ bits
    return {"image_hash": digest_hex(content)} | about


def records_per_shard(shard_mb: float, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many records fit a shard; at least one, and whole batches where they are many."""
    count = max(1, int(shard_mb * 1e6 / record_bytes(tensors)))
    return count if count < LARGE_SHARD else count - count % WHOLE_BATCHES


def array_digest(start: bytes, *arrays: Any) -> str:
    """Return a digest of arrays of 64-bit numbers."""
    found = hashlib.sha256(start)
    for one in arrays:
        found.update(b"%d " % one.size)
        found.update(np.ascontiguousarray(one).astype("<i8", copy=False).tobytes())
    return found.hexdigest()[:32]
