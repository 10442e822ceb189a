"""Data sets to encode: rows of names, and the bytes behind a name.

fill50k's layout, as its authors published it: a folder or zip with `prompt.json`, one JSON object
a line, {"source": conditioning image, "target": image, "prompt": caption}.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.errors import ConfigError

PROMPTS = "prompt.json"
FIELDS = ("source", "target", "prompt")


@dataclass(frozen=True)
class Row:
    """One sample of a source.

    Attributes:
        line: of prompt.json, from 1.
        image: name of the image in the source.
        conditioning_image: name of the conditioning image in the source.
        prompt: the caption as found, or a list of captions; a bad row's may be no text.
    """

    line: int
    image: str
    conditioning_image: str
    prompt: Any

    @property
    def name(self) -> str:
        """What the row is called in reports."""
        return f"line {self.line}, {self.image}"

    @property
    def prompts(self) -> list[Any]:
        """The captions, each once."""
        if not isinstance(self.prompt, list):
            return [self.prompt]
        return [one for at, one in enumerate(self.prompt) if one not in self.prompt[:at]]


class Source(Protocol):
    """Rows, and a way to read what they name; reading is safe from several threads."""

    rows: list[Row]

    def read(self, name: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            OSError: missing or unreadable.
        """
        ...


class Folder:
    """fill50k, unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = parse_rows((path / PROMPTS).read_bytes(), str(path / PROMPTS))

    def read(self, name: str) -> bytes:
        """Return the bytes of an image."""
        try:
            return (self.path / name).read_bytes()
        except ValueError as error:  # a NUL in the name
            raise OSError(str(error)) from error


class Zip:
    """fill50k as downloaded; read in place, unpacked nowhere."""

    def __init__(self, path: Path, prompts: str) -> None:
        self.archive = zipfile.ZipFile(path)
        self.prefix = prompts.removesuffix(PROMPTS)
        self.rows = parse_rows(self.archive.read(prompts), f"{path}: {prompts}")

    def read(self, name: str) -> bytes:
        """Return the bytes of an image."""
        try:
            return self.archive.read(self.prefix + name)
        except KeyError as error:
            raise OSError("no such file in the zip") from error
        # Damaged, encrypted or compressed in a way that Python does not know.
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise OSError(str(error)) from error


def open_source(path: Path) -> Source:
    """Return the data set at a path.

    Raises:
        ConfigError: nothing there, not fill50k, or a broken line in its prompt.json.
    """
    if path.is_dir():
        if (path / PROMPTS).is_file():
            return Folder(path)
        inner = sorted(path.glob(f"*/{PROMPTS}"))
        hint = f" Did you mean {inner[0].parent}?" if inner else ""
        raise ConfigError(f"--source {path}: not fill50k, no {PROMPTS} in this folder.{hint}")
    if not path.exists():
        raise ConfigError(
            f"--source {path}: no such file or folder. Expected fill50k: the folder with {PROMPTS},"
            " or its zip."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in archive.namelist()
                if name.rpartition("/")[2] == PROMPTS and not name.startswith("__MACOSX/")
            ]
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"--source {path}: neither a folder nor a whole zip ({error})."
        ) from error
    if not names:
        raise ConfigError(f"--source {path}: not fill50k, no {PROMPTS} in this zip.")
    return Zip(path, min(names, key=len))


def parse_rows(data: bytes, where: str) -> list[Row]:
    """Return the rows of a prompt.json.

    Args:
        data: its bytes, one JSON object a line; empty lines are passed over.
        where: its name, for errors.

    Raises:
        ConfigError: no rows, or a line that is not such an object, with its number.
    """
    rows: list[Row] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}, line {number}: not JSON ({error}).") from error
        missing = [name for name in FIELDS if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise ConfigError(
                f'{where}, line {number}: expected {{"source": …, "target": …, "prompt": …}}, '
                f"no {', '.join(missing)}."
            )
        if not (isinstance(entry["source"], str) and isinstance(entry["target"], str)):
            raise ConfigError(f"{where}, line {number}: source and target must be file names.")
        rows.append(Row(number, entry["target"], entry["source"], entry["prompt"]))
    if not rows:
        raise ConfigError(f"{where}: holds no rows.")
    return rows
