"""From the cache to batches: records read by place, and everything random drawn for that place.

What is drawn depends on (seed, place) alone, the place being a sample's number in the run's order;
so a resumed or re-partitioned run draws the same.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common.prefetch import prefetch
from shards.format.tensor_spec import TensorSpec
from shards.reading.cache import Cache
from shards.reading.order import Order
from shards.reading.tensors import empty_tensors

BATCHES_AHEAD = 2  # a thread that reads


@dataclass(frozen=True)
class NoisySamples:
    """Samples, raw as cached, each with noise.

    Attributes:
        latent: [B, C, h, w].
        conditioning_latent: [B, C, h, w].
        clip_embeds: [B, T, W], not yet padded to T5's width.
        t5_embeds: [B, T, W].
        pooled_embeds: [B, W].
        noise: standard normal, [B, C, h, w].
    """

    latent: Tensor
    conditioning_latent: Tensor
    clip_embeds: Tensor
    t5_embeds: Tensor
    pooled_embeds: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Self:
        """Return them on a device; from pinned memory the copy overlaps with computing."""
        return type(self)(
            **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        )


@dataclass(frozen=True)
class Batch(NoisySamples):
    """Samples with all that was drawn for them.

    Attributes:
        uniform: uniform in [0, 1), [B], for the timestep.
        normal: standard normal, [B], for the timestep.
    """

    uniform: Tensor
    normal: Tensor


@dataclass(frozen=True)
class Memory:
    """Where a batch goes, taken before it is read.

    Attributes:
        records: what is read, by name in the records, [B, ...].
        draws: what is drawn, by name in `Batch`; where the cache holds means and deviations,
            also the latents that are sampled from them.
        bucket: whose shapes these are.
    """

    records: dict[str, Tensor]
    draws: dict[str, Tensor]
    bucket: int


class Samples(Dataset[dict[str, Tensor]]):
    """The endless sequence of training samples, indexed by place.

    Args:
        cache: opened for reading.
        order: which record comes at which place.
        seed: of all draws.
        proportion_empty_prompts: how often the empty prompt takes the caption's place.
    """

    def __init__(
        self, cache: Cache, order: Order, *, seed: int, proportion_empty_prompts: float
    ) -> None:
        self.cache = cache
        self.order = order
        self.seed = seed
        self.proportion_empty_prompts = proportion_empty_prompts
        sampled = ("latent", "conditioning_latent")
        names = cache.sample_specs(0).keys()
        # What has the shape of a latent and is drawn, in the order of drawing.
        self.drawn = ["noise", *(name for name in sampled if f"{name}_std" in names)]
        self.empty_prompt = cache.empty_prompt_key()

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Return one sample's tensors: those of a `Batch`, without its first axis.

        Raises:
            ShardError: a record is missing or damaged.
        """
        batch = self.fill(self.memory(1, self.bucket(place)), [place])
        return {name: value[0] for name, value in vars(batch).items()}

    def key(self, place: int) -> str:
        """Return the key of the sample at a place, for messages."""
        shard, index = self.order.record(place)
        return self.cache.conditioning.index(shard).key(index)

    def bucket(self, place: int) -> int:
        """Return which bucket the sample at a place is of."""
        shard, _ = self.order.record(place)
        return self.cache.conditioning.bucket(shard)

    def memory(self, count: int, bucket: int = 0, *, pin: bool = False) -> Memory:
        """Return memory for a batch of `count` samples.

        Args:
            count: samples.
            bucket: that they are of.
            pin: take pinned memory. Torch keeps what is freed of it for the next batch, and gives
                it out again only when copies from it are done.
        """
        tensors = self.cache.sample_specs(bucket)
        latent = TensorSpec(tensors["latent"].shape, "float32")
        draws = dict.fromkeys(self.drawn, latent)
        draws |= dict.fromkeys(("uniform", "normal"), TensorSpec((), "float32"))

        return Memory(
            empty_tensors(tensors, count, pin_memory=pin),
            empty_tensors(draws, count, pin_memory=pin),
            bucket,
        )

    def fill(self, memory: Memory, places: Sequence[int]) -> Batch:
        """Read and draw the samples at some places.

        Args:
            memory: for as many samples as there are places, of their bucket.
            places: their numbers in the run's order.

        Raises:
            ShardError: a record is missing or damaged.
        """
        draws = {name: tensor.numpy() for name, tensor in memory.draws.items()}
        pairs, prompts = [], []
        for row, place in enumerate(places):
            pair = self.cache.sample_records(*self.order.record(place))
            assert self.cache.conditioning.bucket(pair.conditioning[0]) == memory.bucket
            caption = self.draw(draws, row, place, len(pair.prompts))
            pairs.append(pair)
            prompts.append(self.empty_prompt if caption is None else pair.prompts[caption])
        self.cache.read(memory.records, pairs, prompts)
        for name in memory.draws.keys() & memory.records.keys():
            deviation = memory.records[f"{name}_std"].float()
            memory.draws[name].mul_(deviation).add_(memory.records[name])
        found = memory.records | memory.draws
        return Batch(**{field.name: found[field.name] for field in fields(Batch)})

    def draw(
        self, draws: Mapping[str, NDArray[np.float32]], row: int, place: int, num_prompts: int
    ) -> int | None:
        """Draw what is random about the sample at a place.

        Args:
            draws: by name in `Batch`, [B, ...]; for latents what their deviation is multiplied by.
            row: of them to fill.
            place: number in the run's order.
            num_prompts: captions that the sample has.

        Returns:
            Which of its captions it gets, or None for the empty prompt.
        """
        # Philox is counter-based: any place's stream is there at once and overlaps no other.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, place]))
        draws["uniform"][row], draws["normal"][row] = rng.random(), rng.standard_normal()
        drops = rng.random() < self.proportion_empty_prompts
        caption = int(rng.integers(num_prompts))
        for name in self.drawn:
            rng.standard_normal(out=draws[name][row], dtype=np.float32)
        return None if drops else caption


class RankBatches(Sampler[list[int]]):
    """The places of one rank's batches from a place on, without end.

    An optimiser step takes the next `batch_size * num_ranks * accumulation` places; ranks share
    each batch of `batch_size * num_ranks` among them in turn, so every rank makes equal steps.

    Args:
        start: first place not yet trained on.
        batch_size: samples a batch and rank.
        rank: which of them this is.
        num_ranks: how many share the sequence.
    """

    def __init__(self, start: int, *, batch_size: int, rank: int, num_ranks: int) -> None:
        self.start = start
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of places."""
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.num_ranks


def loader(
    samples: Samples, places: RankBatches, *, num_workers: int, pin: bool
) -> Generator[tuple[list[int], Batch], None, None]:
    """Yield batches and their places without end, read ahead by `num_workers` threads.

    Threads rather than processes: reading and drawing happen outside Python's lock, batches need
    not be copied from one process to another, and memory is that of the batches alone. Close it to
    end the threads.

    Raises:
        ShardError: a record is missing or damaged.
    """

    def fill(work: tuple[Memory, list[int]]) -> tuple[list[int], Batch]:
        memory, group = work
        return group, samples.fill(memory, group)

    work = (
        (samples.memory(len(group), samples.bucket(group[0]), pin=pin), group) for group in places
    )
    with (
        ThreadPoolExecutor(max(1, num_workers), "read") as pool,
        samples.cache.read_ahead(samples.order, places.start),
    ):
        lead = BATCHES_AHEAD * num_workers
        for group, batch in prefetch(pool, fill, work, lead) if num_workers else map(fill, work):
            samples.cache.files.release_before(group[0])
            yield group, batch
