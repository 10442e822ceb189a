"""Pictures on the device: the same wherever the models lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer.config import GenerateConfig
from infer.drawing.generate import generate
from sd3.vae_decoder import decode, to_bytes
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, awaken, four_steps
from train import models
from train.inputs import find_inputs, make_objective
from train.validation import sampling

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(
    base: Path, controlnet: Path, circles: Path, device: torch.device, tmp_path: Path
) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS[:1],
        image=(circles / "source/0.png",),
        num_inference_steps=3,
        device=str(device),
        offload="none",
    )


def picture(config: GenerateConfig) -> np.ndarray:
    """Draw; return the picture."""
    generate(config)
    with Image.open(config.output_dir / "000.png") as image:
        return np.array(image).astype(int)


def test_a_picture_is_that_of_the_cpu(config: GenerateConfig, tmp_path: Path) -> None:
    on_cpu = replace(config, device="cpu", output_dir=tmp_path / "cpu")
    difference = np.abs(picture(config) - picture(on_cpu))
    assert difference.mean() < 1
    without = replace(config, controlnet_conditioning_scale=(0.0,), output_dir=tmp_path / "without")
    assert np.abs(picture(config) - picture(without)).mean() > 2


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("offload", ["model", "groups", "auto"])
def test_a_picture_is_the_same_in_each_placement(
    offload: str, config: GenerateConfig, tmp_path: Path
) -> None:
    other = replace(config, offload=offload, output_dir=tmp_path / offload)
    assert np.abs(picture(config) - picture(other)).max() <= 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_transformer_draws_nearly_the_same(
    kind: str, config: GenerateConfig, device: torch.device, tmp_path: Path
) -> None:
    quantized = replace(config, quantize_base=kind, output_dir=tmp_path / kind)
    difference = np.abs(picture(config) - picture(quantized))
    assert 0 < difference.mean() < {"int8": 1, "nf4": 8}[kind]
    if device.type == "cuda":
        for offload in ("model", "groups"):
            offloaded = replace(quantized, offload=offload, output_dir=tmp_path / offload)
            assert np.abs(picture(quantized) - picture(offloaded)).max() <= 1


@pytest.mark.usefixtures("card")
def test_a_compiled_pipeline_draws_nearly_the_same(config: GenerateConfig, tmp_path: Path) -> None:
    other = replace(config, compile=True, output_dir=tmp_path / "compiled")
    assert np.abs(picture(config) - picture(other)).mean() < 1


def test_validation_draws_what_the_cpu_draws(
    cache: Path, base: Path, device: torch.device, tmp_path: Path
) -> None:
    found = Cache(cache)
    pair, negative = sampling.read_pairs(found)[0], sampling.negative_embeds(found)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    run = four_steps(base, cache, tmp_path)
    objective = make_objective(run, find_inputs(run, 1), torch.device("cpu"))
    drawn = []
    for place in (torch.device("cpu"), device):
        transformer = models.load_transformer(base, None, torch.float32).to(place)
        controlnet = models.new_controlnet(base, None, 2)
        awaken(controlnet)
        latents = sampling.sample(
            transformer,
            controlnet.to(place),
            models.load_scheduler(base),
            pair,
            negative,
            noise.to(place),
            objective,
            num_inference_steps=3,
            guidance_scale=4.0,
        )
        assert latents.device.type == place.type
        drawn.append(latents)
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=1e-2, atol=1e-2)
    spec = found.manifest.latent_spec
    raw = drawn[0] / spec.scaling_factor + spec.shift_factor
    images = [
        to_bytes(decode(base, None, [raw], place)[0]).astype(int)
        for place in (torch.device("cpu"), device)
    ]
    assert np.abs(images[0] - images[1]).max() <= 2
