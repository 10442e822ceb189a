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
from shards.format.keys import CONTENT_DIGITS
from shards.format.manifest import (
    DEFAULT_CONDITIONING,
    Manifest,
    conditioning_folder,
    validation_folder,
)
from shards.format.tensor_spec import TensorSpec
from shards.reading.location import Files, LocalFiles, ShardId
from shards.reading.order import Order
from shards.reading.tensors import TensorReader, byte_view, empty_tensors


class SampleRecords(NamedTuple):
    """The records that make up a sample.

    Attributes:
        key: of the image.
        conditioning: (shard, index) of its conditioning latent.
        latent: (shard, index) of its latent.
        prompts: keys of the text records that caption it, at least one.
    """

    key: str
    conditioning: tuple[int, int]
    latent: tuple[int, int]
    prompts: list[str]


class Cache:
    """A complete cache, opened for reading.

    Args:
        files: of the cache; a path for a folder of this machine.
        conditioning_name: the control to read.

    Raises:
        ShardError: there is no complete cache, no such control in it, or a shard is missing.
    """

    def __init__(self, files: Files | Path, conditioning_name: str = DEFAULT_CONDITIONING) -> None:
        self.files: Files = LocalFiles(files) if isinstance(files, Path) else files
        self.manifest: Manifest = self.files.manifest()
        if conditioning_name not in self.manifest.conditioning:
            raise ShardError(
                f"{self.files}: no conditioning {conditioning_name!r}; "
                f"found {', '.join(map(repr, self.manifest.conditioning))}: choose one by "
                "--conditioning-name"
            )
        self.conditioning_name = conditioning_name
        self.conditioning_spec = self.manifest.conditioning_specs[conditioning_name]
        self.text = self._reader("text")
        self.latents = self._reader("latents")
        self.conditioning = self._reader(conditioning_folder(conditioning_name))
        self.validation = self._reader(validation_folder(conditioning_name))
        readers = (self.text, self.latents, self.conditioning, self.validation)
        self.files.check_present(self.manifest, [reader.folder for reader in readers])

    def _reader(self, folder: str) -> TensorReader:
        product = dict(self.manifest.products())[folder]
        return TensorReader(self.files, folder, product, self.manifest.specs_by_bucket(folder))

    @contextlib.contextmanager
    def read_ahead(self, order: Order, place: int, *, beside_bytes: int = 0) -> Iterator[None]:
        """Fetch what is read from a place on in the background, before it is read.

        Args:
            order: of the samples.
            place: the first that is read.
            beside_bytes: what other remote caches take of the same room.

        Raises:
            ShardError: the cache is remote, and the shards of two windows have no room here.
        """
        limit = self.files.limit_bytes
        if limit is not None and self._num_bytes > limit - beside_bytes:
            self._check_room(order, place, limit - beside_bytes)
        with self.files.read_ahead(order.windows(place), self._shards_of):
            yield

    def bytes_ahead(self, order: Order, place: int) -> int:
        """Return the room that reading from a place on takes here, of a remote cache; else 0."""
        limit = self.files.limit_bytes
        if limit is None or self._num_bytes <= limit:
            return 0 if limit is None else self._num_bytes
        return self._bytes_of(_two_windows(order, place))

    @property
    def _num_bytes(self) -> int:
        products = (self.text.product, self.latents.product, self.conditioning.product)
        return sum(product.num_bytes for product in products)

    def _check_room(self, order: Order, place: int, limit: int) -> None:
        """Refuse a window that has no room here beside the next one."""
        shards = _two_windows(order, place)
        size = self._bytes_of(shards)
        if size > limit:
            window = min(order.window, self.conditioning.product.num_shards)
            # Where captions repeat, a smaller window may need nearly as much text.
            smaller = window * limit // size
            while smaller and self._bytes_of(shards[: 2 * smaller]) > limit:
                smaller //= 2
            advice = f"--shuffle-window {smaller}, or " if smaller else ""
            raise ShardError(
                f"{self.files}: {window} shards mixed at a time and the next {window} take "
                f"{size / 1e9:.3g} GB, and --local-cache-gb is {limit / 1e9:.3g}; give "
                f"{advice}room for {size / 1e9:.3g} GB or more"
            )

    def _bytes_of(self, conditioning_shards: list[int]) -> int:
        """Return the size of all shards that hold the samples of some conditioning shards."""
        products = dict(self.manifest.products())
        needed = set(self._shards_of(conditioning_shards))
        return sum(products[folder].shard_bytes[shard] for folder, shard in needed)

    def _shards_of(self, conditioning_shards: list[int]) -> list[ShardId]:
        """Return all shards that hold the samples of some conditioning shards."""
        text_shards = {0}  # of the empty prompt
        for shard in conditioning_shards:
            text_shards |= self.latents.index(shard).shards_of_prompts()
        return [
            *((self.conditioning.folder, shard) for shard in conditioning_shards),
            *((self.latents.folder, shard) for shard in conditioning_shards),
            *((self.text.folder, shard) for shard in sorted(text_shards)),
        ]

    def empty_prompt(self) -> dict[str, Tensor]:
        """Return the text tensors of the empty prompt.

        Raises:
            ShardError: the cache does not have it.
        """
        return self.embeddings(self.empty_prompt_key())

    def empty_prompt_key(self) -> str:
        """Return the key of the empty prompt, always the first record of the first shard.

        Raises:
            ShardError: the cache does not have it.
        """
        if (
            not sum(self.text.product.shard_records[:1])
            or self.text.metadata(0, 0).get("prompt") != ""
        ):
            raise ShardError(f"{self.files}: the first record of text/ is not the empty prompt")
        return self.text.index(0).key(0)

    def sample_records(self, shard: int, index: int) -> SampleRecords:
        """Return the records of the sample whose conditioning latent is record `index` of a shard.

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
        return SampleRecords(key, (shard, index), (latent_shard, latent_index), prompts)

    def sample_specs(self, bucket: int) -> dict[str, TensorSpec]:
        """Return the tensors of a sample of a bucket, by name: latents, conditioning and text."""
        readers = (self.latents, self.conditioning)
        specs = {name: spec for reader in readers for name, spec in reader.specs[bucket].items()}
        return specs | self.manifest.text_spec.network_specs()

    def read(
        self,
        batch: Mapping[str, Tensor],
        samples: Sequence[SampleRecords],
        prompts: Sequence[str],
        positions: Sequence[int] | None = None,
    ) -> None:
        """Read samples straight into the memory of a batch.

        Each record is read once; a prompt that comes again is copied from where it came first.

        Args:
            batch: contiguous CPU tensors [B, ...] as `sample_specs` says.
            samples: B samples, all of that bucket.
            prompts: B keys: of the text record that goes with each sample.
            positions: of the samples in the batch, where it has others beside them.

        Raises:
            ShardError: a record is missing or damaged.
        """
        views = {name: byte_view(tensor) for name, tensor in batch.items()}
        absent = batch.keys() & self.manifest.text_spec.network_specs().keys()
        absent -= self.text.specs[0].keys()
        first: dict[str, int] = {}
        places = range(len(samples)) if positions is None else positions
        for position, sample, prompt in zip(places, samples, prompts, strict=True):
            self.latents.read_into(*sample.latent, views, position)
            self.conditioning.read_into(*sample.conditioning, views, position)
            source = first.setdefault(prompt, position)
            if source == position:
                self.text.read_into(*self.text.locate(prompt), views, position)
            else:
                for name in self.text.specs[0]:
                    views[name][position] = views[name][source]
            for name in absent:
                views[name][position] = 0

    def sample(self, shard: int, index: int) -> tuple[str, dict[str, Tensor], list[str]]:
        """Return one image's key, its tensors and the keys of the prompts that caption it.

        Args:
            shard: number of a conditioning shard.
            index: of the record in it.

        Returns:
            The key; `latent` [C, h, w] and `conditioning_latent` [C, h, w], with posterior
            `mean_std` also `latent_std` and `conditioning_latent_std`; the keys of the prompts.

        Raises:
            ShardError: the image has no caption, or a record is missing or damaged.
        """
        sample = self.sample_records(shard, index)
        latent = self.latents.tensors(*sample.latent)
        conditioning = self.conditioning.tensors(*sample.conditioning)
        return sample.key, latent | conditioning, sample.prompts

    def find_prompt(self, prompt: str) -> str | None:
        """Return the key of a prompt's record, or None if the cache does not have the prompt.

        A key ends with digits of the prompt's XXH3-128, so that only its own record is read.

        Raises:
            ShardError: the cache is damaged.
        """
        ending = "-" + xxh3_128_hexdigest(prompt.encode())[:CONTENT_DIGITS]
        for shard, index in self.text.locations():
            key = self.text.index(shard).key(index)
            if key.endswith(ending) and self.text.metadata(shard, index).get("prompt") == prompt:
                return key
        return None

    def embeddings(self, prompt_key: str) -> dict[str, Tensor]:
        """Return `clip_embeds` [T, W], `t5_embeds` [T, W] and `pooled_embeds` [W] of a prompt."""
        return self._with_t5(self.text.tensors(*self.text.locate(prompt_key)))

    def pair(self, shard: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of a validation pair: of a prompt, and of a conditioning image."""
        return self._with_t5(self.validation.tensors(shard, index))

    def _with_t5(self, record: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a record of a prompt with the zeros that stand for T5 where there is none."""
        specs = self.manifest.text_spec.network_specs()
        absent = {name: spec for name, spec in specs.items() if name not in record}
        zeros = {name: tensor[0].zero_() for name, tensor in empty_tensors(absent, 1).items()}
        return record | zeros


def _two_windows(order: Order, place: int) -> list[int]:
    """Return the conditioning shards of the window at a place and of the next one."""
    windows = itertools.islice(order.windows(place), 2)
    return [shard for _, shards in windows for shard in shards]
