"""Conditioning images at inference are those of training: background, scale, colours."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError
from infer.config import GenerateConfig, ScoreConfig
from infer.convention import Convention, find_convention
from infer.drawing.controlnet_set import find_controlnet_sets
from infer.drawing.pictures import plan_pictures
from infer.drawing.requests import find_requests, load_control
from infer.scoring.samples import read_samples
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from precompute.sources.open_source import open_source
from precompute.sources.source import SourceSettings
from sd3.pretrained import DATA_KEY
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX
from train.sets.data_entry import data_entry

SIZES = ((RESOLUTION_PX, RESOLUTION_PX),)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drawing() -> Image.Image:
    """Return a white stroke on nothing."""
    image = Image.new("RGBA", (96, 96), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (20, 30, 40, 60))
    return image


def depth() -> Image.Image:
    return Image.fromarray(np.linspace(0, 5000, 96 * 96).reshape(96, 96).astype(np.uint16))


def with_data(controlnet: Path, folder: Path, **data: Any) -> Path:
    """Return a copy of a ControlNet whose training data was made otherwise."""
    shutil.copytree(controlnet, folder)
    values = json.loads((folder / "config.json").read_text())
    values[DATA_KEY] |= data
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def config(base: Path, controlnet: Path, tmp_path: Path) -> GenerateConfig:
    drawing().save(tmp_path / "drawing.png")
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "pictures",
        prompt=PROMPTS[:1],
        image=(tmp_path / "drawing.png",),
        device="cpu",
    )


def fitted(config: GenerateConfig, cache: Cache | None = None) -> list[Image.Image]:
    """Return the conditioning image that each ControlNet gets."""
    requests = find_requests(config, cache)
    _, sets = find_controlnet_sets(config, with_text_encoders=False)
    return [
        plan_pictures(config, one, requests, title_in_name=True)[0].fit_controls()[0]
        for one in sets
    ]


def test_background_and_scale_go_from_the_cache_to_the_controlnet(
    fresh: PrecomputeConfig, base: Path, config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    made = replace(fresh, background="black", conditioning_scale="0:200")
    precompute(made)
    found = Cache(made.cache)
    entry = data_entry(found.manifest, "conditioning")
    # As a ControlNet's config.json holds it.
    entry = json.loads(json.dumps(entry))
    assert (entry["background"], entry["conditioning_scale"]) == ([0, 0, 0], "0:200")
    other = with_data(controlnet, tmp_path / "other", **entry)
    convention = find_convention(config, base, "other", other)
    assert (convention.background, convention.scale) == ("#000000", "0:200")


def test_a_cache_of_white_and_as_it_is_says_so_to_the_controlnet(cache: Path) -> None:
    text = (cache / "manifest.json").read_text()
    assert '"background"' not in text
    assert '"scale"' not in text
    found = Cache(cache)
    entry = data_entry(found.manifest, "conditioning")
    assert (entry["background"], entry["conditioning_scale"]) == ((255, 255, 255), "as-is")


def test_transparent_controls_are_over_each_controlnets_own_background(
    config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    black = with_data(controlnet, tmp_path / "black", background=[0, 0, 0])
    former = with_data(controlnet, tmp_path / "former")
    both = replace(config, controlnet=(str(black), str(former)))
    over_black, over_white = (np.asarray(image) for image in fitted(both))
    assert (over_white == 255).all()
    # 20 to 40 of 96 are 13.3 to 26.7 of 64.
    assert (over_black[25:35, 15:25] == 255).all()
    assert (over_black[:, 30:] == 0).all()


def test_maps_are_at_the_scale_of_training(
    config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    depth().save(tmp_path / "depth.png")
    maps = replace(config, image=(tmp_path / "depth.png",))
    for scale, brightest in (("as-is", 19), ("0:5000", 255), ("auto", 255), ("0:10000", 128)):
        other = with_data(controlnet, tmp_path / scale.replace(":", "to"), conditioning_scale=scale)
        (found,) = fitted(replace(maps, controlnet=(str(other),)))
        assert abs(int(np.asarray(found).max()) - brightest) <= 2
    with pytest.raises(ConfigError, match=r"--image .*drawing.png: it holds 8 bit numbers, and"):
        fitted(replace(config, controlnet=(str(tmp_path / "0to5000"),)))


def test_a_validation_image_of_the_cache_is_ready(tmp_path: Path) -> None:
    """It is at the scale already, and so is what is drawn on the page."""
    convention = Convention(SIZES, 77, "-1_1", scale="auto")
    path = tmp_path / "x.png"
    path.write_bytes(png(Image.fromarray(np.array([[0, 100]], np.uint8))))
    ready, raw = (load_control(path, is_ready=is_ready).image(convention) for is_ready in (1, 0))
    assert np.asarray(ready)[0, :, 0].tolist() == [0, 100]
    assert np.asarray(raw)[0, :, 0].tolist() == [0, 255]


def test_validation_images_are_drawn_as_the_cache_has_them(
    fresh: PrecomputeConfig, config: GenerateConfig, controlnet: Path, tmp_path: Path
) -> None:
    made = replace(fresh, conditioning_scale="auto")
    precompute(made)
    found = Cache(made.cache)
    stored = found.validation.tensors(*next(iter(found.validation.locations())))
    other = with_data(controlnet, tmp_path / "other", conditioning_scale="auto")
    asked = replace(config, controlnet=(str(other),), prompt=(), image=(), cache=str(made.cache))
    (image,) = fitted(asked, found)
    assert np.array_equal(np.asarray(image), stored["conditioning_image"].permute(1, 2, 0).numpy())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A row with two captions and a transparent control."""
    folder = tmp_path / "rows"
    folder.mkdir()
    drawing().save(folder / "c.png")
    Image.new("RGB", (96, 96), "red").save(folder / "t.png")
    row = {"source": "c.png", "target": "t.png", "prompt": ["number 0 red", "a red square"]}
    (folder / "prompt.json").write_text(json.dumps(row))
    return folder


