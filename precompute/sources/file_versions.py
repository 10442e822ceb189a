"""Image files: their bytes, and versions that tell whether they may have changed."""

import os
import stat
import time
from pathlib import Path

from xxhash import xxh3_128_digest

# A file that is written twice within its clock's tick keeps its times; git waits likewise.
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
        if not stat.S_ISREG(mode):  # to open a pipe is to wait for whoever writes to it
            raise OSError("is not a regular file")
        return Path(path).read_bytes()
    except ValueError as error:
        raise OSError(f"not a file name: {error}") from error


def file_version(path: str | Path) -> bytes | None:
    """Return 16 bytes that change when a file's bytes may have changed, without reading it.

    Args:
        path: absolute, of the file.

    Returns:
        None if there is no such file, or if it changed so lately that its times do not tell.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return stat_version(found, str(path)) if stat.S_ISREG(found.st_mode) else None


def stat_version(found: os.stat_result, *names: str) -> bytes | None:
    """Return the version of something in a file, from the file's status.

    Args:
        found: status of the file.
        names: the file's absolute path, and what further names the bytes within it.

    Returns:
        None as `file_version`.
    """
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED_NS:
        return None
    return names_version(found.st_size, found.st_mtime_ns, found.st_ctime_ns, *names)


def names_version(*parts: str | int) -> bytes:
    """Return 16 bytes that stand for names and numbers in their order."""
    return xxh3_128_digest("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"))
