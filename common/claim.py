"""One process at a time, on any disk and any machine, by a file that only one can make."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click

# Others hold a claim for a second or less; who waits longer is told so.
SILENT_S = 1.0
BOOT, NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


@contextlib.contextmanager
def alone(path: Path, abandoned_after_s: float) -> Iterator[None]:
    """Keep other processes that claim the same file waiting.

    A killed process leaves its claim behind. One of this machine that no longer runs is not waited
    for; otherwise nobody can tell, so the next process waits, says so, and takes its place.

    Args:
        path: of the claim, a file that one process only can make.
        abandoned_after_s: seconds after which a claim that has not changed counts as left behind.
    """
    seen, since, said = None, time.monotonic(), False
    while True:
        try:
            with path.open("x") as file:
                file.write(_process(os.getpid()))
            break
        except FileExistsError:
            waited = time.monotonic() - since
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if (claim := (status.st_ino, status.st_mtime_ns)) != seen:
                    seen, since = claim, time.monotonic()
                elif waited > abandoned_after_s:
                    path.unlink()
                    continue
                elif _is_of_nobody(path.read_text("utf-8", "replace")) and _removed(path):
                    continue
                elif waited > SILENT_S and not said:
                    said = True
                    click.echo(
                        f"{path}: another process made this file, and may be at work; waiting "
                        f"until it is gone, or has not changed for {abandoned_after_s:g} s",
                        err=True,
                    )
            time.sleep(0.01)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def renew(path: Path) -> None:
    """Change one's own claim, so that none who waits takes it for left behind."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)


def _removed(path: Path) -> bool:
    """Remove a claim of nobody, unless another process of this machine was quicker.

    Returns:
        Whether the file system has locks, without which a claim made meanwhile might be removed.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return False
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            path.unlink()
    return True


def _process(number: int) -> str:
    """Return what names a process of this machine; "" where that cannot be told.

    Hosts and containers may share a name: Linux tells them apart by boot and by process namespace.
    """
    try:
        return f"{BOOT.read_text('utf-8').strip()} {NAMESPACE.readlink()} {number}\n"
    except OSError:
        return ""


def _is_of_nobody(claim: str) -> bool:
    """Tell whether a claim is of a process of this machine that no longer runs."""
    number = claim.rpartition(" ")[2].strip()
    if not number.isdecimal() or claim != _process(int(number)):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False
