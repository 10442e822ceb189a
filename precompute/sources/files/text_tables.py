"""Rows from tables of text."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from common.errors import ConfigError
from precompute.sources.files.records import FILE_NAME, SEPARATED, Record, read_records
from precompute.sources.files.stored_rows import Entry, StoredRows
from precompute.sources.files.tree import NUM_TRIED, Finder, Tree, ending, folder_of_names
from precompute.sources.source import SourceSettings

PROMPTS = "prompt.json"
MOST_COLUMNS = 20  # in messages
# Bytes that are no UTF-8, as Python keeps them.
NO_UTF8 = re.compile("[\udc80-\udcff]")
NOT_UTF8 = (
    "the caption is not UTF-8: perhaps Latin-1, as Windows writes it; convert the table, "
    "iconv -f WINDOWS-1252 -t UTF-8 old.csv > new.csv"
)


@dataclass(frozen=True)
class Names:
    """The names of a table's columns, each with the option that sets it; empty if it has none.

    Attributes:
        image: names that the column of images may have, the first that a row has is taken.
        conditioning_image: the same of the conditioning images; none if they are not wanted.
        caption: the same of the captions; none if they are not wanted.
    """

    image: tuple[str, ...]
    conditioning_image: tuple[str, ...]
    caption: tuple[str, ...]


def column_names(settings: SourceSettings) -> Names:
    """Return the names of the columns that the settings ask for."""
    image, control = settings.image_column, settings.conditioning_image_column
    # An image folder's table has `file_name`, and `x_file_name` for the column `x`.
    images = (image, f"{image}_{FILE_NAME}", *([FILE_NAME] if image == "image" else []))
    wants_controls = settings.wants_conditioning and settings.conditioning_data_dir is None
    return Names(
        images,
        (control, f"{control}_{FILE_NAME}") if wants_controls else (),
        (settings.caption_column,) if settings.caption is None else (),
    )


def prompt_json_names(settings: SourceSettings) -> Names:
    """Return the names of prompt.json's columns, which are always the same."""
    names = column_names(settings)
    return Names(
        ("target",),
        ("source",) if names.conditioning_image else (),
        ("prompt",) if names.caption else (),
    )


def columns_of(tree: Tree, table: str) -> list[str]:
    """Return the names of a table's columns, by its first record that can be read; else none.

    Args:
        tree: the files.
        table: name of a table of text, or of a Parquet file.

    Raises:
        OSError: it cannot be read.
    """
    with suppress(ConfigError), tree.open(table) as stream:
        if ending(table) == "parquet":
            import pyarrow.parquet

            with suppress(ValueError):  # no Parquet: pyarrow's errors are ValueErrors
                return list(pyarrow.parquet.read_schema(stream).names)
        for _, record in islice(read_records(stream, table, table), NUM_TRIED):
            if isinstance(record, dict):
                return list(record)
    return []


def has_images(tree: Tree, table: str, settings: SourceSettings) -> bool:
    """Tell whether a table has a column of images.

    Raises:
        OSError: it cannot be read.
    """
    return bool(set(column_names(settings).image) & set(columns_of(tree, table)))


def names_pictures(tree: Tree, table: str, settings: SourceSettings) -> bool:
    """Tell whether a table has all columns that rows need, and names a file that is there.

    Raises:
        OSError: it cannot be read.
    """
    records: list[dict[str, Any]] = []
    with suppress(ConfigError), tree.open(table) as stream:
        first = islice(read_records(stream, table, table), NUM_TRIED // 2)
        records = [record for _, record in first if isinstance(record, dict)]
    names = column_names(settings)
    wanted = [alternatives for alternatives in vars(names).values() if alternatives]
    if not all(any(_value(one, each) is not None for one in records) for each in wanted):
        return False
    files = [name for one in records if (name := _file_name(one, names.image)[0])]
    return folder_of_names(Finder([tree]), posixpath.dirname(table), files)[1] > 0


def read_tables(tree: Tree, tables: Sequence[str], names: Names, where: str) -> StoredRows:
    """Return the rows of tables.

    Args:
        tree: the data set's files.
        tables: file names in it.
        names: of the columns.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: there are no rows, all are broken, or a column is missing.
        OSError: a table cannot be read.
    """
    rows = StoredRows(tables)
    found: dict[str, None] = {}  # the columns, in order
    first_fault = ""
    for table in tables:
        place, is_csv = f"{where}, {table}", ending(table) in SEPARATED
        with tree.open(table) as stream:
            for number, record in read_records(stream, table, place):
                if isinstance(record, dict):
                    found |= dict.fromkeys(record)
                elif not first_fault:
                    first_fault = f"{place}, line {number}: {record}."
                rows.append(number, _entry(record, names, is_csv=is_csv))
        rows.end_table()
    if not len(rows):
        raise ConfigError(f"{where}, {tables[0]}: holds no rows.")
    if not found:
        fault = first_fault or f"{where}, {tables[0]}: its rows have no columns."
        raise ConfigError(f"{fault} No row of this table can be read.")
    _refuse_missing(found, names, f"{where}, {tables[0]}")
    return rows


def count_records(tree: Tree, table: str) -> int:
    """Return the number of a table's records, broken ones included.

    Raises:
        ConfigError: it is no table as a whole.
        OSError: it cannot be read.
    """
    with tree.open(table) as stream:
        return sum(1 for _ in read_records(stream, table, table))


def _entry(record: Record, names: Names, *, is_csv: bool) -> Entry:
    if not isinstance(record, dict):
        return Entry("", "", None, record)
    image, fault = _file_name(record, names.image)
    control, control_fault = _file_name(record, names.conditioning_image)
    caption = _value(record, names.caption)
    if is_csv and isinstance(caption, str) and NO_UTF8.search(caption):
        fault = fault or NOT_UTF8
    return Entry(image, control, caption, fault or control_fault)


def _value(record: dict[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


def _file_name(record: dict[str, Any], names: Iterable[str]) -> tuple[str, str]:
    """Return a file name, empty if there is none, and what is wrong with it."""
    value = _value(record, names)
    if value is None or isinstance(value, str):
        return value or "", ""
    (name,) = [name for name in names if name in record][:1]
    return "", f"{name} is not a file name but {type(value).__name__}"


def _refuse_missing(found: dict[str, None], names: Names, where: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        ConfigError: naming the columns that it has, and the option that names one.
    """
    used = {name for alternatives in vars(names).values() for name in alternatives}
    for option, alternatives in vars(names).items():
        if alternatives and not any(name in found for name in alternatives):
            if where.lower().endswith(PROMPTS):
                form = ", ".join(f'"{one}": …' for (one,) in filter(None, vars(names).values()))
                raise ConfigError(
                    f"{where}: no {alternatives[0]} in any line; expected {{{form}}}."
                )
            flag = f"--{option.replace('_', '-')}-column"
            others = [name for name in found if name not in used]
            hint = f"Did you mean {flag} {others[0]}?" if len(others) == 1 else f"Name it: {flag}."
            if option == "conditioning_image" and not others:
                hint = (
                    f"Name it: {flag}; or give --conditioning-data-dir, or have them drawn: "
                    "--conditioning-from canny."
                )
            if option == "caption" and not others:
                hint = f'Name it: {flag}; or give one for all rows: --caption "…".'
            more = ["…"] if len(found) > MOST_COLUMNS else []
            has = ", ".join([*list(found)[:MOST_COLUMNS], *more])
            raise ConfigError(f"{where}: no column {alternatives[0]!r}; it has {has}. {hint}")
