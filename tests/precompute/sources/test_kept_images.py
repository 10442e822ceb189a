"""Images that are read once: how long their bytes are kept."""

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from precompute.sources import kept_images
from precompute.sources.kept_images import KeptImages
from precompute.sources.source import Kind, Row


class Counting:
    """A source of images of ten bytes, which counts how often each is read."""

    has_conditioning_images = True
    layout = "made up"

    def __init__(self) -> None:
        self.remarks = ["made up"]
        self.reads = Counter[tuple[int, Kind]]()

    def __len__(self) -> int:
        return 5

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        raise NotImplementedError

    def read(self, index: int, kind: Kind) -> bytes:
        self.reads[index, kind] += 1
        return bytes([index]) * 10

    def version(self, index: int, kind: Kind) -> bytes | None:
        return bytes([index])


def test_bytes_are_kept_until_the_last_use() -> None:
    source = Counting()
    kept = KeptImages(source, {"image": 2, "conditioning_image": 1})
    for _ in range(2):
        assert kept.read(3, "image") == bytes([3]) * 10
        kept.used(3, "image")
    assert source.reads[3, "image"] == 1
    kept.read(3, "image")
    assert source.reads[3, "image"] == 2
    kept.read(3, "conditioning_image")
    kept.used(3, "conditioning_image")
    kept.used(3, "conditioning_image")  # it is not kept any more
    kept.read(3, "conditioning_image")
    assert source.reads[3, "conditioning_image"] == 2


def test_no_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_images, "KEPT_BYTES", 25)
    source = Counting()
    kept = KeptImages(source, {"image": 1, "conditioning_image": 1})
    for _ in range(2):
        for index in range(3):
            kept.read(index, "image")
    assert [source.reads[index, "image"] for index in range(3)] == [1, 1, 2]
    kept.used(0, "image")
    kept.read(2, "image")
    kept.read(2, "image")
    assert source.reads[2, "image"] == 3
