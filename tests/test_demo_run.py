"""`python -m demo`: every stage runs, the page stands alone, and a second run keeps everything."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from demo.config import load_config
from demo.report import loss_svg, losses
from infer.score import WITHOUT
from shards import manifest
from shards.errors import ConfigError
from tests.conftest import REPOSITORY, run_python


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The fast demonstration in a folder of its own, and faster still."""
    text = (REPOSITORY / "configs" / "demo-fast.toml").read_text()
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
    path = tmp_path / "demo.toml"
    path.write_text(text)
    return path


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
def test_the_demonstration_ends_with_a_page_that_stands_alone(config: Path, tmp_path: Path) -> None:
    first = run_python("-m", "demo", "--config", config)
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
    score = json.loads((run / "score" / "score.json").read_text())
    assert f'<td class="n">{score["with_controlnet"]["iou"]["mean"]:.2f}</td>' in page
    contents = manifest.load(run / "cache")
    assert f"{contents.text.num_records} distinct prompts" in page
    assert f">{2 * 8 * 4}<" in page  # pictures: two a sample, batches of 8, 4 steps
    assert list(json.loads((run / "times.json").read_text())) == [
        "circles",
        "precompute",
        "train",
        "infer",
        "score",
    ]
    # At a learning rate of 0 the ControlNet stays as it begins, adding nothing: training's pictures
    # are those of the base alone, which the page shows as before training.
    for number in range(2):
        pair = Image.open(run / "controlnet" / "validation" / "step-000004" / f"{number}.png")
        trained = np.asarray(pair.crop((128, 0, 256, 128)), dtype=float)
        alone = np.asarray(Image.open(run / "score" / WITHOUT / f"{number:03d}.png"), dtype=float)
        assert np.abs(trained - alone).mean() < 1  # embeddings came through 16 bit
    shard = run / "cache" / "latents" / "000000.tar"
    written = shard.stat().st_mtime_ns
    second = run_python("-m", "demo", "--config", config)
    assert second.returncode == 0, second.stderr
    assert "already complete, nothing to do" in second.stdout
    assert shard.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_demonstration(config: Path) -> None:
    config.write_text(config.read_text().replace('"demo/miniature"', '"no/such/base"', 1))
    done = run_python("-m", "demo", "--config", config)
    assert done.returncode == 2
    assert "no/such/base" in done.stderr
    assert "python -m train" not in done.stdout


def test_a_table_that_lacks_something_is_named(config: Path) -> None:
    config.write_text(
        config.read_text().replace("[demo]", "[demo]\n#", 1).replace("output_dir", "#", 1)
    )
    with pytest.raises(ConfigError, match=r"\[demo\] lacks output_dir"):
        load_config(config)


def test_losses_are_those_logged_over_all_starts(tmp_path: Path) -> None:
    for start, values in ((0, (0.5, 0.4)), (2, (0.3,))):
        with SummaryWriter(str(tmp_path / "logs" / f"run-{start}")) as writer:
            for offset, value in enumerate(values):
                writer.add_scalar("loss", value, 10 * (start + offset + 1))
    assert losses(tmp_path) == [(10, 0.5), (20, pytest.approx(0.4)), (30, pytest.approx(0.3))]
    with pytest.raises(FileNotFoundError, match="no losses"):
        losses(tmp_path / "nothing")


def test_the_curve_is_one_svg() -> None:
    svg = loss_svg([(10 * step, 1 / step) for step in range(1, 30)])
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert loss_svg([(10, 0.5)]).startswith("<svg")
