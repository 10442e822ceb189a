"""fill50k's layout, as its authors published it: a folder, or the zip of one.

`prompt.json` holds one JSON object a line, {"source": conditioning image, "target": image,
"prompt": caption}.
"""

import json
import mmap
import os
import posixpath
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from common.errors import ConfigError
from precompute.sources.file_versions import file_version, read_file, stat_version
from precompute.sources.source import Kind, Row, Source

PROMPTS = "prompt.json"
# Damaged, encrypted or compressed in a way that Python does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError)


class Entry(msgspec.Struct, gc=False):
    """A line of prompt.json."""

    target: str
    prompt: Any
    source: str


class BareEntry(msgspec.Struct, gc=False):
    """A line of prompt.json whose conditioning image nobody wants."""

    target: str
    prompt: Any
    source = ""


class Lines:
    """The rows of a prompt.json: a private copy of the file, and where each line begins.

    The copy is on disk, so that neither ten million lines nor an editor at work are a matter.
    """

    def __init__(self, stream: IO[bytes], where: str, wants_conditioning: bool) -> None:
        self.has_conditioning_images = wants_conditioning
        self.entry: type[Entry | BareEntry] = Entry if wants_conditioning else BareEntry
        self.decoder = msgspec.json.Decoder(self.entry)
        self.starts = array("Q")
        self.numbers = array("I")
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            if not copy.tell():
                raise ConfigError(f"{where}: holds no rows.")
            copy.flush()
            self.text = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
        start = 0
        for number, line in enumerate(iter(self.text.readline, b""), start=1):
            if not line.isspace():
                self._parse(line, f"{where}, line {number}")
                self.starts.append(start)
                self.numbers.append(number)
            start += len(line)
        if not self.starts:
            raise ConfigError(f"{where}: holds no rows.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def row(self, index: int) -> Row:
        """Return a row."""
        start, where = self.starts[index], f"line {self.numbers[index]}"
        end = self.text.find(b"\n", start)
        entry = self._parse(self.text[start : end if end >= 0 else len(self.text)], where)
        return Row(where, entry.target, entry.source, entry.prompt)

    def name(self, index: int, kind: Kind) -> str:
        """Return the name of a row's image."""
        row = self.row(index)
        return row.image if kind == "image" else row.conditioning_image

    def _parse(self, line: bytes, where: str) -> Entry | BareEntry:
        """Return what a line says.

        Raises:
            ConfigError: it is not such an object.
        """
        try:
            return self.decoder.decode(line)
        # Python's own parser takes a little more, such as half of a surrogate pair.
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self._parse_leniently(line, where)

    def _parse_leniently(self, line: bytes, where: str) -> Entry:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON ({error}).") from error
        fields = ("source", "target", "prompt")[not self.has_conditioning_images :]
        missing = [name for name in fields if not isinstance(entry, dict) or name not in entry]
        if missing:
            form = ", ".join(f'"{name}": …' for name in fields)
            raise ConfigError(f"{where}: expected {{{form}}}, no {', '.join(missing)}.")
        if not all(isinstance(entry[name], str) for name in fields[:-1]):
            raise ConfigError(f"{where}: {' and '.join(fields[:-1])} must be file names.")
        source = entry["source"] if self.has_conditioning_images else ""
        return Entry(entry["target"], entry["prompt"], source)


class Folder:
    """fill50k, unpacked."""

    def __init__(self, path: Path, wants_conditioning: bool = True) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100  (names with NUL are joined to it)
        self.has_conditioning_images = wants_conditioning
        with (path / PROMPTS).open("rb") as stream:
            self.lines = Lines(stream, str(path / PROMPTS), wants_conditioning)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it anew in another process."""
        return Folder, (Path(self.path), self.has_conditioning_images)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers."""
        return map(self.lines.row, indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        return read_file(self._file(index, kind))

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return what changes whenever the image may have changed."""
        return file_version(self._file(index, kind))

    def _file(self, index: int, kind: Kind) -> str:
        return os.path.join(self.path, self.lines.name(index, kind))  # noqa: PTH118


class Zip:
    """fill50k as downloaded; its images are read in place."""

    def __init__(self, path: Path, prompts: str, wants_conditioning: bool = True) -> None:
        self.path = path.absolute()
        self.prompts = prompts
        self.prefix = prompts.removesuffix(PROMPTS)
        self.has_conditioning_images = wants_conditioning
        self.archive = zipfile.ZipFile(self.path)
        with self.archive.open(prompts) as stream:
            self.lines = Lines(stream, f"{path}: {prompts}", wants_conditioning)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it anew in another process."""
        return Zip, (self.path, self.prompts, self.has_conditioning_images)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers."""
        return map(self.lines.row, indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        try:
            return self.archive.read(self._member(index, kind))
        except ZIP_ERRORS as error:
            raise OSError(str(error)) from error

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return what changes whenever the image may have changed."""
        try:
            member = self._member(index, kind).filename
            found = os.fstat(self.archive.fp.fileno())  # type: ignore[union-attr]
        except OSError:
            return None
        return stat_version(found, str(self.path), member)

    def _member(self, index: int, kind: Kind) -> zipfile.ZipInfo:
        name = posixpath.normpath(self.prefix + self.lines.name(index, kind))
        try:
            return self.archive.getinfo(name)
        except KeyError as error:
            if f"{name}/" in self.archive.NameToInfo:
                raise OSError("is a directory") from error
            raise OSError("no such file in the zip") from error


def is_fill50k(path: Path) -> bool:
    """Tell whether a path is, or was meant to be, fill50k: any zip, a folder with prompt.json."""
    if path.is_dir():
        return (path / PROMPTS).is_file()
    return path.suffix == ".zip" or zipfile.is_zipfile(path)


def open_fill50k(path: Path, where: str, wants_conditioning: bool = True) -> Source:
    """Return fill50k, from its folder or zip.

    Args:
        path: of the folder or zip.
        where: the path as the user gave it, for errors.
        wants_conditioning: whether the lines must name conditioning images.

    Raises:
        ConfigError: not a whole zip, no prompt.json in it, or a broken line in that.
    """
    try:
        if path.is_dir():
            return Folder(path, wants_conditioning)
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in archive.namelist()
                if name.rpartition("/")[2] == PROMPTS and not name.startswith("__MACOSX/")
            ]
        if not names:
            raise ConfigError(f"{where}: not fill50k, no {PROMPTS} in this zip.")
        return Zip(path, min(names, key=len), wants_conditioning)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{where}: neither a folder nor a whole zip ({error}).") from error
    except (OSError, *ZIP_ERRORS) as error:
        raise ConfigError(f"{where}: its {PROMPTS} cannot be read ({error}).") from error
