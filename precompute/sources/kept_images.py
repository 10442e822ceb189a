"""Images that are read once for all that is done with them."""

import threading
from collections.abc import Iterator, Mapping, Sequence

from precompute.sources.source import Kind, Row, Source

# Bytes that are kept at most: fill50k's images fit.
KEPT_BYTES = 1 << 29


class KeptImages:
    """The rows of any source; bytes of images are kept from the first use to the last, if they fit.

    Args:
        source: the rows.
        uses: how often an image of each kind is encoded or drawn from.
    """

    def __init__(self, source: Source, uses: Mapping[Kind, int]) -> None:
        self.source = source
        self.uses = uses
        self.has_conditioning_images = source.has_conditioning_images
        self.layout = source.layout
        self.remarks = source.remarks
        self._kept: dict[tuple[int, Kind], tuple[bytes, int]] = {}  # and the uses to come
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        return self.source.rows(indices)

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image; they are kept if there is room."""
        image = index, kind
        with self._lock:
            if image in self._kept:
                return self._kept[image][0]
        data = self.source.read(index, kind)
        with self._lock:
            if image not in self._kept and self._num_bytes + len(data) <= KEPT_BYTES:
                self._kept[image] = data, self.uses[kind]
                self._num_bytes += len(data)
        return data

    def used(self, index: int, kind: Kind) -> None:
        """Count one of an image's uses; it is not kept beyond the last."""
        image = index, kind
        with self._lock:
            if image not in self._kept:
                return
            data, uses = self._kept.pop(image)
            if uses > 1:
                self._kept[image] = data, uses - 1
            else:
                self._num_bytes -= len(data)

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        return self.source.version(index, kind)
