"""Work shared out to the cores, in processes that are copies of this one."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# What a process of `map_in_processes` computes: a function and its arguments, set when it starts.
_work: tuple[Callable[[Any], Any], Sequence[Any]]


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield a function's results in the order of the items, computed on all cores at once.

    Where a process cannot be copied safely, that is anywhere but on Linux and while other threads
    work, and for a single item or core, they are computed here. Close the iterator to stop early:
    nothing goes on after it.

    Args:
        function: must not use the GPU; its results and errors are pickled.
        items: arguments, one a call.

    Raises:
        Exception: what the function raised, when its result is due.
    """
    count = min(len(items), num_cores())
    if count < 2 or sys.platform != "linux" or _others_work():
        yield from map(function, items)
        return
    # Copies need not import torch again, which takes longer than most of what is asked.
    context = multiprocessing.get_context("fork")
    # The pool ends them by SIGTERM, which a handler of ours, copied too, would only note.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        pool = context.Pool(count, _begin, (function, items))
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
    with pool:
        yield from pool.imap(_compute, range(len(items)))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _others_work() -> bool:
    """Return whether other threads work, whose locks would be copied without them.

    Those that only wait, such as tqdm's, are daemons.
    """
    return threading.current_thread() is not threading.main_thread() or any(
        thread is not threading.main_thread() and not thread.daemon
        for thread in threading.enumerate()
    )


def _begin(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _work
    _work = function, items
    # Ctrl-C reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # the threads of OpenMP are not copied


def _compute(index: int) -> Any:
    function, items = _work
    return function(items[index])
