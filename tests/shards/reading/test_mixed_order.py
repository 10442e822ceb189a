"""The order of several sets: exact proportions anywhere, every record of a set once a pass."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reading.mixed_order import MixedOrder, set_seed, unmixed, whole_weights
from shards.reading.order import Order
from tests.shards.format.test_format import page_mix, page_order


@st.composite
def mixes(draw: st.DrawFn) -> MixedOrder:
    """Orders of 1 to 5 sets of 1 to 200 records, in shards of 1 or 2 buckets, with weights."""
    seed, window = draw(st.integers(0, 2**40)), draw(st.none() | st.integers(1, 6))
    group = draw(st.integers(1, 8))
    orders, buckets = [], set()
    for number in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 200))
        num_shards = draw(st.integers(1, min(count, 5)))
        sizes = [count // num_shards + (shard < count % num_shards) for shard in range(num_shards)]
        of_shards = draw(st.lists(st.integers(0, 1), min_size=num_shards, max_size=num_shards))
        buckets |= set(of_shards)
        orders.append(
            Order(
                sizes,
                seed=set_seed(seed, number),
                window=window,
                shard_buckets=of_shards,
                group=group,
            )
        )
    weights = [draw(st.integers(1, 12)) for _ in orders]
    return MixedOrder(orders, weights, group=group if len(buckets) > 1 else 1)


@given(mix=mixes(), start=st.integers(0, 300), passes=st.integers(1, 3))
@settings(deadline=None)
def test_each_set_has_its_weight_of_any_stretch(mix: MixedOrder, start: int, passes: int) -> None:
    stretch = sum(mix.weights) * passes * mix.group
    first = start * mix.group
    counts = Counter(mix.locate(place)[0] for place in range(first, first + stretch))
    expected = {set_: weight * passes * mix.group for set_, weight in enumerate(mix.weights)}
    assert counts == expected


@given(mix=mixes(), count=st.integers(1, 300))
@settings(deadline=None)
def test_a_sets_own_places_come_one_after_the_other(mix: MixedOrder, count: int) -> None:
    """So every record of a set comes once before any comes again, as its own order has it."""
    come = [0] * len(mix.orders)
    for place in range(count):
        assert [mix.count(number, place) for number in range(len(come))] == come
        number, place_in_set = mix.locate(place)
        assert place_in_set == come[number]
        assert mix.record(place) == (number, *mix.orders[number].record(place_in_set))
        come[number] += 1


@given(mix=mixes(), place=st.integers(0, 2000))
@settings(deadline=None)
def test_shares_are_never_far_from_their_weights(mix: MixedOrder, place: int) -> None:
    """Each halving rounds once, and 5 sets are halved 3 times at most."""
    groups, left = divmod(place, mix.group)
    for number, weight in enumerate(mix.weights):
        share = Fraction(weight, sum(mix.weights)) * groups * mix.group
        assert abs(mix.count(number, place) - share) <= 1.5 * mix.group + left


@given(mix=mixes(), ranks=st.integers(1, 16), batch=st.integers(1, 3), resumed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_any_number_of_ranks_reads_the_same_from_any_place(
    mix: MixedOrder, ranks: int, batch: int, resumed: int
) -> None:
    again = MixedOrder(mix.orders, mix.weights, group=mix.group)
    step = ranks * batch
    alone = [mix.record(place) for place in range(resumed * step, (resumed + 2) * step)]
    shared = [
        again.record(resumed * step + number * step + rank * batch + row)
        for number in range(2)
        for rank in range(ranks)
        for row in range(batch)
    ]
    assert shared == alone


@given(mix=mixes(), place=st.integers(0, 200))
@settings(deadline=None)
def test_a_step_is_of_one_set_and_bucket_where_there_are_several(
    mix: MixedOrder, place: int
) -> None:
    first = place // mix.group * mix.group
    records = [mix.record(each) for each in range(first, first + mix.group)]
    assert len({(number, mix.orders[number].buckets[shard]) for number, shard, _ in records}) == 1


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    window=st.none() | st.integers(1, 4),
    place=st.integers(0, 100),
)
def test_a_single_set_is_in_its_own_order(
    sizes: list[int], seed: int, window: int | None, place: int
) -> None:
    order = Order(sizes, seed=set_seed(seed, 0), window=window)
    assert unmixed(order).record(place) == (
        0,
        *Order(sizes, seed=seed, window=window).record(place),
    )
    assert unmixed(order).epochs(place) == order.epochs(place)
    assert unmixed(order).start(3) == order.start(3)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("weights", [[1], [3, 1], [2, 2, 5], [1, 1, 1, 1], [7, 1, 2, 4, 3]])
def test_any_place_at_once_is_as_the_page_counts_to_it(weights: list[int], group: int) -> None:
    sizes = [[3, 4], [5], [2, 2, 1], [6], [4, 4]][: len(weights)]
    seeds = [set_seed(9, number) for number in range(len(weights))]
    orders = [
        Order(each, seed=seed, window=2, group=group)
        for each, seed in zip(sizes, seeds, strict=True)
    ]
    mix = MixedOrder(orders, weights, group=group)
    page = page_mix(
        [
            page_order(each, [0] * len(each), seed, 2, group)
            for each, seed in zip(sizes, seeds, strict=True)
        ],
        weights,
        group,
    )
    assert [mix.record(place) for place in range(120)] == list(islice(page, 120))


def test_an_epoch_ends_when_each_set_has_come() -> None:
    # 12 and 5 records, three of the one to one of the other: the second takes 20 places.
    mix = MixedOrder([Order([12], seed=0), Order([5], seed=1)], [3, 1])
    assert mix.start(0) == 0
    assert mix.start(1) == 20
    assert [mix.count(number, 20) for number in (0, 1)] == [15, 5]
    assert mix.epochs(20) == 1
    assert mix.epochs(17) < 1
    # By repeats: 2 x 12 and 1 x 5.
    repeated = MixedOrder([Order([12], seed=0), Order([5], seed=1)], [24, 5])
    assert [repeated.start(epoch) for epoch in (1, 2, 3)] == [29, 58, 87]


def test_two_sets_of_the_same_images_come_in_different_orders() -> None:
    one, other = (Order([50], seed=set_seed(3, number)) for number in (0, 1))
    assert [one.record(place) for place in range(50)] != [other.record(p) for p in range(50)]


def test_weights_keep_their_proportions() -> None:
    assert whole_weights([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert whole_weights([Fraction(3), Fraction("1.5"), Fraction(1)]) == [6, 3, 2]
    assert MixedOrder([Order([1], seed=0)] * 2, [600, 200]).weights == [3, 1]


def test_a_range_leaves_out_what_is_before_and_behind_it() -> None:
    # Records 3 to 9 of shards of 4, 4 and 4.
    order = Order([1, 4, 2], seed=0, skipped=[3, 0, 0])
    records = sorted(order.record(place) for place in range(7))
    assert records == [(0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
