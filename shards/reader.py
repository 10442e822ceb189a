"""Reading a cache: any record of any shard with one `preadv`, in any order, from any thread.

Axes: T tokens, C latent channels, h x w latent grid.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from shards import sidecar
from shards.errors import ShardError
from shards.files import Files, LocalFiles, Shard
from shards.index import ShardIndex
from shards.manifest import (
    DEFAULT_CONDITIONING,
    Manifest,
    Product,
    conditioning_folder,
    validation_folder,
)
from shards.order import Order
from shards.records import (
    LARGEST_ABOUT_BYTES,
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    TensorSpec,
    about_from_bytes,
    place_of,
    tensor_order,
)

# A reader's share of memory, whatever the size of the cache: about 10 MB of indexes.
INDEXED_RECORDS = 65536
DAMAGED = "the cache was damaged or changed since it was made; python -m shards verify lists where"


class ProductReader:
    """Reads the records of one product; holds a bounded number of indexes.

    Safe to share between threads: reads carry their offset.

    Args:
        files: where the cache is.
        folder: the product's, relative to the cache.
        product: the manifest's entry.
        expected: what each record holds.
    """

    def __init__(
        self, files: Files, folder: str, product: Product, expected: Mapping[str, TensorSpec]
    ) -> None:
        self.files = files
        self.folder = folder
        self.product = product
        self.expected = dict(expected)
        self.data_bytes = sum(spec.num_bytes for spec in expected.values())
        largest = max(product.shard_records, default=0)
        self.index = lru_cache(max(2, INDEXED_RECORDS // max(largest, 1)))(self._load_index)
        # The header of the record read last and the order of tensors it tells of. Records of a
        # product have equal headers, so it need be parsed but once; see `read_into`.
        self._header: tuple[bytes, tuple[str, ...]] | None = None

    def __reduce__(self) -> tuple[type["ProductReader"], tuple[Any, ...]]:
        """What was read stays behind when a reader travels to a spawned worker."""
        return ProductReader, (self.files, self.folder, self.product, self.expected)

    def read_into(self, shard: int, index: int, rows: Mapping[str, NDArray[np.uint8]]) -> None:
        """Read the tensors of a record straight to where they are wanted, and check them.

        Args:
            shard: number of the shard.
            index: of the record in it.
            rows: name -> the memory of the tensor; see `byte_rows`.

        Raises:
            ShardError: the shard is missing, or the record is damaged or not as the manifest says.
        """
        entry = self.index(shard)
        start, size = (int(number) for number in entry.spans[index, :2])
        header, order = self._header or self._read_header(shard, index)
        if len(header) + self.data_bytes != size:
            header, order = self._read_header(shard, index)
        scratch = bytearray(len(header))
        for _ in range(2):
            buffers: list[Any] = [scratch, *(rows[name] for name in order)]
            self._read(shard, start, buffers)
            if scratch == header:
                break
            header, order = self._read_header(shard, index)  # as long as, but another
        checksum = xxhash.xxh3_64()
        for buffer in buffers:
            checksum.update(buffer)
        if checksum.intdigest() != entry.checksums[index, 0]:
            raise ShardError(
                f"{self._where(shard, index)}: its bytes are not as written; {DAMAGED}"
            )

    def tensors(self, shard: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of record `index` of a shard.

        Raises:
            ShardError: as `read_into`.
        """
        found = {
            name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self.expected.items()
        }
        self.read_into(
            shard, index, {name: byte_rows(tensor[None])[0] for name, tensor in found.items()}
        )
        return found

    def about(self, shard: int, index: int) -> dict[str, Any]:
        """Return what record `index` of a shard says of itself.

        Raises:
            ShardError: as `read_into`.
        """
        entry = self.index(shard)
        start, size = (int(number) for number in entry.spans[index, 2:])
        if size > LARGEST_ABOUT_BYTES:
            raise ShardError(f"{self._where(shard, index)}: JSON of {size} bytes; {DAMAGED}")
        data = bytearray(size)
        self._read(shard, start, [data])
        if xxhash.xxh3_64_intdigest(data) != entry.checksums[index, 1]:
            raise ShardError(f"{self._where(shard, index)}: its JSON is not as written; {DAMAGED}")
        try:
            return about_from_bytes(bytes(data))
        except ValueError as error:
            raise ShardError(f"{self._where(shard, index)}: {error}") from error

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
        if found.num_records != self.product.shard_records[shard]:
            raise ShardError(
                f"{name}: {found.num_records} records, "
                f"{self.product.shard_records[shard]} expected; {DAMAGED}"
            )
        return ShardIndex(found)

    def _read_header(self, shard: int, index: int) -> tuple[bytes, tuple[str, ...]]:
        """Read and check a record's header; it becomes what the next are expected to have."""
        start, size = (int(number) for number in self.index(shard).spans[index, :2])
        where = self._where(shard, index)
        length = bytearray(LENGTH_BYTES)
        if size < LENGTH_BYTES:
            raise ShardError(f"{where}: a record of {size} bytes; {DAMAGED}")
        self._read(shard, start, [length])
        header_bytes = LENGTH_BYTES + int.from_bytes(length, "little")
        if header_bytes > min(size, LARGEST_HEADER_BYTES):
            raise ShardError(f"{where}: a header of {header_bytes} bytes in {size}; {DAMAGED}")
        header = bytearray(header_bytes)
        self._read(shard, start, [header])
        try:
            order = tensor_order(bytes(header), self.expected)
        except ValueError as error:
            raise ShardError(f"{where}: {error}") from error
        if len(header) + self.data_bytes != size:
            raise ShardError(
                f"{where}: {len(header) + self.data_bytes} bytes expected, {size} found; {DAMAGED}"
            )
        self._header = bytes(header), order
        return self._header

    def _read(self, shard: int, start: int, buffers: list[Any]) -> None:
        try:
            found = self.files.tar(self.folder, shard).read_into(buffers, start)
        except OSError as error:
            raise ShardError(
                f"{self.files.name(self.folder, shard)}: cannot be read ({error.strerror})"
            ) from error
        expected = sum(len(one) for one in buffers)
        if found != expected:
            raise ShardError(
                f"{self.files.name(self.folder, shard)}: cut short, {expected} bytes expected at "
                f"{start}, found {found}"
            )

    def _where(self, shard: int, index: int) -> str:
        return f"{self.files.name(self.folder, shard)}: record {self.index(shard).key(index)}"


