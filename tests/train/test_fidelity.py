"""What training computes from the cache is what it would compute from the images themselves."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image

from shards.reading.cache import Cache
from shards.reading.order import Order
from tests.conftest import RESOLUTION_PX, TOKENS, awaken
from train import models
from train.data import TrainingSamples
from train.loss import Objective, batch_losses


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap", "sigma_sqrt"])
@pytest.mark.parametrize("precondition", [True, False])
def test_live_encoding_gives_the_loss_of_the_cache(
    cache: Path, base: Path, circles: Path, scheme: str, precondition: bool
) -> None:
    found = Cache(cache)
    samples = TrainingSamples(
        found,
        Order(found.conditioning.product.shard_records, seed=0),
        seed=0,
        proportion_empty_prompts=0.0,
    )
    batch = samples.fill(samples.allocate(4), range(4))
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    scheduler = pipeline.scheduler
    controlnet = models.new_controlnet(base, None, 2)
    awaken(controlnet)
    losses = batch_losses(
        batch,
        controlnet,
        pipeline.transformer,
        Objective(
            sigmas=scheduler.sigmas,
            timesteps=scheduler.timesteps,
            latent_spec=found.manifest.latent_spec,
            conditioning_spec=found.conditioning_spec,
            weighting_scheme=scheme,
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
            precondition_outputs=precondition,
        ),
    )

    # The live computation: stock classes and the reference's formulas, nothing of ours.
    rows = [json.loads(line) for line in (circles / "prompt.json").read_text().splitlines()]
    keys = [found.sample(*samples.order.record(place))[0] for place in range(4)]
    first_shard = found.manifest.latents.shard_records[0]
    live = [rows[int(key[:6]) * first_shard + int(key.split("-")[1])] for key in keys]
    vae = pipeline.vae

    def encode(names: list[str]) -> torch.Tensor:
        images = [Image.open(circles / name).convert("RGB") for name in names]
        images = [image.resize((RESOLUTION_PX,) * 2, Image.BILINEAR) for image in images]
        latents = vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.sample()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    with torch.no_grad():
        latent = encode([row["target"] for row in live])
        conditioning = encode([row["source"] for row in live])
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [row["prompt"] for row in live], None, None, max_sequence_length=TOKENS
        )
    if scheme == "logit_normal":
        density = torch.sigmoid(batch.normal)
    elif scheme == "mode":
        u = batch.uniform
        density = 1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    else:
        density = batch.uniform
    timesteps = scheduler.timesteps[(density * 1000).long()]
    indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigma = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latent + sigma * batch.noise
    common = {
        "timestep": timesteps,
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
    }
    residuals = controlnet(hidden_states=noisy, controlnet_cond=conditioning, **common)[0]
    prediction = pipeline.transformer(
        hidden_states=noisy, block_controlnet_hidden_states=residuals, **common
    ).sample
    if precondition:
        prediction, target = prediction * -sigma + noisy, latent
    else:
        target = batch.noise - latent
    weight = compute_loss_weighting_for_sd3(scheme, sigmas=sigma)
    expected = (weight * (prediction - target) ** 2).reshape(4, -1).mean(1)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
