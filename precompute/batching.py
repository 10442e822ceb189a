"""Taking items in batches, and preparing them ahead of time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], count: int, lead: int
) -> Iterator[Any]:
    """Yield work(0), work(1), …, computed in threads up to `lead` items ahead of the consumer."""
    pending = [pool.submit(work, index) for index in range(min(lead, count))]
    for index in range(count):
        if index + lead < count:
            pending.append(pool.submit(work, index + lead))
        yield pending.pop(0).result()


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield `items` in runs of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