def samples(rows: Path, conventions: list[Convention], **settings: Any) -> list[Any]:
    config = ScoreConfig(
        controlnet=("a",),
        pretrained_model_name_or_path="b",
        output_dir=Path("c"),
        source=rows,
        **settings,
    )
    source = open_source(SourceSettings(source=str(rows)))
    return list(read_samples(config, source, conventions, None))


def test_score_takes_the_first_caption_and_the_controlnets_background(rows: Path) -> None:
    (sample,) = samples(rows, [Convention(SIZES, 77, "-1_1", background="#000000")])
    assert sample.prompt == "number 0 red"
    assert (np.asarray(sample.conditioning)[:, 30:] == 0).all()


def test_score_lays_a_rounded_control_over_its_image_as_training_does(rows: Path) -> None:
    """Annotators round sides to multiples of 64; the same line is to stay in the same column."""
    for name, (width, height) in {"t.png": (1000, 700), "c.png": (704, 512)}.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, width // 5 : width // 5 + width // 50] = 255
        Image.fromarray(pixels).save(rows / name)
    (sample,) = samples(rows, [Convention(((512, 512),), 77, "-1_1")])
    line, control = (
        np.average(np.arange(512), weights=np.asarray(image)[:, :, 0].mean(0))
        for image in (sample.target, sample.conditioning)
    )
    assert control == pytest.approx(line, abs=1)


def test_score_stretches_or_crops_a_control_of_another_shape_where_asked(rows: Path) -> None:
    control = Image.effect_noise((144, 96), 50).convert("RGB")
    control.save(rows / "c.png")
    convention = Convention(((96, 96),), 77, "-1_1")
    with pytest.raises(
        ConfigError, match=r"144 x 96 pixels, of another shape .*--conditioning-fit"
    ):
        samples(rows, [convention])
    expected = {
        "stretch": control.resize((96, 96), Image.Resampling.BILINEAR),
        "crop": control.crop((24, 0, 120, 96)),
    }
    for way, by_hand in expected.items():
        (sample,) = samples(rows, [convention], conditioning_fit=way)
        assert sample.conditioning.tobytes() == by_hand.tobytes()


def test_score_refuses_controls_that_differ_between_controlnets(rows: Path) -> None:
    white, black = (
        Convention(SIZES, 77, "-1_1", background=colour) for colour in ("white", "#000000")
    )
    with pytest.raises(ConfigError, match=r"line 1: .*white, as-is and #000000, as-is.*one by one"):
        samples(rows, [white, black])
    drawing().convert("RGB").save(rows / "c.png")
    assert len(samples(rows, [white, black])) == 1


def test_score_refuses_a_caption_that_is_no_text(rows: Path) -> None:
    (rows / "prompt.json").write_text(
        json.dumps({"source": "c.png", "target": "t.png", "prompt": 7})
    )
    with pytest.raises(ConfigError, match="line 1: its caption is not text but int"):
        samples(rows, [Convention(SIZES, 77, "-1_1")])
