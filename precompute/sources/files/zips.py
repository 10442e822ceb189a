"""A tree of files in one zip, or in several. They are unpacked nowhere."""

import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import ConfigError
from precompute.sources.counted import Counted
from precompute.sources.file_versions import stat_version
from precompute.sources.files.tree import ending, is_junk

# Damaged, encrypted or compressed in a way that Python does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError)
FIRST_BYTES = (b"PK\x03\x04", b"PK\x05\x06")  # of a member, or of the end if there are none


def is_zip(path: Path) -> bool:
    """Tell whether a file is a zip, by its ending or its first bytes.

    `zipfile.is_zipfile` looks near the file's end, where a tar may hold an .npz, which is a zip.

    Raises:
        OSError: it cannot be read.
    """
    if ending(path.name) == "zip":
        return True
    with path.open("rb") as file:
        return file.read(4) in FIRST_BYTES


class Archive:
    """A zip.

    Attributes:
        members: by their names, junk aside.
        prefix: the folder that everything lies in, with its `/`; empty if there is none.
        replaced: names of members that a later one has as well, so that they are not read.

    Args:
        path: of the zip.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: it is no whole zip, or cannot be read.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path = path.absolute()
        try:
            self.archive = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{where}: {path.name} is not a whole zip ({error}).") from error
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror or error}).") from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        self.folder_names: set[str] = set()
        self.replaced: list[str] = []
        for member in self.archive.infolist():
            written = member.filename.replace("\\", "/")
            name = posixpath.normpath(f"/{written}").lstrip("/")
            if written.endswith("/"):
                self.folder_names.add(name)
                continue
            if any(map(is_junk, name.split("/"))):
                continue
            if name in self.members:
                self.replaced.append(name)
            self.members[name] = member
        tops = {name.partition("/")[0] for name in self.members}
        is_folder = len(tops) == 1 and all("/" in name for name in self.members)
        self.prefix = f"{tops.pop()}/" if is_folder else ""

    def member(self, name: str) -> zipfile.ZipInfo | None:
        """Return a member, with or without the folder that everything lies in."""
        path = posixpath.normpath(name)
        return self.members.get(self.prefix + path) or self.members.get(path)

    def read(self, member: zipfile.ZipInfo) -> bytes:
        """Return the bytes of a member.

        Raises:
            OSError: it is damaged or encrypted.
        """
        try:
            return self.archive.read(member)
        except ZIP_ERRORS as error:
            raise OSError(str(error)) from error

    def version(self, member: zipfile.ZipInfo) -> bytes | None:
        """Return bytes that change when the zip may have changed; None if nothing shows that."""
        try:
            status = os.fstat(self.archive.fp.fileno())  # type: ignore[union-attr]
        except OSError:
            return None
        return stat_version(status, str(self.path), member.filename)


class Zips:
    """The files in one zip; or in several, each a folder with the name of its zip.

    Args:
        paths: of the zips.
        where: what the user gave, for errors.

    Raises:
        ConfigError: one is no whole zip, or cannot be read.
    """

    def __init__(self, paths: Sequence[Path], where: str) -> None:
        self.archives = {path.stem: Archive(path, where) for path in sorted(paths)}
        self.is_single = len(paths) == 1
        self.tops: tuple[str, ...] = ("",) if self.is_single else tuple(self.archives)
        self.listing: dict[str, list[str]] = {}
        for mount, archive in self.archives.items():
            for member in archive.members:
                inner = member.removeprefix(archive.prefix)
                folder, _, name = (inner if self.is_single else f"{mount}/{inner}").rpartition("/")
                self.listing.setdefault(folder, []).append(name)
        for names in self.listing.values():
            names.sort()

    @property
    def replaced(self) -> Counted[str]:
        """The members that have the name of a later one, and so are not read."""
        counted = Counted[str]()
        for archive in self.archives.values():
            counted.add(archive.replaced)
        return counted

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder's name, that of the root is empty, and the names of the files in it."""
        return iter(sorted(self.listing.items()))

    def files(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; none if there is no such folder."""
        return self.listing.get(folder, [])

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        archive, member = self._find(name)
        return archive.read(member)

    def version(self, name: str) -> bytes | None:
        """Return bytes that change when the file may have changed; None if nothing shows that."""
        try:
            archive, member = self._find(name)
        except OSError:
            return None
        return archive.version(member)

    def has(self, name: str) -> bool:
        """Tell whether there is anything of this name."""
        try:
            self._find(name)
        except FileNotFoundError:
            return False
        except OSError:
            pass
        return True

    def open(self, name: str) -> IO[bytes]:
        """Open a file."""
        archive, member = self._find(name)
        try:
            return archive.archive.open(member)
        except ZIP_ERRORS as error:
            raise OSError(str(error)) from error

    def _find(self, name: str) -> tuple[Archive, zipfile.ZipInfo]:
        """Return a file's zip and its member of it.

        Raises:
            FileNotFoundError: there is none of this name.
            OSError: it is a folder, or in two zips.
        """
        mount, _, inner = name.partition("/")
        own = self.archives.get(mount)
        if own and not self.is_single and (member := own.member(inner) or own.member(name)):
            return own, member
        found = [
            (archive, member)
            for archive in self.archives.values()
            if (member := archive.member(name))
        ]
        if len(found) > 1:
            raise OSError(f"is in {found[0][0].path.name} and in {found[1][0].path.name}")
        if found:
            return found[0]
        if own and (member := own.member(inner)):  # the only one, which stands for its folder
            return own, member
        folder = posixpath.normpath(name)
        if any(
            {folder, archive.prefix + folder} & archive.folder_names
            for archive in self.archives.values()
        ):
            raise IsADirectoryError("is a directory")
        raise FileNotFoundError("no such file in the zip")


class ZipFolders(Zips):
    """Zips of which each stands for the folder of its name, and for no other file.

    Args:
        paths: of the zips.
        where: what the user gave, for errors.

    Raises:
        ConfigError: one is no whole zip, or cannot be read.
    """

    def _find(self, name: str) -> tuple[Archive, zipfile.ZipInfo]:
        mount, _, inner = posixpath.normpath(name).partition("/")
        archive = self.archives.get(mount)
        member = (archive.member(inner) or archive.member(name)) if archive else None
        if archive is None or member is None:
            raise FileNotFoundError("no such file in the zip")
        return archive, member
