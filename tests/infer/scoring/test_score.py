"""`infer score`: the pictures are the stock pipelines', and the figures are theirs."""

import csv
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

from demo.circles import Circle, draw_disc, draw_outline, random_circles, write_circles
from demo.colors import COLORS
from infer.config import ScoreConfig
from infer.scoring.charts import worst_sheet
from infer.scoring.discs import measure_disc
from infer.scoring.measures import MEASURES, Sample
from infer.scoring.results import WITH, WITHOUT, SampleResult, summarize_variants, to_csv
from infer.scoring.score import score
from infer.scoring.statistics import summarize
from sd3.contact_sheet import CELL_PX
from sd3.images import fit
from tests.conftest import RESOLUTION_PX, TOKENS, Outcome, flags

NUM_SAMPLES = 3
VARIANTS = (WITH, WITHOUT)


@pytest.fixture
def config(base: Path, controlnet: Path, tmp_path: Path) -> ScoreConfig:
    write_circles(tmp_path / "circles", random_circles(NUM_SAMPLES + 1, seed=3))
    return ScoreConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "score",
        source=tmp_path / "circles",
        num_samples=NUM_SAMPLES,
        batch_size=2,
        seed=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        json=tmp_path / "figures.json",
        device="cpu",
    )


def test_pictures_are_those_of_the_stock_pipelines(config: ScoreConfig) -> None:
    # The ControlNet has a say in the second step of three alone.
    influence = {
        "controlnet_conditioning_scale": 0.7,
        "control_guidance_start": 0.2,
        "control_guidance_end": 0.9,
    }
    each = {name: (value,) for name, value in influence.items()}
    score(replace(config, num_inference_steps=3, negative_prompt="black", **each))
    base = config.pretrained_model_name_or_path
    network = SD3ControlNetModel.from_pretrained(config.controlnet[0])
    stock = StableDiffusion3ControlNetPipeline.from_pretrained(base, controlnet=network)
    without = StableDiffusion3Pipeline.from_pretrained(base)
    rows = [json.loads(line) for line in (config.source / "prompt.json").open()]
    for variant, number in itertools.product(VARIANTS, range(NUM_SAMPLES)):
        image = Image.open(config.source / rows[number]["source"]).convert("RGB")
        small = image.resize((RESOLUTION_PX,) * 2, Image.Resampling.BILINEAR)
        side = RESOLUTION_PX // 8
        expected = (stock if variant == WITH else without)(
            rows[number]["prompt"],
            negative_prompt="black",
            height=RESOLUTION_PX,
            width=RESOLUTION_PX,
            num_inference_steps=3,
            guidance_scale=3.0,
            max_sequence_length=TOKENS,
            latents=torch.randn(1, 16, side, side, generator=torch.manual_seed(5 + number)),
            **({"control_image": small} | influence if variant == WITH else {}),
        ).images[0]
        picture = np.array(Image.open(config.output_dir / variant / f"{number:03d}.png"))
        # One picture at a time or two: the last bits differ, and 8 bit rounding with them.
        assert np.abs(picture.astype(int) - np.array(expected)).max() <= 1


def test_figures_are_those_of_the_pictures(config: ScoreConfig) -> None:
    score(config)
    figures = json.loads(config.json.read_text())
    rows = list(csv.DictReader((config.output_dir / "samples.csv").open()))
    assert [row["sample"] for row in rows] == ["0", "1", "2"]
    lines = [json.loads(line) for line in (config.source / "prompt.json").open()]
    for row, line in zip(rows, lines, strict=False):
        color, background = (
            COLORS[name]
            for name in row["prompt"].removesuffix(" background").split(" circle with ")
        )
        conditioning = fit(Image.open(config.source / line["source"]).convert("RGB"), RESOLUTION_PX)
        for variant in VARIANTS:
            picture = Image.open(config.output_dir / variant / f"{int(row['sample']):03d}.png")
            found = measure_disc(picture, conditioning, color, background)
            assert float(row[f"{variant}_iou"]) == pytest.approx(found.iou, abs=1e-4)
            error = float(row[f"{variant}_background_color_error"])
            assert error == pytest.approx(found.background_error, abs=1e-4)
    for variant in VARIANTS:
        for name, column in (("iou", "iou"), ("background_color_error", "background_color_error")):
            values = [float(row[f"{variant}_{column}"]) for row in rows]
            assert figures[variant][name]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
            assert figures[variant][name]["median"] == pytest.approx(np.median(values), abs=1e-3)
    assert figures["config"]["seed"] == 5


def test_fewer_rows_than_asked_are_all_scored(config: ScoreConfig, tmp_path: Path) -> None:
    rows = [Circle(200, 200, 100, "red", "blue"), Circle(300, 200, 80, "blue", "red")]
    write_circles(tmp_path / "two", rows)
    figures = tmp_path / "new" / "folder" / "figures.json"
    score(
        replace(
            config, source=tmp_path / "two", num_samples=50, num_inference_steps=1, json=figures
        )
    )
    assert json.loads(figures.read_text())[WITH]["iou"]["count"] == 2
    score(replace(config, source=tmp_path / "two", num_samples=1, num_inference_steps=1, json=None))
    alone = json.loads((config.output_dir / "score.json").read_text())
    assert alone[WITHOUT]["iou"]["count"] == 1
    assert alone[WITHOUT]["iou"]["low"] is None


