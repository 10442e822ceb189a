"""Rows that cannot be used, over many runs and many workers: each counted once, all judged."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

from common.errors import ShardError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards import verify
from shards.format import manifest, seal
from shards.format.bad_rows import too_many
from shards.format.expected_cache import read_expected
from tests.conftest import NUM_ROWS, Outcome
from tests.precompute.test_again import Encoded, encoded, tars  # noqa: F401  (a fixture)


def lines(source: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (source / "prompt.json").read_text().splitlines()]


def write_lines(source: Path, rows: list[dict[str, Any]]) -> None:
    (source / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoil(path: Path) -> None:
    """Damage an image so that only decoding notices it: a TIFF's header says nothing of its end."""
    Image.effect_noise((64, 64), 50).save(path, "TIFF")  # each another
    path.write_bytes(path.read_bytes()[:600])


@pytest.fixture
def spoilt(fresh: PrecomputeConfig, circles: Path, tmp_path: Path) -> PrecomputeConfig:
    """A source with two images and one conditioning image that cannot be decoded."""
    source = tmp_path / "source"
    shutil.copytree(circles, source)
    for name in ("target/1.png", "target/6.png", "source/8.png"):
        spoil(source / name)
    return replace(fresh, source=str(source), max_bad_fraction=0.3)


