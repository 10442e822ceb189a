"""Off a terminal progress is printed in lines, at most one in ten seconds."""

import contextlib
import os
import pty
import sys
import termios

import pytest

from common import progress
from common.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_counts_are_printed_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(100, "image", "images", initial=20) as bar:
        for _ in range(15):
            clock[0] += 1
            bar.update(2)
    # 20 images in 10 s, so 60 take 30 s.
    assert capsys.readouterr().err == "images: 40 of 100 images, 2 images/s, 00:30 left\n"


def test_values_are_printed_at_once_and_then_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(
        1000, "step", "train", rate_unit="samples", rate_factor=4, with_values=True
    ) as bar:
        for step in range(1, 31):
            clock[0] += 2
            bar.update()
            if step % 2 == 0:
                bar.show({"loss": f"{step / 8:.4f}"})
    lines = capsys.readouterr().err.splitlines()
    # One step in two seconds, of four samples; 998 steps are 1996 s. Then each multiple of four
    # seconds that is ten or more after the last line: 4, 16, 28, 40, 52 s.
    assert lines[0] == "train: 2 of 1000 steps, loss 0.2500, 2 samples/s, 33:16 left"
    assert [line.split(",")[0] for line in lines] == [
        f"train: {step} of 1000 steps" for step in (2, 8, 14, 20, 26)
    ]


def test_the_last_step_has_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(12, "step", "train", with_values=True) as bar:
        for _ in range(12):
            clock[0] += 1.1
            bar.update()
            bar.show({"loss": "1"})
    # The first, the first ten seconds after it, and the last.
    with Progress(12, "image", "images") as bar:
        for _ in range(12):
            clock[0] += 1
            bar.update()
    with Progress(3, "image", "a short pass") as bar:
        bar.update(3)
    counts = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == [
        *(f"train: {step} of 12 steps" for step in (1, 11, 12)),
        *(f"images: {image} of 12 images" for image in (10, 12)),
    ]


def test_one_process_prints_for_all(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "image", "images", quiet=True) as bar:
        clock[0] += 60
        bar.update()
        bar.show({"loss": "1"})
    assert capsys.readouterr() == ("", "")


def read_all(terminal: int) -> str:
    """Return what was written to a terminal whose other end is closed; it may arrive in parts."""
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as stream:
        while part := stream.read(10_000):
            shown += part
    return shown.decode()


def test_a_terminal_has_a_bar_and_no_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress(10, "image", "images") as bar:
            bar.update(4)
            bar.show({"loss": "0.5"})
    shown = read_all(ours)
    assert "40%" in shown
    assert "loss=0.5" in shown
    assert "of 10 images" not in shown
