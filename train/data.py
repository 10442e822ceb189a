"""From the cache to batches: records read by place, and everything random drawn for that place.

What is drawn depends on (seed, place) alone, the place being a sample's number in the run's order;
so a resumed or re-partitioned run draws the same.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shards.errors import ShardError
from shards.order import Order
from shards.reader import Cache


@dataclass(frozen=True)
class Batch:
    """Samples on the device, raw as cached, with what was drawn for them.

    Attributes:
        latent: [B, C, h, w].
        conditioning_latent: [B, C, h, w].
        clip_embeds: [B, T, W], not yet padded to T5's width.
        t5_embeds: [B, T, W].
        pooled_embeds: [B, W].
        noise: standard normal, [B, C, h, w].
        uniform: uniform in [0, 1), [B], for the timestep.
        normal: standard normal, [B], for the timestep.
    """

    latent: Tensor
    conditioning_latent: Tensor
    clip_embeds: Tensor
    t5_embeds: Tensor
    pooled_embeds: Tensor
    noise: Tensor
    uniform: Tensor
    normal: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; from pinned memory the copy overlaps with computing."""
        return Batch(
            **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the data loader calls this."""
        return Batch(**{name: value.pin_memory() for name, value in vars(self).items()})


class Samples(Dataset[dict[str, Tensor] | ShardError]):
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

    def __getitem__(self, place: int) -> dict[str, Tensor] | ShardError:
        """Return one sample's tensors, see `Batch`; or the error, for `loader` to raise.

        Raised here, in a worker process, it would reach the user as that process's traceback.
        """
        try:
            return self._sample(place)
        except ShardError as error:
            return error

    def _sample(self, place: int) -> dict[str, Tensor]:
        _, tensors, prompts = self.cache.sample(*self.order.record(place))
        # Philox is counter-based: any place's stream is there at once and overlaps no other.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, place]))
        uniform, normal = rng.random(), rng.standard_normal()
        drops, caption = rng.random() < self.proportion_empty_prompts, rng.integers(len(prompts))
        embeds = self.cache.empty_prompt() if drops else self.cache.embeddings(prompts[caption])
        shape = tensors["latent"].shape
        sample = {
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "uniform": torch.tensor(uniform, dtype=torch.float32),
            "normal": torch.tensor(normal, dtype=torch.float32),
            **embeds,
        }
        for name in ("latent", "conditioning_latent"):
            sample[name] = tensors[name]
            if (std := tensors.get(f"{name}_std")) is not None:
                draw = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
                sample[name] = tensors[name].float() + std.float() * draw
        return sample


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


def collate(samples: Sequence[dict[str, Tensor] | ShardError]) -> Batch | ShardError:
    """Return samples as one batch, or the first error among them."""
    good = []
    for sample in samples:
        if isinstance(sample, ShardError):
            return sample
        good.append(sample)
    return Batch(**{name: torch.stack([one[name] for one in good]) for name in good[0]})


def loader(
    samples: Samples, places: RankBatches, *, num_workers: int, pin: bool
) -> Iterator[Batch]:
    """Yield batches without end, read ahead by `num_workers` processes.

    Raises:
        ShardError: a record is missing or damaged.
    """
    batches: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=places,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin,
    )
    for batch in batches:
        if isinstance(batch, ShardError):
            raise batch
        yield batch


def prompt_embeds(clip_embeds: Tensor, t5_embeds: Tensor) -> Tensor:
    """Return the prompt as SD3 takes it: CLIP padded with zeros to T5's width, then T5.

    Args:
        clip_embeds: [B, T_clip, W_clip], W_clip at most W_t5.
        t5_embeds: [B, T_t5, W_t5].

    Returns:
        [B, T_clip + T_t5, W_t5].
    """
    padding = t5_embeds.shape[-1] - clip_embeds.shape[-1]
    return torch.cat([torch.nn.functional.pad(clip_embeds, (0, padding)), t5_embeds], dim=1)
