"""A complete cache, opened for reading: samples, one by one or in batches.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from xxhash import xxh3_128_hexdigest

from common.errors import ShardError
from shards.format.manifest import (
    DEFAULT_CONDITIONING,
    Manifest,
    conditioning_folder,
    validation_folder,
)
from shards.format.records import TensorSpec
from shards.reading.location import Files, LocalFiles, Shard
from shards.reading.order import Order
from shards.reading.reader import ProductReader, byte_rows


class Pair(NamedTuple):
    """What makes up a sample, as (shard, index) of its records and keys.

    Attributes:
        key: of the image.
        conditioning: its conditioning latent.
        latent: its latent.
        prompts: keys of the text records that caption it, at least one.
    """

    key: str
    conditioning: tuple[int, int]
    latent: tuple[int, int]
    prompts: list[str]


class Cache:
    """A complete cache, opened for reading.

    Args:
        files: where it is; a path for a folder of this machine.
        conditioning_name: which kind of control to read.

    Raises:
        ShardError: see `shards.format.manifest.load`; there is no such control in this cache; or
            a shard is missing.
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
        return ProductReader(self.files, folder, product, self.manifest.expected(folder))

    @contextlib.contextmanager
    def following(self, order: Order, place: int) -> Iterator[None]:
        """Have what is read from a place on here by the time it is read.

        Raises:
            ShardError: the cache is remote, and what is read at a time has no room here.
        """
        limit = self.files.limit_bytes
        products = (self.text.product, self.latents.product, self.conditioning.product)
        if limit is not None and sum(product.num_bytes for product in products) > limit:
            self._check_room(order, place, limit)
        with self.files.following(order.windows(place), self._read_by):
            yield

    def _check_room(self, order: Order, place: int, limit: int) -> None:
        """Refuse a window that cannot be here beside the next one."""
        windows = [shards for _, shards in itertools.islice(order.windows(place), 2)]
        needed = set(self._read_by([shard for shards in windows for shard in shards]))
        products = dict(self.manifest.products())
        size = sum(products[folder].shard_bytes[shard] for folder, shard in needed)
        if size > limit:
            window = min(order.window, self.conditioning.product.num_shards)
            raise ShardError(
                f"{self.files}: {window} shards mixed at a time and the next {window} take "
                f"{size / 1e9:.3g} GB, and --local-cache-gb is {limit / 1e9:.3g}; give "
                f"--shuffle-window {max(1, window * limit // size)}, or room for "
                f"{size / 1e9:.3g} GB or more"
            )

    def _read_by(self, shards: list[int]) -> list[Shard]:
        """Return the files that the samples of some conditioning shards are in."""
        texts = {0}  # of the empty prompt
        for shard in shards:
            texts |= self.latents.index(shard).shards_of_prompts()
        return [
            *((self.conditioning.folder, shard) for shard in shards),
            *((self.latents.folder, shard) for shard in shards),
            *((self.text.folder, shard) for shard in sorted(texts)),
        ]

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
        if (
            not sum(self.text.product.shard_records[:1])
            or self.text.about(0, 0).get("prompt") != ""
        ):
            raise ShardError(f"{self.files}: the first record of text/ is not the empty prompt")
        return self.text.index(0).key(0)

    def pair(self, shard: int, index: int) -> Pair:
        """Return what makes up the sample whose conditioning latent is record `index` of a shard.

        Samples are counted by conditioning records: an image whose conditioning image could not
        be used has a latent, but is no sample.

        Raises:
            ShardError: the image is missing, or has no caption.
        """
        key = self.conditioning.index(shard).key(index)
        latent_shard, latent_index = self.latents.locate(key)
        prompts = self.latents.index(latent_shard).prompts(latent_index)
        if not prompts:
            raise ShardError(f"{self.files}: the image {key} has no caption")
        return Pair(key, (shard, index), (latent_shard, latent_index), prompts)

    def batch_tensors(self, bucket: int) -> dict[str, TensorSpec]:
        """Return the tensors of one sample of a bucket, by name; see `read`."""
        readers = (self.latents, self.conditioning, self.text)
        return {name: spec for reader in readers for name, spec in reader.expected[bucket].items()}

    def read(
        self, batch: Mapping[str, Tensor], pairs: Sequence[Pair], prompts: Sequence[str]
    ) -> None:
        """Read samples straight into the memory of a batch.

        Each record is read once; a prompt that comes again is copied from where it came first.

        Args:
            batch: contiguous CPU tensors [B, ...] of what `batch_tensors` says.
            pairs: B samples, all of that bucket.
            prompts: key of the text record that goes with each.

        Raises:
            ShardError: a record is missing or damaged.
        """
        rows = {name: byte_rows(tensor) for name, tensor in batch.items()}
        first: dict[str, int] = {}
        for row, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
            self.latents.read_into(*pair.latent, rows, row)
            self.conditioning.read_into(*pair.conditioning, rows, row)
            source = first.setdefault(prompt, row)
            if source == row:
                self.text.read_into(*self.text.locate(prompt), rows, row)
            else:
                for name in self.text.expected[0]:
                    rows[name][row] = rows[name][source]

    def sample(self, shard: int, index: int) -> tuple[str, dict[str, Tensor], list[str]]:
        """Return one image's key, its tensors and the keys of the prompts that caption it.

        Returns:
            The key; `latent` [C, h, w] and `conditioning_latent` [C, h, w], with posterior
            `mean_std` also `latent_std` and `conditioning_latent_std`; the prompts, see `pair`.

        Raises:
            ShardError: see `pair`; or a record is missing or damaged.
        """
        pair = self.pair(shard, index)
        tensors = {**self.latents.tensors(*pair.latent), **self.conditioning.tensors(shard, index)}
        return pair.key, tensors, pair.prompts

    def find_prompt(self, prompt: str) -> str | None:
        """Return the key of a prompt's record, or None if the cache does not have the prompt.

        A key ends with 16 digits of the prompt's XXH3-128, so only its own record is opened.

        Raises:
            ShardError: the cache is damaged.
        """
        ending = "-" + xxh3_128_hexdigest(prompt.encode())[:16]
        for shard, index in self.text.places():
            key = self.text.index(shard).key(index)
            if key.endswith(ending) and self.text.about(shard, index).get("prompt") == prompt:
                return key
        return None

    def embeddings(self, prompt_key: str) -> dict[str, Tensor]:
        """Return `clip_embeds` [T, W], `t5_embeds` [T, W] and `pooled_embeds` [W] of a prompt."""
        return self.text.tensors(*self.text.locate(prompt_key))
