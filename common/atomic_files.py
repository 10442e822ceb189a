"""Writing files completely or not at all, even if the power fails in between."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path, num_bytes: int = 0) -> Iterator[IO[bytes]]:
    """Open a file under a temporary name; on success, sync it and rename it to `path`.

    On any exception the temporary file is deleted and `path` stays as it was.

    Args:
        path: the file to write or replace.
        num_bytes: its approximate size; 0 if unknown.

    Raises:
        OSError: the file cannot be written or does not fit; names the path and the space needed.
    """
    # Unique across processes, and across machines that share the disk.
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        if num_bytes > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("wb") as file:
            yield file
            file.flush()
        move_into_place(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error, num_bytes) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that a number of bytes fits the disk of a folder.

    Raises:
        OSError: it does not fit; names the folder and the space needed.
    """
    if num_bytes > shutil.disk_usage(folder).free:
        raise cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), num_bytes)


def give_usual_permissions(path: Path) -> None:
    """Give a file the permissions of any other that this process writes.

    The safetensors library lets only the owner read its files.
    """
    probe = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to its final name, so that it survives a power failure.

    A file replaces an earlier one. A folder is synced with all in it; its name must be free.
    """
    if temporary.is_dir():
        sync_tree(temporary)
    else:
        _sync(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def cannot_write(path: Path, error: OSError, num_bytes: int) -> OSError:
    """Return an error that names the file and, if the disk is full, the space needed.

    Args:
        path: the file that could not be written.
        error: the reason.
        num_bytes: the file's approximate size; 0 if unknown.
    """
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        needed = f"about {num_bytes / 1e6:.1f} MB needed, " if num_bytes else ""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
            reason += f" ({needed}{free / 1e6:.1f} MB free); make room and run again"
    return OSError(error.errno, f"cannot write: {reason}", str(path))


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power failure."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Sync a folder with all files and folders in it."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
