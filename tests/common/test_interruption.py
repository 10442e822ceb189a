"""Signals are noted, however often they come; only a Ctrl-C after the first ends a run at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from common import interruption
from common.interruption import InterruptedRun, signals_noted, stop_between_shards


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Have Ctrl-C as on a terminal: processes that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM] * 3,  # Slurm to everybody, then the launcher, then Slurm at the end
        [signal.SIGINT] * 2,  # the terminal to everybody, then the launcher
        [signal.SIGTERM, signal.SIGINT],
        [signal.SIGINT, signal.SIGTERM],
    ],
)
def test_a_signal_that_comes_again_is_no_second_wish(
    numbers: list[signal.Signals], capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in numbers]
    with signals_noted("step") as received:
        assert received() is None
        send(*numbers)
        assert received() is numbers[0]
    assert [signal.getsignal(number) for number in numbers] == before
    errors = capfd.readouterr().err
    assert errors.count("ending after this step") == 1
    assert errors.count("once more to end at once (Ctrl-C)") == 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_later_ends_at_once(
    first: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with signals_noted("step"):
        send(first)
        for later_s in (0, 1.9):
            now[0] += later_s
            send(signal.SIGINT)
        now[0] += 60
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_shards_end_after_sigterms() -> None:
    with stop_between_shards() as check:
        check()
        send(signal.SIGTERM, signal.SIGTERM)
        with pytest.raises(InterruptedRun) as ended:
            check()
    assert ended.value.exit_code == 143


def test_the_message_interrupts_no_other_write() -> None:
    """Python's own stderr refuses to be written to by a handler that interrupts a write."""
    script = """
import os, signal, sys, threading, time
from common.interruption import signals_noted
with signals_noted("step") as received:
    # The main thread stands in a write, since the pipe is full, when the signal comes.
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    print("x" * 300_000, file=sys.stderr)
    print(received().name)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(0.8)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "SIGTERM\n"), errors[-500:]
