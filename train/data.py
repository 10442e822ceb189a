"""From the cache to batches: samples read by place, and everything random drawn for that place.

A sample's place is its number in the run's order. What is drawn depends on (seed, place) alone, so
a resumed or re-partitioned run draws the same.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.prefetch import prefetch
from shards.format.specs import Bucket
from shards.format.tensor_spec import TensorSpec
from shards.reading.cache import Cache, SampleRecords
from shards.reading.mixed_order import MixedOrder
from shards.reading.tensors import empty_tensors
from train.config import DROPPED

BATCHES_AHEAD = 2  # for each reading thread


@dataclass(frozen=True)
class Dropout:
    """How often parts of what the networks get are zeros, each drawn by itself.

    Attributes:
        t5: T5's embedding, as the stock pipeline has it without `text_encoder_3`.
        clip: the embedding of both CLIP encoders.
        pooled: the pooled embedding.
        control: what the ControlNet is controlled by.
    """

    t5: float = 0.0
    clip: float = 0.0
    pooled: float = 0.0
    control: float = 0.0

    @property
    def chances(self) -> list[float]:
        """In the order of `DROPPED`."""
        return [getattr(self, name) for name in DROPPED]


@dataclass(frozen=True)
class EncodedSamples:
    """Samples as cached, latents not yet scaled, and the noise to mix into them.

    Attributes:
        latent: [B, C, h, w].
        conditioning_latent: [B, C, h, w].
        clip_embeds: [B, T, W], not yet padded to T5's width.
        t5_embeds: [B, T, W].
        pooled_embeds: [B, W].
        noise: standard normal, [B, C, h, w].
        conditioning_mask: for inpainting, 1 where the picture is kept and 0 elsewhere,
            [B, 1, h, w].
        kept: 1, and 0 for each of `DROPPED` that is dropped from a sample, [B, 4]; None if
            nothing ever is.
    """

    latent: Tensor
    conditioning_latent: Tensor
    clip_embeds: Tensor
    t5_embeds: Tensor
    pooled_embeds: Tensor
    noise: Tensor
    conditioning_mask: Tensor | None = field(default=None, kw_only=True)
    kept: Tensor | None = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> Self:
        """Return them on a device; from pinned memory the copy overlaps with computing."""
        there: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if value is not None
        }
        return type(self)(**there)


@dataclass(frozen=True)
class Batch(EncodedSamples):
    """Samples with the draws that decide their timesteps.

    Attributes:
        uniform: uniform in [0, 1), [B].
        normal: standard normal, [B].
    """

    uniform: Tensor
    normal: Tensor


@dataclass(frozen=True)
class BatchMemory:
    """The memory that a batch is read into.

    Attributes:
        records: what is read, by name in the records, [B, ...].
        draws: what is drawn, by name in `Batch`. Where the cache holds means and deviations, the
            latents sampled from them are here too.
        bucket: height and width of the latents.
    """

    records: dict[str, Tensor]
    draws: dict[str, Tensor]
    bucket: Bucket


class TrainingSamples:
    """The endless sequence of training samples, indexed by place.

    Args:
        caches: of each set, opened for reading; their samples differ in size alone.
        order: which record of which set comes at which place.
        seed: of all draws.
        proportion_empty_prompts: how often the empty prompt replaces the caption.
        strata: samples of an optimiser step, of which each draws its timestep from a part of the
            distribution of its own; 1 for independent draws.
        dropout: how often parts are dropped.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        order: MixedOrder,
        *,
        seed: int,
        proportion_empty_prompts: float,
        strata: int = 1,
        dropout: Dropout | None = None,
    ) -> None:
        self.caches = list(caches)
        self.order = order
        self.seed = seed
        self.proportion_empty_prompts = proportion_empty_prompts
        self.strata = strata
        self.chances = dropout.chances if dropout else []
        self._specs = {
            grid: cache.sample_specs(number)
            for cache in self.caches
            for number, grid in enumerate(cache.manifest.buckets)
        }
        cached = self.caches[0].sample_specs(0).keys()
        from_posterior = [
            name for name in ("latent", "conditioning_latent") if f"{name}_std" in cached
        ]
        # Tensors of a latent's shape that need normal draws, in the order of drawing.
        self.drawn_latents = ["noise", *from_posterior]
        self.empty_prompts = [cache.empty_prompt_key() for cache in self.caches]

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Return the tensors of the sample at a place: those of a `Batch`, without the batch axis.

        Raises:
            ShardError: a record is missing or damaged.
        """
        batch = self.fill(self.allocate(1, self.bucket(place)), [place])
        return {name: value[0] for name, value in vars(batch).items() if value is not None}

    def key(self, place: int) -> str:
        """Return the key of the sample at a place, for messages."""
        number, shard, slot = self.order.record(place)
        return self.caches[number].conditioning.index(shard).key(slot)

    def bucket(self, place: int) -> Bucket:
        """Return height and width of the latents of the sample at a place."""
        number, shard, _ = self.order.record(place)
        return self._bucket(number, shard)

    def _bucket(self, number: int, shard: int) -> Bucket:
        cache = self.caches[number]
        return cache.manifest.buckets[cache.conditioning.bucket(shard)]

    def allocate(
        self, count: int, bucket: Bucket | None = None, *, pin: bool = False
    ) -> BatchMemory:
        """Return memory for a batch.

        Args:
            count: number of samples.
            bucket: height and width of their latents; by default the first cache's first.
            pin: use pinned memory. Torch reuses freed pinned memory for later batches, but only
                once all copies from it are done.
        """
        bucket = bucket or self.caches[0].manifest.buckets[0]
        tensors = self._specs[bucket]
        latent = TensorSpec(tensors["latent"].shape, "float32")
        draws = dict.fromkeys(self.drawn_latents, latent)
        draws |= dict.fromkeys(("uniform", "normal"), TensorSpec((), "float32"))
        if any(self.chances):
            draws["kept"] = TensorSpec((len(DROPPED),), "float32")
        return BatchMemory(
            empty_tensors(tensors, count, pin_memory=pin),
            empty_tensors(draws, count, pin_memory=pin),
            bucket,
        )

    def fill(self, memory: BatchMemory, places: Sequence[int]) -> Batch:
        """Read and draw the samples at some places.

        Args:
            memory: room for one sample a place, all of the same bucket.
            places: numbers in the run's order.

        Raises:
            ShardError: a record is missing or damaged.
        """
        draws = {name: tensor.numpy() for name, tensor in memory.draws.items()}
        of_sets: dict[int, tuple[list[int], list[SampleRecords], list[str]]] = {}
        for position, place in enumerate(places):
            number, shard, index = self.order.record(place)
            assert self._bucket(number, shard) == memory.bucket
            sample = self.caches[number].sample_records(shard, index)
            caption = self.draw(draws, position, place, len(sample.prompts))
            empty = self.empty_prompts[number]
            positions, samples, prompts = of_sets.setdefault(number, ([], [], []))
            positions.append(position)
            samples.append(sample)
            prompts.append(empty if caption is None else sample.prompts[caption])
        for number, (positions, samples, prompts) in of_sets.items():
            self.caches[number].read(memory.records, samples, prompts, positions)
        for name in memory.draws.keys() & memory.records.keys():
            deviation = memory.records[f"{name}_std"].float()
            memory.draws[name].mul_(deviation).add_(memory.records[name])
        tensors = memory.records | memory.draws
        names = [each.name for each in fields(Batch) if each.name in tensors]
        return Batch(**{name: tensors[name] for name in names})

    @contextlib.contextmanager
    def read_ahead(self, place: int) -> Iterator[None]:
        """Fetch what is read from a place on in the background, of the caches that are remote.

        Raises:
            ShardError: the shards that are mixed at a time have no room here.
        """
        places = [self.order.count(number, place) for number in range(len(self.caches))]
        sets = list(zip(self.caches, self.order.orders, places, strict=True))
        # Sets of one remote cache share its copies.
        needs = {str(cache.files): cache.bytes_ahead(order, at) for cache, order, at in sets}
        with contextlib.ExitStack() as entered:
            for cache, order, at in sets:
                beside = sum(needs.values()) - needs[str(cache.files)]
                entered.enter_context(cache.read_ahead(order, at, beside_bytes=beside))
            yield

    def release_before(self, place: int) -> None:
        """Allow the removal of shards that are needed only before a place."""
        for number, cache in enumerate(self.caches):
            cache.files.release_before(self.order.count(number, place))

    def draw(
        self, draws: Mapping[str, NDArray[np.float32]], position: int, place: int, num_prompts: int
    ) -> int | None:
        """Draw everything random about the sample at a place.

        Args:
            draws: arrays to fill, by name in `Batch`, [B, ...]. A latent's array gets the normal
                draws that its deviation is multiplied by.
            position: the sample's position in these arrays.
            place: the sample's number in the run's order.
            num_prompts: number of captions that the sample has.

        Returns:
            The index of the caption to use, or None for the empty prompt.
        """
        # Philox is counter-based: every place's stream starts at once and overlaps no other.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, place]))
        uniform, normal = rng.random(), rng.standard_normal()
        if self.strata > 1:
            from scipy.special import ndtri

            uniform = (stratum(self.seed, place, self.strata) + uniform) / self.strata
            normal = float(ndtri(uniform))
        draws["uniform"][position], draws["normal"][position] = uniform, normal
        drop_prompt = rng.random() < self.proportion_empty_prompts
        caption = int(rng.integers(num_prompts))
        for name in self.drawn_latents:
            rng.standard_normal(out=draws[name][position], dtype=np.float32)
        if any(self.chances):
            # Last, so that all other draws are the same whatever is dropped.
            draws["kept"][position] = rng.random(len(DROPPED)) >= self.chances
        return None if drop_prompt else caption


def stratum(seed: int, place: int, strata: int) -> int:
    """Return the part of a distribution that the sample at a place draws from, 0 to strata - 1.

    The samples of an optimiser step have one each, in an order drawn for the step.
    """
    step, position = divmod(place, strata)
    return int(_strata(seed, step, strata)[position])


@lru_cache(maxsize=8)
def _strata(seed: int, step: int, strata: int) -> NDArray[np.intp]:
    # A key that no place has; as a list it would be rounded to floating point.
    key = np.array([seed, (1 << 63) + step], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    return rng.permutation(strata)


@dataclass(frozen=True)
class RankPlaces:
    """The places of one rank's batches, without end.

    An optimiser step takes the next `batch_size * num_ranks * accumulation` places. The ranks split
    each batch of `batch_size * num_ranks` evenly, so every rank makes equal steps.

    Attributes:
        start: first place not yet trained on, on any rank.
        batch_size: samples a batch and rank.
        rank: this rank's number.
        num_ranks: how many ranks share the sequence.
    """

    start: int
    batch_size: int
    rank: int
    num_ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of each batch."""
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.num_ranks


