"""Measures of pictures recover what was drawn."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image, ImageDraw

from common.errors import ConfigError
from demo.circles import random_circles, write_circles
from infer.config import ScoreConfig
from infer.scoring.charts import draw_curves
from infer.scoring.edges import TOLERANCE, agreement, edge_agreement, has_lines, lines
from infer.scoring.measures import MEASURES, Sample, applicable_measures
from infer.scoring.results import WITHOUT
from infer.scoring.score import score
from infer.scoring.statistics import Summary
from sd3.images import fit
from sd3.pretrained import DATA_KEY
from tests.conftest import RESOLUTION_PX, TOKENS, Outcome, awaken, flags

SIDE = 128
NEAR = math.floor(TOLERANCE * math.hypot(SIDE, SIDE))  # pixels


def mask(*columns: int) -> np.ndarray:
    found = np.zeros((SIDE, SIDE), bool)
    found[:, columns] = True
    return found


def boxes(*corners: tuple[int, int, int, int], fill: str = "black") -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    for corner in corners:
        ImageDraw.Draw(image).rectangle(corner, fill=fill)
    return image


def drawing(*corners: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "black")
    for corner in corners:
        ImageDraw.Draw(image).rectangle(corner, outline="white")
    return image


ONE, TWO = (20, 20, 60, 60), (80, 70, 110, 100)


def test_edges_within_the_tolerance_agree() -> None:
    assert NEAR == 1
    assert agreement(mask(50), mask(50 + NEAR)) == {
        "edge_precision": 1.0,
        "edge_recall": 1.0,
        "edge_f1": 1.0,
    }
    assert agreement(mask(50), mask(50 + NEAR + 1))["edge_f1"] == 0.0
    found = agreement(mask(20, 50), mask(50, 80, 100, 120))
    assert found == {
        "edge_precision": 1 / 2,
        "edge_recall": 1 / 4,
        "edge_f1": pytest.approx(2 * (1 / 2) * (1 / 4) / (3 / 4)),
    }


def test_edges_that_are_not_there() -> None:
    nothing = np.zeros((SIDE, SIDE), bool)
    assert agreement(nothing, mask(5)) == {
        "edge_precision": None,
        "edge_recall": 0.0,
        "edge_f1": 0.0,
    }
    assert agreement(mask(5), nothing)["edge_precision"] == 0.0
    assert agreement(mask(5), nothing)["edge_recall"] is None
    assert set(agreement(nothing, nothing).values()) == {None}


def test_a_picture_that_follows_its_drawing() -> None:
    found = edge_agreement(boxes(ONE, TWO), drawing(ONE, TWO))
    assert found["edge_precision"] == pytest.approx(1.0, abs=0.02)
    assert found["edge_recall"] == pytest.approx(1.0, abs=0.02)
    # The circumferences are 160 and 120 pixels.
    half = edge_agreement(boxes(ONE), drawing(ONE, TWO))
    assert half["edge_precision"] == pytest.approx(1.0, abs=0.02)
    assert half["edge_recall"] == pytest.approx(160 / 280, abs=0.02)
    more = edge_agreement(boxes(ONE, TWO), drawing(ONE))
    assert more["edge_precision"] == pytest.approx(160 / 280, abs=0.02)
    assert more["edge_recall"] == pytest.approx(1.0, abs=0.02)
    moved = edge_agreement(boxes(tuple(side + 15 for side in ONE)), drawing(ONE))
    assert moved["edge_f1"] < 0.1


def test_lines_are_light_on_dark_or_dark_on_light() -> None:
    thick = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(thick).line((10, 64, 117, 64), fill=255, width=5)
    thin = lines(thick)
    assert 95 < np.count_nonzero(thin) < 115
    assert set(np.nonzero(thin)[0]) <= {63, 64, 65}
    inverted = Image.fromarray(255 - np.asarray(thick))
    assert np.array_equal(lines(inverted), thin)
    assert has_lines(thick)
    assert has_lines(inverted)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (64, 64)),
        Image.linear_gradient("L"),
        Image.effect_noise((64, 64), 60),
        boxes((0, 0, SIDE, SIDE // 2)),
    ],
)
def test_depth_noise_and_areas_are_no_lines(image: Image.Image) -> None:
    assert not has_lines(image)


def test_targets_are_compared_by_arithmetic() -> None:
    target = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
    sample = Sample(0, "", target, target)
    same = MEASURES["targets"].of(target, sample)
    assert same == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    grey = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    lighter = Image.new("RGB", (SIDE, SIDE), (110, 110, 110))
    found = MEASURES["targets"].of(lighter, Sample(0, "", grey, grey))
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / 10))
    # Of flat pictures only the term of luminance is left: Wang et al. 2004, equation 6.
    constant = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + constant) / (100**2 + 110**2 + constant)
    assert found["ssim"] == pytest.approx(expected, rel=1e-6)


def test_what_a_data_set_can_be_measured_by() -> None:
    circle = random_circles(1, seed=0)[0]
    from demo.circles import draw_outline

    assert applicable_measures(
        Sample(0, circle.prompt, draw_outline(circle), draw_outline(circle))
    ) == ("circles",)
    assert applicable_measures(Sample(0, "a house", drawing(ONE))) == ("edges",)
    assert applicable_measures(Sample(0, "a house", drawing(ONE), boxes(ONE))) == (
        "edges",
        "targets",
    )
    assert applicable_measures(Sample(0, "a house", Image.linear_gradient("L"))) == ()


@pytest.fixture
def houses(tmp_path: Path) -> Path:
    """Drawings of boxes and the boxes, in fill50k's layout."""
    folder = tmp_path / "houses"
    (folder / "source").mkdir(parents=True)
    (folder / "target").mkdir()
    rows = []
    for number in range(3):
        corners = (20 + 10 * number, 30, 70, 90)
        drawing(corners).save(folder / f"source/{number}.png")
        boxes(corners).save(folder / f"target/{number}.png")
        row = {"source": f"source/{number}.png", "target": f"target/{number}.png"}
        rows.append(json.dumps(row | {"prompt": "a house"}))
    (folder / "prompt.json").write_text("\n".join(rows))
    return folder


