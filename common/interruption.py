"""Ctrl-C and SIGTERM: noted, so that what is in hand can be finished first."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

Received = Callable[[], signal.Signals | None]
Check = Callable[[], None]


class InterruptedRun(Exception):
    """The user or the system wants the run to end; what is finished is kept."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.exit_code = 128 + received  # as a shell reports a process that a signal ended


@contextlib.contextmanager
def signals_noted(unit: str) -> Iterator[Received]:
    """Give a function that says which signal has come, or None.

    A second signal does what it would without this. Outside the main thread, where Python takes no
    signals, nothing is changed.

    Args:
        unit: what is finished first, as in "ending after this step".
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
def between_shards() -> Iterator[Check]:
    """Give a function to call between shards, which ends the run if a signal has come."""
    with signals_noted("shard") as received:

        def check() -> None:
            if came := received():
                raise InterruptedRun(came)

        yield check
