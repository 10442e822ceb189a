"""Data sets that the `datasets` library reads: image folders, Parquet, WebDataset tars, the hub.

Tables stay Arrow on disk, mapped into memory; images are never decoded here.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from precompute.sources.columns import Columns, find_columns, lacks
from precompute.sources.file_versions import file_version, names_version, read_file
from precompute.sources.hub import load_hub
from precompute.sources.local import load_local
from precompute.sources.source import Kind, Row, Source, SourceSettings

if TYPE_CHECKING:
    from datasets import Dataset


class Table:
    """A table of images and captions.

    An image is bytes, a file name, or both; a file name is relative to the data set's folder.

    Args:
        dataset: the rows.
        columns: which of its columns are read.
        captions_are_json: `datasets` keeps columns of mixed types so.
        folder: that file names are relative to; None if there is none.
        remarks: on what is left out of the rows, or written elsewhere.
    """

    def __init__(
        self,
        dataset: "Dataset",
        columns: Columns,
        captions_are_json: bool,
        folder: str | None,
        remarks: list[str],
    ) -> None:
        self.layout = "a table that the datasets library reads"
        self.remarks = remarks
        self.folder = folder
        self.has_conditioning_images = columns.conditioning_image is not None
        table = dataset.with_format("arrow")[:]
        self.num_rows = len(table)
        self.captions = None if columns.caption is None else table[columns.caption]
        self.caption_column = columns.caption
        self.captions_are_json = captions_are_json
        self.paths: dict[Kind, Any] = {}
        self.bytes: dict[Kind, Any] = {}
        names: dict[Kind, str | None] = {
            "image": columns.image,
            "conditioning_image": columns.conditioning_image,
        }
        for kind, name in names.items():
            if name is not None:
                self.paths[kind], self.bytes[kind] = _paths_and_bytes(table[name])
        self.names = names
        self.files_version = _files_version(dataset)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        for index in indices:
            caption, fault = self._caption(index), ""
            if caption is None and self.captions is not None:
                fault = lacks("caption", self.caption_column)
            yield Row(
                f"row {index}",
                self._path(index, "image"),
                self._path(index, "conditioning_image"),
                caption,
                fault,
            )

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        if (embedded := _value(self.bytes[kind], index)) is not None:
            return bytes(embedded)
        return read_file(self._file(index, kind))

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        column = self.bytes[kind]
        if column is not None and column[index].is_valid:
            if self.files_version is None:
                return None
            return names_version(self.files_version.hex(), str(self.names[kind]), index)
        try:
            return file_version(self._file(index, kind))
        except OSError:
            return None

    def _caption(self, index: int) -> Any:
        if self.captions is None:
            return None
        caption = self.captions[index].as_py()
        if self.captions_are_json and caption is not None:
            return json.loads(caption)
        return caption

    def _path(self, index: int, kind: Kind) -> str:
        return _value(self.paths.get(kind), index) or ""

    def _file(self, index: int, kind: Kind) -> str:
        path = self._path(index, kind)
        if not path:
            raise OSError(lacks(kind.replace("_", " "), self.names[kind]))
        if path.startswith("zip://"):
            raise OSError("lies in an archive; unpack it beside its table first")
        if "://" in path:
            raise OSError("is an address, not a file; images are not downloaded one by one")
        if self.folder is None and not os.path.isabs(path):  # noqa: PTH117
            raise OSError("is a file name, and the data set does not hold the file")
        return os.path.join(self.folder or "", path)  # noqa: PTH118


def _value(column: Any, index: int) -> Any:
    return None if column is None else column[index].as_py()


def _paths_and_bytes(column: Any) -> tuple[Any, Any]:
    """Return the file names and the bytes in a column of images; None for what it lacks."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        fields = [column.type.field(at).name for at in range(column.type.num_fields)]
        columns = {name: pc.struct_field(column, name) for name in fields}
        return columns.get("path"), columns.get("bytes")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column, None
    return None, column


def _files_version(dataset: "Dataset") -> bytes | None:
    """Return bytes that change when the table's Arrow files change; None if it has none."""
    parts: list[str | int] = []
    for file in sorted(file["filename"] for file in dataset.cache_files):
        status = os.stat(file)  # noqa: PTH116
        parts += [os.path.abspath(file), status.st_size, status.st_mtime_ns]  # noqa: PTH100
    return names_version(*parts) if parts else None


def open_local(settings: SourceSettings, path: Path, where: str) -> Source:
    """Return a local data set.

    Args:
        settings: its configuration and columns.
        path: of its folder, or of one file.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: it cannot be read, or lacks a column.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return _open(*load_local(settings, path, where), settings, str(folder), where)


def open_hub(settings: SourceSettings, name: str, where: str) -> Source:
    """Return a data set of the hub.

    Args:
        settings: its configuration, revision and columns.
        name: its hub id.
        where: the id as the user gave it, for errors.

    Raises:
        ConfigError: it cannot be downloaded or read, or lacks a column.
    """
    return _open(*load_hub(settings, name, where), settings, None, where)


def _open(
    dataset: "Dataset",
    remarks: list[str],
    settings: SourceSettings,
    folder: str | None,
    where: str,
) -> Source:
    from datasets import features

    if not len(dataset):
        raise ConfigError(f"{where}: holds no rows.")
    types = {field.name: field.type for field in dataset.features.arrow_schema}
    columns = find_columns(types, settings, where)
    kind = getattr(features, "Json", ())  # of datasets 4.7 and later
    is_json = columns.caption is not None and isinstance(dataset.features[columns.caption], kind)
    return Table(dataset, columns, is_json, folder, remarks + _copies(dataset, folder))


def _copies(dataset: "Dataset", folder: str | None) -> list[str]:
    """Return a remark on the Arrow files that the datasets library has written of a data set."""
    files = [Path(file["filename"]).absolute() for file in dataset.cache_files]
    copies = [file for file in files if folder is None or not file.is_relative_to(folder)]
    if not copies:
        return []
    num_bytes = sum(file.stat().st_size for file in copies)
    return [
        f"copied by the datasets library: {num_bytes / 1e6:.1f} MB of Arrow files in "
        f"{copies[0].parent}"
    ]
