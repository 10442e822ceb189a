"""ControlNets of different numbers of blocks act together, each as it would alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from PIL import Image
from torch import Tensor

import demo.base_model.pipeline
from common.config_file import read_section
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from sd3.controlnet.combined import CombinedControlNets
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, Outcome, awaken
from train import models

DATA = {
    "max_sequence_length": TOKENS,
    "conditioning_range": "-1_1",
    "height": RESOLUTION_PX,
    "width": RESOLUTION_PX,
}


def net(base: Path, num_layers: int, seed: int) -> SD3ControlNetModel:
    controlnet = models.new_controlnet(base, None, num_layers)
    awaken(controlnet, seed)
    return controlnet


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 96, generator=generator),
        "pooled_projections": torch.randn(1, 80, generator=generator),
        "timestep": torch.tensor([500.0]),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


@torch.no_grad()
def test_each_block_gets_what_both_alone_would_give_it(base: Path) -> None:
    two, one = net(base, 2, 0), net(base, 1, 1)
    controls = list(torch.randn(2, 1, 16, 8, 8))
    given = inputs()
    of_two, of_one = (
        each(controlnet_cond=control, conditioning_scale=0.5, **given)[0]
        for each, control in zip((two, one), controls, strict=True)
    )

    def together(*nets: SD3ControlNetModel, scales: list[float]) -> list[Tensor]:
        (residuals,) = CombinedControlNets(list(nets), 4)(
            controlnet_cond=controls, conditioning_scale=scales, **given
        )
        return residuals

    both = together(two, one, scales=[0.5, 0.5])
    # Of four blocks the first two get the first of two residuals, and all of them the only one.
    for residual, first, second in zip(both, (0, 0, 1, 1), (0, 0, 0, 0), strict=True):
        assert torch.equal(residual, of_two[first] + of_one[second])
    alone = together(two, one, scales=[0.5, 0.0])
    for residual, first in zip(alone, (0, 0, 1, 1), strict=True):
        assert torch.equal(residual, of_two[first])
    assert not torch.equal(both[3], alone[3])


@torch.no_grad()
def test_three_and_two_blocks_reach_all_six_of_the_base(circles: Path, tmp_path: Path) -> None:
    """diffusers pairs their residuals off and drops the third."""
    base = tmp_path / "base"
    pipeline = demo.base_model.pipeline.build_pipeline(0, num_layers=6)
    demo.base_model.pipeline.save_base(base, pipeline)
    three, two = net(base, 3, 0), net(base, 2, 1)
    controls = list(torch.randn(2, 1, 16, 8, 8))
    of_three, of_two = (
        each(controlnet_cond=control, conditioning_scale=1.0, **inputs())[0]
        for each, control in zip((three, two), controls, strict=True)
    )
    (both,) = CombinedControlNets([three, two], 6)(
        controlnet_cond=controls, conditioning_scale=[1.0, 1.0], **inputs()
    )
    assert len(both) == 6
    for residual, first, second in zip(both, (0, 0, 1, 1, 2, 2), (0, 0, 0, 1, 1, 1), strict=True):
        assert torch.equal(residual, of_three[first] + of_two[second])
    # In pictures: at scale 0 the second changes none.
    for name, network in (("three", three), ("two", two)):
        network.register_to_config(**{DATA_KEY: DATA})
        network.save_pretrained(tmp_path / name)
    config = GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(tmp_path / "three"), str(tmp_path / "two")),
        controlnet_conditioning_scale=(1.0, 0.0),
        combine=True,
        output_dir=tmp_path / "combined",
        prompt=PROMPTS,
        image=(circles / "source" / "0.png",) * 4,
        num_inference_steps=2,
        device="cpu",
        batch_size=2,
    )
    generate(config)
    generate(
        replace(
            config,
            controlnet=config.controlnet[:1],
            controlnet_conditioning_scale=(1.0,),
            combine=False,
            image=config.image[:2],
            output_dir=tmp_path / "alone",
        )
    )
    generate(
        replace(config, controlnet_conditioning_scale=(1.0, 1.0), output_dir=tmp_path / "with both")
    )
    combined, alone, heard = (
        np.array(Image.open(tmp_path / name / "000.png"))
        for name in ("combined", "alone", "with both")
    )
    assert np.array_equal(combined, alone)
    assert not np.array_equal(combined, heard)


def test_each_has_its_own_scale_start_and_end(
    base: Path,
    controlnet: Path,
    circles: Path,
    command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    """As options, and again from a picture's file; as the stock pipeline takes lists."""
    second = SD3ControlNetModel.from_pretrained(controlnet)
    awaken(second, 1)
    second.save_pretrained(tmp_path / "second")
    names, image = [str(controlnet), str(tmp_path / "second")], str(circles / "source" / "0.png")
    options = ["--pretrained-model-name-or-path", str(base), "--combine", "--device", "cpu"]
    options += ["--controlnet", names[0], "--controlnet", names[1], "--image", image]
    options += ["--prompt", PROMPTS[0], "--num-inference-steps", "4"]
    each = ["--controlnet-conditioning-scale", "0.8", "0.5", "--control-guidance-start", "0", "0.4"]
    each += ["--control-guidance-end", "0.6", "1"]
    drawn = tmp_path / "drawn"
    done = command("infer", "generate", *options, *each, "--output-dir", str(drawn))
    assert done.exit_code == 0, done.output
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base,
        controlnet=SD3MultiControlNetModel(
            [SD3ControlNetModel.from_pretrained(name) for name in names]
        ),
    )
    small = Image.open(image).convert("RGB").resize((RESOLUTION_PX,) * 2, Image.Resampling.BILINEAR)
    expected = pipeline(
        PROMPTS[0],
        control_image=[small, small],
        controlnet_conditioning_scale=[0.8, 0.5],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.6, 1.0],
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        num_inference_steps=4,
        max_sequence_length=TOKENS,
        generator=torch.manual_seed(0),
    ).images[0]
    picture = np.array(Image.open(drawn / "000.png"))
    assert np.array_equal(picture, np.array(expected))
    again = command(
        "infer",
        "generate",
        "--like",
        str(drawn / "000.png"),
        "--output-dir",
        str(tmp_path / "like"),
    )
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.array(Image.open(tmp_path / "like" / "000.png")), picture)
    wrong = [*options, "--controlnet-conditioning-scale", "0.8", "0.5", "1"]
    refused = command("infer", "generate", *wrong, "--output-dir", str(drawn))
    assert refused.exit_code == 2
    assert "--controlnet-conditioning-scale: 3 values; give one, or 2, one for each." in (
        refused.output
    )


