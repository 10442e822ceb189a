"""Ctrl-C and SIGTERM: the shard in hand is finished first."""

import contextlib
from collections.abc import Callable, Iterator
from signal import Signals

from shards.interruption import signals_noted

Check = Callable[[], None]


class InterruptedRun(Exception):
    """The user or the system wants the run to end; what is finished is kept."""

    def __init__(self, received: Signals) -> None:
        super().__init__(received.name)
        self.exit_code = 128 + received  # as a shell reports a process that a signal ended


@contextlib.contextmanager
def between_shards() -> Iterator[Check]:
    """Give a function to call between shards, which ends the run if a signal has come."""
    with signals_noted("shard") as received:

        def check() -> None:
            if signal := received():
                raise InterruptedRun(signal)

        yield check