CIRCLES = MEASURES["circles"]


def drawn(folder: Path, number: int, shift: int) -> SampleResult:
    """A sample whose controlled picture is a disc shifted by so much, and whose other is flat."""
    wanted = Circle(200, 256, 100, "tomato", "old lace")
    moved = replace(wanted, x=200 + shift)
    sample = Sample(number, wanted.prompt, fit(draw_outline(wanted), 128))
    pictures = {WITH: fit(draw_disc(moved), 128), WITHOUT: Image.new("RGB", (128, 128), "blue")}
    files = {variant: folder / f"{number}-{variant}.png" for variant in pictures}
    for variant, picture in pictures.items():
        picture.save(files[variant])
    measured = {variant: CIRCLES.of(picture, sample) for variant, picture in pictures.items()}
    return SampleResult(sample, files, measured)


def test_the_worst_come_first_and_no_disc_has_no_colour(tmp_path: Path) -> None:
    samples = [drawn(tmp_path, number, shift) for number, shift in enumerate((40, 160, 0, 80))]
    rows = list(csv.DictReader(to_csv([CIRCLES], samples).splitlines()))
    scores = [float(row[f"{WITH}_iou"]) for row in rows]
    assert scores[2] > 0.98
    assert scores[2] > scores[0] > scores[3] > scores[1]
    assert all(row[f"{WITHOUT}_disc_color_error"] == "" for row in rows)
    assert all(row[f"{WITHOUT}_iou"] == "0.0000" for row in rows)
    sheet = np.array(worst_sheet(CIRCLES, samples))
    rows_of, columns_of = np.nonzero((sheet == COLORS["tomato"]).all(axis=-1))
    # Each row shows a disc, in the second column, and one moved less than that of the row above.
    ends = np.flatnonzero(np.diff(rows_of) > CELL_PX / 4) + 1
    middles = [columns.mean() for columns in np.split(columns_of, ends)]
    moved = [(200 + shift) / 512 * CELL_PX for shift in (160, 80, 40, 0)]
    assert np.diff(middles) == pytest.approx(np.diff(moved), abs=1)
    assert columns_of.min() > CELL_PX
    figures = summarize_variants([CIRCLES], samples)
    assert figures[WITHOUT]["disc_color_error"].count == 0
    # As if one picture had a disc: the others are left out, and do not count as 0.
    samples[2].values[WITHOUT]["disc_color_error"] = 8.0
    summary = summarize_variants([CIRCLES], samples)[WITHOUT]["disc_color_error"]
    assert (summary.count, summary.mean, summary.median) == (1, 8.0, 8.0)


def test_a_summary_is_what_statistics_say() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 400)
    found = summarize(list(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.median == pytest.approx(np.median(values))
    # Of a mean of 400 the bootstrap's interval is near the normal distribution's.
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert summarize(list(values)) == found
    assert summarize([2.0]).low is None
    alike = summarize([0.25] * 7)
    assert (alike.low, alike.mean, alike.high) == (0.25, 0.25, 0.25)
    assert summarize([]).mean is None
    assert str(summarize([2.0])) == "  2.00  median 2.00"


@pytest.mark.parametrize(
    ("prompt", "source", "message"),
    [
        ("a dog", "source/0.png", "row 1: not a caption of a circle: 'a dog'; --measure circles"),
        (None, "source/9.png", "line 1: .*No such file"),
        (None, "black.png", "row 1: the conditioning image has no outline; --measure circles"),
        (None, "prompt.json", "line 1: not a readable image"),
    ],
)
def test_what_is_no_circle_is_named(
    config: ScoreConfig,
    command: Callable[..., Outcome],
    tmp_path: Path,
    prompt: str | None,
    source: str,
    message: str,
) -> None:
    folder = tmp_path / "other"
    circle = Circle(200, 200, 100, "red", "blue")
    write_circles(folder, [circle])
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    row = {"source": source, "target": "target/0.png", "prompt": prompt or circle.prompt}
    (folder / "prompt.json").write_text(json.dumps(row))
    outcome = command(
        "infer", "score", *flags(replace(config, source=folder, measure=("circles",)))
    )
    assert outcome.exit_code == 2
    assert re.search(message, outcome.output), outcome.output
    assert not config.output_dir.exists()


@pytest.mark.parametrize("flag", ["--num-samples", "--batch-size", "--num-inference-steps"])
def test_counts_are_positive(
    config: ScoreConfig, command: Callable[..., Outcome], flag: str
) -> None:
    outcome = command("infer", "score", *flags(config), flag, 0)
    assert outcome.exit_code == 2
    assert f"{flag} 0: at least 1." in outcome.output
