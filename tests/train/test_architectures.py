"""SD3-medium, SD3.5-medium and SD3.5-large in miniature, trained and drawn with from one cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from PIL import Image

import demo.base_model.pipeline
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from tests.conftest import PROMPTS, narrow_posterior
from train.config import TrainConfig
from train.run import train

# As the real ones differ: normalised queries and keys, a second attention in the first half of
# the blocks, and more and wider blocks.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 4, "qk_norm": None},
    "sd35-medium": {"num_layers": 4, "dual_attention_layers": (0, 1, 2)},
    "sd35-large": {"num_layers": 6, "num_attention_heads": 6},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_trains_and_draws_from_the_same_cache(
    name: str, train_config: TrainConfig, circles: Path, tmp_path: Path
) -> None:
    pipeline = demo.base_model.pipeline.build_pipeline(0, **ARCHITECTURES[name])
    narrow_posterior(pipeline.vae)
    demo.base_model.pipeline.save_base(tmp_path / "base", pipeline)
    config = replace(
        train_config,
        pretrained_model_name_or_path=str(tmp_path / "base"),
        validation_steps=4,
        num_validation_images=1,
        validation_inference_steps=2,
        checkpointing="full",
    )
    train(config)
    controlnet = SD3ControlNetModel.from_pretrained(config.output_dir)
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "base", subfolder="transformer")
    for key in ("qk_norm", "num_attention_heads", "attention_head_dim"):
        assert controlnet.config[key] == transformer.config[key]
    assert tuple(controlnet.config.dual_attention_layers) == tuple(
        transformer.config.dual_attention_layers
    )
    generate(
        GenerateConfig(
            pretrained_model_name_or_path=str(tmp_path / "base"),
            controlnet=(str(config.output_dir),),
            output_dir=tmp_path / "drawn",
            prompt=PROMPTS[:1],
            image=(circles / "source" / "0.png",),
            num_inference_steps=2,
            device="cpu",
        )
    )
    assert Image.open(tmp_path / "drawn" / "000.png").size == (64, 64)
