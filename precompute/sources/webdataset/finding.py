"""Finding the tars of a data set, and what lies beside them."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path, PurePath

from common.errors import ConfigError
from precompute.sources.counted import first_few
from precompute.sources.files.tree import TARS
from precompute.sources.files_below import files_below
from precompute.sources.source import SourceSettings

PARQUET = ".parquet"
TABLES = (".jsonl", ".json", ".csv", ".tsv", PARQUET)
SNIFFED_BYTES = 1 << 20


def find_tars(
    settings: SourceSettings, path: Path, where: str
) -> tuple[dict[Path, PurePath], list[str]]:
    """Return the tars of a data set, in the order of the rows, and remarks on what lies beside.

    Args:
        settings: whose columns tell whether a table is a data set, or a list beside the tars.
        path: of the data set's folder, or of a tar.
        where: the data set as the user gave it, for errors.

    Returns:
        each tar's path, and the same relative to the folder; none if it has none.

    Raises:
        ConfigError: there are tars and a table, each of which may be the data set.
    """
    found, num_others = files_below(path, (*TARS, *TABLES))
    tars = {one: relative for one, relative in found.items() if one.name.lower().endswith(TARS)}
    if not tars:
        return {}, []
    tables = [one for one in found if one not in tars]
    for table in tables:
        if _may_be_the_data(_columns(table), settings):
            names = first_few(list(map(str, tars.values())))
            raise ConfigError(
                f"{where}: holds WebDataset tars ({names}) and a table with images and captions, "
                f"{found[table]}. Give the path of one of them."
            )
    remarks = []
    if tables:
        names = first_few([str(found[table]) for table in tables])
        remarks.append(f"not read: {len(tables)} tables beside the tars: {names}")
    if num_others:
        remarks.append(f"not read: {num_others} other files beside the tars")
    return tars, remarks


def _may_be_the_data(columns: Iterable[str], settings: SourceSettings) -> bool:
    names = set(columns)
    images = {settings.image_column, "file_name"}
    return settings.caption_column in names and bool(images & names)


def _columns(table: Path) -> list[str]:
    """Return the names of a table's columns; of a file that is no table, none."""
    try:
        if table.name.lower().endswith(PARQUET):
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(table).names)
        with table.open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(SNIFFED_BYTES)
        if table.suffix.lower() in (".csv", ".tsv"):
            return next(csv.reader([text.partition("\n")[0]]), [])
        first = json.JSONDecoder().raw_decode(text.lstrip("[ \t\r\n"))[0]
        return list(first) if isinstance(first, dict) else []
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return []
