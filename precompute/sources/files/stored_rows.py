"""Rows on the disk: ten million take little memory, and later edits of a table change nothing."""

import json
import mmap
import posixpath
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

import msgspec


class Entry(msgspec.Struct, array_like=True, gc=False):
    """A row as it is stored.

    Attributes:
        image: file name of the image; empty if it has none.
        conditioning_image: file name of the conditioning image; empty if it has none.
        prompt: the caption as found, or a list of captions.
        fault: why the row cannot be used; empty if nothing is known to be wrong.
    """

    image: str
    conditioning_image: str
    prompt: Any
    fault: str = ""


DECODER = msgspec.json.Decoder(Entry)


class StoredRows:
    """Rows of one table or several, in a temporary file.

    Attributes:
        folders: which the file names of each table are relative to; at first the table's own.
        num_names: how many file names the rows have.

    Args:
        tables: names of the tables.
        unit: what a row's number counts.
    """

    def __init__(self, tables: Sequence[str], unit: Literal["line", "row"] = "line") -> None:
        self.tables = tables
        self.unit = unit
        self.folders = [posixpath.dirname(table) for table in tables]
        self.num_names = 0
        self.ends = array("Q")  # number of rows up to the end of each table
        self.starts = array("Q")
        self.numbers = array("I")
        self.text: mmap.mmap | bytes = b""
        self._file = tempfile.TemporaryFile(buffering=1 << 16)  # noqa: SIM115
        self._size = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def append(self, number: int, entry: Entry) -> None:
        """Add a row.

        Args:
            number: where it stands in its table.
            entry: the row.
        """
        try:
            line = msgspec.json.encode(entry)
        except UnicodeEncodeError:  # half of a surrogate pair, which json writes as an escape
            line = json.dumps(msgspec.to_builtins(entry)).encode()
        self.num_names += bool(entry.image) + bool(entry.conditioning_image)
        self._file.write(line)
        self.starts.append(self._size)
        self.numbers.append(number)
        self._size += len(line)

    def end_table(self) -> None:
        """Note that all rows of a table are there; after the last table, none can be added."""
        self.ends.append(len(self))
        if len(self.ends) == len(self.tables):
            self._file.flush()
            if self._size:
                self.text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._file.close()

    def __getitem__(self, index: int) -> Entry:
        """Return a row."""
        end = self.starts[index + 1] if index + 1 < len(self) else self._size
        line = self.text[self.starts[index] : end]
        try:
            return DECODER.decode(line)
        except (msgspec.MsgspecError, ValueError):
            return Entry(*json.loads(line))

    def table(self, index: int) -> str:
        """Return the name of a row's table."""
        return self.tables[bisect_right(self.ends, index)]

    def folder(self, index: int) -> str:
        """Return the folder that a row's file names are relative to."""
        return self.folders[bisect_right(self.ends, index)]

    def where(self, index: int) -> str:
        """Return the place of a row, in words."""
        place = f"{self.unit} {self.numbers[index]}"
        return f"{self.table(index)}, {place}" if len(self.tables) > 1 else place
