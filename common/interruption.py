"""Ctrl-C and SIGTERM: a run finishes its current shard or step, then ends."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Received = Callable[[], signal.Signals | None]
StopCheck = Callable[[], None]

# A launcher passes a terminal's Ctrl-C on to processes that the terminal has told already.
SAME_PRESS_S = 2.0
HOW_TO_END_AT_ONCE = {
    signal.SIGINT: "once more to end at once (Ctrl-C)",
    signal.SIGTERM: f"Ctrl-C twice, {SAME_PRESS_S:.0f} seconds apart, ends it at once",
}


def exit_code(received: signal.Signals) -> int:
    """Return the exit code of a run that a signal ended, as shells report it."""
    return 128 + received


class InterruptedRun(Exception):
    """The run ends because of a signal; finished work is kept."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.exit_code = exit_code(received)


@contextlib.contextmanager
def signals_noted(unit: str) -> Iterator[Received]:
    """Give a function that returns the first signal received so far, or None.

    SIGTERM may come any number of times: Slurm sends it to every process, and a launcher that
    receives it sends it on. Only a second Ctrl-C has its usual effect. Does nothing outside the
    main thread, where Python handles no signals.

    Args:
        unit: what the run finishes first, for the message "ending after this <unit>".
    """
    received: list[signal.Signals] = []
    pressed_at: list[float] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) == 1:
            how = HOW_TO_END_AT_ONCE[received[0]]
            _say(f"\nending after this {unit}; {how}\n")
        if number == signal.SIGINT:
            pressed_at.append(time.monotonic())
            if pressed_at[-1] - pressed_at[0] >= SAME_PRESS_S:
                restore()
                signal.raise_signal(number)

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


def _say(text: str) -> None:
    """Write to stderr from a signal handler, which may have interrupted another write to it."""
    with contextlib.suppress(OSError):  # the terminal or the launcher is gone
        os.write(2, text.encode())


@contextlib.contextmanager
def stop_between_shards() -> Iterator[StopCheck]:
    """Give a function to call between shards; it raises InterruptedRun after a signal."""
    with signals_noted("shard") as received:

        def check() -> None:
            if number := received():
                raise InterruptedRun(number)

        yield check
