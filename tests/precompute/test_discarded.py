"""Before much of a cache is thrown away, a run says what would go and asks for --overwrite."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from common.errors import ConfigError
from common.provenance import RUN
from precompute.config import PrecomputeConfig
from precompute.discarded import (
    SECONDS_A_RECORD,
    Discarded,
    find_discarded,
    seconds_a_record,
)
from precompute.planning.prepare import prepare
from precompute.run import precompute
from shards.format import manifest, sidecar
from tests.conftest import NUM_ROWS, Outcome, flags
from tests.precompute.test_again import again, edit, repaint, tars  # noqa: F401


@pytest.fixture
def careful(again: PrecomputeConfig) -> PrecomputeConfig:  # noqa: F811
    """A copy of the cache and of its source, without leave to throw anything away."""
    return replace(again, overwrite=False)


def counts(config: PrecomputeConfig) -> dict[str, tuple[int, int]]:
    """How many records would go, and how many there are, by product."""
    return {one.folder: (one.going, one.standing) for one in find_discarded(prepare(config))}


NUM_TEXTS = NUM_ROWS + 1  # and the empty prompt


def test_what_is_as_it_was_goes_ahead(careful: PrecomputeConfig) -> None:
    assert counts(careful) == {}
    precompute(careful)


def test_another_resolution_is_refused_and_changes_nothing(careful: PrecomputeConfig) -> None:
    before = tars(careful)
    other = replace(careful, resolution=32)
    everything = (NUM_ROWS, NUM_ROWS)
    assert counts(other) == {"latents": everything, "conditioning/conditioning": everything}
    with pytest.raises(
        ConfigError, match=r"latents: 10 of 10 records, .*resolution was 64, is 32"
    ) as raised:
        precompute(other)
    assert str(raised.value).endswith("Give --overwrite to go ahead, or another --cache.")
    assert tars(careful) == before
    assert manifest.load(careful.cache)
    precompute(replace(other, overwrite=True))
    assert tars(careful) != before


def test_other_controls_are_named(careful: PrecomputeConfig) -> None:
    precompute(replace(careful, conditioning_name="depth"))
    with pytest.raises(ConfigError, match="other controls, which go with their latents: 'depth'"):
        precompute(replace(careful, resolution=32))
    with pytest.raises(ConfigError) as raised:  # the text alone goes
        precompute(replace(careful, max_sequence_length=24))
    assert "depth" not in str(raised.value)
    assert f"text: {NUM_TEXTS} of {NUM_TEXTS} records" in str(raised.value)


@pytest.mark.parametrize(("num_edited", "is_refused"), [(1, False), (2, True)])
def test_a_tenth_is_the_limit(careful: PrecomputeConfig, num_edited: int, is_refused: bool) -> None:
    for row in range(num_edited):
        repaint(careful, f"target/{row}.png")
    expected = (num_edited, NUM_ROWS)
    assert counts(careful) == {"latents": expected, "conditioning/conditioning": expected}
    if is_refused:
        with pytest.raises(ConfigError, match=f"latents: {num_edited} of {NUM_ROWS} records"):
            precompute(careful)
    else:
        precompute(careful)


def test_other_conditioning_images_count(careful: PrecomputeConfig) -> None:
    for row in range(3):
        repaint(careful, f"source/{row}.png")
    assert counts(careful) == {"conditioning/conditioning": (3, NUM_ROWS)}


def test_of_finished_shards_no_whole_sidecar_is_read(
    careful: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaint(careful, "source/0.png")
    context = prepare(careful)
    read: list[tuple[str, int]] = []

    def load(folder: Path, shard: int) -> sidecar.Sidecar:
        read.append((folder.name, shard))
        return whole(folder, shard)

    whole = sidecar.load_present
    monkeypatch.setattr(sidecar, "load_present", load)
    find_discarded(context)
    assert context.products.conditioning.num_shards > 1
    assert read == [("conditioning", 0)]


def test_a_wrong_folder_is_noticed(careful: PrecomputeConfig, tmp_path: Path) -> None:
    edit(careful, lambda rows: rows.__delitem__(slice(3, None)))
    going = (NUM_ROWS - 3, NUM_ROWS)
    found = counts(careful)
    assert found["latents"] == found["conditioning/conditioning"] == going
    assert found["text"] == (NUM_TEXTS - 4, NUM_TEXTS)


def test_new_rows_throw_nothing_away(careful: PrecomputeConfig) -> None:
    for kind in ("source", "target"):
        path = Path(str(careful.source)) / kind
        Image.open(path / "0.png").rotate(90).save(path / "new.png")
    row = {"source": "source/new.png", "target": "target/new.png", "prompt": "a new one"}
    edit(careful, lambda rows: rows.append(row))
    assert counts(careful) == {}
    precompute(careful)
    assert manifest.load(careful.cache).latents.num_records == NUM_ROWS + 1


def test_who_was_told_once_is_not_asked_again(
    careful: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was interrupted goes on without --overwrite, and so do other workers."""
    other = replace(careful, resolution=32)
    with monkeypatch.context() as patched:
        patched.setattr("precompute.run._encode", lambda context: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            precompute(replace(other, overwrite=True))
    precompute(other)


def test_a_cache_without_its_plan_is_measured_by_its_shards(careful: PrecomputeConfig) -> None:
    (careful.cache / "plan.safetensors").unlink()
    assert counts(replace(careful, resolution=32))["latents"] == (NUM_ROWS, NUM_ROWS)
    assert counts(careful) == {}


def test_the_hours_are_those_of_the_encoders(fresh: PrecomputeConfig) -> None:
    precompute(fresh)
    run = json.loads((fresh.cache / RUN).read_text())
    assert run[SECONDS_A_RECORD].keys() == {"text", "images"}
    run[SECONDS_A_RECORD] = {"text": 360.0, "images": 540.0}
    (fresh.cache / RUN).write_text(json.dumps(run))
    found = {one.folder: one for one in find_discarded(prepare(replace(fresh, resolution=32)))}
    assert found["latents"].hours == pytest.approx(NUM_ROWS * 540 / 3600)
    assert "1.5 h of encoding" in str(found["latents"])
    (text,) = find_discarded(prepare(replace(fresh, max_sequence_length=24)))
    assert text.hours == pytest.approx(NUM_TEXTS * 360 / 3600)
    run[SECONDS_A_RECORD] = {"text": 60.0, "images": 540.0}
    (fresh.cache / RUN).write_text(json.dumps(run))
    precompute(replace(fresh, max_sequence_length=24))  # measures texts, and keeps the rest
    again_ = json.loads((fresh.cache / RUN).read_text())[SECONDS_A_RECORD]
    assert again_["images"] == 540.0
    assert again_["text"] != 60.0


def test_without_a_measurement_no_hours_are_told(careful: PrecomputeConfig) -> None:
    (careful.cache / RUN).unlink()
    found = find_discarded(prepare(replace(careful, resolution=32)))
    assert [one.hours for one in found] == [None, None]
    assert str(Discarded("text", 1, 2, None, "")) == "  text: 1 of 2 records"


def test_a_former_versions_cache_has_no_measurement(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text('{"command": "precompute"}')
    assert seconds_a_record(tmp_path) == {}


def test_the_dry_run_says_the_same(
    careful: PrecomputeConfig, command: Callable[..., Outcome]
) -> None:
    shutil.rmtree(careful.cache / "validation")
    outcome = command("precompute", *flags(replace(careful, resolution=32, dry_run=True)))
    assert outcome.exit_code == 0, outcome.output
    assert "  latents: 10 of 10 records" in outcome.output
    assert "for that --overwrite must be given" in outcome.output
    refused = command("precompute", *flags(replace(careful, resolution=32)))
    assert refused.exit_code == 2
    assert "Give --overwrite to go ahead, or another --cache." in refused.output


@pytest.mark.slow
def test_a_changed_source_is_told_in_rows(
    again: PrecomputeConfig,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        for row in (4, 5, 6):
            rows[row]["prompt"] = f"number {row}"
        rows.append(rows[0] | {"target": "source/0.png"})
        rows.append(rows[0] | {"target": "source/1.png"})

    edit(again, change)
    repaint(again, "target/2.png")
    precompute(again)
    said = capsys.readouterr().out
    told = "2 rows more, 1 image changed, 3 captions changed"
    assert f"the source since the last run: {told}\n" in said
    (remembered,) = manifest.load(again.cache).made_by["changes"]
    assert remembered["what"] == told
    before = manifest.load(again.cache)
    precompute(again)
    assert "since the last run" not in capsys.readouterr().out
    assert manifest.load(again.cache) == before
    edit(again, lambda rows: rows.__delitem__(slice(9, None)))
    precompute(again)
    assert "the source since the last run: 3 rows fewer\n" in capsys.readouterr().out
    whats = [one["what"] for one in manifest.load(again.cache).made_by["changes"]]
    assert whats == [told, "3 rows fewer"]
    # Of two rows with one image, one stood there before.
    edit(again, lambda rows: rows[3].update(target=rows[0]["target"]))
    precompute(again)
    assert "the source since the last run: 1 image changed" in capsys.readouterr().out


def test_rows_that_are_held_out_or_mirrored_are_no_others(
    again: PrecomputeConfig,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    precompute(replace(again, validation_rows=2))
    precompute(replace(again, validation_rows=2, random_flip=True))
    assert "since the last run" not in capsys.readouterr().out
