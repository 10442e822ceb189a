"""A column of images in a Parquet file, read a few rows at a time.

Images are asked for nearly in the order of their rows. So each row group is decoded from its
beginning on, some rows ahead, and what was decoded last is kept. A row that lies far back costs
another decoding of its group up to it.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

BATCH_BYTES = 1 << 25
NUM_KEPT_BATCHES = 4
BUFFER_BYTES = 1 << 20
BYTES, PATH = "bytes", "path"


class StoredImages:
    """The images of one column: bytes, file names, or both.

    Args:
        path: of the file.
        metadata: the file's own.
        name: of the column.

    Attributes:
        path_leaf: what holds the file names; None if nothing does.
        all_embedded: whether it is known that all rows have bytes.
        none_embedded: whether it is known that no row has.
    """

    def __init__(self, path: Path, metadata: Any, name: str) -> None:
        self.path, self.metadata, self.name = path, metadata, name
        leaves = [metadata.schema.column(at).path for at in range(metadata.num_columns)]
        is_bytes = str(metadata.schema.to_arrow_schema().field(name).type) in (
            "binary",
            "large_binary",
        )
        bytes_leaf = name if is_bytes else f"{name}.{BYTES}"
        self.bytes_leaf = bytes_leaf if bytes_leaf in leaves else None
        path_leaf = name if name in leaves and not is_bytes else f"{name}.{PATH}"
        self.path_leaf = path_leaf if path_leaf in leaves else None
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        self.ends = list(accumulate(group.num_rows for group in groups))
        chunks = []
        if self.bytes_leaf is not None:
            chunks = [group.column(leaves.index(self.bytes_leaf)) for group in groups]
        nulls = [_num_nulls(chunk) for chunk in chunks]
        self.all_embedded = bool(chunks) and not any(nulls)
        self.none_embedded = nulls == [group.num_rows for group in groups] or not chunks
        num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
        self.batch_rows = max(1, BATCH_BYTES * metadata.num_rows // max(num_bytes, 1))
        self._batches: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._reading: tuple[int, int, Iterator[Any]] = (-1, 0, iter(()))  # group, next batch
        self._lock = threading.Lock()

    def embedded(self, at: int) -> bytes | None:
        """Return the bytes of a row's image; None if it has none.

        Raises:
            OSError: the file cannot be read.
        """
        if self.none_embedded:
            return None
        group = bisect_right(self.ends, at)
        batch, inside = divmod(at - (self.ends[group - 1] if group else 0), self.batch_rows)
        with self._lock:
            column = self._batch(group, batch)
        return column[inside].as_py()  # type: ignore[no-any-return]

    def _batch(self, group: int, batch: int) -> Any:
        while (group, batch) not in self._batches:
            reading, following, batches = self._reading
            if reading != group or following > batch:
                following, batches = 0, self._decode(group)
            self._batches[group, following] = next(batches)
            self._reading = (group, following + 1, batches)
            if len(self._batches) > NUM_KEPT_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end((group, batch))
        return self._batches[group, batch]

    def _decode(self, group: int) -> Iterator[Any]:
        """Yield the bytes of a row group's images, an Arrow array for each batch."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(
            self.path, metadata=self.metadata, buffer_size=BUFFER_BYTES, pre_buffer=False
        ) as file:
            for batch in file.iter_batches(
                self.batch_rows, row_groups=[group], columns=[self.bytes_leaf], use_threads=False
            ):
                yield only_column(batch)


def only_column(table: Any) -> Any:
    """Return the column of a table that has one; of a struct with one field, that field."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(0)
    return pc.struct_field(column, 0) if pa.types.is_struct(column.type) else column


def _num_nulls(chunk: Any) -> int:
    """Return how many values of a column chunk are missing; -1 if it does not say."""
    statistics = chunk.statistics
    if statistics is None or not statistics.has_null_count:
        return -1
    return int(statistics.null_count)
