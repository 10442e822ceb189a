"""The order of samples of several sets: how places of a run are shared out among the sets' orders.

Sets are woven by weight, without chance: of any stretch of as many places as the weights sum up
to, each set has exactly its weight, wherever the stretch begins. A set's own places come one after
the other, as its `Order` says, so that each of its records comes once before any comes again.

The sets are halved again and again. Of the places that two halves share, the left half has a
weight's share of any prefix, rounded; so where a place belongs, and how many of a set's places come
before it, is computed without a table.

If the sets have records of several buckets, groups of places are woven instead of places: the
samples of an optimiser step are of one bucket, and so of one set.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import gcd, lcm

from xxhash import xxh3_64_intdigest

from shards.reading.order import Order


class MixedOrder:
    """Maps places to records of sets.

    Args:
        orders: of each set, with at least one record.
        weights: of each set, at least 1; a set comes with this frequency.
        group: number of successive places, from any multiple of it on, that belong to one set.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], *, group: int = 1) -> None:
        assert len(orders) == len(weights), "a weight for each set"
        assert min(weights) >= 1, "sets that never come are left out"
        self.orders = list(orders)
        self.weights = [weight // gcd(*weights) for weight in weights]
        # Of a single set any number of places are its own.
        self.group = group if len(self.orders) > 1 else 1
        self._sums = [0, *accumulate(self.weights)]

    def record(self, place: int) -> tuple[int, int, int]:
        """Return (set, shard, index in the shard) of the record at a place."""
        number, place_in_set = self.locate(place)
        return number, *self.orders[number].record(place_in_set)

    def locate(self, place: int) -> tuple[int, int]:
        """Return the set that a place belongs to, and which of the set's own places it is."""
        group, place_in_group = divmod(place, self.group)
        first, last = 0, len(self.orders)
        while last - first > 1:
            middle = (first + last) // 2
            before, after = (self._in_left(first, middle, last, end) for end in (group, group + 1))
            if after > before:
                last, group = middle, before
            else:
                first, group = middle, group - before
        return first, group * self.group + place_in_group

    def count(self, number: int, place: int) -> int:
        """Return how many places before this one belong to a set."""
        group, place_in_group = divmod(place, self.group)
        if place_in_group and self.locate(place)[0] != number:
            place_in_group = 0
        first, last = 0, len(self.orders)
        while last - first > 1:
            middle = (first + last) // 2
            left = self._in_left(first, middle, last, group)
            if number < middle:
                last, group = middle, left
            else:
                first, group = middle, group - left
        return group * self.group + place_in_group

    def _in_left(self, first: int, middle: int, last: int, groups: int) -> int:
        """Return how many of the first groups of sets `first` to `last` are before `middle`."""
        total = self._sums[last] - self._sums[first]
        return ((self._sums[middle] - self._sums[first]) * groups + total // 2) // total

    def start(self, epoch: int) -> int:
        """Return the place before which every set has come `epoch` times.

        It is where the weights put it, which may be a place or two after the first such place.
        """
        return max(
            max(self._first_place(number, due), self._place_by_weight(number, due))
            for number, order in enumerate(self.orders)
            for due in [order.start(epoch)]
        )

    def epochs(self, place: int) -> float:
        """Return how often every set has come at least before a place."""
        return min(
            order.epochs(self.count(number, place)) for number, order in enumerate(self.orders)
        )

    @property
    def num_records(self) -> int:
        """Number of records of all sets."""
        return sum(order.num_records for order in self.orders)

    @property
    def step_group(self) -> int:
        """Number of samples that an optimiser step must have, or 1 where it may have any number."""
        return max(self.group, *(order.group for order in self.orders))

    def _place_by_weight(self, number: int, count: int) -> int:
        groups = -(-count // self.group)
        return -(-groups * self._sums[-1] // self.weights[number]) * self.group

    def _first_place(self, number: int, count: int) -> int:
        """Return the first place before which a set has come in `count` places."""
        low, high = 0, 1
        while self.count(number, high) < count:
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            if self.count(number, middle) < count:
                low = middle + 1
            else:
                high = middle
        return low


def unmixed(order: Order) -> MixedOrder:
    """Return the order of a single set."""
    return MixedOrder([order], [1])


def set_seed(seed: int, number: int) -> int:
    """Return the seed of a set's order: that of the run for the first set.

    The others have seeds of their own: two controls of the same images come in different orders.
    """
    return xxh3_64_intdigest(f"{seed}/set {number}".encode()) if number else seed


def whole_weights(weights: Sequence[Fraction]) -> list[int]:
    """Return weights in the same proportions, without fractions."""
    factor = lcm(*(weight.denominator for weight in weights))
    return [int(weight * factor) for weight in weights]
