"""ControlNets of different numbers of blocks act together, each as it would alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel
from PIL import Image
from torch import Tensor

from infer.config import GenerateConfig
from infer.drawing.generate import generate
from sd3.controlnet.combined import CombinedControlNets
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, awaken
from train import models


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
