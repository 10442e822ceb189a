"""Taking the inventory of a source: who looks at its files."""

import io
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from PIL import Image

from precompute.fingerprints.digest_cache import DigestCache
from precompute.planning import inventory
from precompute.planning.inventory import TRIAL_LOOKS, take_inventory
from precompute.sources.source import Kind, Row


class Disk:
    """A source of images that all differ.

    Attributes:
        looks: the thread of each look, by row.
    """

    has_conditioning_images = False
    layout, remarks = "made up", list[str]()

    def __init__(self) -> None:
        self.looks: dict[int, int] = {}

    def __len__(self) -> int:
        return 3 * TRIAL_LOOKS

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        return (Row(f"row {index}", f"{index}.png", "", f"caption {index}") for index in indices)

    def read(self, index: int, kind: Kind) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (index + 1, 1)).save(file, "png")
        return file.getvalue()

    def version(self, index: int, kind: Kind) -> bytes:
        self.looks[index] = threading.get_ident()
        return index.to_bytes(16, "big")


@pytest.mark.parametrize(("slow_s", "in_threads"), [(math.inf, False), (0, True)])
def test_threads_share_looks_that_take_long(
    slow_s: float, in_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "SLOW_LOOK_S", slow_s)
    disk = Disk()
    digests = DigestCache.in_memory()
    found = take_inventory(disk, range(len(disk)), digests, conditioning=False, transparency=False)
    assert found.sizes.tolist() == [[index + 1, 1] for index in range(len(disk))]
    assert sorted(disk.looks) == list(range(len(disk)))
    here = threading.get_ident()
    others = {row for row, thread in disk.looks.items() if thread != here}
    assert others == (set(range(TRIAL_LOOKS, len(disk))) if in_threads else set())
    # Each version is the one of its row.
    versions = [index.to_bytes(16, "big") for index in range(len(disk))]
    known = digests.find(versions)
    assert [content.width for content in known if content] == np.arange(1, len(disk) + 1).tolist()
