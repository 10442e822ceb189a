"""Data sets to encode: rows of names and captions, and the bytes of their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["image", "conditioning_image"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a source.

    Attributes:
        where: which row it is, for people: `line 3`, from 1, or `row 17`, from 0.
        image: what the image is called; a file name where there is one, or empty.
        conditioning_image: likewise; empty where the source has none.
        prompt: the caption as found, or a list of captions; a bad row's may be no text.
    """

    where: str
    image: str
    conditioning_image: str
    prompt: Any

    @property
    def name(self) -> str:
        """What the row is called in reports."""
        return f"{self.where}, {printable(self.image)}" if self.image else self.where

    @property
    def prompts(self) -> list[Any]:
        """The captions, each once."""
        if not isinstance(self.prompt, list):
            return [self.prompt]
        return [one for at, one in enumerate(self.prompt) if one not in self.prompt[:at]]


def printable(name: str) -> str:
    r"""Return a file name as it can be printed: bytes that are no UTF-8 are written as \udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


class Source(Protocol):
    """Rows by number, and the bytes of their images; safe to use from several threads.

    No row is kept as an object: ten million fit into memory.

    Attributes:
        has_conditioning_images: whether the rows name a conditioning image.
    """

    has_conditioning_images: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers, from 0, in this order."""
        ...

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image.

        Raises:
            OSError: missing, unreadable or not a file; the reason is for people.
        """
        ...

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return 16 bytes that change whenever the image's bytes may have changed.

        Found without reading the image; None where that cannot be told.
        """
        ...


@dataclass(frozen=True)
class SourceSettings:
    """Where the rows come from; exactly one of the first two and `train_data_dir` is given.

    Attributes:
        source: fill50k as folder or zip, or a local data set.
        dataset_name: a hub id, or a local data set.
        dataset_config_name: which of the data set's configurations.
        dataset_revision: branch, tag or commit on the hub.
        train_data_dir: a local data set.
        image_column: name of the column with the images.
        conditioning_image_column: name of the column with the conditioning images.
        caption_column: name of the column with the captions.
        cache_dir: where `datasets` keeps what it downloads and converts.
        wants_conditioning: False where conditioning images are drawn from the images; those that
            the source may have are then passed over.
    """

    source: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_data_dir: str | None = None
    image_column: str = "image"
    conditioning_image_column: str = "conditioning_image"
    caption_column: str = "text"
    cache_dir: Path | None = None
    wants_conditioning: bool = True