def byte_rows(batch: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous CPU tensor [B, ...] as bytes, [B, bytes of one]."""
    rows: NDArray[np.uint8] = batch.reshape(len(batch), -1).view(torch.uint8).numpy()
    return rows


class Cache:
    """A complete cache, opened for reading.

    Args:
        files: where it is; a path for a folder of this machine.
        conditioning_name: which kind of control to read.

    Raises:
        ShardError: see `shards.manifest.load`; there is no such control in this cache; or a shard
            is missing.
    """

    def __init__(self, files: Files | Path, conditioning_name: str = DEFAULT_CONDITIONING) -> None:
        self.files: Files = LocalFiles(files) if isinstance(files, Path) else files
        self.manifest: Manifest = self.files.manifest()
        if conditioning_name not in self.manifest.conditioning:
            raise ShardError(
                f"{self.files}: no conditioning {conditioning_name!r}; "
                f"found {', '.join(map(repr, self.manifest.conditioning))}"
            )
        self.conditioning_name = conditioning_name
        self.conditioning_spec = self.manifest.conditioning_specs[conditioning_name]
        self.text = self._reader("text")
        self.latents = self._reader("latents")
        self.conditioning = self._reader(conditioning_folder(conditioning_name))
        self.validation = self._reader(validation_folder(conditioning_name))
        readers = (self.text, self.latents, self.conditioning, self.validation)
        self.files.check_present(self.manifest, [reader.folder for reader in readers])

    def __reduce__(self) -> tuple[type["Cache"], tuple[Files, str]]:
        """A cache that travels to a spawned worker is opened there again."""
        return Cache, (self.files, self.conditioning_name)

    def _reader(self, folder: str) -> ProductReader:
        product = dict(self.manifest.products())[folder]
        return ProductReader(self.files, folder, product, self.manifest.tensors(folder))

    @contextlib.contextmanager
    def following(self, order: Order, place: int) -> Iterator[None]:
        """Have what is read from a place on here by the time it is read.

        Raises:
            ShardError: the cache is remote, and what is read at a time has no room here.
        """
        counts = [one.num_shards for one in (self.latents.product, self.conditioning.product)]
        products = (self.text.product, self.latents.product, self.conditioning.product)
        total, limit = sum(product.num_bytes for product in products), self.files.limit_bytes
        # A shard of images with the prompts that go with it; what they share is counted to each.
        one = total / max(*counts, 1)
        window = min(order.window, max(counts))
        if limit is not None and total > limit and window * one > limit:
            raise ShardError(
                f"{self.files}: {window} shards mixed at a time take {window * one / 1e9:.1f} GB, "
                f"and --local-cache-gb is {limit / 1e9:g}; give --shuffle-window "
                f"{max(1, int(limit / one / 2))}, or room for {window * one / 1e9:.1f} GB or more"
            )
        windows = ((end, self._read_by(shards)) for end, shards in order.windows(place))
        with self.files.following(windows):
            yield

    def _read_by(self, shards: list[int]) -> list[Shard]:
        """Return the files that the samples of some conditioning shards are in."""
        texts = sorted({text for shard in shards for text in self._text_shards(shard)})
        return [
            *((self.conditioning.folder, shard) for shard in shards),
            *((self.latents.folder, shard) for shard in shards),
            *((self.text.folder, shard) for shard in texts),
        ]

    def _text_shards(self, shard: int) -> list[int]:
        return self.latents.index(shard).shards_of_prompts()

    def empty_prompt(self) -> dict[str, Tensor]:
        """Return the text tensors of the empty prompt.

        Raises:
            ShardError: it is not there.
        """
        return self.text.tensors(*self.text.locate(self.empty_prompt_key()))

    def empty_prompt_key(self) -> str:
        """Return the key of the empty prompt, always the first record of the first shard.

        Raises:
            ShardError: it is not there.
        """
        if not self.text.product.num_records or self.text.about(0, 0).get("prompt") != "":
            raise ShardError(f"{self.files}: the first record of text/ is not the empty prompt")
        return self.text.index(0).key(0)

    def pair(self, shard: int, index: int) -> tuple[str, tuple[int, int], list[str]]:
        """Return what makes up the sample whose conditioning latent is record `index` of a shard.

        Samples are counted by conditioning records: an image whose conditioning image could not
        be used has a latent, but is no sample.

        Returns:
            The sample's key; (shard, index) of its latent; the keys of its prompts, at least one.

        Raises:
            ShardError: the image is missing, or has no caption.
        """
        key = self.conditioning.index(shard).key(index)
        latent_shard, latent_index = self.latents.locate(key)
        prompts = self.latents.index(latent_shard).prompts(latent_index)
        if not prompts:
            raise ShardError(f"{self.files}: the image {key} has no caption")
        return key, (latent_shard, latent_index), prompts

    def sample(self, shard: int, index: int) -> tuple[str, dict[str, Tensor], list[str]]:
        """Return one image's key, its tensors and the keys of the prompts that caption it.

        Returns:
            The key; `latent` [C, h, w] and `conditioning_latent` [C, h, w], with posterior
            `mean_std` also `latent_std` and `conditioning_latent_std`; the prompts, see `pair`.

        Raises:
            ShardError: see `pair`; or a record is missing or damaged.
        """
        key, latent, prompts = self.pair(shard, index)
        tensors = {**self.latents.tensors(*latent), **self.conditioning.tensors(shard, index)}
        return key, tensors, prompts

    def embeddings(self, prompt_key: str) -> dict[str, Tensor]:
        """Return `clip_embeds` [T, W], `t5_embeds` [T, W] and `pooled_embeds` [W] of a prompt."""
        return self.text.tensors(*self.text.locate(prompt_key))
