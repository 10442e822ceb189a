"""fill50k's layout, as its authors published it: a folder, or the zip of one.

`prompt.json` holds one JSON object a line, {"source": conditioning image, "target": image,
"prompt": caption}.
"""

import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import ConfigError
from precompute.sources.file_versions import file_version, read_file, stat_version
from precompute.sources.fill50k_lines import PromptLines
from precompute.sources.source import Kind, Row, Source

PROMPTS = "prompt.json"
# Damaged, encrypted or compressed in a way that Python does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError)


class Folder:
    """fill50k, unpacked."""

    def __init__(self, path: Path, wants_conditioning: bool = True) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100  (names with NUL are joined to it)
        self.has_conditioning_images = wants_conditioning
        self.layout = f"ControlNet's {PROMPTS}"
        self.remarks: list[str] = []
        with (path / PROMPTS).open("rb") as stream:
            self.lines = PromptLines(stream, str(path / PROMPTS), wants_conditioning)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        return map(self.lines.row, indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        return read_file(self._file(index, kind))

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        return file_version(self._file(index, kind))

    def _file(self, index: int, kind: Kind) -> str:
        return os.path.join(self.path, self.lines.name(index, kind))  # noqa: PTH118


class Zip:
    """fill50k as downloaded; the images are read from the zip."""

    def __init__(self, path: Path, prompts: str, wants_conditioning: bool = True) -> None:
        self.path = path.absolute()
        self.prefix = prompts.removesuffix(PROMPTS)
        self.has_conditioning_images = wants_conditioning
        self.layout = f"ControlNet's {PROMPTS}, in a zip"
        self.remarks: list[str] = []
        self.archive = zipfile.ZipFile(self.path)
        with self.archive.open(prompts) as stream:
            self.lines = PromptLines(stream, f"{path}: {prompts}", wants_conditioning)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        return map(self.lines.row, indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        try:
            return self.archive.read(self._member(index, kind))
        except ZIP_ERRORS as error:
            raise OSError(str(error)) from error

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        try:
            member = self._member(index, kind).filename
            status = os.fstat(self.archive.fp.fileno())  # type: ignore[union-attr]
        except OSError:
            return None
        return stat_version(status, str(self.path), member)

    def _member(self, index: int, kind: Kind) -> zipfile.ZipInfo:
        name = posixpath.normpath(self.prefix + self.lines.name(index, kind))
        try:
            return self.archive.getinfo(name)
        except KeyError as error:
            if f"{name}/" in self.archive.NameToInfo:
                raise OSError("is a directory") from error
            raise OSError("no such file in the zip") from error


def is_fill50k(path: Path) -> bool:
    """Tell whether a path is probably fill50k: any zip, or a folder with prompt.json."""
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
        prompts = _find_prompts(path, where)
        return Zip(path, prompts, wants_conditioning)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{where}: neither a folder nor a whole zip ({error}).") from error
    except (OSError, *ZIP_ERRORS) as error:
        raise ConfigError(f"{where}: its {PROMPTS} cannot be read ({error}).") from error


def _find_prompts(path: Path, where: str) -> str:
    """Return the name of the topmost prompt.json in a zip."""
    with zipfile.ZipFile(path) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.rpartition("/")[2] == PROMPTS and not name.startswith("__MACOSX/")
        ]
    if not names:
        raise ConfigError(f"{where}: not fill50k, no {PROMPTS} in this zip.")
    return min(names, key=len)
