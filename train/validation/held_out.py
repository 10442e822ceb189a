"""The held-out loss: how well velocities are predicted on rows that training never sees.

All randomness is fixed, so the loss changes only when the ControlNet does. Rows take turns at the
noise levels: row r is measured at level r modulo 8. This estimates what every row at every level
would tell, at an eighth of the cost. The mean squared error of the velocity over equidistant noise
levels is the validation loss of Esser et al. 2024 (arXiv:2403.03206), who found that it correlates
with how people judge pictures. It is also the quality metric of MLPerf Training's text-to-image
benchmark.

Axes: B samples, C latent channels, h x w latent grid.
"""

import itertools
import math
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from shards.reading.cache import Cache
from shards.reading.tensors import empty_tensors
from train import objective
from train.data import EncodedSamples
from train.loss import Objective, predict
from train.watch.curves import NUM_LEVELS

# The noise does not depend on the run's seed, so that runs can be compared.
NOISE_SEED = 0


class Measurement(NamedTuple):
    """One row at one noise level.

    Attributes:
        number: of the measurement; its level is this modulo 8.
        record: (shard, index) of the row's conditioning record.
    """

    number: int
    record: tuple[int, int]


def held_out_records(cache: Cache) -> list[tuple[int, int]]:
    """Return (shard, index) of the held-out conditioning records."""
    records = cache.conditioning.product.shard_records
    return [(shard, index) for shard in cache.manifest.held_out for index in range(records[shard])]


def measurements(cache: Cache) -> list[Measurement]:
    """Return what is measured: each row once, the first again until all levels are met equally.

    So the mean over the measurements is the mean over the levels, of any number of rows.
    """
    records = held_out_records(cache)
    count = NUM_LEVELS * math.ceil(len(records) / NUM_LEVELS)
    return [Measurement(number, records[number % len(records)]) for number in range(count)]


def batches(cache: Cache, batch_size: int) -> list[list[Measurement]]:
    """Return the measurements in batches of one bucket each."""

    def bucket(measurement: Measurement) -> int:
        return cache.conditioning.bucket(measurement.record[0])

    by_bucket = itertools.groupby(sorted(measurements(cache), key=bucket), key=bucket)
    groups = [list(group) for _, group in by_bucket]
    return [
        group[start : start + batch_size]
        for group in groups
        for start in range(0, len(group), batch_size)
    ]


def read(cache: Cache, records: list[tuple[int, int]]) -> EncodedSamples:
    """Return held-out samples with each image's own fixed noise, and the first caption of each.

    Args:
        cache: opened for reading.
        records: (shard, index) of conditioning records, all of one bucket.

    Raises:
        ShardError: a record is missing or damaged.
    """
    samples = [cache.sample_records(*record) for record in records]
    specs = cache.sample_specs(cache.conditioning.bucket(records[0][0]))
    memory = empty_tensors(specs, len(samples))
    cache.read(memory, samples, [sample.prompts[0] for sample in samples])
    noise = np.empty(memory["latent"].shape, np.float32)
    for position, sample in enumerate(samples):
        image_hash = int(sample.key.rpartition("-")[2], 16)
        rng = np.random.Generator(np.random.Philox(key=[NOISE_SEED, image_hash]))
        rng.standard_normal(out=noise[position], dtype=np.float32)
    names = {each.name for each in fields(EncodedSamples)} & memory.keys()
    return EncodedSamples(**{name: memory[name] for name in names}, noise=torch.from_numpy(noise))


@torch.no_grad()
def velocity_losses(
    samples: EncodedSamples, levels: Tensor, controlnet: Any, transformer: Any, settings: Objective
) -> Tensor:
    """Return the mean squared error of each sample's velocity at its noise level.

    Levels are k / NUM_LEVELS; at the next one, 1, nothing of the image would be left.

    The loss is unweighted and without preconditioning, whatever training minimises.

    Args:
        samples: on the networks' device.
        levels: 0 to NUM_LEVELS - 1, [B].
        controlnet: in evaluation mode.
        transformer: frozen.
        settings: how latents are scaled.

    Returns:
        [B], float32.
    """
    sigma = levels / NUM_LEVELS
    timestep = sigma * len(settings.sigmas)
    velocity, noisy, latent = predict(samples, sigma, timestep, controlnet, transformer, settings)
    return objective.flow_loss(
        velocity,
        latent,
        samples.noise,
        noisy,
        sigma,
        torch.ones_like(sigma),
        precondition_outputs=False,
    )


def held_out_loss(
    cache: Cache,
    accelerator: Accelerator,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
    batch_size: int,
) -> list[float]:
    """Return the mean loss of the held-out rows at each noise level, the same on every process.

    Every process must call this. If there are not enough batches for all processes, the others
    compute the first batch once more without counting it, since a forward pass may need all of
    them.

    Args:
        cache: opened for reading; it has held-out rows.
        accelerator: of the run.
        controlnet: in evaluation mode.
        transformer: frozen.
        settings: how latents are scaled.
        batch_size: samples a batch.

    Raises:
        ShardError: a record is missing or damaged.
    """
    all_batches = batches(cache, batch_size)
    # One place a measurement: however they are shared out, they are added up in the same order.
    losses = torch.zeros(sum(map(len, all_batches)), device=accelerator.device)
    for first in range(0, len(all_batches), accelerator.num_processes):
        place = first + accelerator.process_index
        counts = place < len(all_batches)
        batch = all_batches[place if counts else 0]
        samples = read(cache, [measurement.record for measurement in batch])
        numbers = torch.tensor([measurement.number for measurement in batch])
        numbers = numbers.to(accelerator.device)
        of_batch = velocity_losses(
            samples.to(accelerator.device), numbers % NUM_LEVELS, controlnet, transformer, settings
        )
        if counts:
            losses[numbers] = of_batch
    total: Tensor = accelerator.reduce(losses, reduction="sum")
    levels: list[float] = total.view(-1, NUM_LEVELS).mean(dim=0).tolist()
    return levels
