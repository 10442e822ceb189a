"""ControlNets for inpainting are trained as the stock inpainting pipeline drives them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetInpaintingPipeline
from PIL import Image

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3 import images
from sd3.annotators.degraded import strokes
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, awaken
from train import models
from train.config import TrainConfig
from train.inputs import find_inputs, make_objective
from train.memory.estimate import find_sizes
from train.memory.simulation import simulate
from train.run import train
from train.validation import sampling


@pytest.fixture(scope="module")
def config(
    precompute_config: PrecomputeConfig,
    circles: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> PrecomputeConfig:
    """A cache with random strokes as masks, three rows held out, and a pair."""
    made = replace(
        precompute_config,
        cache=tmp_path_factory.mktemp("inpainting") / "cache",
        num_extra_conditioning_channels=1,
        conditioning_from="strokes",
        validation_rows=3,
        validation_prompt=PROMPTS[:1],
        validation_image=(circles / "target" / "0.png",),
    )
    precompute(made)
    return made


@pytest.fixture
def inpaint(config: PrecomputeConfig, train_config: TrainConfig) -> TrainConfig:
    return replace(train_config, cache=(str(config.cache),))


def test_sampling_equals_the_stock_inpainting_pipeline(
    inpaint: TrainConfig, base: Path, circles: Path
) -> None:
    inputs = find_inputs(inpaint, 1)
    transformer = models.load_transformer(base, None, torch.float32)
    controlnet = models.new_controlnet(base, None, 2, inputs.pooled_projection, 1)
    assert controlnet.pos_embed_input.proj.weight.shape[1] == 17
    awaken(controlnet)
    (pair,) = sampling.read_pairs(inputs.cache)
    noise = torch.randn(2, 16, 8, 8)
    latents = sampling.sample(
        transformer,
        controlnet,
        models.load_scheduler(base),
        pair,
        sampling.negative_embeds(inputs.cache),
        noise,
        make_objective(inpaint, inputs, torch.device("cpu")),
        num_inference_steps=3,
        guidance_scale=4.0,
    )
    pipeline = StableDiffusion3ControlNetInpaintingPipeline.from_pretrained(
        base, controlnet=controlnet, transformer=transformer
    )
    side = (RESOLUTION_PX, RESOLUTION_PX)
    picture = images.fit(Image.open(circles / "target" / "0.png").convert("RGB"), side)
    expected = pipeline(
        pair.prompt,
        num_images_per_prompt=2,
        control_image=picture,
        control_mask=strokes(picture),
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=noise,
        max_sequence_length=TOKENS,
        output_type="latent",
    ).images
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


def test_a_run_and_going_on(inpaint: TrainConfig, tmp_path: Path) -> None:
    first = replace(inpaint, max_train_steps=4, validation_steps=2, learning_rate=1e-2)
    train(first)
    saved = json.loads((first.output_dir / "config.json").read_text())
    assert saved["extra_conditioning_channels"] == 1
    assert saved["force_zeros_for_pooled_projection"] is True
    weight = SD3ControlNetModel.from_pretrained(first.output_dir).pos_embed_input.proj.weight
    assert weight[:, 16].abs().max() > 0  # the mask has a say
    card = (first.output_dir / "README.md").read_text()
    assert "StableDiffusion3ControlNetInpaintingPipeline.from_pretrained(" in card
    assert "control_mask=mask," in card
    again = replace(
        first,
        controlnet_model_name_or_path=str(first.output_dir),
        num_controlnet_layers=None,
        output_dir=tmp_path / "again",
        learning_rate=0.0,
        max_train_steps=1,
        validation_steps=0,
    )
    train(again)
    kept = SD3ControlNetModel.from_pretrained(again.output_dir).state_dict()
    for name, tensor in SD3ControlNetModel.from_pretrained(first.output_dir).state_dict().items():
        assert torch.equal(kept[name], tensor), name


def test_what_does_not_go_with_inpainting_is_refused(
    inpaint: TrainConfig, train_config: TrainConfig, controlnet: Path
) -> None:
    with pytest.raises(
        ConfigError, match="--pooled-projection prompt: the cache is for inpainting"
    ):
        find_inputs(replace(inpaint, pooled_projection="prompt"), 1)
    other = replace(
        inpaint, controlnet_model_name_or_path=str(controlnet), num_controlnet_layers=None
    )
    with pytest.raises(ConfigError, match="extra_conditioning_channels: ControlNet 0, cache 1"):
        train(other)


def test_the_estimate_knows_the_mask(inpaint: TrainConfig) -> None:
    sizes = find_sizes(inpaint)
    assert sizes.controlnet["extra_conditioning_channels"] == 1
    assert simulate(inpaint, sizes).peak > 0


def test_the_stock_pipeline_gives_text_to_all(inpaint: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"reads no text, .* --controlnet-kind joint"):
        find_inputs(replace(inpaint, controlnet_kind="stability"), 1)
