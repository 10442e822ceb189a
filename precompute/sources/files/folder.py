"""A tree of files in a folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from precompute.sources.caches import is_cache
from precompute.sources.file_versions import file_version, read_file
from precompute.sources.files.tree import is_junk


class Folder:
    """The files in a folder and below it. A name may also be absolute.

    Attributes:
        caches: the folders that are caches of precompute's, as far as it was walked. What lies in
            them is no part of a data set, and is passed over.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.root = os.path.abspath(path)  # noqa: PTH100  (names with NUL are joined to it)
        self.tops: tuple[str, ...] = ("",)
        self.caches: dict[str, None] = {}

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder's name, that of the root is empty, and the names of the files in it."""
        return self._walk("", frozenset())

    def files(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; none if there is no such folder."""
        try:
            return self._list(folder)[0]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return read_file(self.path(name))

    def version(self, name: str) -> bytes | None:
        """Return bytes that change when the file may have changed; None if nothing shows that."""
        return file_version(self.path(name))

    def has(self, name: str) -> bool:
        """Tell whether there is anything of this name."""
        try:
            return os.path.lexists(self.path(name))
        except ValueError:
            return False

    def open(self, name: str) -> IO[bytes]:
        """Open a file."""
        return Path(self.path(name)).open("rb")

    def path(self, name: str) -> str:
        """Return the path of a file, absolute."""
        return os.path.join(self.root, name)  # noqa: PTH118

    def _walk(
        self, folder: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[str, list[str]]]:
        status = os.stat(self.path(folder))  # noqa: PTH116
        itself = (status.st_dev, status.st_ino)
        if itself in above:  # a link back
            return
        files, folders = self._list(folder)
        if is_cache(files, folders):
            self.caches[folder] = None
            return
        yield folder, files
        for inner in folders:
            yield from self._walk(f"{folder}/{inner}" if folder else inner, above | {itself})

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder, sorted."""
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(self.path(folder)) as entries:
            for entry in entries:
                if not is_junk(entry.name):
                    (folders if _is_folder(entry) else files).append(entry.name)
        return sorted(files), sorted(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
