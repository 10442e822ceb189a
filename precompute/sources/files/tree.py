"""A tree of files, which may be a folder or zips, and the names that people write for its files."""

import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from typing import IO, Protocol

# fmt: off
PICTURES = frozenset({
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic",
    "heif", "jp2", "j2k", "jxl", "tga", "ppm", "pgm", "pbm", "pnm", "pfm", "npy", "exr", "hdr",
})
# fmt: on
# How the names of tars end. Those that are compressed cannot be read: where they are all that there
# is, it is said to unpack them.
TAR = ".tar"
TARS = (TAR, ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# So many names of a table tell where its files lie.
NUM_TRIED = 200
# What systems and editors leave beside people's files. Hidden ones are passed over as well.
JUNK = {"thumbs.db", "desktop.ini", "__macosx"}


class Tree(Protocol):
    """Files by their names, relative to the tree's root and with `/`; safe in several threads.

    Attributes:
        tops: the folders in which tables are looked for: the root, or each zip's.
    """

    tops: tuple[str, ...]

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder's name, that of the root is empty, and the names of the files in it.

        Both are sorted. Links are followed, except in circles; junk and caches are passed over.

        Raises:
            OSError: a folder cannot be read.
        """
        ...

    def files(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; none if there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: there is none of this name.
            OSError: it cannot be read.
        """
        ...

    def version(self, name: str) -> bytes | None:
        """Return bytes that change when the file may have changed; None if nothing shows that."""
        ...

    def has(self, name: str) -> bool:
        """Tell whether there is anything of this name."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open a file.

        Raises:
            OSError: it is missing or cannot be read.
        """
        ...


class Finder:
    """Finds a file by the name that a table has for it.

    Args:
        trees: where to look, the first one first.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = trees

    def read(self, written: str, folder: str) -> bytes:
        """Return the bytes of a file.

        Args:
            written: its name as the table has it.
            folder: of the tree, that the name is relative to.

        Raises:
            OSError: it is missing, unreadable or no file.
        """
        missing: OSError | None = None
        for tree in self.trees:
            for name in spellings(written, folder):
                try:
                    return tree.read(name)
                except (FileNotFoundError, NotADirectoryError) as error:
                    missing = missing or error
        raise missing or FileNotFoundError("no such file")

    def version(self, written: str, folder: str) -> bytes | None:
        """Return bytes that change when the file may have changed; None if nothing shows that."""
        for tree in self.trees:
            for name in spellings(written, folder):
                if (version := tree.version(name)) is not None or tree.has(name):
                    return version
        return None

    def has(self, written: str, folder: str) -> bool:
        """Tell whether there is anything of this name."""
        return any(tree.has(name) for tree in self.trees for name in spellings(written, folder))


def folder_of_names(finder: Finder, own: str, names: Sequence[str]) -> tuple[str, int]:
    """Return the folder that a table's file names are relative to, and how many exist in it.

    It is the table's folder, the data set's or the one above it: the one in which most of the files
    exist. All names of a table are relative to the same, so that a missing file is never replaced
    by another of its name elsewhere.

    Args:
        finder: finds files.
        own: the table's folder.
        names: the first of the table's.
    """
    best, most = own, -1
    for folder in dict.fromkeys([own, "", ".."]):
        found = sum(finder.has(name, folder) for name in names)
        if found > most:
            best, most = folder, found
        if most == len(names):
            break
    return best, most


def spellings(written: str, folder: str) -> Iterator[str]:
    r"""Yield the names under which a file may lie in a tree, the likeliest first.

    Tables write `\`, letters with accents as one character or as two, and endings in either case.

    Args:
        written: the name that a table has.
        folder: that it is relative to.
    """
    seen = set()
    for form in _forms(written):
        if form not in seen:
            seen.add(form)
            yield posixpath.join(folder, form)


def _forms(written: str) -> Iterator[str]:
    slashed = posixpath.expanduser(written.replace("\\", "/"))
    yield written
    yield slashed
    for text in (unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")):
        name, dotted = posixpath.splitext(text)
        yield from (text, name + dotted.lower(), name + dotted.upper())


def is_junk(name: str) -> bool:
    """Tell whether a file or folder is nobody's picture: hidden, or a system's."""
    return name.startswith(".") or name.lower() in JUNK


def ending(name: str) -> str:
    """Return a file's ending in lower case, without the dot."""
    return posixpath.splitext(name)[1][1:].lower()


def is_picture(name: str) -> bool:
    """Tell whether a file is a picture, by its ending."""
    return ending(name) in PICTURES


def stem(name: str) -> str:
    """Return a file's name without folder and ending, accents as one character each."""
    return unicodedata.normalize("NFC", posixpath.splitext(posixpath.basename(name))[0])