def test_a_configuration_may_say_one_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        "[infer]\ncontrolnet_conditioning_scale = 0.8\ncontrol_guidance_end = [0.5, 1]\n"
    )
    assert read_section(path, "infer", GenerateConfig) == {
        "controlnet_conditioning_scale": (0.8,),
        "control_guidance_end": (0.5, 1),
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_without_a_say_changes_no_picture(
    order: tuple[int, int], base: Path, controlnet: Path, circles: Path, tmp_path: Path
) -> None:
    """With a shorter one, the second half of the residuals would be lost."""
    silent = models.new_controlnet(base, None, 1)
    silent.register_to_config(**{DATA_KEY: SD3ControlNetModel.load_config(controlnet)[DATA_KEY]})
    silent.save_pretrained(tmp_path / "silent")
    both = [str(controlnet), str(tmp_path / "silent")]
    config = GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=tuple(both[number] for number in order),
        combine=True,
        output_dir=tmp_path / "both",
        prompt=PROMPTS,
        image=(circles / "source" / "0.png",) * 4,
        num_inference_steps=2,
        device="cpu",
        batch_size=2,  # then a picture's noise does not depend on the number of controls
    )
    generate(config)
    alone = replace(
        config,
        controlnet=(str(controlnet),),
        combine=False,
        image=config.image[:2],
        output_dir=tmp_path / "alone",
    )
    generate(alone)
    pictures = [np.array(Image.open(tmp_path / name / "000.png")) for name in ("both", "alone")]
    assert np.array_equal(*pictures)
