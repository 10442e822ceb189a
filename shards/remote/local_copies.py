"""Copies of a remote cache's shards on this machine, in a folder of bounded size.

Several processes may share the folder: of those that need a shard one fetches it, and none removes
a shard that another has open.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import IO

import click

from common.locks import lock
from shards.format import json_files
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.location import OPEN_FILES, OpenFile, ShardId
from shards.remote.folder import RemoteFolder, remove_abandoned

_said: set[Path] = set()


class LocalCopies:
    """Files of a remote cache, fetched when they are needed and removed to make room.

    Args:
        remote: the cache.
        folder: of all remote caches' copies; made if missing.
        name: of this cache's folder in it.
        limit_bytes: size of all tars in `folder` together.

    Attributes:
        changed: lock for `arriving` and the open files; notified when there may be more room.
        arriving: size in bytes of each tar that is being fetched.
    """

    def __init__(self, remote: RemoteFolder, folder: Path, name: str, limit_bytes: int) -> None:
        self.remote = remote
        self.folder = folder
        self.root = folder / name
        self.root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        self.limit_bytes = limit_bytes
        self._parts: dict[Path, dict[str, list[Path]]] = {}
        self.changed = threading.Condition()
        self.arriving: dict[ShardId, int] = {}
        self._open: OrderedDict[ShardId, SharedFile] = OrderedDict()

    def tar_path(self, shard_id: ShardId) -> Path:
        """Return where a shard's tar is, once it has been fetched."""
        folder, shard = shard_id
        return tar_path(self.root / folder, shard)

    def sidecar(self, shard_id: ShardId, sha256: str) -> bytes:
        """Return the bytes of a shard's sidecar; it is fetched if it is not here.

        Raises:
            ShardError: it cannot be fetched.
            OSError: it cannot be written here.
        """
        folder, shard = shard_id
        path = sidecar_path(self.root / folder, shard)
        while True:
            self.fetch(path, None, sha256)
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                data = json_files.read_file(path)
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
                path.unlink()  # damaged here; what is fetched is checked before it gets this name

    def fetch(self, path: Path, size: int | None, sha256: str) -> None:
        """Fetch a file that is not here; one process or thread at a time does so.

        Raises:
            ShardError: it cannot be fetched.
            OSError: it cannot be written here.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(f"{path.suffix}.lock").open("w") as file:
            alone = _lock(file.fileno(), fcntl.LOCK_EX, self.folder)
            if not path.exists():
                if alone:
                    for part in self._left_over(path.parent).pop(path.name, []):
                        part.unlink(missing_ok=True)
                name = path.relative_to(self.root).as_posix()
                self.remote.fetch(name, path, size=size, sha256=sha256)

    def _left_over(self, folder: Path) -> dict[str, list[Path]]:
        """Return the parts that killed processes left in a folder, by the name of the file.

        They are looked for once a folder, which may hold very many files.
        """
        if folder not in self._parts:
            parts: dict[str, list[Path]] = {}
            for part in folder.glob("*.part"):
                parts.setdefault(part.name.rsplit(".", 2)[0], []).append(part)
            self._parts[folder] = parts
        return self._parts[folder]

    def opened(self, shard_id: ShardId) -> OpenFile | None:
        """Return a shard's tar if this process has it open."""
        with self.changed:
            if shard_id not in self._open:
                return None
            self._open.move_to_end(shard_id)
            return self._open[shard_id]

    def open(self, shard_id: ShardId) -> OpenFile:
        """Open a shard's tar; no process removes it as long as it is open.

        Raises:
            FileNotFoundError: it is not here, or is being removed.
        """
        file = SharedFile(self.tar_path(shard_id), self.folder)
        with self.changed:
            self._open[shard_id] = file
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return file

    def close_others(self, needed: Collection[ShardId]) -> None:
        """Close all tars but the needed ones; other processes may then remove them."""
        with self.changed:
            for shard_id in self._open.keys() - needed:
                del self._open[shard_id]
            self.changed.notify_all()

    def make_room(self, num_bytes: int, needed: Collection[ShardId]) -> bool:
        """Remove tars that are not needed, oldest first, until a file has room; tell whether."""
        with self.changed:
            needed_paths = {self.tar_path(shard_id) for shard_id in needed}
            tars = self._tars()
            total = sum(size for _, size, _ in tars) + sum(self.arriving.values())
            for _, size, path in sorted(tars):
                if total + num_bytes <= self.limit_bytes:
                    break
                if path not in needed_paths and self._remove(path):
                    total -= size
            return total + num_bytes <= self.limit_bytes

    def _tars(self) -> list[tuple[float, int, Path]]:
        """Return (time of the last opening, size, path) of all tars, of other caches as well."""
        tars = []
        for path in self.folder.rglob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                tars.append((status.st_mtime, status.st_size, path))
        return tars

    def _remove(self, path: Path) -> bool:
        """Remove a shard unless another process reads it; tell whether it is gone."""
        with contextlib.suppress(ValueError):  # a tar of another cache
            folder = path.parent.relative_to(self.root).as_posix()
            self._open.pop((folder, int(path.stem)), None)
        with contextlib.suppress(OSError), _open_to_lock(path) as file:
            # Without locks a process of this machine goes on reading what it has open.
            _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder)
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            return True
        return False


def _lock(descriptor: int, operation: int, folder: Path) -> bool:
    """Lock an open file; return False where the disk has no locks, and say so once a folder."""
    if lock(descriptor, operation):
        return True
    if folder not in _said:
        _said.add(folder)
        click.echo(
            f"{folder}: this disk has no file locks; processes may fetch a shard twice, and "
            "several machines must not share the folder: give each its --local-cache-dir",
            err=True,
        )
    return False


def _open_to_lock(path: Path) -> IO[bytes]:
    """Open a file so that NFS can lock it, or at least local disks, where it is not ours."""
    try:
        return path.open("r+b")
    except PermissionError:
        return path.open("rb")


class SharedFile(OpenFile):
    """An open file that other processes see to be in use.

    Args:
        path: the file.
        folder: that the processes share.

    Raises:
        FileNotFoundError: it is not there, or is being removed.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path)
        _lock(self.descriptor, fcntl.LOCK_SH, folder)
        # NFS keeps a removed file that is open under another name; its links do not tell.
        try:
            removed = not os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError as error:
            if error.errno != errno.ESTALE:  # another machine has removed it
                raise
            removed = True
        if removed:
            raise FileNotFoundError(path)
        with contextlib.suppress(PermissionError):  # another user's
            os.utime(self.descriptor)
