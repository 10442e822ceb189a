"""Layouts: nothing that has a slot moves, and every worker finds the same one."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from precompute.planning.layout import EMPTY, Layout, arrange, first_of_each

IDS = st.lists(st.integers(1, 12), max_size=40)
SIZES = [3, 2]


def laid_out(ids: list[int], before: Layout = EMPTY) -> tuple[Layout, list[int]]:
    """Items with an even id are of bucket 0, the others of bucket 1."""
    numbers = np.array(ids, np.uint64)
    layout, slots = arrange(numbers, (numbers % 2).astype(np.int64), SIZES, before)
    return layout, slots.tolist()


def equal(one: Layout, other: Layout) -> bool:
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_fresh_items_fill_shards_of_their_bucket_in_order() -> None:
    layout, slots = laid_out([2, 4, 1, 6, 8, 3, 5])
    # 2 4 6 | 1 3 | 8 . . | 5 .
    assert layout.ids.tolist() == [2, 4, 6, 1, 3, 8, 0, 0, 5, 0]
    assert layout.starts.tolist() == [0, 3, 5, 8, 10]
    assert layout.buckets.tolist() == [0, 1, 0, 1]
    assert slots == [0, 1, 3, 2, 5, 4, 8]


def test_a_changed_item_takes_the_slot_of_the_one_it_was() -> None:
    before, _ = laid_out([2, 4, 6, 8])
    layout, slots = laid_out([2, 10, 6, 8], before)
    assert layout.ids.tolist() == [2, 10, 6, 8, 0, 0]
    assert slots == [0, 1, 2, 3]


def test_what_is_inserted_comes_to_the_end_and_what_is_deleted_leaves_a_gap() -> None:
    before, _ = laid_out([2, 4, 6, 8, 10, 12])
    inserted, _ = laid_out([2, 4, 14, 6, 8, 10, 12], before)
    assert inserted.ids.tolist() == [2, 4, 6, 8, 10, 12, 14, 0, 0]
    deleted, _ = laid_out([2, 6, 8, 10, 12], before)
    assert deleted.ids.tolist() == [2, 0, 6, 8, 10, 12]
    emptied, _ = laid_out([2, 4], before)
    assert emptied.ids.tolist() == [2, 4, 0]


@given(IDS, IDS, IDS)
def test_properties(first: list[int], second: list[int], third: list[int]) -> None:
    before, _ = laid_out(second, laid_out(first)[0])
    layout, slots = laid_out(third, before)
    # Every item has a slot of its own, that says so, in a shard of its bucket.
    assert len(set(slots)) == len(third)
    assert layout.ids[slots].tolist() == third if third else True
    assert Counter(layout.ids[layout.ids > 0].tolist()) == Counter(third)
    shards, rows = layout.locate(np.array(slots, np.int64))
    assert layout.buckets[shards].tolist() == [number % 2 for number in third]
    assert (rows < np.array(SIZES)[layout.buckets[shards]]).all()
    # What was there stays: of each id as many slots as both have.
    stayed = Counter(
        int(number)
        for number, other in zip(before.ids.tolist(), layout.ids.tolist(), strict=False)
        if number and number == other
    )
    expected = Counter(before.ids[before.ids > 0].tolist()) & Counter(third)
    assert stayed == expected
    # Whoever plans after the plan was carried out, or half carried out, finds the same.
    again, same_slots = laid_out(third, layout)
    assert equal(again, layout)
    assert same_slots == slots


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_first_of_each(pairs: list[tuple[int, int]]) -> None:
    digests = np.array(pairs, np.uint64).reshape(-1, 2)
    first, numbers = first_of_each(digests)
    distinct = list(dict.fromkeys(pairs))
    assert [pairs[at] for at in first] == distinct
    assert first.tolist() == [pairs.index(pair) for pair in distinct]
    assert [distinct[number] for number in numbers] == pairs
