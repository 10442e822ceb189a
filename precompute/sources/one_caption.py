"""One caption for all rows of a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from precompute.sources.source import Kind, Row, Source

NAME = "{name}"


class OneCaption:
    """The rows of any source, with one caption for all.

    Args:
        source: the rows; their own captions do not matter.
        caption: `{name}` in it stands for the name of the row's image, without folder and ending.
    """

    def __init__(self, source: Source, caption: str) -> None:
        self.source = source
        self.caption = caption
        self.has_conditioning_images = source.has_conditioning_images
        self.layout = source.layout
        of_each = ", each with its file's name" if NAME in caption else ""
        self.remarks = [f"one caption for all rows{of_each}: {caption!r}", *source.remarks]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        for row in self.source.rows(indices):
            name = PurePosixPath(row.image.replace("\\", "/")).stem
            yield replace(row, prompt=self.caption.replace(NAME, name))

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image."""
        return self.source.read(index, kind)

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        return self.source.version(index, kind)
