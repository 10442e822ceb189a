"""The records of a table of text: JSON lines, a JSON list, or comma or tab separated values."""

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeGuard

import msgspec

from common.errors import ConfigError
from precompute.sources.files.tree import ending, is_picture

SEPARATED = frozenset({"csv", "tsv"})
TABLES = frozenset({"jsonl", "json"}) | SEPARATED
# A record, or why it cannot be read.
Record = dict[str, Any] | str
SEPARATOR_LINE = re.compile(r"sep=(.)\s*")
FILE_NAME = "file_name"
BLANK = codecs.BOM_UTF8 + b" \t\r\n"
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_records(stream: IO[bytes], name: str, where: str) -> Iterator[tuple[int, Record]]:
    """Yield the records of a table, each with its line, or its number in a list; from 1.

    The values of a CSV are text as it stands there: `null` and `1.50` as well.

    Args:
        stream: the table.
        name: its file name, whose ending tells its form.
        where: the table in words, for errors.

    Raises:
        ConfigError: it is no such table as a whole.
    """
    if ending(name) in SEPARATED:
        return _separated(stream, "\t" if ending(name) == "tsv" else ",")
    start = stream.read(4096)
    encoding = BYTE_ORDER_MARKS.get(start[:2], "")
    if encoding or (ending(name) == "json" and start.lstrip(BLANK)[:1] == b"["):
        data = start + stream.read()
        text = data.decode(encoding, "surrogatepass").encode() if encoding else data
        if text.lstrip(BLANK)[:1] == b"[":
            return _listed(text.removeprefix(codecs.BOM_UTF8), where)
        start, stream = b"", io.BytesIO(text)
    if ending(name) == "json":
        start += stream.readline()
        first = _parse(start.lstrip(BLANK).partition(b"\n")[0])
        if isinstance(first, str) or _is_mapping(first):  # perhaps an object over several lines
            start += stream.read()
            whole = _parse(start.removeprefix(codecs.BOM_UTF8))
            if _is_mapping(whole):
                return _mapped(whole)
    return _lines(start, stream)


def _lines(start: bytes, stream: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """Yield the objects of JSON lines; `start` has been read from the stream already."""
    lines = itertools.chain(io.BytesIO(start + stream.readline()), stream)
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, _parse(text)


def _parse(line: bytes) -> Record:
    try:
        value = msgspec.json.decode(line)
    # Python's own parser accepts a little more, such as half of a surrogate pair.
    except (msgspec.MsgspecError, ValueError, RecursionError):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"not JSON ({error})"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _listed(text: bytes, where: str) -> Iterator[tuple[int, Record]]:
    try:
        values = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a JSON list ({error}).") from error
    return ((number, _parse(bytes(value))) for number, value in enumerate(values, start=1))


class _StrayQuote(ValueError):
    """A value goes on into a line that is a row of its own."""


class _Lines:
    """The lines of a table, of which those that a record has taken can be given back.

    Args:
        lines: from the header on.
        number: of the header, from 1.
        separator: of values.

    Attributes:
        number: of the first line of the record that is read.
        taken: the lines of that record.
        num_values: of a row; 0 if that is not known yet.
    """

    def __init__(self, lines: Iterable[str], number: int, separator: str) -> None:
        self.number, self.separator = number, separator
        self.taken: list[str] = []
        self.num_values = 0
        self._lines = iter(lines)
        self._given_back: deque[str] = deque()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self.taken.append(line)
        if len(self.taken) > 1 and self._is_row(line):
            raise _StrayQuote
        return line

    def begin_record(self) -> None:
        """Let the next record begin behind the last one."""
        self.number += len(self.taken)
        self.taken.clear()

    def keep_first(self) -> None:
        """Give back all lines of the record but its first."""
        self._given_back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def _is_row(self, line: str) -> bool:
        """Tell whether a line within a value is a row: it names a picture, and opens no value.

        The last line of a value has an odd number of quotation marks, and may name a picture too.
        """
        if not self.num_values or line.count('"') % 2:
            return False
        values = next(csv.reader([line], delimiter=self.separator), [])
        return len(values) == self.num_values and any(map(is_picture, values))


def _is_mapping(record: Record) -> TypeGuard[dict[str, Any]]:
    """Tell whether an object has names of pictures for its keys."""
    return isinstance(record, dict) and bool(record) and all(map(is_picture, record))


def _mapped(values: dict[str, Any]) -> Iterator[tuple[int, Record]]:
    """Yield the rows of an object of captions, or of objects with them, by file names."""
    for number, (name, value) in enumerate(values.items(), start=1):
        yield number, {FILE_NAME: name} | (value if isinstance(value, dict) else {"text": value})


def _separated(stream: IO[bytes], separator: str) -> Iterator[tuple[int, Record]]:
    """Yield the rows of separated values, the first line that is not blank aside: their names.

    A quotation mark that is not closed before the next row makes a bad row of its own line alone.

    Args:
        stream: the table.
        separator: that its ending stands for; its first line may show another.
    """
    csv.field_size_limit(sys.maxsize)
    start = stream.peek(2)[:2] if hasattr(stream, "peek") else b""
    encoding = BYTE_ORDER_MARKS.get(start, "utf-8-sig")
    # What is no UTF-8 stays in a file's name as it is, and makes a caption a bad one.
    text = io.TextIOWrapper(stream, encoding, "surrogateescape", newline="")
    number, first = next(((n, line) for n, line in enumerate(text, 1) if line.strip()), (1, ""))
    if match := SEPARATOR_LINE.fullmatch(first):  # as Excel writes it
        lines = _Lines(text, number + 1, match[1])
    else:
        if separator == "," or separator not in first:
            separator = max((separator, *",;\t"), key=first.count)
        lines = _Lines(itertools.chain([first], text), number, separator)
    reader = csv.reader(lines, delimiter=lines.separator, strict=True)
    names: list[str] = []
    while True:
        lines.begin_record()
        values, fault = _next_values(reader, lines)
        if fault:
            yield lines.number, fault
        elif values is None:
            return
        elif not names:
            names, lines.num_values = values, len(values)
        elif values:
            yield lines.number, dict(zip(names, values, strict=True))


def _next_values(reader: Iterator[list[str]], lines: _Lines) -> tuple[list[str] | None, str]:
    """Return the next values, none for a blank line and None at the end, and what is wrong."""
    fault = ""
    try:
        values = next(reader, None)
    except (csv.Error, _StrayQuote) as error:
        values, fault = None, f"not CSV ({error})"
        if "unexpected end" in str(error):
            fault = "a quotation mark is opened here and never closed"
        elif len(lines.taken) > 1:
            fault = "a quotation mark is opened here and not closed before the next row"
    if values and lines.num_values and len(values) != lines.num_values:
        fault = f"{len(values)} values, {lines.num_values} expected as in the first line"
    if fault:
        lines.keep_first()
    return values, fault
