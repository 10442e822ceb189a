"""The embedded default: circles in fill50k's style, and a base model the stock pipeline loads."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageColor, ImageDraw
from transformers import CLIPTokenizer, T5TokenizerFast

import demo.base_model.pipeline
import demo.circles
from common.config_file import read_section
from common.errors import ConfigError
from demo.circles import IMAGE_PX, LINE_PX, Circle, draw_disc, draw_outline, random_circles
from demo.colors import COLORS, is_held_out
from demo.config import load_config
from infer.config import GenerateConfig, ScoreConfig
from precompute.config import PrecomputeConfig
from tests.conftest import REPOSITORY, Outcome
from train.config import TrainConfig


def test_colours_are_the_css_ones() -> None:
    for name, rgb in COLORS.items():
        assert ImageColor.getrgb(name.replace(" ", "")) == rgb
    assert COLORS["pale golden rod"] == (238, 232, 170)
    assert len(COLORS) == 141


def test_circles_are_seeded_and_lie_inside() -> None:
    rows = random_circles(300, seed=1)
    assert rows == random_circles(300, seed=1) != random_circles(300, seed=2)
    for row in rows:
        assert row.radius <= row.x <= IMAGE_PX - row.radius
        assert row.radius <= row.y <= IMAGE_PX - row.radius
        assert COLORS[row.color] != COLORS[row.background]


def test_a_disc_has_its_colours_and_area() -> None:
    circle = Circle(200, 300, 100, "tomato", "old lace")
    pixels = np.array(draw_disc(circle))
    assert tuple(pixels[300, 200]) == COLORS["tomato"]
    assert tuple(pixels[0, 0]) == COLORS["old lace"]
    area = (pixels == COLORS["tomato"]).all(axis=-1).sum()
    assert area == pytest.approx(np.pi * 100**2, rel=0.02)
    line = np.array(draw_outline(circle))
    assert line[300, 200].tolist() == [0, 0, 0]
    assert line[300, 100 + LINE_PX // 2].tolist() == [255, 255, 255]
    bright = (line.max(axis=-1) > 127).sum()
    assert bright == pytest.approx(2 * np.pi * 98.5 * LINE_PX, rel=0.1)


def test_edges_are_blends_as_an_average_of_four_samples_is() -> None:
    circle = Circle(200, 300, 100, "tomato", "old lace")
    large = Image.new("RGB", (1024, 1024), COLORS["old lace"])
    ImageDraw.Draw(large).ellipse([200, 400, 600, 800], fill=COLORS["tomato"])
    samples = np.array(large, dtype=int).reshape(512, 2, 512, 2, 3)
    assert np.array_equal(np.array(draw_disc(circle)), (samples.sum(axis=(1, 3)) + 2) // 4)


def test_smaller_images_show_the_same_circle() -> None:
    circle = Circle(200, 300, 100, "tomato", "old lace")
    for draw in (draw_disc, draw_outline):
        small = np.array(draw(circle, 256), dtype=int)
        whole = np.array(draw(circle), dtype=int).reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
        assert small.shape == (256, 256, 3)
        assert np.abs(small - whole).mean() < 2
        assert np.abs(small.mean() - whole.mean()) < 0.5


def test_unseen_circles_have_pairs_of_colours_that_training_lacks() -> None:
    for held_out in (False, True):
        rows = random_circles(200, seed=1, held_out=held_out)
        assert {is_held_out(row.color, row.background) for row in rows} == {held_out}
        assert all(COLORS[row.color] != COLORS[row.background] for row in rows)


def test_the_data_sets_have_the_layout_of_fill50k(tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        given = ["--output-dir", str(tmp_path), "--num-rows", "3", "--num-unseen", "2", *arguments]
        return CliRunner().invoke(demo.circles.main, given, catch_exceptions=False).output

    first = call()
    assert f"{tmp_path}/train: 3 circles drawn" in first
    assert f"{tmp_path}/unseen: 2 circles drawn" in first
    assert call().count("there already") == 2
    for name, rows in (
        ("train", random_circles(3, seed=0, held_out=False)),
        ("unseen", random_circles(2, seed=1, held_out=True)),
    ):
        folder = tmp_path / name
        lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
        assert [sorted(line) for line in lines] == [["prompt", "source", "target"]] * len(rows)
        for line, circle in zip(lines, rows, strict=True):
            assert line["prompt"] == f"{circle.color} circle with {circle.background} background"
            assert Image.open(folder / line["source"]).size == (512, 512)
            assert np.array_equal(
                np.array(Image.open(folder / line["target"])), np.array(draw_disc(circle))
            )
    assert "3 circles drawn" in call("--seed", "1")
    assert "--num-unseen 0: at least 1." in call("--num-unseen", "0")
    assert "--seed -1: at least 0." in call("--seed", "-1")
    assert "3 circles drawn" in call("--seed", "1", "--image-px", "128")
    assert Image.open(tmp_path / "train/source/0.png").size == (128, 128)
    assert call("--seed", "1", "--image-px", "128").count("there already") == 2
    assert "--image-px 32: at least 64." in call("--image-px", "32")


@pytest.mark.parametrize(
    ("tokenizer", "name"), [(CLIPTokenizer, "tokenizer"), (T5TokenizerFast, "tokenizer_3")]
)
def test_a_caption_is_a_token_a_word_and_fits(base: Path, tokenizer: type, name: str) -> None:
    loaded = tokenizer.from_pretrained(base, subfolder=name)
    longest = 0
    for color in COLORS:
        caption = f"{color} circle with {color} background"
        ids = loaded(caption).input_ids
        assert loaded.unk_token_id not in ids[1:-1]
        special = 2 if name == "tokenizer" else 1
        assert len(ids) == len(caption.split()) + special
        longest = max(longest, len(ids))
    assert longest <= demo.base_model.pipeline.CLIP_TOKENS


def test_the_stock_pipeline_loads_and_samples_the_base(base: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "tomato circle with old lace background",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=24,
        output_type="np",
        generator=torch.manual_seed(0),
    ).images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    assert pipeline.vae.config.latent_channels == 16
    assert pipeline.vae.config.scaling_factor == 1.5305
    assert pipeline.vae.config.shift_factor == 0.0609
    assert pipeline.vae_scale_factor == 8


def test_the_same_seed_gives_the_same_base() -> None:
    one, two, three = (demo.base_model.pipeline.build_pipeline(seed) for seed in (0, 0, 1))
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        first, second, other = (getattr(p, name).state_dict() for p in (one, two, three))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first)
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()


def test_a_base_does_not_take_the_place_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things than a model"):
        demo.base_model.pipeline.save_base(
            tmp_path, demo.base_model.pipeline.build_pipeline(0, num_layers=2)
        )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_make_stacks_configurations() -> None:
    arguments = ["make", "-n", "train", "CONFIG=configs/sd3-medium.toml my.toml", "CARD=12gb"]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "python -m train" in line]
    given = re.findall(r'--(?:config|card) "(\S+)"', line)
    assert given == ["configs/sd3-medium.toml", "my.toml", "12gb"]


@pytest.mark.parametrize("name", ["sd3-medium", "sd35-large"])
def test_bases_differ_in_nothing_but_the_base(name: str) -> None:
    for section, config_class in (("precompute", PrecomputeConfig), ("train", TrainConfig)):
        own, medium = (
            read_section(REPOSITORY / f"configs/{base}.toml", section, config_class)
            for base in (name, "sd35-medium")
        )
        assert own.pop("pretrained_model_name_or_path") != medium.pop(
            "pretrained_model_name_or_path"
        )
        assert own == medium


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_configurations_are_valid(path: Path, command: Callable[..., Outcome]) -> None:
    for section, config_class in (
        ("precompute", PrecomputeConfig),
        ("train", TrainConfig),
        ("infer", GenerateConfig),
        ("score", ScoreConfig),
    ):
        assert read_section(path, section, config_class)
    if path.stem.startswith("demo"):
        whole = load_config(path)
        assert whole.infer.prompt == whole.precompute.validation_prompt
        return
    # The names that a real run gives on the command line; nothing else may be missing.
    outcome = command("precompute", "--config", path, "--source", "nowhere", "--cache", "cache")
    assert outcome.exit_code == 2
    assert "--source nowhere: no such file or folder" in outcome.output
