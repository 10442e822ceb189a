"""Python snippets of the README and of diffusers' documentation work with what training leaves."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import save_file

from infer.config import GenerateConfig
from infer.drawing.generate import generate
from sd3.images import fit
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, REPOSITORY, RESOLUTION_PX, TOKENS
from tests.published_names import transformer
from train.config import TrainConfig
from train.saving.card_base import card_base
from train.saving.card_example import example

# As diffusers documents the use of what its script trains, on a GPU at 1024 px in float16.
DOCUMENTED = """
from diffusers import StableDiffusion3ControlNetPipeline, SD3ControlNetModel
from diffusers.utils import load_image
import torch

controlnet = SD3ControlNetModel.from_pretrained(controlnet_path, torch_dtype=torch.float16)
pipe = StableDiffusion3ControlNetPipeline.from_pretrained(base_model_path, controlnet=controlnet)
pipe.to("cuda", torch.float16)
control_image = load_image(image_path).resize((1024, 1024))
generator = torch.manual_seed(0)
image = pipe(
    prompt, num_inference_steps=20, generator=generator, control_image=control_image
).images[0]
"""
ON_A_CPU = {
    '"cuda", torch.float16': '"cpu", torch.float32',
    "torch_dtype=torch.float16": "torch_dtype=torch.float32",
    "1024": str(RESOLUTION_PX),
    "num_inference_steps=20": f"height={RESOLUTION_PX}, width={RESOLUTION_PX}, "
    f"max_sequence_length={TOKENS}, num_inference_steps=2",
}


def run(code: str, changes: dict[str, str], names: dict[str, Any]) -> Image.Image:
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    exec(compile(code, "snippet", "exec"), names)
    return names["image"]


@pytest.fixture
def config(base: Path, controlnet: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS[:1],
        image=(circles / "source" / "0.png",),
        num_inference_steps=2,
        device="cpu",
    )


def test_the_documented_snippet(config: GenerateConfig, tmp_path: Path) -> None:
    # The snippet squeezes the whole image; generate's own crop of a square one is the same.
    square = tmp_path / "square.png"
    fit(Image.open(config.image[0]).convert("RGB"), RESOLUTION_PX).save(square)
    found = run(
        DOCUMENTED,
        ON_A_CPU,
        {
            "base_model_path": config.pretrained_model_name_or_path,
            "controlnet_path": config.controlnet[0],
            "image_path": str(square),
            "prompt": PROMPTS[0],
        },
    )
    generate(config)
    assert np.array_equal(np.array(found), np.array(Image.open(config.output_dir / "000.png")))


def test_the_snippet_of_the_readme(config: GenerateConfig) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    conditioning = fit(Image.open(config.image[0]).convert("RGB"), RESOLUTION_PX)
    changes = {
        '"out"': repr(config.controlnet[0]),
        '"stabilityai/stable-diffusion-3.5-medium"': repr(config.pretrained_model_name_or_path),
        "torch.bfloat16": "torch.float32",
        '.to("cuda")': "",
        '"a caption"': repr(PROMPTS[0]),
        'load_image("edges.png")': "conditioning",
        'image.save("picture.png")': "",
        "max_sequence_length=77,": f"max_sequence_length={TOKENS}, num_inference_steps=2, "
        f"height={RESOLUTION_PX}, width={RESOLUTION_PX},",
    }
    found = run(code, changes, {"conditioning": conditioning})
    generate(config)
    assert np.array_equal(np.array(found), np.array(Image.open(config.output_dir / "000.png")))


@pytest.mark.parametrize("pixel_range", ["-1_1", "0_1", "stability_canny"])
def test_the_snippet_of_a_model_card(
    config: GenerateConfig,
    train_config: TrainConfig,
    controlnet: Path,
    tmp_path: Path,
    pixel_range: str,
) -> None:
    """As the card of a ControlNet says it, pixel for pixel what generate draws."""
    other = tmp_path / "controlnet"
    shutil.copytree(controlnet, other)
    saved = json.loads((other / "config.json").read_text())
    saved[DATA_KEY]["conditioning_range"] = pixel_range
    (other / "config.json").write_text(json.dumps(saved))
    base = card_base(train_config)
    text = example(str(other), base, saved[DATA_KEY], inpainting=False)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    changes = {
        "torch.float16": "torch.float32",
        '"a prompt",': f"{PROMPTS[0]!r}, num_inference_steps=2,",
        '"conditioning.png"': repr(str(config.image[0])),
        f'"path/to/{base.name}"': repr(config.pretrained_model_name_or_path),
    }
    found = run(code, changes, {})
    generate(replace(config, controlnet=(str(other),)))
    assert np.array_equal(np.array(found), np.array(Image.open(config.output_dir / "000.png")))


def test_the_snippet_of_a_card_loads_the_transformer_that_it_was_trained_with(
    config: GenerateConfig, train_config: TrainConfig, controlnet: Path, tmp_path: Path
) -> None:
    base = SD3Transformer2DModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="transformer"
    )
    changed = {name: tensor * 1.5 for name, tensor in base.state_dict().items()}
    file = tmp_path / "tuned.safetensors"
    save_file({n: t.clone().contiguous() for n, t in transformer(changed).items()}, file)
    card = card_base(replace(train_config, transformer=file))
    assert card.in_words.endswith("with the transformer of `tuned.safetensors`")
    data = json.loads((controlnet / "config.json").read_text())[DATA_KEY]
    text = example(str(controlnet), card, data, inpainting=False)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    changes = {
        "torch.float16": "torch.float32",
        '"a prompt",': f"{PROMPTS[0]!r}, num_inference_steps=2,",
        '"conditioning.png"': repr(str(config.image[0])),
        f'"path/to/{card.name}"': repr(config.pretrained_model_name_or_path),
        '"path/to/tuned.safetensors"': repr(str(file)),
    }
    found = np.array(run(code, changes, {}))
    generate(replace(config, transformer=file, cache_dir=tmp_path / "downloads"))
    assert np.array_equal(found, np.array(Image.open(config.output_dir / "000.png")))
    # Other bytes in its place: what was drawn with the former ones is drawn anew.
    save_file({n: 0.5 * t for n, t in transformer(changed).items()}, file)
    generate(replace(config, transformer=file, cache_dir=tmp_path / "downloads"))
    assert not np.array_equal(found, np.array(Image.open(config.output_dir / "000.png")))
    generate(replace(config, output_dir=tmp_path / "without"))
    assert not np.array_equal(found, np.array(Image.open(tmp_path / "without" / "000.png")))