def test_rows_whose_lines_have_moved_are_counted_once(
    spoilt: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    precompute(spoilt)
    before = tars(spoilt)
    source = Path(str(spoilt.source))
    write_lines(source, lines(source)[::-1])
    encoded.taken()
    capsys.readouterr()
    precompute(spoilt)
    assert encoded.taken() == {}
    assert tars(spoilt) == before
    # A row of which the line has moved, then one more: an image that is missing.
    rows = lines(source)
    rows[0]["target"] = "target/nowhere.png"  # of line 10 before
    write_lines(source, rows)
    precompute(replace(spoilt, max_bad_fraction=0.4))
    assert manifest.load(spoilt.cache).num_skipped == 4
    write_lines(source, lines(source)[::-1])
    precompute(replace(spoilt, max_bad_fraction=0.4))
    write_lines(source, lines(source)[::-1])
    said = capsys.readouterr().out
    assert "4 rows were left out:\n  line 1, target/nowhere.png: No such" in said
    for line, name, fault in (
        (2, "target/8.png", "source/8.png: "),
        (4, "target/6.png", ""),
        (9, "target/1.png", ""),
    ):
        assert f"  line {line}, {name}: {fault}not a readable image" in said


@pytest.mark.parametrize(
    ("count", "fraction", "is_too_many"),
    [
        (1, 0.01, False),  # of ten: one odd sample does not end a run
        (2, 0.01, True),
        (1, 0.0, True),
        (0, 0.0, False),
        (10, 1.0, True),
    ],
)
def test_a_single_row_may_be_bad(count: int, fraction: float, is_too_many: bool) -> None:
    assert too_many(count, 10, fraction) == is_too_many


@pytest.mark.slow
def test_mirrors_of_a_bad_row_are_that_row(spoilt: PrecomputeConfig) -> None:
    config = replace(spoilt, random_flip=True)
    precompute(config)
    assert manifest.load(config.cache).num_skipped == 3
    precompute(config)
    with pytest.raises(ShardError, match="3 of 10 rows cannot be used"):
        precompute(replace(config, max_bad_fraction=0.29))


@pytest.mark.parametrize("by", [pytest.param("precompute", marks=pytest.mark.slow), "seal"])
def test_the_bound_holds_over_all_workers(
    spoilt: PrecomputeConfig, by: str, command: Callable[..., Outcome]
) -> None:
    # Shard 0 has one bad row, shard 1 another: neither part alone has too many.
    (Path(str(spoilt.source)) / "source" / "8.png").write_bytes(
        (Path(str(spoilt.source)) / "source" / "7.png").read_bytes()
    )
    spoil(Path(str(spoilt.source)) / "target" / "9.png")
    rows = lines(Path(str(spoilt.source)))
    del rows[6]
    write_lines(Path(str(spoilt.source)), rows)
    config = replace(spoilt, max_bad_fraction=0.2)
    rest = spoilt.cache.with_name("rest")
    precompute(replace(config, part="0/2"))
    strict = replace(config, part="1/2", max_bad_fraction=0.12)
    if by == "precompute":
        with pytest.raises(ShardError, match=r"2 of 9 rows cannot be used, more than .* 0\.12 a"):
            precompute(strict)
    else:
        precompute(replace(strict, cache=rest))
        shutil.copytree(rest, spoilt.cache, dirs_exist_ok=True)
        outcome = command("shards", "seal", spoilt.cache)
        assert outcome.exit_code == 2
        assert "2 of 9 rows cannot be used, more than --max-bad-fraction 0.12" in outcome.output
        assert "  line 2, target/1.png: not a readable image" in outcome.output
    assert not (spoilt.cache / "manifest.json").exists()
    precompute(replace(config, max_bad_fraction=0.23))
    assert manifest.load(spoilt.cache).num_skipped == 2


@pytest.mark.slow
def test_a_plan_without_the_number_of_rows_is_sealed(spoilt: PrecomputeConfig) -> None:
    precompute(spoilt)
    expected, _ = read_expected(spoilt.cache)
    former = replace(expected, num_rows=0, num_images=0, max_bad_fraction=1.0)
    assert seal.seal(spoilt.cache, former).num_skipped == 3


@pytest.mark.slow
def test_rows_are_tried_again_when_asked(
    spoilt: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Path(str(spoilt.source))
    for bad, good in (("target/1", "target/0"), ("target/6", "target/2"), ("source/8", "source/5")):
        shutil.copy(source / f"{good}.png", source / f"{bad}.png")
    (source / "target" / "3.png").unlink()  # which no codec mends
    held = {path: path.read_bytes() for path in source.glob("*/*.png")}
    unreadable = {held[source / name] for name in ("target/1.png", "source/8.png")}
    original = Image.open

    def without_a_codec(file: Any, *rest: Any) -> Any:
        if not isinstance(file, (str, Path)) and file.getvalue() in unreadable:
            raise UnidentifiedImageError("no codec")
        return original(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", without_a_codec)
        precompute(replace(spoilt, max_bad_fraction=1.0))
    encoded.taken()
    precompute(replace(spoilt, max_bad_fraction=1.0))
    assert encoded.taken() == {}
    assert manifest.load(spoilt.cache).num_skipped == 5
    precompute(replace(spoilt, max_bad_fraction=1.0, retry_bad_rows=True))
    # Of the five that are counted one is then found missing: row 3.
    assert encoded.taken() == {"latents": 3, "conditioning": 5}
    assert manifest.load(spoilt.cache).num_skipped == 1
    assert manifest.load(spoilt.cache).conditioning["conditioning"].num_records == NUM_ROWS - 1
    assert all(not faults for _, faults in verify.faults(spoilt.cache))
    precompute(replace(spoilt, max_bad_fraction=1.0, retry_bad_rows=True))
    assert encoded.taken() == {}
    complete = replace(spoilt, cache=spoilt.cache.with_name("at-once"), max_bad_fraction=1.0)
    precompute(complete)
    assert tars(spoilt) == tars(complete)


def test_rows_are_judged_before_a_complete_cache_is_taken_away(
    spoilt: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(spoilt)
    paths = [path for path in spoilt.cache.rglob("*") if path.suffix in {".json", ".tar"}]
    files = {path: path.read_bytes() for path in paths}
    again = replace(spoilt, max_bad_fraction=0.2, retry_bad_rows=True)
    with pytest.raises(ShardError, match=r"3 of 10 rows cannot be used, more than .* 0\.2 a"):
        precompute(again)
    assert {path: path.read_bytes() for path in files if path.is_file()} == files
    capsys.readouterr()
    precompute(replace(again, dry_run=True))
    # Two images in shard 0 and a conditioning image in shard 1, which both have to be tried again.
    said = capsys.readouterr().out
    for name, to_make in (("latents", 1), ("conditioning/conditioning", 2)):
        assert re.search(rf"^ *{name} +10 +2 +{to_make} ", said, re.MULTILINE), said
    assert {path: path.read_bytes() for path in files} == files
    assert manifest.load(spoilt.cache).num_skipped == 3


@pytest.mark.parametrize("when", ["before", "while decoding"])
def test_a_cache_without_images_is_refused(spoilt: PrecomputeConfig, when: str) -> None:
    for path in (Path(str(spoilt.source)) / "target").iterdir():
        if when == "before":
            path.unlink()
        else:
            spoil(path)
    config = replace(spoilt, max_bad_fraction=1.0, validation_prompt=(), validation_image=())
    with pytest.raises(ShardError, match=r"none of the 10 rows can be used:\n.*target/0.png"):
        precompute(config)
    assert not (config.cache / "manifest.json").exists()


def test_a_manifest_names_no_folders_of_this_machine(cache: Path, base: Path) -> None:
    assert manifest.load(cache).made_by["base"] == base.name
    assert str(base.parent) not in (cache / "manifest.json").read_text()
