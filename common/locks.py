"""Locks of open files among processes, as far as the file's disk has them."""

import errno
import fcntl
from typing import IO, Any

# What file systems without locks answer: Lustre without `flock`, NFS without a lock server.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(file: IO[Any] | int, operation: int) -> bool:
    """Lock an open file, until it is closed or the process ends.

    Args:
        file: or its descriptor. NFS wants it writable for LOCK_EX and readable for LOCK_SH.
        operation: as `fcntl.flock` takes it.

    Returns:
        Whether it is locked; not where its disk has no locks.

    Raises:
        BlockingIOError: with LOCK_NB: another process holds a lock.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
