"""The records of a table of text: JSON lines, a JSON list, or comma or tab separated values."""

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import IO, Any

import msgspec

from common.errors import ConfigError
from precompute.sources.files.tree import ending

TABLES = frozenset({"jsonl", "json", "csv", "tsv"})
# A record, or why it cannot be read.
Record = dict[str, Any] | str
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
    if ending(name) in ("csv", "tsv"):
        return _separated(stream, "\t" if ending(name) == "tsv" else ",", where)
    start = stream.read(4096)
    encoding = BYTE_ORDER_MARKS.get(start[:2], "")
    if encoding or (ending(name) == "json" and start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["):
        data = start + stream.read()
        text = data.decode(encoding, "surrogatepass").encode() if encoding else data
        if text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            return _listed(text.removeprefix(codecs.BOM_UTF8), where)
        return _lines(b"", io.BytesIO(text))
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


def _separated(stream: IO[bytes], separator: str, where: str) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(sys.maxsize)
    start = stream.peek(2)[:2] if hasattr(stream, "peek") else b""
    encoding = BYTE_ORDER_MARKS.get(start, "utf-8-sig")
    # What is no UTF-8 stays in a file's name as it is, and makes a caption a bad one.
    text = io.TextIOWrapper(stream, encoding, "surrogateescape", newline="")
    first = text.readline()
    others = [other for other in ";\t" if other in first]
    if separator not in first and others:
        separator = others[0]
    reader = csv.reader(itertools.chain([first], text), delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ConfigError(
                    f"{where}, line {number}: a quotation mark is opened here and never closed."
                ) from error
            yield number, f"not CSV ({error})"
            continue
        if names is None:
            names = values
        elif len(values) == len(names):
            yield number, dict(zip(names, values, strict=True))
        elif values:
            yield number, f"{len(values)} values, {len(names)} expected as in the first line"
