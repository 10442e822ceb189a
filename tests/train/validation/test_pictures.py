"""Validation pictures are what the stock pipeline draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3ControlNetPipeline

from sd3.vae_decoder import decode, to_bytes
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, awaken
from train import models
from train.validation import sampling


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_and_decoding_equal_the_stock_pipeline(
    cache: Path, base: Path, guidance: float
) -> None:
    found = Cache(cache)
    transformer = models.load_transformer(base, None, torch.float32)
    controlnet = models.new_controlnet(base, None, 2)
    awaken(controlnet)
    pair = sampling.read_pairs(found)[1]
    assert pair.prompt == PROMPTS[1]
    noise = torch.randn(2, 16, 8, 8)
    latents = sampling.sample(
        transformer,
        controlnet,
        models.load_scheduler(base),
        pair,
        sampling.negative_embeds(found),
        noise,
        num_inference_steps=3,
        guidance_scale=guidance,
    )
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=controlnet, transformer=transformer
    )
    pixels = pair.conditioning_image[None] / 127.5 - 1
    common = {
        "prompt": pair.prompt,
        "num_images_per_prompt": 2,
        "control_image": pixels,
        "height": RESOLUTION_PX,
        "width": RESOLUTION_PX,
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "latents": noise,
        "max_sequence_length": TOKENS,
    }
    expected = pipeline(output_type="latent", **common).images
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    spec = found.manifest.latent_spec
    raw = latents / spec.scaling_factor + spec.shift_factor
    images = to_bytes(decode(base, None, [raw], torch.device("cpu"))[0])
    stock = pipeline(output_type="np", **common).images
    assert images.shape == (2, RESOLUTION_PX, RESOLUTION_PX, 3)
    assert np.abs(images / 255 - stock).max() < 2.5 / 255
