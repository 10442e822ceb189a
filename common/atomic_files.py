"""Files that are written whole or not at all, even if power fails in between."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path, num_bytes: int = 0) -> Iterator[IO[bytes]]:
    """Give a file under a temporary name; on success it is synced and renamed to `path`.

    On any exception the temporary file goes and `path` is as it was.

    Args:
        path: the file to write or replace.
        num_bytes: about how large it will be, if that is known.

    Raises:
        OSError: it cannot be written, or will not fit; with the path and the space needed.
    """
    # No other process has this name, on this machine or another that shares the disk.
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
    """Refuse to begin what does not fit the disk.

    Raises:
        OSError: with the folder and the space needed.
    """
    if num_bytes > shutil.disk_usage(folder).free:
        raise cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), num_bytes)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to its own name, so that it is there whole even if power fails now."""
    _sync(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def cannot_write(path: Path, error: OSError, num_bytes: int) -> OSError:
    """Return an error that names the file and, where the disk is full, the space it takes.

    Args:
        path: the file that was to be written.
        error: why it could not.
        num_bytes: about how large it would be; 0 if that is not known.
    """
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        needed = f"about {num_bytes / 1e6:.1f} MB needed, " if num_bytes else ""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
            reason += f" ({needed}{free / 1e6:.1f} MB free); make room and run again"
    return OSError(error.errno, f"cannot write: {reason}", str(path))


def sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder do so by themselves."""
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
