"""Where a cache's files are: a folder here, or behind a URL (see `shards.remote.folder`)."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from common.errors import ShardError
from shards.format import json_files, manifest
from shards.format.manifest import Manifest
from shards.format.sidecar import sidecar_path, tar_path

OPEN_FILES = 256

Shard = tuple[str, int]  # folder of the product, number
Window = tuple[int, list[int]]  # the first place behind it, its conditioning shards


class OpenFile:
    """A file open for reading; it closes when the last user is done with it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1  # for `__del__`, where opening fails
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, buffers: Sequence[Any], start: int, wanted: int) -> int:
        """Fill writable buffers one after the other from a place in the file.

        Args:
            buffers: of `wanted` bytes together.
            start: first byte to read.
            wanted: how many.

        Returns:
            How many there were; fewer only at the end of the file.
        """
        done = os.preadv(self.descriptor, buffers, start)
        while 0 < done < wanted:  # seldom: a signal came, or a network's file system took a break
            rest, skip = [], done
            for one in buffers:
                view: memoryview[Any] = memoryview(one)
                if skip < len(view):
                    rest.append(view[skip:])
                skip = max(0, skip - len(view))
            more = os.preadv(self.descriptor, rest, start + done)
            if more == 0:
                break
            done += more
        return done


class Files(Protocol):
    """What a reader asks of the place where a cache is kept."""

    def manifest(self) -> Manifest:
        """Return the manifest of the complete cache."""

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar, as they are."""

    def tar(self, folder: str, shard: int) -> OpenFile:
        """Return a shard's tar, open."""

    def name(self, folder: str, shard: int) -> str:
        """Return what to call a shard's tar in a message."""

    def remedy(self, folder: str, shard: int) -> str:
        """Return what to do about a shard that is damaged."""

    def check_present(self, found: Manifest, folders: Sequence[str]) -> None:
        """Check that the shards of some products are there, as far as that is cheap."""

    def following(
        self, windows: Iterator[Window], needed: Callable[[list[int]], list[Shard]]
    ) -> AbstractContextManager[None]:
        """Have what windows read here by the time it is read.

        Args:
            windows: in order; taken as they are needed, perhaps from other threads.
            needed: returns what the samples of some conditioning shards are in.
        """

    def reached(self, place: int) -> None:
        """Let go of what is read only before a place in the run's order."""

    @property
    def limit_bytes(self) -> int | None:
        """How much of the cache can be here at a time; None for all."""


class LocalFiles:
    """A cache in a folder of this machine.

    Args:
        root: the cache's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tar = lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple[type["LocalFiles"], tuple[Path]]:
        """Open files stay behind when a cache travels to a spawned worker."""
        return LocalFiles, (self.root,)

    def __str__(self) -> str:
        return str(self.root)

    def manifest(self) -> Manifest:
        """Return the manifest; see `shards.format.manifest.load`."""
        return manifest.load(self.root)

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar.

        Raises:
            ShardError: there is none, or it cannot be read.
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

    def following(
        self, windows: Iterator[Window], needed: Callable[[list[int]], list[Shard]]
    ) -> AbstractContextManager[None]:
        """Everything is here."""
        return nullcontext()

    def reached(self, place: int) -> None:
        """Everything stays here."""

    @property
    def limit_bytes(self) -> int | None:
        """Everything is here."""
        return None

    def check_present(self, found: Manifest, folders: Sequence[str]) -> None:
        """Check that all tars of some products are there in full length, and all sidecars.

        Raises:
            ShardError: naming the first that is not.
        """
        products = dict(found.products())
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    """Return name -> size of the files in a folder, links followed; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ShardError(f"{folder}: cannot be read ({error.strerror})") from error
