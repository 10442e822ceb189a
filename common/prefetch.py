"""Preparing items ahead of time, in threads, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], lead: int
) -> Generator[Result, None, None]:
    """Yield work(item) for each item, computed up to `lead` items ahead of the consumer.

    Items are taken in the consumer's thread. When the consumer stops, work not begun is dropped.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > lead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
