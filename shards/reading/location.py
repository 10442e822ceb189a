"""Where a cache's files are: a folder here, or behind a URL (see `shards.remote.folder`)."""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from common.errors import ShardError
from shards.format import json_files
from shards.format.manifest import Manifest, load
from shards.format.sidecar import sidecar_path, tar_path

# Half of what a process may have open: of 1,024, the usual limit, 512.
OPEN_FILES = max(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

ShardId = tuple[str, int]  # folder of the product, number of the shard
Window = tuple[int, list[int]]  # the place at which it ends, its conditioning shards


class OpenFile:
    """A file open for reading; it closes when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1  # for `__del__`, where opening fails
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, buffers: Sequence[Any], start: int, num_bytes: int) -> int:
        """Fill writable buffers one after the other from the file.

        Args:
            buffers: of `num_bytes` bytes together.
            start: offset of the first byte to read.
            num_bytes: number of bytes to read.

        Returns:
            Number of bytes read; fewer than `num_bytes` only at the end of the file.
        """
        done = os.preadv(self.descriptor, buffers, start)
        while 0 < done < num_bytes:  # rare: after a signal, or on a network's file system
            more = os.preadv(self.descriptor, _remaining(buffers, done), start + done)
            if more == 0:
                break
            done += more
        return done


def _remaining(buffers: Sequence[Any], done: int) -> "list[memoryview[Any]]":
    """Return the parts of buffers behind their first `done` bytes."""
    remaining = []
    for buffer in buffers:
        view: memoryview[Any] = memoryview(buffer)
        if done < len(view):
            remaining.append(view[done:])
        done = max(0, done - len(view))
    return remaining


class Files(Protocol):
    """The files of a cache, wherever they are."""

    def manifest(self) -> Manifest:
        """Return the manifest of the complete cache."""

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar."""

    def tar(self, folder: str, shard: int) -> OpenFile:
        """Return a shard's tar, open."""

    def name(self, folder: str, shard: int) -> str:
        """Return what to call a shard's tar in a message."""

    def remedy(self, folder: str, shard: int) -> str:
        """Return what to do about a shard that is damaged."""

    def check_present(self, manifest: Manifest, folders: Sequence[str]) -> None:
        """Check that the shards of some products are there, as far as that is cheap."""

    def read_ahead(
        self, windows: Iterator[Window], shards_of: Callable[[list[int]], list[ShardId]]
    ) -> AbstractContextManager[None]:
        """Fetch the shards of windows in the background, before they are read.

        Args:
            windows: in order; consumed one by one, perhaps from other threads.
            shards_of: returns all shards that hold the samples of some conditioning shards.
        """

    def release_before(self, place: int) -> None:
        """Allow the removal of shards that are needed only before a place in the run's order."""

    @property
    def limit_bytes(self) -> int | None:
        """How much of the cache can be on this machine at a time; None for all."""


class LocalFiles:
    """A cache in a folder of this machine.

    Args:
        root: the cache's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tar = lru_cache(OPEN_FILES)(self._open)

    def __str__(self) -> str:
        return str(self.root)

    def manifest(self) -> Manifest:
        """Return the manifest; see `shards.format.manifest.load`."""
        return load(self.root)

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar.

        Raises:
            ShardError: it is missing or cannot be read.
        """
        path = sidecar_path(self.root / folder, shard)
        try:
            return json_files.read_file(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(f"{path}: missing, though manifest.json counts on it") from error

    def _open(self, folder: str, shard: int) -> OpenFile:
        """Return a shard's tar, open.

        Raises:
            OSError: it cannot be opened.
        """
        return OpenFile(tar_path(self.root / folder, shard))

    def name(self, folder: str, shard: int) -> str:
        """Return the tar's path."""
        return str(tar_path(self.root / folder, shard))

    def remedy(self, folder: str, shard: int) -> str:
        """Return what to do about a shard that is damaged."""
        return "python -m shards verify lists all that is; run precompute again, or pull it again"

    def read_ahead(
        self, windows: Iterator[Window], shards_of: Callable[[list[int]], list[ShardId]]
    ) -> AbstractContextManager[None]:
        """Do nothing: all shards are on this machine."""
        return nullcontext()

    def release_before(self, place: int) -> None:
        """Do nothing: all shards stay on this machine."""

    @property
    def limit_bytes(self) -> int | None:
        """None: all shards are on this machine."""
        return None

    def check_present(self, manifest: Manifest, folders: Sequence[str]) -> None:
        """Check that all tars of some products are there in full size, and all sidecars.

        Raises:
            ShardError: naming the first file that is not.
        """
        products = dict(manifest.products())
        for folder in folders:
            sizes = _sizes(self.root / folder)
            for shard, expected in enumerate(products[folder].shard_bytes):
                tar = tar_path(self.root / folder, shard)
                for path in (tar, sidecar_path(self.root / folder, shard)):
                    if path.name not in sizes:
                        raise ShardError(
                            f"{path}: missing, though manifest.json counts on it; "
                            "copy it again, or run precompute again"
                        )
                if sizes[tar.name] != expected:
                    raise ShardError(
                        f"{tar}: cut short or changed, {expected} bytes expected, "
                        f"found {sizes[tar.name]}; copy it again, or run precompute again"
                    )


def _sizes(folder: Path) -> dict[str, int]:
    """Return name -> size of the files in a folder, links followed; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ShardError(f"{folder}: cannot be read ({error.strerror})") from error
