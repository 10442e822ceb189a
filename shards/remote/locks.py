"""Locks among the processes that share a folder, as far as its disk has them."""

import errno
import fcntl
from pathlib import Path

import click

# What file systems without locks answer: Lustre without `flock`, NFS without a lock server.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_said: set[Path] = set()


def lock(descriptor: int, operation: int, folder: Path) -> bool:
    """Lock an open file; return False where the disk has no locks, and say so once a folder.

    Args:
        descriptor: of the file. NFS wants it writable for LOCK_EX and readable for LOCK_SH.
        operation: as `fcntl.flock` takes it.
        folder: the shared folder, for the message.

    Raises:
        BlockingIOError: with LOCK_NB: another process holds a lock.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if folder not in _said:
            _said.add(folder)
            click.echo(
                f"{folder}: this disk has no file locks; processes may fetch a shard twice, and "
                "several machines must not share the folder: give each its --local-cache-dir",
                err=True,
            )
        return False
    return True
