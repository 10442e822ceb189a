"""Reading a cache: any record of any shard with one `pread`, in any order, from any process.

Axes: T tokens, C latent channels, h x w latent grid.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from shards import manifest, sidecar
from shards.errors import ShardError
from shards.manifest import (
    DEFAULT_CONDITIONING,
    Manifest,
    Product,
    conditioning_folder,
    validation_folder,
)
from shards.records import about_from_bytes, shard_of, tensors_from_bytes
from shards.sidecar import Sidecar, tar_path

OPEN_FILES = 64
SIDECARS_IN_MEMORY = 256


class ProductReader:
    """Reads the records of one product; holds a bounded number of files and sidecars open.

    Safe to copy to worker processes and to share between threads: reads carry their offset.
    """

    def __init__(self, folder: Path, product: Product) -> None:
        self.folder = folder
        self.product = product
        self.sidecar = lru_cache(SIDECARS_IN_MEMORY)(self._load_sidecar)
        self._index = lru_cache(SIDECARS_IN_MEMORY)(self._index_of_keys)
        self._file = lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple[type["ProductReader"], tuple[Path, Product]]:
        """Open files stay behind when a reader travels to a spawned worker."""
        return ProductReader, (self.folder, self.product)

    def check_present(self) -> None:
        """Check that all tars are there in full length, and all sidecars.

        Raises:
            ShardError: naming the first that is not.
        """
        for shard, expected in enumerate(self.product.shard_bytes):
            path = tar_path(self.folder, shard)
            try:
                found = path.stat().st_size
                sidecar.sidecar_path(self.folder, shard).stat()
            except OSError as error:
                raise ShardError(
                    f"{error.filename}: {error.strerror}, though manifest.json counts on it; "
                    "copy it again, or run precompute again"
                ) from error
            if found != expected:
                raise ShardError(
                    f"{path}: cut short or changed, {expected} bytes expected, found {found}; "
                    "copy it again, or run precompute again"
                )

    def tensors(self, shard: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of record `index` of a shard.

        Raises:
            ShardError: the shard is missing, shorter than its sidecar says, or damaged.
        """
        start, size, _, _ = self.sidecar(shard).spans[index]
        return tensors_from_bytes(self._read(shard, start, size), self._where(shard, index))

    def about(self, shard: int, index: int) -> dict[str, Any]:
        """Return what record `index` of a shard says of itself.

        Raises:
            ShardError: as `tensors`.
        """
        _, _, start, size = self.sidecar(shard).spans[index]
        return about_from_bytes(self._read(shard, start, size), self._where(shard, index))

    def locate(self, key: str) -> tuple[int, int]:
        """Return (shard, index) of the record with a key.

        Raises:
            ShardError: there is none, so whatever refers to it is older than this shard.
        """
        shard = shard_of(key)
        if shard < self.product.num_shards:
            keys = self._index(shard)
            if key in keys:
                return shard, keys[key]
        raise ShardError(
            f"{self.folder}: no record {key!r}, though the cache refers to it; "
            "run precompute again to bring the cache up to date"
        )

    def _index_of_keys(self, shard: int) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.sidecar(shard).keys)}

    def _load_sidecar(self, shard: int) -> Sidecar:
        found = sidecar.load(self.folder, shard)
        path = sidecar.sidecar_path(self.folder, shard)
        if found is None:
            raise ShardError(f"{path}: missing, though manifest.json counts on it")
        if found.sha256 != self.product.shard_sha256[shard]:
            raise ShardError(
                f"{path}: not the shard that manifest.json was written for; run precompute again"
            )
        return found

    def _open(self, shard: int) -> "_File":
        return _File(tar_path(self.folder, shard))

    def _read(self, shard: int, start: int, size: int) -> bytes:
        path = tar_path(self.folder, shard)
        try:
            file = self._file(shard)  # held, so that it stays open while it is read
            data = os.pread(file.descriptor, size, start)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise ShardError(
                f"{path}: cut short, {size} bytes expected at {start}, found {len(data)}"
            )
        return data

    def _where(self, shard: int, index: int) -> str:
        return f"{tar_path(self.folder, shard)}: record {self.sidecar(shard).keys[index]}"


class _File:
    """A read-only descriptor that closes when the last user is done with it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Cache:
    """A complete cache, opened for reading.

    Args:
        folder: the cache's folder.
        conditioning_name: which kind of control to read.

    Raises:
        ShardError: see `shards.manifest.load`; there is no such control in this cache; or a shard
            is missing.
    """

    def __init__(self, folder: Path, conditioning_name: str = DEFAULT_CONDITIONING) -> None:
        self.folder = folder
        self.manifest: Manifest = manifest.load(folder)
        if conditioning_name not in self.manifest.conditioning:
            raise ShardError(
                f"{folder}: no conditioning {conditioning_name!r}; "
                f"found {', '.join(map(repr, self.manifest.conditioning))}"
            )
        self.conditioning_spec = self.manifest.conditioning_specs[conditioning_name]
        self.text = ProductReader(folder / "text", self.manifest.text)
        self.latents = ProductReader(folder / "latents", self.manifest.latents)
        self.conditioning = ProductReader(
            folder / conditioning_folder(conditioning_name),
            self.manifest.conditioning[conditioning_name],
        )
        self.validation = ProductReader(
            folder / validation_folder(conditioning_name),
            self.manifest.validation[conditioning_name],
        )
        for reader in (self.text, self.latents, self.conditioning, self.validation):
            reader.check_present()

    def empty_prompt(self) -> dict[str, Tensor]:
        """Return the text tensors of the empty prompt, always the first record of the first shard.

        Raises:
            ShardError: it is not there.
        """
        if self.text.about(0, 0).get("prompt") != "":
            raise ShardError(f"{self.text.folder}: the first record is not the empty prompt")
        return self.text.tensors(0, 0)

    def sample(self, shard: int, index: int) -> tuple[str, dict[str, Tensor], list[str]]:
        """Return one image's key, its tensors and the keys of the prompts that caption it.

        Samples are counted by conditioning records: an image whose conditioning image could not
        be used has a latent, but is no sample.

        Returns:
            The key; `latent` [C, h, w] and `conditioning_latent` [C, h, w], with posterior
            `mean_std` also `latent_std` and `conditioning_latent_std`; the prompts, at least one.

        Raises:
            ShardError: a record is missing or damaged, or the image has no caption.
        """
        key = self.conditioning.sidecar(shard).keys[index]
        latent_shard, latent_index = self.latents.locate(key)
        captions = self.latents.sidecar(latent_shard).prompts
        if not captions or not captions[latent_index]:
            raise ShardError(f"{self.latents.folder}: the image {key} has no caption")
        tensors = {
            **self.latents.tensors(latent_shard, latent_index),
            **self.conditioning.tensors(shard, index),
        }
        return key, tensors, captions[latent_index]

    def embeddings(self, prompt_key: str) -> dict[str, Tensor]:
        """Return `clip_embeds` [T, W], `t5_embeds` [T, W] and `pooled_embeds` [W] of a prompt."""
        return self.text.tensors(*self.text.locate(prompt_key))
