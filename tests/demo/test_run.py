"""`python -m demo`: every stage runs, the page stands alone, and a second run keeps everything."""

import html
import itertools
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from benchmarks.demo import write_seeded
from common.errors import ConfigError
from demo.comparison import Comparison
from demo.config import load_config
from demo.report import draw_losses, read_losses, render_page
from demo.times import StageTimes
from infer.scoring.results import WITHOUT
from shards.format import manifest
from tests.conftest import REPOSITORY, run_python

CONFIGS = REPOSITORY / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> list[Path]:
    """The fast demonstration in a folder of its own, and faster still."""
    complete = tmp_path / "demo.toml"
    complete.write_text((CONFIGS / "demo.toml").read_text())
    text = (CONFIGS / "demo-fast.toml").read_text()
    text = text.replace('"runs/demo-fast', f'"{tmp_path}/run')
    for key, value in (
        ("num_rows", 24),
        ("num_unseen", 6),
        ("max_train_steps", 4),
        ("checkpointing_steps", 2),
        ("validation_steps", 2),
        ("learning_rate", 0.0),
    ):
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    fast = tmp_path / "demo-fast.toml"
    fast.write_text(text)
    return [complete, fast]


def edit(configs: list[Path], old: str, new: str) -> None:
    """Replace the first `old` in each of the files."""
    texts = [path.read_text() for path in configs]
    assert any(old in text for text in texts)
    for path, text in zip(configs, texts, strict=True):
        path.write_text(text.replace(old, new, 1))


def flags(configs: list[Path]) -> list[str | Path]:
    return [word for path in configs for word in ("--config", path)]


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_the_demonstration_ends_with_a_page_that_stands_alone(
    configs: list[Path], tmp_path: Path
) -> None:
    first = run_python("-m", "demo", *flags(configs))
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    links = Links()
    links.feed(page)
    pictures = [target for target in links.targets if target.startswith("data:image/webp;base64,")]
    assert len(pictures) == links.tags.count("img") == 2
    # What else is linked lies within the page: the chart's own parts.
    assert all(target.startswith(("data:", "#")) for target in links.targets)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", page)
    contents = manifest.load(run / "cache")
    assert f"{contents.text.num_records} distinct prompts" in page
    assert f">{2 * 4 * 4}<" in page  # pictures: two a sample, batches of 4, 4 steps
    times = json.loads((run / "times.json").read_text())
    assert times["finished"] == ["circles", "precompute", "train", "infer", "score"]
    # At a learning rate of 0 the ControlNet stays as it begins, adding nothing: training's pictures
    # are those of the base alone, at step 0, which the page shows as before training, and later.
    for number, step in itertools.product(range(2), (0, 4)):
        pair = Image.open(run / f"controlnet/validation/step-{step:06d}/{number}.png")
        trained = np.asarray(pair.crop((128, 0, 256, 128)), dtype=float)
        alone = np.asarray(Image.open(run / "score" / WITHOUT / f"{number:03d}.png"), dtype=float)
        assert np.abs(trained - alone).mean() < 1  # embeddings came through 16 bit
    shard = run / "cache" / "latents" / "000000.tar"
    written = shard.stat().st_mtime_ns
    second = run_python("-m", "demo", *flags(configs))
    assert second.returncode == 0, second.stderr
    assert "already complete, nothing to do" in second.stdout
    assert shard.stat().st_mtime_ns == written
    assert json.loads((run / "times.json").read_text()) == times


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_demonstration(configs: list[Path]) -> None:
    edit(configs, '"demo/miniature"', '"no/such/base"')
    done = run_python("-m", "demo", *flags(configs))
    assert done.returncode == 2
    assert "no/such/base" in done.stderr
    assert "python -m train" not in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("output_dir", "# output_dir", r"\[demo\] lacks output_dir"),
        ("[train]", '[train]\nreport_to = "none"', "must be tensorboard"),
    ],
)
def test_what_the_report_needs_is_checked_first(
    configs: list[Path], old: str, new: str, message: str
) -> None:
    load_config(*configs)
    edit(configs, old, new)
    with pytest.raises(ConfigError, match=message):
        load_config(*configs)