@pytest.fixture
def config(base: Path, controlnet: Path, houses: Path, tmp_path: Path) -> ScoreConfig:
    return ScoreConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "score",
        source=houses,
        num_inference_steps=1,
        guidance_scale=1.0,
        device="cpu",
    )


def test_checkpoints_side_by_side(config: ScoreConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (50, 100):
        folder = run / f"checkpoint-{step}" / "controlnet"
        shutil.copytree(config.controlnet[0], folder)
        network = SD3ControlNetModel.from_pretrained(folder)
        awaken(network, seed=step)
        if step == 100:
            data = dict(network.config[DATA_KEY]) | {"conditioning_range": "0_1"}
            network.register_to_config(**{DATA_KEY: data})
        network.save_pretrained(folder)
    names = tuple(str(run / f"checkpoint-{step}" / "controlnet") for step in (50, 100))
    score(replace(config, controlnet=names))
    figures = json.loads((config.output_dir / "score.json").read_text())
    assert figures.keys() == {"config", "checkpoint-50", "checkpoint-100", WITHOUT}
    rows = list(csv.DictReader((config.output_dir / "samples.csv").open()))
    assert len(rows) == 3
    assert figures["checkpoint-50"] != figures["checkpoint-100"]
    for variant in ("checkpoint-50", "checkpoint-100", WITHOUT):
        for number, row in enumerate(rows):
            picture = Image.open(config.output_dir / variant / f"00{number}.png")
            conditioning, target = (
                fit(Image.open(config.source / kind / f"{number}.png").convert("RGB"), 64)
                for kind in ("source", "target")
            )
            sample = Sample(number, "a house", conditioning, target)
            for name in ("edges", "targets"):
                for key, value in MEASURES[name].of(picture, sample).items():
                    written = row[f"{variant}_{key}"]
                    assert written == ("" if value is None else f"{value:.4f}")
        mean = np.mean([float(row[f"{variant}_ssim"]) for row in rows])
        assert figures[variant]["ssim"]["mean"] == pytest.approx(mean, abs=1e-4)
    with Image.open(config.output_dir / "curve.png") as image:
        assert image.width > 5 * 300
    # The second one was trained on pixels from 0 to 1, and is given such.
    stock = StableDiffusion3ControlNetPipeline.from_pretrained(
        config.pretrained_model_name_or_path, controlnet=network
    )
    house = fit(Image.open(config.source / "source/0.png").convert("RGB"), 64)
    expected = stock(
        "a house",
        control_image=torch.tensor(np.array(house)).permute(2, 0, 1)[None] / 255,
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=TOKENS,
        latents=torch.randn(1, 16, 8, 8, generator=torch.manual_seed(0)),
    ).images[0]
    drawn = np.array(Image.open(config.output_dir / "checkpoint-100" / "000.png")).astype(int)
    assert np.abs(drawn - np.array(expected)).max() <= 1
    assert RESOLUTION_PX == 64


def test_pictures_of_several_sizes(config: ScoreConfig, houses: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bucketed"
    shutil.copytree(config.controlnet[0], folder)
    values = json.loads((folder / "config.json").read_text())
    values[DATA_KEY]["buckets"] = [[64, 64], [64, 96]]
    (folder / "config.json").write_text(json.dumps(values))
    for kind in ("source", "target"):
        path = houses / kind / "1.png"
        Image.open(path).resize((192, 128)).save(path)
    score(replace(config, controlnet=(str(folder),), batch_size=3, measure=("targets",)))
    sizes = [
        Image.open(config.output_dir / WITHOUT / f"00{number}.png").size for number in range(3)
    ]
    assert sizes == [(64, 64), (96, 64), (64, 64)]
    with pytest.raises(ConfigError, match="trained on other sizes than"):
        score(replace(config, controlnet=(config.controlnet[0], str(folder))))


def summary(mean: float) -> Summary:
    return Summary(9, mean, mean - 1, mean + 1, mean)


def test_the_curve_is_in_the_order_of_steps() -> None:
    figures = {
        "b": {"psnr": summary(3.0), "ssim": summary(0.5)},
        "a": {"psnr": summary(2.0), "ssim": Summary(0, None, None, None, None)},
        WITHOUT: {"psnr": summary(1.0), "ssim": summary(0.1)},
    }
    names = ["out/checkpoint-100/controlnet", "out/checkpoint-50/controlnet"]
    figure = draw_curves([MEASURES["targets"]], figures, names)
    psnr, ssim = figure.axes
    assert psnr.lines[0].get_xydata().tolist() == [[50, 2], [100, 3]]
    assert ssim.lines[0].get_xydata().tolist() == [[100, 0.5]]
    assert psnr.lines[1].get_ydata()[0] == 1.0
    named = draw_curves([MEASURES["targets"]], figures, ["out/b", "out/a"])
    assert [label.get_text() for label in named.axes[0].get_xticklabels()] == ["b", "a"]


def test_what_cannot_be_measured_is_named(
    config: ScoreConfig, command: Callable[..., Outcome], houses: Path
) -> None:
    Image.linear_gradient("L").save(houses / "source/1.png")
    outcome = command("infer", "score", *flags(config))
    assert outcome.exit_code == 2
    assert "row 2: the conditioning image is no drawing of lines; --measure edges" in outcome.output
    (houses / "target/0.png").unlink()
    Image.linear_gradient("L").save(houses / "source/0.png")
    with pytest.raises(ConfigError, match="nothing to measure"):
        score(config)
    with pytest.raises(ConfigError, match="row 1: the row has no image to compare with"):
        score(replace(config, measure=("targets",)))
    assert not config.output_dir.exists()


def test_circles_are_measured_as_such(config: ScoreConfig, tmp_path: Path) -> None:
    write_circles(tmp_path / "circles", random_circles(2, seed=1))
    score(replace(config, source=tmp_path / "circles"))
    figures = json.loads((config.output_dir / "score.json").read_text())
    assert figures[WITHOUT].keys() == {"iou", "disc_color_error", "background_color_error"}
