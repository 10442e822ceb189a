"""Stage 3: pixel for pixel the stock pipeline, driven as the ControlNet was trained."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image

from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.convention import Convention, find_convention
from infer.drawing.generate import generate
from sd3.contact_sheet import CELL_PX, contact_sheet
from sd3.pixels import to_pixels, to_uint8
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, Outcome, flags


@pytest.fixture
def config(base: Path, controlnet: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS,
        image=(circles / "source" / "0.png", circles / "source" / "1.png"),
        seed=(7,),
        num_inference_steps=3,
        device="cpu",
    )


def stock(config: GenerateConfig, number: int, **changes: object) -> np.ndarray:
    """The documented call, nothing of ours in it."""
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        controlnet=SD3ControlNetModel.from_pretrained(config.controlnet[0]),
    )
    image = Image.open(config.image[number]).convert("RGB")
    small = image.resize((RESOLUTION_PX,) * 2, Image.Resampling.BILINEAR)
    result = pipeline(
        config.prompt[number],
        control_image=changes.pop("control_image", small),
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        num_inference_steps=3,
        generator=torch.manual_seed(7),
        max_sequence_length=TOKENS,
        **changes,
    )
    return np.array(result.images[0])


def test_pictures_equal_the_stock_pipeline_pixel_for_pixel(config: GenerateConfig) -> None:
    generate(config)
    pictures = [np.array(Image.open(config.output_dir / f"00{number}.png")) for number in (0, 1)]
    for number, picture in enumerate(pictures):
        assert np.array_equal(picture, stock(config, number))
    assert not np.array_equal(pictures[0], pictures[1])
    sheet = Image.open(config.output_dir / "contact_sheet.png")
    assert sheet.width > 2 * CELL_PX
    assert sheet.height > 2 * CELL_PX


def test_options_reach_the_pipeline(config: GenerateConfig) -> None:
    one = replace(config, prompt=PROMPTS[:1], image=config.image[:1])
    generate(
        replace(
            one, guidance_scale=3.0, controlnet_conditioning_scale=(0.5,), negative_prompt="black"
        )
    )
    expected = stock(
        config, 0, guidance_scale=3.0, controlnet_conditioning_scale=0.5, negative_prompt="black"
    )
    picture = np.array(Image.open(config.output_dir / "000.png"))
    assert np.array_equal(picture, expected)
    generate(replace(one, controlnet_conditioning_scale=(0.0,)))
    free = np.array(Image.open(config.output_dir / "000.png"))
    assert np.array_equal(free, stock(config, 0, controlnet_conditioning_scale=0.0))
    assert not np.array_equal(free, picture)


def test_a_controlnet_trained_on_0_1_is_driven_so(
    config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    other = tmp_path / "controlnet"
    shutil.copytree(controlnet, other)
    values = json.loads((other / "config.json").read_text())
    values[DATA_KEY]["conditioning_range"] = "0_1"
    (other / "config.json").write_text(json.dumps(values))
    changed = replace(config, controlnet=(str(other),), prompt=PROMPTS[:1], image=config.image[:1])
    generate(changed)
    image = Image.open(config.image[0]).convert("RGB")
    small = image.resize((RESOLUTION_PX,) * 2, Image.Resampling.BILINEAR)
    unit = to_pixels(to_uint8(small), "0_1")[None]
    assert unit.min() >= 0
    picture = np.array(Image.open(config.output_dir / "000.png"))
    assert np.array_equal(picture, stock(changed, 0, control_image=unit))
    assert not np.array_equal(picture, stock(config, 0))


def test_a_controlnet_that_says_nothing_gets_the_stock_defaults(
    config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    other = tmp_path / "controlnet"
    shutil.copytree(controlnet, other)
    values = json.loads((other / "config.json").read_text())
    del values[DATA_KEY]
    (other / "config.json").write_text(json.dumps(values))
    found = find_convention(config, Path(config.pretrained_model_name_or_path), "other", other)
    assert found == Convention(((128, 128),), 256, "-1_1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "--image none.png: No such file"),
        (["--image", "README.md"], "--image README.md: not a readable image"),
        (["--controlnet", "nowhere"], "--controlnet nowhere: no such folder, and not a hub id"),
        (["--pretrained-model-name-or-path", "./no"], "no such folder, and not a hub id"),
        (["--resolution", "100"], "--resolution 100: must be divisible by 16"),
        (["--prompt", "a", "b", "c"], "4 --prompt and 2 --image"),
    ],
)
def test_bad_input_ends_in_one_line(
    config: GenerateConfig,
    command: Callable[..., Outcome],
    arguments: list[str],
    message: str,
) -> None:
    images = () if arguments[0] == "--image" else config.image
    one = replace(config, prompt=PROMPTS[:1], image=config.image)
    given = flags(replace(one, image=config.image))
    if not images:
        at = given.index("--image")
        given = given[:at] + given[at + 4 :]
    outcome = command("infer", "generate", *given, *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not config.output_dir.exists()


def test_a_thin_line_of_an_image_ends_in_one_line(
    config: GenerateConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    thin = tmp_path / "thin.png"
    Image.new("1", (1, 60_000)).save(thin)
    outcome = command("infer", "generate", *flags(replace(config, image=(thin, thin))))
    assert outcome.exit_code == 2
    assert f"--image {thin}: " in outcome.output
    assert not config.output_dir.exists()


def test_a_controlnet_for_another_base_is_refused(
    config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    shutil.copytree(config.pretrained_model_name_or_path, other)
    path = other / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooled_projection_dim": 2048}))
    with pytest.raises(ConfigError, match="pooled_projection_dim: ControlNet 80, base model 2048"):
        generate(replace(config, pretrained_model_name_or_path=str(other)))


def test_a_contact_sheet_shows_what_it_is_given() -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    sheet = contact_sheet([([red, blue], "a caption " * 40)], ["left", "right"])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[255, 0, 0] == colours[0, 0, 255] == CELL_PX**2


def test_a_variant_that_no_component_has_is_passed_over(
    config: GenerateConfig, tmp_path: Path
) -> None:
    """As in the other stages."""
    generate(replace(config, output_dir=tmp_path / "plain"))
    generate(replace(config, output_dir=tmp_path / "variant", variant="fp16"))
    plain, variant = (
        np.array(Image.open(tmp_path / name / "000.png")) for name in ("plain", "variant")
    )
    assert np.array_equal(plain, variant)
