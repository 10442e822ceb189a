"""What training computes from the cache is what it would compute from the images themselves."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image

from sd3.controlnet.pooled_projection import PooledProjection
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from tests.conftest import RESOLUTION_PX, TOKENS, awaken
from train import models
from train.config import TrainConfig
from train.data import EncodedSamples, TrainingSamples
from train.loss import Objective, batch_losses, predict

SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt")


@pytest.mark.parametrize(
    ("scheme", "precondition", "convention"),
    [
        *itertools.product(SCHEMES, (True, False), ("prompt",)),
        ("logit_normal", True, "zeros"),
    ],
)
def test_live_encoding_gives_the_loss_of_the_cache(
    cache: Path,
    base: Path,
    circles: Path,
    train_config: TrainConfig,
    scheme: str,
    precondition: bool,
    convention: PooledProjection,
) -> None:
    config = replace(
        train_config,
        weighting_scheme=scheme,
        logit_mean=0.3,
        logit_std=1.4,
        mode_scale=1.1,
        precondition_outputs=int(precondition),
    )
    found = Cache(cache)
    samples = TrainingSamples(
        [found],
        unmixed(Order(found.conditioning.product.shard_records, seed=0)),
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
        Objective.from_config(
            config,
            sigmas=scheduler.sigmas,
            timesteps=scheduler.timesteps,
            latent_spec=found.manifest.latent_spec,
            # As of another VAE: what scales images must not scale controls.
            conditioning_spec=replace(
                found.conditioning_spec, scaling_factor=0.7, shift_factor=-0.4
            ),
            pooled_projection=convention,
        ),
    )

    # The live computation: stock classes and the reference's formulas, nothing of ours.
    rows = [json.loads(line) for line in (circles / "prompt.json").read_text().splitlines()]
    keys = [found.sample(*samples.order.record(place)[1:])[0] for place in range(4)]
    first_shard = found.manifest.latents.shard_records[0]
    live = [rows[int(key[:6]) * first_shard + int(key.split("-")[1])] for key in keys]
    vae = pipeline.vae

    def encode(names: list[str], scaling: float, shift: float) -> torch.Tensor:
        images = [Image.open(circles / name).convert("RGB") for name in names]
        images = [image.resize((RESOLUTION_PX,) * 2, Image.BILINEAR) for image in images]
        latents = vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.sample()
        return (latents - shift) * scaling

    with torch.no_grad():
        factors = vae.config.scaling_factor, vae.config.shift_factor
        latent = encode([row["target"] for row in live], *factors)
        shift = -0.4 if convention == "prompt" else 0.0
        conditioning = encode([row["source"] for row in live], 0.7, shift)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [row["prompt"] for row in live], None, None, max_sequence_length=TOKENS
        )
    if scheme == "logit_normal":
        density = torch.sigmoid(0.3 + 1.4 * batch.normal)
    elif scheme == "mode":
        u = batch.uniform
        density = 1 - u - 1.1 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    else:
        density = batch.uniform
    timesteps = scheduler.timesteps[(density * 1000).long()]
    indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigma = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latent + sigma * batch.noise
    common = {
        "hidden_states": noisy,
        "timestep": timesteps,
        "encoder_hidden_states": embeds,
    }
    residuals = controlnet(
        controlnet_cond=conditioning,
        pooled_projections=pooled if convention == "prompt" else torch.zeros(4, pooled.shape[1]),
        **common,
    )[0]
    prediction = pipeline.transformer(
        block_controlnet_hidden_states=residuals, pooled_projections=pooled, **common
    ).sample
    if precondition:
        prediction, target = prediction * -sigma + noisy, latent
    else:
        target = batch.noise - latent
    weight = compute_loss_weighting_for_sd3(scheme, sigmas=sigma)
    expected = (weight * (prediction - target) ** 2).reshape(4, -1).mean(1)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


class Still(torch.nn.Module):
    """A network that returns what it is told to, and keeps what it is given."""

    dtype = torch.float32

    def __init__(self, returned: object) -> None:
        super().__init__()
        self.returned = returned
        self.given: dict[str, torch.Tensor] = {}

    def forward(self, **given: torch.Tensor) -> tuple[object]:
        self.given = given
        return (self.returned,)


def test_latents_in_16_bit_are_scaled_in_float32(cache: Path, train_config: TrainConfig) -> None:
    found = Cache(cache)
    latent, conditioning = torch.randn(2, 1, 16, 8, 8).bfloat16()
    embeds = torch.randn(1, 3, 8)
    samples = EncodedSamples(latent, conditioning, embeds, embeds, embeds[:, 0], latent.float())
    settings = Objective.from_config(
        train_config,
        sigmas=torch.ones(1),
        timesteps=torch.ones(1),
        latent_spec=replace(found.manifest.latent_spec, scaling_factor=1.5, shift_factor=0.06),
        conditioning_spec=replace(found.conditioning_spec, scaling_factor=0.7, shift_factor=-0.4),
        pooled_projection="prompt",
    )
    controlnet, transformer = Still([]), Still(torch.zeros(1))
    one = torch.ones(1)
    prediction = predict(samples, one, one, controlnet, transformer, settings)
    for scaled, right in (
        (prediction.latent, (latent.double() - 0.06) * 1.5),
        (controlnet.given["controlnet_cond"], (conditioning.double() + 0.4) * 0.7),
    ):
        # bfloat16 rounds by up to 2**-9, float32 by 2**-24.
        torch.testing.assert_close(scaled.double(), right, rtol=1e-5, atol=1e-6)
