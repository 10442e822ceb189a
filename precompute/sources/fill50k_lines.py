"""The rows of fill50k's prompt.json."""

import json
import mmap
import shutil
import tempfile
from array import array
from typing import IO, Any

import msgspec

from common.errors import ConfigError
from precompute.sources.source import Kind, Row


class Entry(msgspec.Struct, gc=False):
    """A line of prompt.json."""

    target: str
    prompt: Any
    source: str


class EntryWithoutConditioning(msgspec.Struct, gc=False):
    """A line of prompt.json whose conditioning image is not needed."""

    target: str
    prompt: Any
    source = ""


class PromptLines:
    """The rows of a prompt.json: a private copy of the file, and where each line begins.

    The copy is on disk, so that ten million lines take little memory, and that edits of the file
    during a run change nothing.

    Args:
        stream: the file.
        where: the file as the user gave it, for errors.
        wants_conditioning: whether the lines must name conditioning images.

    Raises:
        ConfigError: there are no rows, or a line is broken.
    """

    def __init__(self, stream: IO[bytes], where: str, wants_conditioning: bool) -> None:
        self.has_conditioning_images = wants_conditioning
        self.entry: type[Entry | EntryWithoutConditioning] = (
            Entry if wants_conditioning else EntryWithoutConditioning
        )
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
        """Return the file name of a row's image."""
        row = self.row(index)
        return row.image if kind == "image" else row.conditioning_image

    def _parse(self, line: bytes, where: str) -> Entry | EntryWithoutConditioning:
        """Return the entry of a line.

        Raises:
            ConfigError: the line is not such an object.
        """
        try:
            return self.decoder.decode(line)
        # Python's own parser accepts a little more, such as half of a surrogate pair.
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
