"""Ctrl-C and SIGTERM: a run finishes its current shard or step, then ends."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

Received = Callable[[], signal.Signals | None]
StopCheck = Callable[[], None]


class InterruptedRun(Exception):
    """The run ends because of a signal; finished work is kept."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.exit_code = 128 + received  # as shells report processes ended by a signal


@contextlib.contextmanager
def signals_noted(unit: str) -> Iterator[Received]:
    """Give a function that returns the signal received so far, or None.

    A second signal has its usual effect. Does nothing outside the main thread, where Python
    handles no signals.

    Args:
        unit: what the run finishes first, for the message "ending after this <unit>".
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        click.echo(f"\nending after this {unit}; once more to end at once", err=True)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()


@contextlib.contextmanager
def stop_between_shards() -> Iterator[StopCheck]:
    """Give a function to call between shards; it raises InterruptedRun after a signal."""
    with signals_noted("shard") as received:

        def check() -> None:
            if number := received():
                raise InterruptedRun(number)

        yield check
