"""The held-out loss: how well velocities are predicted on rows that training never sees.

All randomness is fixed and every row is measured at every noise level, so the loss changes only
when the ControlNet does. The mean squared error of the velocity over equidistant noise levels is
the validation loss of Esser et al. 2024 (arXiv:2403.03206), who found that it correlates with how
people judge pictures. It is also the quality metric of MLPerf Training's text-to-image benchmark.

Axes: B samples, C latent channels, h x w latent grid.
"""

import itertools
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from shards.reading.cache import Cache
from shards.reading.tensors import empty_tensors
from train import objective
from train.data import EncodedSamples
from train.loss import Objective, predict

# Noise levels are k / 8; at 8 / 8 nothing of the image is left.
NUM_LEVELS = 8
# The noise does not depend on the run's seed, so that runs can be compared.
NOISE_SEED = 0


def held_out_records(cache: Cache) -> list[tuple[int, int]]:
    """Return (shard, index) of the held-out conditioning records."""
    records = cache.conditioning.product.shard_records
    return [(shard, index) for shard in cache.manifest.held_out for index in range(records[shard])]


def batches(cache: Cache, batch_size: int) -> list[list[tuple[int, int]]]:
    """Return the held-out records in batches of one bucket each."""
    record_batches = []
    by_bucket = itertools.groupby(
        held_out_records(cache), key=lambda record: cache.conditioning.bucket(record[0])
    )
    for _, group in by_bucket:
        records = list(group)
        record_batches += [
            records[start : start + batch_size] for start in range(0, len(records), batch_size)
        ]
    return record_batches


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
    names = ("latent", "conditioning_latent", "clip_embeds", "t5_embeds", "pooled_embeds")
    return EncodedSamples(**{name: memory[name] for name in names}, noise=torch.from_numpy(noise))


@torch.no_grad()
def level_losses(
    samples: EncodedSamples, controlnet: Any, transformer: Any, settings: Objective
) -> Tensor:
    """Return the mean squared error of each sample's velocity at each noise level.

    The loss is unweighted and without preconditioning, whatever training minimises.

    Args:
        samples: on the networks' device.
        controlnet: in evaluation mode.
        transformer: frozen.
        settings: how latents are scaled.

    Returns:
        [NUM_LEVELS, B], float32.
    """
    count = len(samples.noise)
    losses = []
    for level in range(NUM_LEVELS):
        sigma = torch.full((count,), level / NUM_LEVELS, device=samples.noise.device)
        timestep = sigma * len(settings.sigmas)
        velocity, noisy, latent = predict(
            samples, sigma, timestep, controlnet, transformer, settings
        )
        losses.append(
            objective.flow_loss(
                velocity,
                latent,
                samples.noise,
                noisy,
                sigma,
                torch.ones_like(sigma),
                precondition_outputs=False,
            )
        )
    return torch.stack(losses)


def held_out_loss(
    cache: Cache,
    accelerator: Accelerator,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
    batch_size: int,
) -> list[float]:
    """Return the mean loss over all held-out rows at each noise level, the same on every process.

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
    record_batches = batches(cache, batch_size)
    sums = torch.zeros(NUM_LEVELS + 1, device=accelerator.device)
    for first in range(0, len(record_batches), accelerator.num_processes):
        number = first + accelerator.process_index
        counts = number < len(record_batches)
        samples = read(cache, record_batches[number if counts else 0]).to(accelerator.device)
        losses = level_losses(samples, controlnet, transformer, settings)
        if counts:
            sums[:NUM_LEVELS] += losses.sum(dim=1)
            sums[NUM_LEVELS] += losses.shape[1]
    total: Tensor = accelerator.reduce(sums, reduction="sum")
    levels: list[float] = (total[:NUM_LEVELS] / total[NUM_LEVELS]).tolist()
    return levels
