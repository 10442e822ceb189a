"""Parquet files as a data set: images stay where they are, captions and names are in memory."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

from common.errors import ConfigError
from precompute.sources.columns import Columns, find_columns, image_columns, lacks
from precompute.sources.counted import first_few, remark
from precompute.sources.file_versions import file_version, names_version
from precompute.sources.files.folder import Folder
from precompute.sources.files.tree import NUM_TRIED, Finder, folder_of_names
from precompute.sources.files_below import files_below
from precompute.sources.parquet.stored_images import StoredImages, only_column
from precompute.sources.source import Kind, Row, Source, SourceSettings
from precompute.sources.splits import files_of_split, left_out_remark

PARQUET = ".parquet"


class ParquetFile:
    """One file: its captions and file names, and where its images are.

    Args:
        path: of the file.
        inside: the same in the data set's folder.
        columns: which are read, by their names in the file.
    """

    def __init__(self, path: Path, inside: PurePath, columns: Columns) -> None:
        import pyarrow.parquet as pq

        self.name, self.columns = inside.as_posix(), columns
        # That its file names are relative to, at first the one that it lies in.
        self.folder = inside.parent.as_posix().removeprefix(".")
        self.version = file_version(path.absolute())
        with pq.ParquetFile(path) as file:
            self.num_rows = file.metadata.num_rows
            self.captions: Any = None
            if columns.caption is not None:
                self.captions = file.read([columns.caption]).column(0)
            names: dict[Kind, str | None] = {
                "image": columns.image,
                "conditioning_image": columns.conditioning_image,
            }
            self.images = {
                kind: StoredImages(path, file.metadata, name)
                for kind, name in names.items()
                if name is not None
            }
            self.names = {
                kind: only_column(file.read([images.path_leaf]))
                for kind, images in self.images.items()
                if images.path_leaf is not None
            }

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.num_rows)

    def image_name(self, at: int, kind: Kind) -> str:
        """Return the name of a row's image; empty if it has none."""
        names = self.names.get(kind)
        return "" if names is None else names[at].as_py() or ""

    def first_names(self, count: int) -> list[str]:
        """Return the names of the first rows' images, as far as they have any."""
        rows = range(min(count // 2, len(self)))
        names = [self.image_name(at, kind) for at in rows for kind in self.images]
        return list(filter(None, names))

    def caption(self, at: int) -> tuple[Any, str]:
        """Return a row's caption, as found, and why it has none."""
        if self.captions is None:
            return None, ""
        caption = self.captions[at].as_py()
        return caption, lacks("caption", self.columns.caption) if caption is None else ""


class ParquetTable:
    """The rows of Parquet files.

    Args:
        files: in the order of the rows.
        finder: of the images that the files only name.
        remarks: on what is left out or not read.
        has_conditioning_images: whether the rows name conditioning images.
    """

    def __init__(
        self,
        files: Sequence[ParquetFile],
        finder: Finder,
        remarks: list[str],
        *,
        has_conditioning_images: bool,
    ) -> None:
        self.files, self.finder, self.remarks = files, finder, remarks
        self.has_conditioning_images = has_conditioning_images
        self.layout = f"Parquet, {len(files)} {'file' if len(files) == 1 else 'files'}"
        self.ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.ends[-1]

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        for index in indices:
            file, at = self._find(index)
            image, control = (file.image_name(at, kind) for kind in ("image", "conditioning_image"))
            where = f"row {index}" if len(self.files) == 1 else f"{file.name}, row {at}"
            yield Row(where, image, control, *file.caption(at))

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        file, at = self._find(index)
        embedded = file.images[kind].embedded(at)
        if embedded is not None:
            return embedded
        return self.finder.read(_named_file(file, at, kind), file.folder)

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        file, at = self._find(index)
        images = file.images[kind]
        if images.all_embedded or images.embedded(at) is not None:
            return file.version and names_version(file.version.hex(), images.name, at)
        try:
            return self.finder.version(_named_file(file, at, kind), file.folder)
        except OSError:
            return None

    def _find(self, index: int) -> tuple[ParquetFile, int]:
        """Return a row's file, and its place in it."""
        number = bisect_right(self.ends, index)
        file = self.files[number]
        return file, index - (self.ends[number] - len(file))


def _named_file(file: ParquetFile, at: int, kind: Kind) -> str:
    """Return the name of a file with a row's image.

    Raises:
        OSError: there is no such file.
    """
    name = file.image_name(at, kind)
    if not name:
        raise OSError(lacks(kind.replace("_", " "), file.images[kind].name))
    if "://" in name:
        raise OSError("is an address, not a file; images are not downloaded one by one")
    return name


def open_parquet(settings: SourceSettings, path: Path, where: str) -> Source | None:
    """Return the Parquet files in a folder, or one, as a data set; None if there are none.

    Args:
        settings: the columns and the split.
        path: of the folder or the file.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: a file is damaged or lacks a column, there is no such split, or no row.
    """
    found, num_others = files_below(path, (PARQUET,))
    found = {one: inside for one, inside in found.items() if one.name.lower().endswith(PARQUET)}
    if not found:
        return None
    kept, left_out = files_of_split(found, settings.split, where)
    names = {one: where if one == path else f"{where}, {inside}" for one, inside in found.items()}
    files, empty = [], []
    for one in kept:
        schema, num_rows = _schema_and_rows(one, names[one])
        if num_rows:
            files.append(_read(one, found[one], schema, settings, names[one]))
        else:  # its columns may be of no type
            empty.append(str(found[one]))
    if not files:
        raise ConfigError(f"{where}: holds no rows.")
    remarks = remark("Parquet files without rows", empty)
    for split, others in left_out.items():
        num_rows = sum(_schema_and_rows(one, names[one])[1] for one in others)
        few = first_few([str(found[one]) for one in others])
        remarks.append(f"{left_out_remark(num_rows, split)} ({few})")
    folder = Folder(path if path.is_dir() else path.parent)
    if num_others and all(one.all_embedded for file in files for one in file.images.values()):
        remarks.append(f"not read: {num_others} other files beside the Parquet files")
    finder = Finder([folder])
    for file in files:
        if not all(images.all_embedded for images in file.images.values()):
            file.folder, _ = folder_of_names(finder, file.folder, file.first_names(NUM_TRIED))
    return ParquetTable(files, finder, remarks, has_conditioning_images=settings.wants_conditioning)


def _read(
    path: Path, inside: PurePath, schema: Any, settings: SourceSettings, where: str
) -> ParquetFile:
    in_file = image_columns(schema.names)
    types = {name: schema.field(old).type for name, old in in_file.items()}
    columns = find_columns(types, settings, where)
    control, caption = columns.conditioning_image, columns.caption
    named = Columns(
        in_file[columns.image],
        None if control is None else in_file[control],
        None if caption is None else in_file[caption],
    )
    try:
        return ParquetFile(path, inside, named)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read as Parquet ({error}).") from error


def _schema_and_rows(path: Path, where: str) -> tuple[Any, int]:
    """Return the Arrow schema of a Parquet file, and the number of its rows.

    Raises:
        ConfigError: it is damaged, or cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read as Parquet ({error}).") from error
    return metadata.schema.to_arrow_schema(), metadata.num_rows
