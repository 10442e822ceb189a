"""The held-out loss: how well velocities are predicted on rows that training never sees.

Everything random is fixed, and every row is seen at every noise level, so that the curve moves only
when the ControlNet does. The mean squared error of the velocity over equidistant noise levels is
the validation loss of Esser et al. 2024 (arXiv:2403.03206), who found it to go with how pictures
are judged, and the quality metric of MLPerf Training's text-to-image benchmark.

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
from train.data import NoisySamples
from train.loss import Objective, predict

# Noise levels k / 8; at 8 / 8 there is nothing left of the image.
NUM_LEVELS = 8
# Of the noise, whatever the run's own seed, so that runs can be held beside each other.
NOISE_SEED = 0


def held_out_records(cache: Cache) -> list[tuple[int, int]]:
    """Return (shard, index) of the held-out conditioning records."""
    records = cache.conditioning.product.shard_records
    return [(shard, index) for shard in cache.manifest.held_out for index in range(records[shard])]


def batches(cache: Cache, batch_size: int) -> list[list[tuple[int, int]]]:
    """Return the held-out records in batches of one bucket each."""
    found = []
    of_shard = itertools.groupby(
        held_out_records(cache), key=lambda one: cache.conditioning.bucket(one[0])
    )
    for _, records in of_shard:
        its = list(records)
        found += [its[at : at + batch_size] for at in range(0, len(its), batch_size)]
    return found


def read(cache: Cache, records: list[tuple[int, int]]) -> NoisySamples:
    """Return held-out samples with the noise that is always theirs; the first caption of each.

    Args:
        cache: opened.
        records: (shard, index), all of one bucket.

    Raises:
        ShardError: a record is missing or damaged.
    """
    pairs = [cache.sample_records(*record) for record in records]
    specs = cache.sample_specs(cache.conditioning.bucket(records[0][0]))
    memory = empty_tensors(specs, len(pairs))
    cache.read(memory, pairs, [pair.prompts[0] for pair in pairs])
    noise = np.empty(memory["latent"].shape, np.float32)
    for row, pair in enumerate(pairs):
        key = [NOISE_SEED, int(pair.key.rpartition("-")[2], 16)]  # of the image itself
        np.random.Generator(np.random.Philox(key=key)).standard_normal(out=noise[row], dtype="f4")
    names = ("latent", "conditioning_latent", "clip_embeds", "t5_embeds", "pooled_embeds")
    return NoisySamples(**{name: memory[name] for name in names}, noise=torch.from_numpy(noise))


@torch.no_grad()
def level_losses(
    samples: NoisySamples, controlnet: Any, transformer: Any, settings: Objective
) -> Tensor:
    """Return the mean squared error of each sample's velocity at each noise level.

    Unweighted and without preconditioning, whatever training minimises.

    Args:
        samples: on the networks' device.
        controlnet: see `predict`.
        transformer: likewise.
        settings: how latents are scaled.

    Returns:
        [NUM_LEVELS, B], float32.
    """
    count = len(samples.noise)
    found = []
    for level in range(NUM_LEVELS):
        sigma = torch.full((count,), level / NUM_LEVELS, device=samples.noise.device)
        timestep = sigma * len(settings.sigmas)
        velocity, noisy, latent = predict(
            samples, sigma, timestep, controlnet, transformer, settings
        )
        found.append(
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
    return torch.stack(found)


def held_out_loss(
    cache: Cache,
    accelerator: Accelerator,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
    batch_size: int,
) -> list[float]:
    """Return the mean loss over all held-out rows at each noise level, the same on every process.

    Every process must call this. Where the batches do not go round, those left over compute the
    first batch once more and do not count it, since a forward pass may need all of them.

    Args:
        cache: opened; has held-out rows.
        accelerator: of the run.
        controlnet: in evaluation mode.
        transformer: frozen.
        settings: how latents are scaled.
        batch_size: samples at a time.

    Raises:
        ShardError: a record is missing or damaged.
    """
    work = batches(cache, batch_size)
    sums = torch.zeros(NUM_LEVELS + 1, device=accelerator.device)
    for first in range(0, len(work), accelerator.num_processes):
        mine = first + accelerator.process_index
        counts = mine < len(work)
        samples = read(cache, work[mine if counts else 0]).to(accelerator.device)
        losses = level_losses(samples, controlnet, transformer, settings)
        if counts:
            sums[:NUM_LEVELS] += losses.sum(dim=1)
            sums[NUM_LEVELS] += losses.shape[1]
    total: Tensor = accelerator.reduce(sums, reduction="sum")
    levels: list[float] = (total[:NUM_LEVELS] / total[NUM_LEVELS]).tolist()
    return levels
