"""Validation pictures are what the stock pipeline draws."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sd3.controlnet.pooled_projection import FORCE_ZEROS, PooledProjection
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, awaken
from train import models
from train.config import TrainConfig
from train.inputs import find_inputs, make_objective
from train.run import train
from train.validation import sampling
from train.validation.pictures import PROMPT_KEY


@pytest.mark.parametrize(
    ("guidance", "convention"), [(1.0, "prompt"), (4.0, "prompt"), (4.0, "zeros")]
)
def test_sampling_equals_the_stock_pipeline(
    train_config: TrainConfig, base: Path, guidance: float, convention: PooledProjection
) -> None:
    config = replace(train_config, pooled_projection=convention)
    inputs = find_inputs(config, 1)
    found = inputs.cache
    transformer = models.load_transformer(base, None, torch.float32)
    controlnet = models.new_controlnet(base, None, 2, convention)
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
        make_objective(config, inputs, torch.device("cpu")),
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


@pytest.mark.parametrize("convention", ["prompt", "zeros"])
def test_a_run_draws_what_the_stock_pipeline_draws(
    train_config: TrainConfig,
    base: Path,
    controlnet: Path,
    circles: Path,
    tmp_path: Path,
    convention: PooledProjection,
) -> None:
    """Pairs, pictures, averaged weights and decoding, as they come out of a run."""
    start = Path(shutil.copytree(controlnet, tmp_path / "start"))
    saved = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(saved | {FORCE_ZEROS: convention == "zeros"}))
    config = replace(
        train_config,
        controlnet_model_name_or_path=str(start),
        num_controlnet_layers=None,
        max_train_steps=3,
        learning_rate=1e-2,
        ema_decay=0.9,
        seed=5,
        validation_steps=2,
        num_validation_images=2,
        validation_inference_steps=2,
        validation_guidance_scale=3.0,
    )
    train(config)
    folders = {path.name for path in (config.output_dir / "validation").iterdir()}
    # Before training, a multiple, and the last.
    assert folders == {"step-000000", "step-000002", "step-000003"}
    before = Image.open(config.output_dir / "validation/step-000000/0.png")
    drawn: dict[str, NDArray[np.float64]] = {}
    for suffix, weights in (
        ("", config.output_dir),
        ("-ema", config.output_dir / "controlnet_ema"),
    ):
        pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
            base, controlnet=SD3ControlNetModel.from_pretrained(weights)
        )
        for number, prompt in enumerate(PROMPTS):
            picture = Image.open(
                config.output_dir / "validation/step-000003" / f"{number}{suffix}.png"
            )
            assert isinstance(picture, PngImageFile)
            assert picture.text[PROMPT_KEY] == prompt
            side_by_side = np.split(np.asarray(picture) / 255, 3, axis=1)
            image = Image.open(circles / "source" / f"{number}.png").convert("RGB")
            image = image.resize((RESOLUTION_PX, RESOLUTION_PX), Image.Resampling.BILINEAR)
            assert np.abs(side_by_side[0] - np.asarray(image) / 255).max() < 1.5 / 255
            # A pair's noise is its own, and the same at every validation.
            noise = torch.randn(
                2, 16, 8, 8, generator=torch.Generator().manual_seed(config.seed + number)
            )
            stock = pipeline(
                prompt,
                num_images_per_prompt=2,
                control_image=image,
                height=RESOLUTION_PX,
                width=RESOLUTION_PX,
                num_inference_steps=2,
                guidance_scale=3.0,
                latents=noise,
                max_sequence_length=TOKENS,
                output_type="np",
            ).images
            drawn[f"{number}{suffix}"] = np.stack(side_by_side[1:])
            assert np.abs(drawn[f"{number}{suffix}"] - stock).max() < 2.5 / 255
    # What must be told apart is further apart than that.
    assert np.abs(drawn["0"] - drawn["0-ema"]).max() > 5 / 255
    alone = np.stack(np.split(np.asarray(before) / 255, 3, axis=1)[1:])
    assert np.abs(drawn["0"] - alone).max() > 5 / 255
