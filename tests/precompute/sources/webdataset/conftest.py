"""Samples of flat colours, in which any mispairing shows."""

import io
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from precompute.sources import file_versions
from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings

COLUMNS = {
    "image_column": "jpg",
    "conditioning_image_column": "png",
    "caption_column": "txt",
}
Members = list[tuple[str, bytes]]


def flat(level: int) -> bytes:
    """Return a PNG of one grey."""
    data = io.BytesIO()
    Image.new("L", (16, 16), level).save(data, "PNG")
    return data.getvalue()


def image(number: int) -> bytes:
    """Return a sample's image."""
    return flat(2 * number)


def control(number: int) -> bytes:
    """Return a sample's conditioning image: of half the brightness."""
    return flat(number)


def caption(number: int) -> str:
    return f"colour {2 * number}"


def sample(number: int, key: str | None = None) -> Members:
    """Return a sample's members: an image, a conditioning image and a caption."""
    key = f"{number:04d}" if key is None else key
    return [
        (f"{key}.jpg", image(number)),
        (f"{key}.png", control(number)),
        (f"{key}.txt", caption(number).encode()),
    ]


def samples(numbers: Iterable[int]) -> Members:
    return [member for number in numbers for member in sample(number)]


def write_tar(path: Path, members: Members, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = 1.5  # which tarfile writes into a pax header
            tar.addfile(member, io.BytesIO(data))
    return path


def open_tars(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(train_data_dir=str(path), **(COLUMNS | settings)))


def assert_rows(source: Source, numbers: Iterable[int | None]) -> None:
    """Assert that a source has these samples, and that each has what belongs to it.

    Args:
        source: the data set.
        numbers: of the samples; None for a row that cannot be used.
    """
    expected = list(numbers)
    rows = list(source.rows(range(len(source))))
    assert len(rows) == len(expected)
    for index, (row, number) in enumerate(zip(rows, expected, strict=True)):
        if number is not None:
            assert row.fault == ""
            assert row.prompt == caption(number)
            assert source.read(index, "image") == image(number)
            assert source.read(index, "conditioning_image") == control(number)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let a minute pass, so that the times of files just written tell them apart."""
    now = time.time_ns
    monkeypatch.setattr(file_versions.time, "time_ns", lambda: now() + 60 * 10**9)
    return lambda: None
