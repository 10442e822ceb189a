"""Taking items in batches."""

from collections.abc import Iterator, Sequence
from typing import Any


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield `items` in runs of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
