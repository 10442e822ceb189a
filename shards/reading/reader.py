"""Reading a product: any record of any shard with one `preadv`, in any order, from any thread.

Tensors come as bytes; `shards.reading.tensors` makes torch tensors of them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.errors import ShardError
from shards.format import sidecar
from shards.format.keys import slot_of
from shards.format.members import LARGEST_METADATA_BYTES, metadata_from_bytes
from shards.format.product import Product
from shards.format.sidecar import Sidecar
from shards.format.tensor_spec import (
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    TensorSpec,
    record_bytes,
    tensor_order,
)
from shards.reading.index import PackedIndexes, ShardIndex, pack
from shards.reading.location import Files

# Bounds a reader's memory, whatever the size of the cache: about 7 MB of indexes, more where
# images have many captions. Those of a larger cache lie in a temporary file.
INDEXED_RECORDS = 65536


class ProductReader:
    """Reads the records of one product; holds a bounded number of indexes.

    Safe to share between threads: reads carry their offset.

    Args:
        files: where the cache is.
        folder: the product's, relative to the cache.
        product: the manifest's entry.
        specs: tensors of a record by name, for each bucket.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        product: Product,
        specs: Sequence[Mapping[str, TensorSpec]],
    ) -> None:
        self.files = files
        self.folder = folder
        self.product = product
        self.specs = [dict(tensors) for tensors in specs]
        self._data_bytes = [record_bytes(tensors) for tensors in specs]
        self._packed = PackedIndexes() if product.num_records > INDEXED_RECORDS else None
        largest = max(product.shard_records, default=0)
        self.index = lru_cache(max(2, INDEXED_RECORDS // max(largest, 1)))(self._load_index)
        # By bucket, the header of the last record and the order of its tensors. Records of a bucket
        # have equal headers, so that a header is parsed only once; see `read_into`.
        self._headers: dict[int, tuple[bytes, tuple[str, ...]]] = {}

    def locations(self) -> Iterator[tuple[int, int]]:
        """Yield (shard, index) of every record, in order."""
        for shard, count in enumerate(self.product.shard_records):
            for index in range(count):
                yield shard, index

    def bucket(self, shard: int) -> int:
        """Return the bucket of a shard's records; 0 for text."""
        return self.product.shard_buckets[shard] if self.product.shard_buckets else 0

    def read_into(
        self, shard: int, index: int, batch: Mapping[str, NDArray[np.uint8]], position: int
    ) -> None:
        """Read the tensors of a record straight into the memory of a batch, and check them.

        Args:
            shard: number of the shard.
            index: of the record in it.
            batch: memory by name of the tensor, [B, bytes of one]; see `tensors.byte_view`.
            position: of the record in the batch.

        Raises:
            ShardError: the shard is missing, or the record is damaged or not as the manifest says.
        """
        start, size, expected = self.index(shard).tensors(index)
        bucket = self.bucket(shard)
        header, order = self._headers.get(bucket) or self._read_header(shard, index)
        if len(header) + self._data_bytes[bucket] != size:
            header, order = self._read_header(shard, index)
        scratch = bytearray(len(header))
        for _ in range(2):
            buffers: list[Any] = [scratch, *(batch[name][position] for name in order)]
            self._read(shard, start, size, buffers)
            if scratch == header:
                break
            header, order = self._read_header(shard, index)  # another header of the same length
        checksum = xxhash.xxh3_64()
        for buffer in buffers:
            checksum.update(buffer)
        if checksum.intdigest() != expected:
            raise self._damaged(shard, index, "its bytes are not as written")

    def tensor_bytes(self, shard: int, index: int) -> dict[str, NDArray[np.uint8]]:
        """Return the bytes of each tensor of record `index` of a shard, by name.

        Raises:
            ShardError: as `read_into`.
        """
        specs = self.specs[self.bucket(shard)]
        batch = {name: np.empty((1, spec.num_bytes), np.uint8) for name, spec in specs.items()}
        self.read_into(shard, index, batch, 0)
        return {name: data[0] for name, data in batch.items()}

    def metadata(self, shard: int, index: int) -> dict[str, Any]:
        """Return the metadata of record `index` of a shard, e.g. its prompt.

        Raises:
            ShardError: as `read_into`.
        """
        start, size, expected = self.index(shard).metadata(index)
        if size > LARGEST_METADATA_BYTES:
            raise self._damaged(shard, index, f"JSON of {size} bytes")
        data = bytearray(size)
        self._read(shard, start, size, [data])
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise self._damaged(shard, index, "its JSON is not as written")
        try:
            return metadata_from_bytes(bytes(data))
        except ValueError as error:
            raise self._damaged(shard, index, str(error)) from error

    def locate(self, key: str) -> tuple[int, int]:
        """Return (shard, index) of the record with a key.

        Raises:
            ShardError: there is no such record, so the reference to it is older than the shard.
        """
        shard, _ = slot_of(key)
        if shard < self.product.num_shards:
            index = self.index(shard).find(key)
            if index is not None:
                return shard, index
        raise ShardError(
            f"{self.files}: no record {key!r} in {self.folder}/, though the cache refers to it; "
            "run precompute again to bring the cache up to date"
        )

    def describe(self, shard: int, index: int) -> str:
        """Return what to call a record in a message."""
        return f"{self.files.name(self.folder, shard)}: record {self.index(shard).key(index)}"

    def _load_index(self, shard: int) -> ShardIndex:
        if self._packed is None:
            return ShardIndex(pack(self._load_sidecar(shard)))
        packed = self._packed.find(shard)
        if packed is None:
            data = pack(self._load_sidecar(shard))
            self._packed.add(shard, data)
            packed = memoryview(data)
        return ShardIndex(packed)

    def _load_sidecar(self, shard: int) -> Sidecar:
        name = self.files.name(self.folder, shard).removesuffix("tar") + "json"
        data = self.files.sidecar(self.folder, shard)
        if hashlib.sha256(data).hexdigest() != self.product.sidecar_sha256[shard]:
            raise ShardError(
                f"{name}: not the sidecar that manifest.json was written for; copy the shard "
                "again, or run precompute again"
            )
        loaded = sidecar.from_json(data, shard, name)
        expected = self.product.shard_records[shard]
        if loaded.num_records != expected:
            raise ShardError(f"{name}: {loaded.num_records} records, {expected} in the manifest")
        return loaded

    def _read_header(self, shard: int, index: int) -> tuple[bytes, tuple[str, ...]]:
        """Read and check a record's header; later records of its bucket are compared with it."""
        start, size, _ = self.index(shard).tensors(index)
        bucket = self.bucket(shard)
        length = bytearray(LENGTH_BYTES)
        if size < LENGTH_BYTES:
            raise self._damaged(shard, index, f"a record of {size} bytes")
        self._read(shard, start, LENGTH_BYTES, [length])
        header_bytes = LENGTH_BYTES + int.from_bytes(length, "little")
        if header_bytes > min(size, LARGEST_HEADER_BYTES):
            raise self._damaged(shard, index, f"a header of {header_bytes} bytes in {size}")
        header = bytearray(header_bytes)
        self._read(shard, start, header_bytes, [header])
        try:
            order = tensor_order(bytes(header), self.specs[bucket])
        except ValueError as error:
            raise self._damaged(shard, index, str(error)) from error
        expected = header_bytes + self._data_bytes[bucket]
        if expected != size:
            raise self._damaged(shard, index, f"{expected} bytes expected, {size} found")
        self._headers[bucket] = bytes(header), order
        return self._headers[bucket]

    def _read(self, shard: int, start: int, size: int, buffers: list[Any]) -> None:
        try:
            count = self.files.tar(self.folder, shard).read_into(buffers, start, size)
        except OSError as error:
            where = error.filename or self.files.name(self.folder, shard)
            raise ShardError(f"{where}: cannot be read ({error.strerror})") from error
        if count != size:
            raise ShardError(
                f"{self.files.name(self.folder, shard)}: cut short, {size} bytes expected at "
                f"{start}, found {count}"
            )

    def _damaged(self, shard: int, index: int, reason: str) -> ShardError:
        remedy = self.files.remedy(self.folder, shard)
        return ShardError(f"{self.describe(shard, index)}: {reason}; {remedy}")
