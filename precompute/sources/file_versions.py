"""Reading files, and versions that show without reading whether a file may have changed."""

import os
import stat
import time
from pathlib import Path

from xxhash import xxh3_128_digest

# Two writes within a tick of the file system's clock leave the same times; git waits for the same
# reason.
SETTLED_NS = 2 * 10**9


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: missing, unreadable, not a file, or a name that no file can have.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  (a name with NUL has no Path.stat)
        if stat.S_ISDIR(mode):
            raise OSError("is a directory")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise OSError("is not a regular file")
        return Path(path).read_bytes()
    except ValueError as error:
        raise OSError(f"not a file name: {error}") from error


def file_version(path: str | Path) -> bytes | None:
    """Return 16 bytes that change when a file's bytes may have changed, without reading it.

    Args:
        path: absolute, of the file.

    Returns:
        None if there is no such file, or if it changed too recently for its times to show it.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return stat_version(status, str(path)) if stat.S_ISREG(status.st_mode) else None


def stat_version(status: os.stat_result, *names: str) -> bytes | None:
    """Return the version of a file, or of a part of it, from the file's status.

    Args:
        status: of the file.
        names: the file's absolute path, and the name of the part.

    Returns:
        None if the file changed too recently for its times to show it.
    """
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
        return None
    return names_version(status.st_size, status.st_mtime_ns, status.st_ctime_ns, *names)


def names_version(*parts: str | int) -> bytes:
    """Return a digest of names and numbers, 16 bytes."""
    return xxh3_128_digest("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"))