def read_batches(
    samples: TrainingSamples, batch_places: RankPlaces, *, num_workers: int, pin: bool
) -> Generator[tuple[list[int], Batch], None, None]:
    """Yield the places of each batch and the batch, without end.

    `num_workers` threads read ahead; with 0 the caller's thread reads. Threads suffice: reading and
    drawing release Python's lock, no batch is copied between processes, and only the batches
    themselves take memory. Close the generator to end the threads.

    Args:
        samples: the sequence to read from.
        batch_places: which samples make up each batch.
        num_workers: number of reading threads.
        pin: read into pinned memory.

    Raises:
        ShardError: a record is missing or damaged.
    """

    def fill(work: tuple[BatchMemory, list[int]]) -> tuple[list[int], Batch]:
        memory, places = work
        return places, samples.fill(memory, places)

    work = (
        (samples.allocate(len(places), samples.bucket(places[0]), pin=pin), places)
        for places in batch_places
    )
    with (
        ThreadPoolExecutor(max(1, num_workers), "read") as pool,
        samples.read_ahead(batch_places.start),
    ):
        lead = BATCHES_AHEAD * num_workers
        filled = prefetch(pool, fill, work, lead) if num_workers else map(fill, work)
        for places, batch in filled:
            samples.release_before(places[0])
            yield places, batch
