"""Claims: who waits for whom, and that it is said."""

import fcntl
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from common import claim

LONG_S = 60.0


def killed_with_a_claim(path: Path) -> None:
    """Leave a claim of a process that has ended, as SIGKILL does."""

    def claims() -> None:
        with claim.alone(path, LONG_S):
            os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=claims)
    process.start()
    process.join()
    assert path.exists()


def test_a_dead_process_of_this_machine_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "claim"
    killed_with_a_claim(path)
    before = time.monotonic()
    with claim.alone(path, LONG_S):
        assert path.exists()
    assert time.monotonic() - before < LONG_S / 2
    assert not path.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["boot", "namespace", "empty"])
def test_a_process_elsewhere_is_waited_for_and_that_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    monkeypatch.setattr(claim, "SILENT_S", 0.05)
    path = tmp_path / "claim"
    killed_with_a_claim(path)
    boot, namespace, number = path.read_text().split()
    found = {
        "boot": f"other {namespace} {number}\n",
        "namespace": f"{boot} pid:[1] {number}\n",
        "empty": "",
    }
    path.write_text(found[change])
    before = time.monotonic()
    with claim.alone(path, 0.3):
        assert time.monotonic() - before >= 0.3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: another process made this file")
    assert "has not changed for 0.3 s" in line


def test_a_claim_that_was_made_meanwhile_stays(tmp_path: Path) -> None:
    """Two find a claim of nobody; the slower one must not remove what the quicker one makes."""
    path = tmp_path / "claim"
    killed_with_a_claim(path)
    slower = threading.Thread(target=claim._removed, args=(path,))
    with path.open() as quicker:
        fcntl.flock(quicker, fcntl.LOCK_EX)
        slower.start()
        time.sleep(0.2)  # until it has opened the file
        path.unlink()
        path.write_text("the quicker one's")
    slower.join()
    assert path.read_text() == "the quicker one's"


def test_a_live_process_is_waited_for(tmp_path: Path) -> None:
    path, order = tmp_path / "claim", []
    begun = threading.Event()

    def first() -> None:
        with claim.alone(path, LONG_S):
            begun.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(LONG_S)
    with claim.alone(path, LONG_S):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
