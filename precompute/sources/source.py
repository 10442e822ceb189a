"""The interface of a data set: rows by number, and the bytes of their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["image", "conditioning_image"]
LONGEST_NAME = 96


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        where: the row in words: `line 3`, counted from 1, or `row 17`, counted from 0.
        image: file name of the image; empty if it has none.
        conditioning_image: file name of the conditioning image; empty if it has none.
        prompt: the caption as found, or a list of captions; in a bad row it may be no text.
        fault: why the row cannot be used, if that is known without reading its images.
    """

    where: str
    image: str
    conditioning_image: str
    prompt: Any
    fault: str = ""

    @property
    def name(self) -> str:
        """The name of the row in reports."""
        return f"{self.where}, {printable(self.image)}" if self.image else self.where

    @property
    def prompts(self) -> list[Any]:
        """The captions, each once."""
        if not isinstance(self.prompt, list):
            return [self.prompt]
        return [text for at, text in enumerate(self.prompt) if text not in self.prompt[:at]]


def printable(name: str) -> str:
    r"""Return a file name that can be printed, in one line and not too long.

    Bytes that are no UTF-8 become e.g. \udcff. Blanks at an end are shown by quotation marks.
    """
    text = name.encode("utf-8", "backslashreplace").decode()
    if len(text) > LONGEST_NAME:
        text = f"{text[: LONGEST_NAME // 2]}…{text[-LONGEST_NAME // 2 + 1 :]}"
    return text if text == text.strip() and text.isprintable() else repr(text)


class Source(Protocol):
    """Rows by number, and the bytes of their images; safe to use from several threads.

    Rows are made when they are asked for, so that ten million rows fit into memory.

    Attributes:
        has_conditioning_images: whether the rows name conditioning images.
        layout: how the data set lies on the disk, in words.
        remarks: a line each for what is left out, not read or written elsewhere, with counts.
    """

    has_conditioning_images: bool
    layout: str
    remarks: list[str]

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices, counted from 0, in this order."""
        ...

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image.

        Raises:
            OSError: it is missing, unreadable or no file; the message says why.
        """
        ...

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return 16 bytes that change whenever the image's bytes may have changed.

        The image is not read. None means that changes cannot be noticed without reading it.
        """
        ...


@dataclass(frozen=True)
class SourceSettings:
    """Where the rows come from; exactly one of the first two and `train_data_dir` is set.

    Attributes:
        source: fill50k as folder or zip, or a local data set.
        dataset_name: a hub id, or a local data set.
        dataset_config_name: which of the data set's configurations.
        dataset_revision: branch, tag or commit on the hub.
        train_data_dir: a local data set.
        image_column: name of the column with the images.
        conditioning_image_column: name of the column with the conditioning images.
        caption_column: name of the column with the captions.
        split: which part of the data set; None is `train`, or the only one.
        caption: the caption of all rows, whatever the data set holds; `{name}` in it stands for
            the name of the row's image. None where the data set has captions.
        caption_extension: ending of caption files beside the images; None for the usual ones.
        conditioning_data_dir: folder, or zip, of conditioning images named like the images.
        cache_dir: where `datasets` keeps what it downloads and converts.
        wants_conditioning: False where conditioning images are drawn from the images; those of the
            source are then ignored.
    """

    source: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_data_dir: str | None = None
    image_column: str = "image"
    conditioning_image_column: str = "conditioning_image"
    caption_column: str = "text"
    split: str | None = None
    caption: str | None = None
    caption_extension: str | None = None
    conditioning_data_dir: str | None = None
    cache_dir: Path | None = None
    wants_conditioning: bool = True
