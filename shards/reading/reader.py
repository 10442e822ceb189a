"""Reading a product: any record of any shard with one `preadv`, in any order, from any thread."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ShardError
from shards.format import sidecar
from shards.format.manifest import Product
from shards.format.records import (
    LARGEST_ABOUT_BYTES,
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    TensorSpec,
    about_from_bytes,
    place_of,
    record_bytes,
    tensor_order,
)
from shards.reading.index import ShardIndex
from shards.reading.location import Files

# A reader's share of memory, whatever the size of the cache: about 10 MB of indexes, more where
# images have many captions.
INDEXED_RECORDS = 65536


class ProductReader:
    """Reads the records of one product; holds a bounded number of indexes.

    Safe to share between threads: reads carry their offset.

    Args:
        files: where the cache is.
        folder: the product's, relative to the cache.
        product: the manifest's entry.
        expected: what each record holds, by bucket.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        product: Product,
        expected: Sequence[Mapping[str, TensorSpec]],
    ) -> None:
        self.files = files
        self.folder = folder
        self.product = product
        self.expected = [dict(specs) for specs in expected]
        self._data_bytes = [record_bytes(specs) for specs in expected]
        largest = max(product.shard_records, default=0)
        self.index = lru_cache(max(2, INDEXED_RECORDS // max(largest, 1)))(self._load_index)
        # By bucket, the header of the record read last and the order of tensors it tells of.
        # Records of a bucket have equal headers, so it need be parsed but once; see `read_into`.
        self._headers: dict[int, tuple[bytes, tuple[str, ...]]] = {}

    def __reduce__(self) -> tuple[type["ProductReader"], tuple[Any, ...]]:
        """What was read stays behind when a reader travels to a spawned worker."""
        return ProductReader, (self.files, self.folder, self.product, self.expected)

    def places(self) -> Iterator[tuple[int, int]]:
        """Give shard and index of every record, in order."""
        for shard, count in enumerate(self.product.shard_records):
            for index in range(count):
                yield shard, index

    def bucket(self, shard: int) -> int:
        """Return which bucket the records of a shard are of; 0 for text."""
        return self.product.shard_buckets[shard] if self.product.shard_buckets else 0

    def read_into(
        self, shard: int, index: int, batch: Mapping[str, NDArray[np.uint8]], row: int
    ) -> None:
        """Read the tensors of a record straight to where they are wanted, and check them.

        Args:
            shard: number of the shard.
            index: of the record in it.
            batch: name -> the memory of that tensor in each sample of a batch; see `byte_rows`.
            row: which of them.

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
            buffers: list[Any] = [scratch, *(batch[name][row] for name in order)]
            self._read(shard, start, size, buffers)
            if scratch == header:
                break
            header, order = self._read_header(shard, index)  # as long as, but another
        checksum = xxhash.xxh3_64()
        for buffer in buffers:
            checksum.update(buffer)
        if checksum.intdigest() != expected:
            raise self._damaged(shard, index, "its bytes are not as written")

    def tensors(self, shard: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of record `index` of a shard.

        Raises:
            ShardError: as `read_into`.
        """
        found = {
            name: torch.empty(spec.shape, dtype=spec.dtype)
            for name, spec in self.expected[self.bucket(shard)].items()
        }
        self.read_into(shard, index, {name: byte_rows(one[None]) for name, one in found.items()}, 0)
        return found

    def about(self, shard: int, index: int) -> dict[str, Any]:
        """Return what record `index` of a shard says of itself.

        Raises:
            ShardError: as `read_into`.
        """
        start, size, expected = self.index(shard).about(index)
        if size > LARGEST_ABOUT_BYTES:
            raise self._damaged(shard, index, f"JSON of {size} bytes")
        data = bytearray(size)
        self._read(shard, start, size, [data])
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise self._damaged(shard, index, "its JSON is not as written")
        try:
            return about_from_bytes(bytes(data))
        except ValueError as error:
            raise self._damaged(shard, index, str(error)) from error

    def locate(self, key: str) -> tuple[int, int]:
        """Return (shard, index) of the record with a key.

        Raises:
            ShardError: there is none, so whatever refers to it is older than this shard.
        """
        shard, _ = place_of(key)
        if shard < self.product.num_shards:
            index = self.index(shard).find(key)
            if index is not None:
                return shard, index
        raise ShardError(
            f"{self.files}: no record {key!r} in {self.folder}/, though the cache refers to it; "
            "run precompute again to bring the cache up to date"
        )

    def _load_index(self, shard: int) -> ShardIndex:
        name = self.files.name(self.folder, shard).removesuffix("tar") + "json"
        data = self.files.sidecar(self.folder, shard)
        if hashlib.sha256(data).hexdigest() != self.product.sidecar_sha256[shard]:
            raise ShardError(
                f"{name}: not the sidecar that manifest.json was written for; copy the shard "
                "again, or run precompute again"
            )
        found = sidecar.from_json(data, shard, name)
        expected = self.product.shard_records[shard]
        if found.num_records != expected:
            raise ShardError(f"{name}: {found.num_records} records, {expected} in the manifest")
        return ShardIndex(found)

    def _read_header(self, shard: int, index: int) -> tuple[bytes, tuple[str, ...]]:
        """Read and check a record's header; it becomes what the next are expected to have."""
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
            order = tensor_order(bytes(header), self.expected[bucket])
        except ValueError as error:
            raise self._damaged(shard, index, str(error)) from error
        expected = header_bytes + self._data_bytes[bucket]
        if expected != size:
            raise self._damaged(shard, index, f"{expected} bytes expected, {size} found")
        self._headers[bucket] = bytes(header), order
        return self._headers[bucket]

    def _read(self, shard: int, start: int, size: int, buffers: list[Any]) -> None:
        try:
            found = self.files.tar(self.folder, shard).read_into(buffers, start, size)
        except OSError as error:
            where = error.filename or self.files.name(self.folder, shard)
            raise ShardError(f"{where}: cannot be read ({error.strerror})") from error
        if found != size:
            raise ShardError(
                f"{self.files.name(self.folder, shard)}: cut short, {size} bytes expected at "
                f"{start}, found {found}"
            )

    def _damaged(self, shard: int, index: int, what: str) -> ShardError:
        where = f"{self.files.name(self.folder, shard)}: record {self.index(shard).key(index)}"
        return ShardError(f"{where}: {what}; {self.files.remedy(self.folder, shard)}")


def byte_rows(batch: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous CPU tensor [B, ...] as bytes, [B, bytes of one]."""
    rows: NDArray[np.uint8] = batch.reshape(len(batch), -1).view(torch.uint8).numpy()
    return rows
