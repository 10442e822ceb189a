"""Where each item of a product goes: shards of slots, and how they change when the items do.

An item is known by its id, the first 64 bits of the digest of its content. Whoever computes a
layout from the same items and the same layout of before gets the same one, and from its own result
that result again; so workers need not agree on it.

Axes: N items, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint64]
Numbers = NDArray[np.int64]
VACANT = np.uint64(0)


@dataclass(frozen=True)
class Layout:
    """Slots, shard by shard.

    Attributes:
        ids: of the item in each slot, [S]; 0 where a slot is vacant.
        starts: first slot of each shard, and S, [shards + 1].
        buckets: of each shard, [shards].
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

    def places(self, slots: Numbers) -> tuple[Numbers, Numbers]:
        """Return the shard of each slot, and its row in there."""
        shards = np.searchsorted(self.starts, slots, side="right") - 1
        return shards, slots - self.starts[shards]


EMPTY = Layout(np.empty(0, np.uint64), np.zeros(1, np.int64), np.empty(0, np.int64))


def arrange(
    ids: Ids, buckets: Numbers, sizes: Sequence[int], before: Layout = EMPTY
) -> tuple[Layout, Numbers]:
    """Give every item a slot, and move none that has one.

    What is no longer among the items leaves its slot. New items take the vacant slots of their
    bucket, then new shards, in their order. So an item that was changed stands where it stood, and
    what is added comes to the end.

    Args:
        ids: of the items, [N]; equal ids are equal items.
        buckets: of each item, [N]; what has the same id has the same bucket.
        sizes: slots of a new shard, by bucket.
        before: the layout to start from.

    Returns:
        The layout, and the slot of each item, [N].
    """
    slots = _matched(ids, before.ids)
    taken = np.zeros(len(before.ids), bool)
    taken[slots[slots >= 0]] = True
    slot_buckets = np.repeat(before.buckets, np.diff(before.starts))
    new: list[tuple[int, int, Numbers]] = []  # first item, bucket, items of each new shard
    for bucket, size in enumerate(sizes):
        waiting = np.flatnonzero((slots < 0) & (buckets == bucket))
        free = np.flatnonzero(~taken & (slot_buckets == bucket))[: len(waiting)]
        slots[waiting[: len(free)]] = free
        rest = waiting[len(free) :]
        for start in range(0, len(rest), size):
            new.append((int(rest[start]), bucket, rest[start : start + size]))
    starts, shard_buckets = list(before.starts), list(before.buckets)
    for _, bucket, items in sorted(new, key=lambda shard: shard[0]):
        slots[items] = np.arange(starts[-1], starts[-1] + len(items))
        starts.append(starts[-1] + sizes[bucket])
        shard_buckets.append(bucket)
    slots = _in_order(ids, slots)
    occupied = int(slots.max()) if len(slots) else -1
    num_shards = int(np.searchsorted(starts, occupied, side="right")) if occupied >= 0 else 0
    kept = np.asarray(starts[: num_shards + 1], np.int64)
    now = np.zeros(int(kept[-1]), np.uint64)
    now[slots] = ids
    return Layout(now, kept, np.asarray(shard_buckets[:num_shards], np.int64)), slots


def items_of_slots(layout: Layout, slots: Numbers) -> Numbers:
    """Return the number of the item in each slot, [S]; -1 where there is none."""
    items = np.full(len(layout.ids), -1, np.int64)
    items[slots] = np.arange(len(slots))
    return items


def first_of_each(digests: Ids) -> tuple[Numbers, Numbers]:
    """Return where each distinct digest comes first, in that order, and which of them each is.

    Args:
        digests: [N, 2].

    Returns:
        Positions, [distinct]; for each digest its number among them, [N].
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[begins]
    rank = np.empty(len(first), np.int64)
    by_place = np.argsort(first)
    rank[by_place] = np.arange(len(first))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = rank[np.cumsum(begins) - 1]
    return first[by_place], numbers


def _matched(ids: Ids, before: Ids) -> Numbers:
    """Return the slot that each item has already, or -1; equal items take them in turn."""
    slots = np.full(len(ids), -1, np.int64)
    order, slot_order = np.argsort(ids, kind="stable"), np.argsort(before, kind="stable")
    ordered, there = ids[order], before[slot_order]
    first_slot = np.searchsorted(there, ordered, side="left")
    past_slots = np.searchsorted(there, ordered, side="right")
    turn = np.arange(len(ids)) - np.searchsorted(ordered, ordered, side="left")
    found = first_slot + turn < past_slots
    slots[order[found]] = slot_order[first_slot[found] + turn[found]]
    return slots


def _in_order(ids: Ids, slots: Numbers) -> Numbers:
    """Return the slots so that equal items have theirs in the items' order."""
    order, slot_order = np.argsort(ids, kind="stable"), np.lexsort((slots, ids))
    result = np.empty(len(slots), np.int64)
    result[order] = slots[slot_order]
    return result
