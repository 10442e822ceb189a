"""The page of a run: what its files say, whole, escaped, and the same after a resume."""

import base64
import html
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import four_steps
from train.config import TrainConfig
from train.dashboard import records
from train.dashboard.page import write_page
from train.run import train

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def done(base: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps that has a page, and a checkpoint at step 2."""
    config = replace(
        four_steps(base, held_out, tmp_path_factory.mktemp("page") / "<b>run"),
        validation_steps=2,
        num_validation_images=2,
        validation_inference_steps=1,
        logging_steps=1,
        dashboard=True,
        ema_decay=0.9,
        resume_from_checkpoint="latest",
        lr_scheduler="constant",
        hub_token="hf_secret",
    )
    train(config)
    return config


class Tags(HTMLParser):
    """Names and attributes of a page's tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_shows_the_runs_pictures_curves_and_settings_and_needs_no_other_file(
    done: TrainConfig,
) -> None:
    page = (done.output_dir / "progress.html").read_text()
    tags = Tags(page).found
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    validation = done.output_dir / "validation"
    shown = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in images]
    expected = []
    drawn = ((0, 0), (0, 1), (2, 1), (4, 1))
    averaged = ((2, 0), (2, 1), (4, 1))  # before training it is the weights, and not drawn
    for pair, places in (("0", drawn), ("0-ema", averaged), ("1", drawn), ("1-ema", averaged)):
        for step, part in places:
            sheet = Image.open(validation / f"step-{step:06d}" / f"{pair}.png")
            expected.append(np.split(np.asarray(sheet), 3, axis=1)[part])
    assert len(shown) == len(expected)
    for picture, pixels in zip(shown, expected, strict=True):
        assert np.array_equal(np.asarray(picture), pixels)
    assert sum(tag == "svg" for tag, _ in tags) == 5
    losses = json.loads((validation / "step-000004/held_out.json").read_text())["held_out_loss"]
    assert f"<b>{sum(losses) / 8:.4f}</b>" in page
    assert "Step 4 of 4, the last one" in page
    assert "hf_secret" not in page
    assert "&lt;b&gt;run" in page
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe")]
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/png;base64,", "#"))
    assert "url(http" not in page
    assert "@import" not in page


def test_a_resumed_run_has_the_page_of_one_that_was_not_stopped(
    done: TrainConfig, tmp_path: Path
) -> None:
    again = replace(done, output_dir=tmp_path / done.output_dir.name)
    shutil.copytree(done.output_dir, again.output_dir)
    shutil.rmtree(again.output_dir / "checkpoint-4")
    train(again)  # from step 2: it validates step 4 anew
    kept, repeated = (records.read(each.output_dir, 4) for each in (done, again))
    assert repeated.held_out == kept.held_out
    names = ("loss", "lr", "gradient_norm")
    for name in names:
        assert repeated.curve(name) == kept.curve(name)
    assert [step for step, _ in repeated.curve("loss")] == [1, 2, 3, 4]

    def without_speed(config: TrainConfig) -> str:
        text = (config.output_dir / "progress.html").read_text()
        text = text.replace(html.escape(str(config.output_dir)), "")
        return re.sub(r"<div><b>[^<]*</b>samples a second[^<]*</div>", "", text)

    assert without_speed(again) == without_speed(done)


def test_what_is_left_is_told_from_the_rate(train_config: TrainConfig) -> None:
    train_config.output_dir.mkdir()
    for step, rate in ((10, 1.0), (20, 4.0), (30, 5.0)):
        values = {"loss": float("nan"), "samples_per_second": rate}
        records.append(train_config.output_dir, step, values)
    write_page(train_config, 20, 50, 8)  # (50 - 20) * 8 samples, at 2.5 a second
    page = (train_config.output_dir / "progress.html").read_text()
    assert "about 2 min of training left" in page
    write_page(train_config, 30, 50, 8)  # 160, at 4
    assert "about 40 s of training left" in (train_config.output_dir / "progress.html").read_text()
    assert records.read(train_config.output_dir, 30).curve("loss") == []


def test_a_cut_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    records.append(tmp_path, 1, {"loss": 1.0})
    with (tmp_path / records.LOG_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    records.forget_after(tmp_path, 2)
    records.append(tmp_path, 3, {"loss": 3.0})
    assert records.read(tmp_path, 3).curve("loss") == [(1, 1.0), (3, 3.0)]


@pytest.mark.slow
@pytest.mark.extras
def test_a_browser_shows_it_and_asks_for_nothing(done: TrainConfig) -> None:
    from playwright import sync_api

    if CHROMIUM is None:
        pytest.skip("neither Chromium nor Google Chrome is installed")
    with sync_api.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((done.output_dir / "progress.html").as_uri())
        for picture in tab.locator("td img").all():
            assert picture.evaluate("image => image.naturalWidth") == 64
        charts = [chart.bounding_box() for chart in tab.locator(".charts svg").all()]
        browser.close()
    assert [box and box["height"] > 100 for box in charts] == [True] * 5
    assert [url for url in asked if not url.startswith("data:")] == asked[:1]
