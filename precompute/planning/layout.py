"""Where each item of a product goes: shards of slots, and how they change when the items do.

An item is known by its id, the first 64 bits of the digest of its content. The same items and the
same existing layout always give the same new layout, and the new layout gives itself again; so
workers need not agree on it. Slots are counted through all shards of a product.

Axes: N items, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The slots of a product, shard by shard.

    Attributes:
        ids: id of the item in each slot, [S]; 0 in a vacant slot.
        starts: first slot of each shard, and S at the end, [shards + 1].
        buckets: bucket of each shard, [shards].
    """

    ids: Ids
    starts: Numbers
    buckets: Numbers

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.buckets)

    def slots(self, shard: int) -> slice:
        """Return the slots of a shard."""
        return slice(int(self.starts[shard]), int(self.starts[shard + 1]))

    def locate(self, slots: Numbers) -> tuple[Numbers, Numbers]:
        """Return the shard of each slot, and its number within the shard."""
        shards = np.searchsorted(self.starts, slots, side="right") - 1
        return shards, slots - self.starts[shards]


EMPTY = Layout(np.empty(0, np.uint64), np.zeros(1, np.int64), np.empty(0, np.int64))


def arrange(
    ids: Ids, buckets: Numbers, sizes: Sequence[int], existing: Layout = EMPTY
) -> tuple[Layout, Numbers]:
    """Give every item a slot, and move no item that has one.

    Items that are gone leave their slots. New items take the vacant slots of their bucket, then
    new shards, in their order. So a changed item takes the slot of its old version, and added items
    come to the end.

    Args:
        ids: id of each item, [N]; equal ids are equal items.
        buckets: bucket of each item, [N]; equal items have the same bucket.
        sizes: slots of a new shard, by bucket.
        existing: the layout to start from.

    Returns:
        The layout, and the slot of each item, [N].
    """
    slots = _existing_slots(ids, existing.ids)
    taken = np.zeros(len(existing.ids), bool)
    taken[slots[slots >= 0]] = True
    slot_buckets = np.repeat(existing.buckets, np.diff(existing.starts))
    new: list[tuple[int, int, Numbers]] = []  # first item, bucket, items of each new shard
    for bucket, size in enumerate(sizes):
        waiting = np.flatnonzero((slots < 0) & (buckets == bucket))
        free = np.flatnonzero(~taken & (slot_buckets == bucket))[: len(waiting)]
        slots[waiting[: len(free)]] = free
        rest = waiting[len(free) :]
        for start in range(0, len(rest), size):
            new.append((int(rest[start]), bucket, rest[start : start + size]))
    starts, shard_buckets = list(existing.starts), list(existing.buckets)
    for _, bucket, items in sorted(new, key=lambda shard: shard[0]):
        slots[items] = np.arange(starts[-1], starts[-1] + len(items))
        starts.append(starts[-1] + sizes[bucket])
        shard_buckets.append(bucket)
    slots = _in_order(ids, slots)
    occupied = int(slots.max()) if len(slots) else -1
    num_shards = int(np.searchsorted(starts, occupied, side="right")) if occupied >= 0 else 0
    kept = np.asarray(starts[: num_shards + 1], np.int64)
    slot_ids = np.zeros(int(kept[-1]), np.uint64)
    slot_ids[slots] = ids
    return Layout(slot_ids, kept, np.asarray(shard_buckets[:num_shards], np.int64)), slots


def items_of_slots(layout: Layout, slots: Numbers) -> Numbers:
    """Return the number of the item in each slot, [S]; -1 in a vacant slot."""
    items = np.full(len(layout.ids), -1, np.int64)
    items[slots] = np.arange(len(slots))
    return items


def first_of_each(digests: Ids) -> tuple[Numbers, Numbers]:
    """Number the distinct digests in order of first appearance.

    Args:
        digests: [N, 2].

    Returns:
        Where each distinct digest comes first, [distinct]; the number of each digest among the
        distinct ones, [N].
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[begins]
    rank = np.empty(len(first), np.int64)
    by_position = np.argsort(first)
    rank[by_position] = np.arange(len(first))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = rank[np.cumsum(begins) - 1]
    return first[by_position], numbers


def _existing_slots(ids: Ids, slot_ids: Ids) -> Numbers:
    """Return the slot that each item has already, or -1; equal items take theirs in turn."""
    slots = np.full(len(ids), -1, np.int64)
    order, slot_order = np.argsort(ids, kind="stable"), np.argsort(slot_ids, kind="stable")
    ordered, slots_ordered = ids[order], slot_ids[slot_order]
    first_slot = np.searchsorted(slots_ordered, ordered, side="left")
    past_slots = np.searchsorted(slots_ordered, ordered, side="right")
    turn = np.arange(len(ids)) - np.searchsorted(ordered, ordered, side="left")
    has_slot = first_slot + turn < past_slots
    slots[order[has_slot]] = slot_order[first_slot[has_slot] + turn[has_slot]]
    return slots


def _in_order(ids: Ids, slots: Numbers) -> Numbers:
    """Return the slots, with those of equal items in the items' order."""
    order, slot_order = np.argsort(ids, kind="stable"), np.lexsort((slots, ids))
    result = np.empty(len(slots), np.int64)
    result[order] = slots[slot_order]
    return result
