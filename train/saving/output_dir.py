"""The output folder belongs to one run at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from common.errors import ConfigError
from common.locks import lock
from shards.format.manifest import MANIFEST
from train.processes.agreement import main_decides

LOCK_FILE = "train.lock"


@contextlib.contextmanager
def output_dir_locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder for the length of a block; make it if it is missing.

    Every process must call this; the main one holds the lock. It is the operating system's, so it
    ends with the process, however that ends. A disk without locks keeps nobody out.

    Raises:
        ConfigError: another run holds the folder, or it is something else; on all processes.
        OSError: the folder cannot be made; on all processes.
    """
    with contextlib.ExitStack() as held:
        main_decides(lambda: _lock(folder, held))
        yield


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    if (folder / MANIFEST).is_file():  # a cache, whose files the run would replace
        raise ConfigError(f"--output-dir {folder}: holds a cache; give another folder.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; give a folder.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if is_new:
        held.callback(_remove_if_empty, folder)
    path = folder / LOCK_FILE
    while True:
        file = held.enter_context(path.open("a+", encoding="utf-8"))
        if not _try_lock(file, folder):
            held.callback(path.unlink, missing_ok=True)
            return
        # The run before may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
    held.callback(path.unlink, missing_ok=True)
    with contextlib.suppress(OSError):  # a full disk; the name is for the message alone
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def _try_lock(file: IO[str], folder: Path) -> bool:
    """Lock an open file; return False where the disk has no locks, and say so.

    Raises:
        ConfigError: another run holds it.
    """
    try:
        locked = lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ConfigError(
            f"--output-dir {folder}: another run writes to it ({file.read() or 'just started'}). "
            "Wait until it has ended, or give another folder."
        ) from error
    if not locked:
        click.echo(f"train: {folder}: this disk has no file locks; start no second run in it")
    return locked


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
