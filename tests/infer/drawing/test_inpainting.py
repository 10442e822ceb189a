"""ControlNets for inpainting draw what the stock inpainting pipeline draws."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetInpaintingPipeline
from PIL import Image, ImageDraw

from common.errors import ConfigError
from infer.config import GenerateConfig, ScoreConfig, ServeConfig
from infer.draw_service import DrawService
from infer.drawing.generate import generate
from infer.memory.estimate import need
from infer.scoring.score import score
from sd3 import images
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, awaken
from train import models
from train.saving.card_base import CardBase
from train.saving.card_example import example

SIZE = (RESOLUTION_PX, RESOLUTION_PX)


@pytest.fixture(scope="module")
def painter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for inpainting with a say, saved as train saves it."""
    model = models.new_controlnet(base, None, 2, "zeros", 1)
    awaken(model)
    data = {"max_sequence_length": TOKENS, "height": RESOLUTION_PX, "width": RESOLUTION_PX}
    model.register_to_config(**{DATA_KEY: data})
    folder = tmp_path_factory.mktemp("painter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """A white rectangle, not in the middle."""
    image = Image.new("L", (512, 512))
    ImageDraw.Draw(image).rectangle((40, 100, 300, 420), fill=255)
    image.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture
def config(base: Path, painter: Path, circles: Path, mask: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(painter),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS,
        image=(circles / "target" / "0.png", circles / "target" / "1.png"),
        mask=(mask,),
        seed=(7,),
        num_inference_steps=2,
        device="cpu",
    )


def stock(config: GenerateConfig, number: int) -> np.ndarray:
    """The documented call, nothing of ours in it."""
    pipeline = StableDiffusion3ControlNetInpaintingPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        controlnet=SD3ControlNetModel.from_pretrained(config.controlnet[0]),
    )
    picture = Image.open(config.image[number]).convert("RGB")
    result = pipeline(
        config.prompt[number],
        control_image=picture.resize(SIZE, Image.Resampling.BILINEAR),
        control_mask=Image.open(config.mask[0]).resize(SIZE, Image.Resampling.BILINEAR),
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        num_inference_steps=2,
        generator=torch.manual_seed(7),
        max_sequence_length=TOKENS,
    )
    return np.array(result.images[0])


def test_pictures_equal_the_stock_inpainting_pipeline(
    config: GenerateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(config)
    pictures = [np.array(Image.open(config.output_dir / f"00{number}.png")) for number in (0, 1)]
    for number, picture in enumerate(pictures):
        assert np.array_equal(picture, stock(config, number))
    generate(config)
    assert "2 of 2 pictures are there already" in capsys.readouterr().out
    # Another mask draws others.
    image = Image.open(config.mask[0])
    ImageDraw.Draw(image).rectangle((0, 0, 511, 200), fill=255)
    image.save(config.mask[0])
    generate(config)
    assert not np.array_equal(np.array(Image.open(config.output_dir / "000.png")), pictures[0])


def test_a_transparent_part_is_a_mask(config: GenerateConfig, tmp_path: Path) -> None:
    picture = Image.open(config.image[0]).convert("RGBA")
    picture.putalpha(Image.open(config.mask[0]).point(lambda level: 255 - level))
    picture.save(tmp_path / "holed.png")
    one = replace(config, prompt=PROMPTS[:1], image=config.image[:1])
    generate(replace(one, image=(tmp_path / "holed.png",), mask=()))
    drawn = np.array(Image.open(config.output_dir / "000.png"))
    assert np.array_equal(drawn, stock(config, 0))
    # And so are pairs of a file.
    pairs = tmp_path / "pairs.jsonl"
    entry = {"prompt": PROMPTS[0], "image": str(config.image[0]), "mask": str(config.mask[0])}
    pairs.write_text(json.dumps(entry))
    from_file = replace(
        config, pairs=pairs, prompt=(), image=(), mask=(), output_dir=tmp_path / "of pairs"
    )
    generate(from_file)
    assert np.array_equal(np.array(Image.open(tmp_path / "of pairs" / "000.png")), drawn)


def test_what_does_not_go_together_is_refused(
    config: GenerateConfig, controlnet: Path, painter: Path, tmp_path: Path
) -> None:
    usual = replace(config, controlnet=(str(controlnet),))
    for changed, words in (
        (usual, "is not for inpainting; leave it out"),
        (replace(config, mask=()), "no part of it is transparent.*give --mask"),
        (
            replace(config, mask=(), from_photo=True, conditioning_from="strokes"),
            "--from-photo: .* is for inpainting",
        ),
        (
            replace(config, controlnet=(str(painter), str(painter)), combine=True),
            "--combine: ControlNets for inpainting draw alone",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(changed)
    with pytest.raises(ConfigError, match="3 --mask and 2 --image"):
        replace(config, mask=config.mask * 3)
    page = ServeConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=config.controlnet,
        output_dir=tmp_path / "served",
        device="cpu",
    )
    with pytest.raises(ConfigError, match="the page draws no masks"):
        DrawService(page)


def test_the_memory_is_known_beforehand(config: GenerateConfig) -> None:
    assert need(replace(config, dtype="float32"), None).free > 0


def test_scoring_compares_with_the_rows_images(
    config: GenerateConfig, circles: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for folder in ("masks", "target"):
        (source / folder).mkdir(parents=True)
    lines = []
    for row in range(2):
        Image.open(config.mask[0]).save(source / "masks" / f"{row}.png")
        Image.open(circles / "target" / f"{row}.png").save(source / "target" / f"{row}.png")
        lines.append(
            json.dumps(
                {"source": f"masks/{row}.png", "target": f"target/{row}.png", "prompt": PROMPTS[0]}
            )
        )
    (source / "prompt.json").write_text("\n".join(lines))
    scored = ScoreConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=config.controlnet,
        output_dir=tmp_path / "score",
        source=source,
        num_inference_steps=2,
        device="cpu",
    )
    score(scored)
    figures = json.loads(scored.json_path.read_text())["with_controlnet"]
    assert set(figures) == {"psnr", "ssim"}
    assert figures["psnr"]["count"] == 2
    kept = images.fit(Image.open(source / "target" / "0.png").convert("RGB"), SIZE)
    assert kept.size == Image.open(scored.output_dir / "with_controlnet" / "000.png").size
    with pytest.raises(ConfigError, match="the control is the image without a part"):
        score(replace(scored, measure=("circles",)))


def test_the_snippet_of_its_card_draws_the_same(config: GenerateConfig, painter: Path) -> None:
    data = json.loads((painter / "config.json").read_text())[DATA_KEY]
    base = CardBase("base", None, None, [], {})
    text = example(str(painter), base, data, inpainting=True)
    code = text.removeprefix("```python\n").removesuffix("```")
    for old, new in {
        "torch.float16": "torch.float32",
        '"a prompt",': f"{PROMPTS[0]!r}, num_inference_steps=2,",
        '"path/to/base"': repr(config.pretrained_model_name_or_path),
        '"picture.png"': repr(str(config.image[0])),
        '"mask.png"': repr(str(config.mask[0])),
    }.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    generate(replace(config, seed=(0,)))
    drawn = np.array(Image.open(config.output_dir / "000.png"))
    assert np.array_equal(np.array(names["image"]), drawn)
