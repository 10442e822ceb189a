"""The order of samples: once an epoch each, pure, and local where a window says so."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice, pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reading.order import Order, permuted
from tests.shards.format.test_format import page_order

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)
BUCKETED = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=9).filter(
    lambda shards: sum(size for size, _ in shards) > 0
)
WINDOW = st.none() | st.integers(1, 12)


def bucketed(
    shards: list[tuple[int, int]], seed: int, window: int | None = None, group: int = 4
) -> Order:
    """An order of shards that are given as (records, bucket)."""
    sizes, buckets = zip(*shards, strict=True)
    return Order(sizes, seed=seed, window=window, shard_buckets=buckets, group=group)


@given(sizes=SIZES, seed=st.integers(0, 2**40), window=WINDOW)
def test_each_record_comes_once_an_epoch(sizes: list[int], seed: int, window: int | None) -> None:
    order = Order(sizes, seed=seed, window=window)
    everything = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    for epoch in range(2):
        first = epoch * len(everything)
        places = range(first, first + len(everything))
        assert sorted(order.record(place) for place in places) == everything


@given(
    shards=BUCKETED,
    seed=st.integers(0, 2**40),
    window=WINDOW,
    group=st.integers(1, 5),
    place=st.integers(0, 60),
)
@settings(deadline=None, max_examples=60)
def test_any_place_at_once_is_as_the_page_counts_to_it(
    shards: list[tuple[int, int]], seed: int, window: int | None, group: int, place: int
) -> None:
    sizes, buckets = zip(*shards, strict=True)
    expected = next(islice(page_order(sizes, buckets, seed, window, group), place, None))
    assert bucketed(shards, seed, window, group).record(place) == expected


def test_no_two_windows_are_permuted_alike() -> None:
    order = Order([10] * 6, seed=1, window=2)
    positions = [
        [
            10 * shards.index(shard) + index
            for shard, index in map(order.record, range(end - 20, end))
        ]
        for end, shards in islice(order.windows(0), 6)  # of two epochs
    ]
    assert all(sorted(one) == list(range(20)) for one in positions)
    assert all(one != other for one, other in combinations(positions, 2))


def test_shards_come_in_any_order() -> None:
    # Which of five shards comes first, under 2,000 seeds: 400 times each, four degrees of freedom.
    counts = Counter(Order([1] * 5, seed=s, window=1).record(0)[0] for s in range(2000))
    statistic = sum((counts[shard] - 400) ** 2 / 400 for shard in range(5))
    assert statistic < scipy.stats.chi2.ppf(0.9999, 4)


def test_progress_counts_what_groups_are_filled_up_with() -> None:
    order = bucketed([(5, 0), (6, 1)], seed=0, group=4)  # 8 places each
    assert [order.epochs(place) for place in (0, 4, 8, 16, 20)] == [0, 0.25, 0.5, 1, 1.25]
    assert Order([5, 6], seed=0).epochs(22) == 2


def test_a_window_mixes_only_its_own_shards() -> None:
    order = Order([5] * 8, seed=1, window=2)
    for start in range(0, 40, 10):
        shards = {order.record(place)[0] for place in range(start, start + 10)}
        assert len(shards) == 2


def test_seed_and_epoch_change_the_order() -> None:
    def sequence(seed: int, first: int) -> list[tuple[int, int]]:
        order = Order([20] * 5, seed=seed)
        return [order.record(place) for place in range(first, first + 100)]

    assert sequence(0, 0) != sequence(1, 0)
    assert sequence(0, 0) != sequence(0, 100)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


def test_permutations_are_uniform_enough() -> None:
    # Pearson's statistic of where each of 12 places goes under 4,000 keys; 132 degrees of freedom,
    # doubly stochastic: (12 - 1) ** 2 = 121 of them free. Its 99.99 % quantile is 185.
    size, keys = 12, 4_000
    counts = np.zeros((size, size))
    for key in range(keys):
        for place in range(size):
            counts[place, permuted(place, size, key * 7919)] += 1
    expected = keys / size
    assert ((counts - expected) ** 2 / expected).sum() < scipy.stats.chi2.ppf(0.9999, 121)
    # All 120 orders of five, under 12,000 keys, likewise.
    orders = Counter(
        tuple(permuted(place, 5, key * 104729) for place in range(5)) for key in range(12_000)
    )
    assert len(orders) == 120
    statistic = sum((count - 100) ** 2 / 100 for count in orders.values())
    assert statistic < scipy.stats.chi2.ppf(0.9999, 119)


def test_neighbours_part() -> None:
    # In a random order of n, neighbours go n / 3 apart on average, with a deviation of 0.236 n.
    size = 10_007
    gaps = [
        abs(permuted(place, size, 5) - permuted(place + 1, size, 5)) for place in range(size - 1)
    ]
    assert np.mean(gaps) / size == pytest.approx(1 / 3, abs=5 * 0.236 / size**0.5)


def test_windows_are_those_that_records_come_from() -> None:
    sizes = [3, 0, 5, 2, 4, 0, 6]
    order = Order(sizes, seed=2, window=3)
    place = 4
    for end, shards in islice(order.windows(place), 7):
        assert {order.record(within)[0] for within in range(place, end)} <= set(shards)
        place = end
    assert place > 2 * sum(sizes)


def test_shuffling_is_uniform_enough() -> None:
    # The mean of 1,000 places of record 0 in 100 is 49.5, within five standard errors.
    places = [
        next(p for p in range(100) if Order([100], seed=s).record(p) == (0, 0)) for s in range(1000)
    ]
    assert sum(places) / 1000 == pytest.approx(49.5, abs=5 * 28.9 / 1000**0.5)


@given(
    shards=BUCKETED,
    seed=st.integers(0, 2**40),
    window=WINDOW,
    ranks=st.integers(1, 16),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
)
@settings(deadline=None)
def test_every_step_is_of_one_bucket_and_every_record_comes(
    shards: list[tuple[int, int]],
    seed: int,
    window: int | None,
    ranks: int,
    batch_size: int,
    accumulation: int,
) -> None:
    step = ranks * batch_size * accumulation
    order = bucketed(shards, seed, window, step)
    if len({bucket for size, bucket in shards if size}) == 1:
        step = 1  # every record exactly once
    place = 0
    for epoch in range(2):
        met: list[int] = []
        for end, mixed in order.windows(place):
            records = [order.record(within) for within in range(place, end)]
            for first in range(0, len(records), step):
                assert len({shards[shard][1] for shard, _ in records[first : first + step]}) == 1
            times = Counter(records)
            for bucket in {shards[shard][1] for shard in mixed}:
                own = [(k, i) for k in mixed if shards[k][1] == bucket for i in range(shards[k][0])]
                filled = sum(times[record] for record in own)
                assert filled == -(-len(own) // step) * step
                # Wrapping around: no record comes twice before all have come once.
                for record in own:
                    assert times[record] in (filled // len(own), -(-filled // len(own)))
            assert set(times) == {(k, i) for k in mixed for i in range(shards[k][0])}
            met += mixed
            place = end
            if place == order.start(epoch + 1):
                break
        # A window without a record has no place, so that it may not be seen.
        assert len(met) == len(set(met))
        assert {k for k, (size, _) in enumerate(shards) if size} <= set(met)
        assert order.epochs(place) == epoch + 1


@given(shards=BUCKETED, seed=st.integers(0, 2**40), window=WINDOW, data=st.data())
def test_a_place_among_buckets_needs_no_history(
    shards: list[tuple[int, int]], seed: int, window: int | None, data: st.DataObject
) -> None:
    order = bucketed(shards, seed, window)
    places = order.start(3)
    expected = [order.record(place) for place in range(places)]
    place = data.draw(st.integers(0, places - 1))
    assert bucketed(shards, seed, window).record(place) == expected[place]
    epoch, place_in_epoch = order.epoch(place)
    assert order.start(epoch) + place_in_epoch == place < order.start(epoch + 1)


@given(
    sizes=SIZES,
    seed=st.integers(0, 2**40),
    window=WINDOW,
    bucket=st.integers(0, 3),
    group=st.integers(1, 16),
)
def test_one_bucket_changes_nothing(
    sizes: list[int], seed: int, window: int | None, bucket: int, group: int
) -> None:
    plain = Order(sizes, seed=seed, window=window)
    order = bucketed([(size, bucket) for size in sizes], seed, window, group)
    places = range(2 * sum(sizes))
    assert [order.record(place) for place in places] == [plain.record(place) for place in places]
    assert [order.epoch(place) for place in places] == [
        divmod(place, sum(sizes)) for place in places
    ]
    assert order.group == 1


def test_buckets_come_in_turns_that_seed_and_epoch_change() -> None:
    # Three buckets of 40 groups each: runs of one bucket are short, 1.5 groups on average.
    order = bucketed([(40, k % 3) for k in range(12)], seed=0)
    turns = [order.record(4 * group)[0] % 3 for group in range(240)]
    changes = sum(turn != following for turn, following in pairwise(turns[:120]))
    assert changes == pytest.approx(119 * 2 / 3, abs=5 * (119 * 2 / 9) ** 0.5)
    assert turns[:120] != turns[120:]
    other = bucketed([(40, k % 3) for k in range(12)], seed=1)
    assert turns[:120] != [other.record(4 * group)[0] % 3 for group in range(120)]


def test_threads_see_the_same_buckets() -> None:
    shards = [(3 + k % 5, k % 3) for k in range(20)]
    order = bucketed(shards, seed=5, window=4)
    places = list(range(0, order.start(40), 7))
    expected = [order.record(place) for place in places]
    fresh = bucketed(shards, seed=5, window=4)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.record, places[::-1])) == expected[::-1]
