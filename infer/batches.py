"""Batches of pictures: the pipeline draws only pictures of one size together."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")


def split_into_batches(
    items: Sequence[T], size: Callable[[T], tuple[int, int]], batch_size: int
) -> list[list[T]]:
    """Return batches of neighbouring items of one size, in order.

    Args:
        items: what is to be drawn.
        size: returns an item's width and height.
        batch_size: largest number of items in a batch.
    """
    batches = []
    for _, group in groupby(items, key=size):
        same_size = list(group)
        batches += [
            same_size[start : start + batch_size] for start in range(0, len(same_size), batch_size)
        ]
    return batches
