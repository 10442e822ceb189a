"""Reading images from disks that fail now and then, such as network disks."""

import errno
import time
from collections.abc import Callable

from common.errors import RunError
from precompute.sources.source import Kind, Source, printable

# Of a file that is missing, or is not what it should be. All others, such as EIO and ESTALE, are
# the disk's: the file may be all right.
FILES_OWN = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENXIO,
    errno.ENODEV,
}
WAITS_S = (0.1, 0.5, 2.0)


def read_patiently(source: Source, index: int, kind: Kind) -> bytes:
    """Return the bytes of a row's image; wait and try again if the disk fails.

    Raises:
        OSError: the file is at fault: it is missing, unreadable or no file.
        RunError: the disk failed several times. The row is not bad for that.
    """

    def name() -> str:
        (row,) = source.rows([index])
        image = row.image if kind == "image" else row.conditioning_image
        return f"{row.where}, {printable(image) or kind}"

    return patiently(lambda: source.read(index, kind), name)


def patiently(read: Callable[[], bytes], name: Callable[[], str]) -> bytes:
    """Return what a function reads; wait and try again if the disk fails.

    Args:
        read: the function.
        name: returns what is read, in words.

    Raises:
        OSError: the file is at fault: it is missing, unreadable or no file.
        RunError: the disk failed several times. The row is not bad for that.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None or error.errno in FILES_OWN:
                raise
            failure = error
        if wait_s is not None:
            time.sleep(wait_s)
    raise RunError(
        f"{name()}: {failure.strerror or failure}, "
        f"{len(WAITS_S) + 1} times. That is the disk's fault, so the row is not left out. "
        "Run again when the disk is well, finished shards are kept; or remove the row."
    ) from failure