@pytest.mark.parametrize("names", [["demo.toml"], ["demo.toml", "demo-full.toml"]])
@pytest.mark.parametrize("seed", [1, 7])
def test_the_benchmark_changes_seed_and_place_alone(
    tmp_path: Path, seed: int, names: list[str]
) -> None:
    shipped = [CONFIGS / name for name in names]
    before, after = load_config(*shipped), load_config(*write_seeded(shipped, seed, tmp_path))
    assert after.circles == replace(before.circles, seed=seed, output_dir=tmp_path / "circles")
    assert after.train.seed == after.score.seed == seed
    assert after.infer.seed == (seed,)
    assert after.train.output_dir == tmp_path / "controlnet"
    assert after.train.max_train_steps == before.train.max_train_steps
    assert after.infer.prompt == after.precompute.validation_prompt != before.infer.prompt


def test_times_add_up_until_a_stage_has_finished(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    times = StageTimes(path, "settings")

    def interrupted() -> None:
        with times.measure("train"):
            time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = StageTimes(path, "settings").seconds["train"]
    assert first >= 0.02
    again = StageTimes(path, "settings")
    with again.measure("train"):
        time.sleep(0.02)
    assert again.seconds["train"] >= first + 0.02
    done = StageTimes(path, "settings")
    with done.measure("train"):
        time.sleep(0.02)
    assert StageTimes(path, "settings").seconds == again.seconds
    assert StageTimes(path, "others").seconds == {}


def cells(page: str, label: str) -> list[str]:
    """Return the texts of a table row's further cells."""
    row = re.search(rf"<tr><td>{re.escape(label)}</td>(.*?)</tr>", html.unescape(page))
    assert row is not None, label
    return re.findall(r"<td class=\"n\">(.*?)</td>", row[1])


def test_figures_stand_in_their_places() -> None:
    def figures(start: float) -> dict[str, dict[str, float | None]]:
        names = ("iou", "disc_color_error", "background_color_error")
        keys = ("mean", "low", "high", "median")
        return {
            name: {key: start + row + column / 100 for column, key in enumerate(keys)}
            | {"count": int(start + row)}
            for row, name in enumerate(names)
        }

    score = {"with_controlnet": figures(10), "without_controlnet": figures(20)}
    score["without_controlnet"]["disc_color_error"] = dict.fromkeys(
        ("mean", "low", "high", "median")
    ) | {"count": 0}
    page = render_page(
        config=load_config(CONFIGS / "demo.toml"),
        seconds={"circles": 30.0, "train": 300.0},
        steps=1800,
        blocks=3,
        score=score | {"config": {"seed": 0}},
        comparison=Comparison(
            num_rows=3000,
            num_prompts=2800,
            num_pictures_reference=28800,
            num_pictures=6000,
            prompt_bytes_reference=75_000_000,
            prompt_bytes=25_000_000,
            latent_bytes=60_000_000,
            vae_seconds_per_picture=0.01,
            encoder_bytes=5_600_000,
        ),
        progress="data:,",
        worst="data:,",
        curve="<svg></svg>",
        versions={"torch": "2"},
        commit="abc",
        machine="a <machine>",
    )
    assert cells(page, "IoU of the disc and its outline, with the ControlNet") == [
        "10.00", "10.01 to 10.02", "10.03", "10",
    ]  # fmt: skip
    assert cells(page, "IoU of the disc and its outline, without")[0] == "20.00"
    assert cells(page, "background's colour difference, without")[0] == "22.00"
    assert cells(page, "disc's colour difference, without") == ["–", "– to –", "–", "0"]
    assert cells(page, "pictures through the VAE") == ["28,800", "6,000"]
    assert cells(page, "… at the 10.0 ms a picture that it takes here") == ["4.8 min", "60.0 s"]
    assert cells(page, "prompt embeddings on disk") == ["75.0 MB", "25.0 MB"]
    assert cells(page, "train")[-1] == "5.0 min"
    assert "in 5.5 min on a &lt;machine&gt;" in page


def test_losses_are_those_logged_over_all_starts(tmp_path: Path) -> None:
    for start, values in ((0, (0.5, 0.4)), (2, (0.3,))):
        with SummaryWriter(str(tmp_path / "logs" / f"run-{start}")) as writer:
            for offset, value in enumerate(values):
                writer.add_scalar("loss", value, 10 * (start + offset + 1))
    assert read_losses(tmp_path) == [(10, 0.5), (20, pytest.approx(0.4)), (30, pytest.approx(0.3))]
    with pytest.raises(FileNotFoundError, match="no losses"):
        read_losses(tmp_path / "nothing")


def test_the_curve_is_one_svg() -> None:
    svg = draw_losses([(10 * step, 1 / step) for step in range(1, 30)])
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert draw_losses([(10, 0.5)]).startswith("<svg")
