"""Layouts from end to end: what a run says of them, what is kept and what is left out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError, ShardError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.format import manifest
from tests.conftest import Outcome, flags
from tests.precompute.sources.files.flat_pictures import (
    caption,
    lines,
    record,
    write,
    write_control,
    write_image,
    write_pair,
)

NUM_ROWS = 8


@pytest.mark.slow
def test_pictures_with_caption_files_and_drawn_controls(
    fresh: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    for number in range(NUM_ROWS):
        write_image(folder / f"{number}.png", number)
        if number != 5:
            write(folder / f"{number}.txt", caption(number))
    write(folder / "notes.pdf", b"%PDF")
    config = replace(fresh, source=str(folder), conditioning_from="canny", max_bad_fraction=0.2)
    said = []
    for dry in (True, False):
        precompute(replace(config, dry_run=dry))
        said.append(capsys.readouterr().out)
    for text in said:
        assert "layout: images and caption files of their names (.txt or .caption)" in text
        assert "  other files, not read: 1 (notes.pdf)" in text
        assert "row 5, 5.png: no caption" in text
    found = manifest.load(config.cache)
    assert found.latents.num_records == NUM_ROWS - 1
    assert found.num_skipped == 1


@pytest.mark.slow
def test_a_row_without_a_control_is_one_bad_row(
    fresh: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    for number in range(NUM_ROWS):
        write_image(folder / "images" / f"{number}.png", number)
        write(folder / "images" / f"{number}.txt", caption(number))
        if number != 5:
            write_control(folder / "conditioning" / f"{number}.png", number)
    with pytest.raises(ShardError, match=r"row 5, images/5\.png: no conditioning image"):
        precompute(replace(fresh, source=str(folder), strict=True))
    assert "images of their names in conditioning/" in capsys.readouterr().out
    precompute(replace(fresh, source=str(folder), max_bad_fraction=0.2))
    assert "row 5, images/5.png: no conditioning image" in capsys.readouterr().out
    assert manifest.load(fresh.cache).conditioning["conditioning"].num_records == NUM_ROWS - 1


@pytest.mark.slow
def test_the_same_rows_in_another_layout_are_not_encoded_again(
    fresh: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    for number in range(NUM_ROWS):
        write_pair(folder, number)
    rows = [
        {"target": f"images/{n}.png", "source": f"edges/{n}.png", "prompt": caption(n)}
        for n in range(NUM_ROWS)
    ]
    write(folder / "prompt.json", lines(rows))
    config = replace(fresh, source=str(folder))
    precompute(config)
    assert "layout: ControlNet's prompt.json" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in config.cache.glob("**/*.tar")}
    write(folder / "prompt.json", lines([*rows, '{"broken": ']))
    precompute(replace(config, dry_run=True, max_bad_fraction=0.2))
    assert f"line {NUM_ROWS + 1}: not JSON" in capsys.readouterr().out
    (folder / "prompt.json").unlink()
    write(folder / "metadata.jsonl", lines(record(n) for n in range(NUM_ROWS)))
    precompute(config)
    assert "layout: table metadata.jsonl" in capsys.readouterr().out
    assert len(before) > 3
    assert {path: path.stat().st_mtime_ns for path in config.cache.glob("**/*.tar")} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"conditioning_data_dir": "a", "conditioning_from": "canny"},
            "--conditioning-data-dir and --conditioning-from: give one of them",
        ),
        (
            {"caption_extension": "tags", "caption": ""},
            "--caption-extension and --caption: give one of them",
        ),
    ],
)
def test_options_that_exclude_each_other(
    fresh: PrecomputeConfig, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(fresh, **settings)  # type: ignore[arg-type]


def test_the_command_says_what_is_missing_and_how_to_give_it(
    command: Callable[..., Outcome], fresh: PrecomputeConfig, tmp_path: Path
) -> None:
    write_image(tmp_path / "mine" / "0.png", 0)
    outcome = command("precompute", *flags(replace(fresh, source=str(tmp_path / "mine"))))
    assert outcome.exit_code == 2
    assert "mine: 1 images and no captions" in outcome.output
    assert not fresh.cache.exists()
