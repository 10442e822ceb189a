"""Computing results ahead of their use, in threads, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], lead: int
) -> Generator[Result, None, None]:
    """Yield work(item) for each item in order, computed up to `lead` items ahead.

    Items are taken in the consumer's thread. If the consumer stops, work that has not begun is
    cancelled.
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
