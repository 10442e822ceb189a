"""Data sets of plain files: rows that name their images, and perhaps their captions' files."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from precompute.sources.files.stored_rows import StoredRows
from precompute.sources.files.tree import Finder
from precompute.sources.patient_read import patiently
from precompute.sources.source import Kind, Row, printable
from sd3.image_files import LFS_POINTER

READING_THREADS = 8
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Listed:
    """Rows whose images are files.

    Args:
        rows: with their images' names.
        finders: of the images and of the conditioning images.
        layout: how they lie there, in words.
        remarks: on what is not read.
        has_conditioning_images: whether the rows name conditioning images.
    """

    def __init__(
        self,
        rows: StoredRows,
        finders: Mapping[Kind, Finder],
        layout: str,
        remarks: list[str],
        *,
        has_conditioning_images: bool,
    ) -> None:
        self.stored = rows
        self.finders = finders
        self.layout = layout
        self.remarks = remarks
        self.has_conditioning_images = has_conditioning_images

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.stored)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        return map(self._row, indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        return self.finders[kind].read(*self._name_and_folder(index, kind))

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        try:
            return self.finders[kind].version(*self._name_and_folder(index, kind))
        except OSError:
            return None

    def _row(self, index: int) -> Row:
        entry = self.stored[index]
        where = self.stored.where(index)
        return Row(where, entry.image, entry.conditioning_image, entry.prompt, entry.fault)

    def _name_and_folder(self, index: int, kind: Kind) -> tuple[str, str]:
        """Return the name of a row's image, and the folder that it is relative to.

        Raises:
            OSError: the row has none, or it is no file.
        """
        entry = self.stored[index]
        name = entry.image if kind == "image" else entry.conditioning_image
        if not name:
            raise OSError(f"no {kind.replace('_', ' ')}")
        if "://" in name:
            raise OSError("is an address, not a file; images are not downloaded one by one")
        of_table = self.finders[kind] is self.finders["image"]  # or of a tree of their own
        return name, self.stored.folder(index) if of_table else ""


class WithCaptionFiles(Listed):
    """Rows whose images and captions are files; the stored prompts are the captions' file names."""

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        return self._rows_in_threads(indices) if len(indices) > 1 else map(self._row, indices)

    def _rows_in_threads(self, indices: Sequence[int]) -> Iterator[Row]:
        with ThreadPoolExecutor(READING_THREADS, "captions") as pool:
            yield from pool.map(self._row, indices)

    def _row(self, index: int) -> Row:
        row = super()._row(index)
        if not row.prompt:
            return row
        name = str(row.prompt)
        try:
            data = patiently(lambda: self.finders["image"].read(name, ""), lambda: printable(name))
            if data.startswith(LFS_POINTER):
                fault = f"{printable(name)}: it is a pointer of Git LFS: git lfs pull"
                return replace(row, prompt=None, fault=fault)
            return replace(row, prompt=_text(data))
        except UnicodeError:
            return replace(row, prompt=None, fault=f"{printable(name)}: not UTF-8")
        except OSError as error:
            reason = error.strerror or error
            return replace(row, prompt=None, fault=f"{printable(name)}: {reason}")


def _text(data: bytes) -> str:
    """Return a caption from the bytes of its file.

    Raises:
        UnicodeError: they are no text.
    """
    encoding = "utf-16" if data[:2] in UTF16_MARKS else "utf-8-sig"
    return data.decode(encoding).strip()
