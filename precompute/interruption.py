"""Ctrl-C and SIGTERM: the shard in hand is finished first."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

Check = Callable[[], None]


class InterruptedRun(Exception):
    """The user or the system wants the run to end; what is finished is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended


@contextlib.contextmanager
def between_shards() -> Iterator[Check]:
    """Give a function to call between shards, which ends the run if a signal has come.

    A second signal does what it would without this. Outside the main thread, where Python takes no
    signals, nothing is changed.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        click.echo("\nending after this shard; once more to end at once", err=True)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def check() -> None:
        if received:
            raise InterruptedRun(received[0])

    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield check
    finally:
        restore()
