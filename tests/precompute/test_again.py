"""Precompute run again: what stands in the cache stays, and only what is new is encoded."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.circles import random_circles as draw
from demo.circles import write_circles
from precompute.config import PrecomputeConfig
from precompute.encoding.shard_build import prepare_build
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.run import precompute
from precompute.sources.files.listed import Listed
from shards import verify
from shards.format import manifest, sidecar
from shards.reading.cache import Cache
from tests.conftest import NUM_ROWS, SHARD_MB

PER_LATENT_SHARD = 8  # in the cache of conftest.py: 33,300 bytes of 4,096
LATENT_SHARDS = 2
Edit = Callable[[list[dict[str, Any]]], None]


class Encoded:
    """How many records the encoders were asked for, by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: dict[str, int] = {}
        original = prepare_build

        def counting(product: Any, shard: int, metadata: Any) -> Any:
            build = original(product, shard, metadata)
            folder = product.folder.parent.name
            kind = folder if folder == "conditioning" else product.folder.name
            self.records[kind] = self.records.get(kind, 0) + len(build.to_encode)
            return build

        monkeypatch.setattr("precompute.encoding.text_pass.prepare_build", counting)
        monkeypatch.setattr("precompute.encoding.image_pass.prepare_build", counting)

    def taken(self) -> dict[str, int]:
        found, self.records = self.records, {}
        return {kind: count for kind, count in found.items() if count}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    return Encoded(monkeypatch)


@pytest.fixture
def again(cache: Path, fresh: PrecomputeConfig, circles: Path, tmp_path: Path) -> PrecomputeConfig:
    """A copy of the cache, and of its source, to be changed."""
    shutil.copytree(cache, fresh.cache)
    shutil.copytree(circles, tmp_path / "source")
    return replace(fresh, source=str(tmp_path / "source"))


def edit(config: PrecomputeConfig, change: Edit) -> None:
    path = Path(str(config.source)) / "prompt.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def repaint(config: PrecomputeConfig, name: str) -> None:
    path = Path(str(config.source)) / name
    Image.open(path).rotate(90).save(path)


def tars(config: PrecomputeConfig) -> dict[str, bytes]:
    return {
        path.relative_to(config.cache).as_posix(): path.read_bytes()
        for path in sorted(config.cache.rglob("*.tar"))
    }


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def contents(config: PrecomputeConfig) -> dict[str, tuple[list[float], list[float], list[str]]]:
    """What training gets, by the image's content: whatever the places."""
    found = Cache(config.cache, config.conditioning_name)
    result = {}
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            key, tensors, prompts = found.sample(shard, index)
            result[key.rpartition("-")[2]] = (
                tensors["latent"].flatten().tolist(),
                tensors["conditioning_latent"].flatten().tolist(),
                [found.text.metadata(*found.text.locate(one))["prompt"] for one in prompts],
            )
    return result


def assert_as_from_nothing(config: PrecomputeConfig, tmp_path: Path) -> None:
    """The cache holds what one made from nothing does, and is whole."""
    other = replace(config, cache=tmp_path / "from-nothing")
    precompute(other)
    ours, theirs = contents(config), contents(other)
    assert ours.keys() == theirs.keys()
    for key, (latent, control, prompts) in ours.items():
        assert prompts == theirs[key][2]
        # A record that stands elsewhere in its batch may differ in the last digit.
        assert latent == pytest.approx(theirs[key][0], rel=1e-4, abs=1e-4)
        assert control == pytest.approx(theirs[key][1], rel=1e-4, abs=1e-4)
    assert all(not faults for _, faults in verify.faults(config.cache))
    before = tars(config)
    precompute(config)
    assert tars(config) == before


def test_the_layout_of_the_cache(cache: Path) -> None:
    found = manifest.load(cache)
    assert found.latents.shard_records == [PER_LATENT_SHARD, NUM_ROWS - PER_LATENT_SHARD]
    assert int(SHARD_MB * 1e6 / (16 * 8 * 8 * 4)) == PER_LATENT_SHARD


def test_more_rows_encode_only_those(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    extra = Path(str(again.source)).parent / "extra"
    write_circles(extra, draw(2, seed=8))

    def add(rows: list[dict[str, Any]]) -> None:
        for number, line in enumerate((extra / "prompt.json").read_text().splitlines()):
            row = json.loads(line)
            for kind in ("source", "target"):
                name = f"{kind}/more{number}.png"
                shutil.copy(extra / row[kind], Path(str(again.source)) / name)
                row[kind] = name
            rows.append(row)

    edit(again, add)
    before = tars(again)
    precompute(again)
    assert encoded.taken() == {"text": 2, "latents": 2, "conditioning": 2}
    # The part-filled last shards grow; no other is touched.
    touched = changed(before, tars(again))
    assert [name for name in touched if "text" not in name] == [
        "conditioning/conditioning/000001.tar",
        "latents/000001.tar",
    ]
    assert_as_from_nothing(again, tmp_path)


def test_an_edited_image_is_encoded_again_alone(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    before = tars(again)
    repaint(again, "target/3.png")
    precompute(again)
    # The conditioning latent as well: its place and size follow the image's.
    assert encoded.taken() == {"latents": 1, "conditioning": 1}
    assert changed(before, tars(again)) == [
        "conditioning/conditioning/000000.tar",
        "latents/000000.tar",
    ]
    assert_as_from_nothing(again, tmp_path)


@pytest.mark.slow
def test_an_edited_conditioning_image_touches_no_latent(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    before = tars(again)
    repaint(again, "source/9.png")
    precompute(again)
    assert encoded.taken() == {"conditioning": 1}
    assert changed(before, tars(again)) == ["conditioning/conditioning/000001.tar"]
    assert_as_from_nothing(again, tmp_path)


def test_an_edited_caption_touches_one_shard_of_text(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    before = tars(again)
    edit(again, lambda rows: rows[4].update(prompt="something else"))
    precompute(again)
    assert encoded.taken() == {"text": 1}
    (touched,) = changed(before, tars(again))
    assert touched.startswith("text/")
    assert_as_from_nothing(again, tmp_path)


@pytest.mark.slow
def test_inserted_rows_touch_only_the_last_shards(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    source = Path(str(again.source))
    before = tars(again)
    for kind in ("source", "target"):
        Image.open(source / kind / "0.png").rotate(180).save(source / kind / "between.png")
    row = {"source": "source/between.png", "target": "target/between.png", "prompt": "between"}
    edit(again, lambda rows: rows.insert(2, row))
    precompute(again)
    assert encoded.taken() == {"text": 1, "latents": 1, "conditioning": 1}
    assert "latents/000000.tar" not in changed(before, tars(again))
    assert_as_from_nothing(again, tmp_path)


def test_deleted_rows_leave_gaps_and_encode_nothing(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    before = tars(again)
    edit(again, lambda rows: rows.pop(2))
    precompute(again)
    assert encoded.taken() == {}
    touched = changed(before, tars(again))
    assert "latents/000000.tar" in touched
    assert "latents/000001.tar" not in touched
    assert manifest.load(again.cache).latents.shard_records == [7, 2]
    card = sidecar.load(again.cache / "latents", 0)
    assert card is not None
    assert [int(key.split("-")[1]) for key in card.keys] == [0, 1, 3, 4, 5, 6, 7]
    assert_as_from_nothing(again, tmp_path)


def test_rows_in_another_order_encode_nothing(
    again: PrecomputeConfig, encoded: Encoded, tmp_path: Path
) -> None:
    before = tars(again)
    edit(again, lambda rows: rows.reverse())
    precompute(again)
    assert encoded.taken() == {}
    assert tars(again) == before


def test_a_kept_record_has_the_bytes_that_encoding_gives(
    again: PrecomputeConfig, encoded: Encoded
) -> None:
    # Without what it could be taken from, the same shard is encoded from nothing.
    repaint(again, "target/3.png")
    precompute(again)
    expected = tars(again)
    encoded.taken()
    for folder in ("latents", "conditioning/conditioning"):
        (again.cache / folder / "000000.json").unlink()
    precompute(again)
    assert encoded.taken() == {"latents": 8, "conditioning": 8}
    assert tars(again) == expected


def test_a_damaged_record_is_not_taken_over(again: PrecomputeConfig, encoded: Encoded) -> None:
    repaint(again, "target/3.png")
    path = again.cache / "latents" / "000000.tar"
    card = sidecar.load(path.parent, 0)
    assert card is not None
    data = bytearray(path.read_bytes())
    data[card.spans[6][0] + 1000] ^= 1
    path.write_bytes(data)
    precompute(again)
    assert encoded.taken() == {"latents": 2, "conditioning": 1}
    assert all(not faults for _, faults in verify.faults(again.cache))


def test_a_cache_copied_without_its_plan_keeps_everything(
    again: PrecomputeConfig, encoded: Encoded
) -> None:
    (again.cache / "plan.safetensors").unlink()
    (again.cache / "hashes.npy").unlink(missing_ok=True)
    edit(again, lambda rows: rows.reverse())
    before = tars(again)
    precompute(again)
    assert encoded.taken() == {}
    assert tars(again) == before


def test_another_control_is_added_and_nothing_else_encoded(
    again: PrecomputeConfig, encoded: Encoded
) -> None:
    before = tars(again)
    precompute(replace(again, conditioning_name="canny", conditioning_from="canny"))
    # Its validation pairs are its own.
    assert encoded.taken() == {"conditioning": NUM_ROWS}
    assert all(tars(again)[name] == before[name] for name in before)
    found = manifest.load(again.cache)
    assert sorted(found.conditioning) == ["canny", "conditioning"]
    assert Cache(again.cache).sample(0, 0)[0] == Cache(again.cache, "canny").sample(0, 0)[0]


def test_a_mirrored_set_beside_the_plain_one(again: PrecomputeConfig, encoded: Encoded) -> None:
    precompute(replace(again, random_flip=True))
    assert encoded.taken() == {"latents": NUM_ROWS, "conditioning": NUM_ROWS}
    assert manifest.load(again.cache).conditioning["conditioning"].num_records == 2 * NUM_ROWS


def test_what_is_made_and_why_is_said(
    again: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(again)
    assert "already complete, nothing to do" in capsys.readouterr().out
    precompute(replace(again, resolution=48))
    said = capsys.readouterr().out
    assert "resolution was 64, is 48" in said
    assert "text: " in said
    assert "kept, 0 to make\n" in said.split("latents:")[0]
    edit(again, lambda rows: rows[4].update(prompt="something else"))
    precompute(replace(again, resolution=48))
    assert "1 to make (1 new or changed, 1 gone)" in capsys.readouterr().out
    precompute(replace(again, resolution=48, max_sequence_length=24))
    assert "max_sequence_length was 20, is 24" in capsys.readouterr().out


def test_a_second_run_reads_no_image_and_loads_no_encoder(
    again: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(str(again.source))
    for path in [*source.rglob("*"), *Path(again.pretrained_model_name_or_path).rglob("*")]:
        if path.is_file():
            os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(
        "precompute.sources.file_versions.SETTLED_NS", 0
    )  # their change times are of just now
    precompute(again)

    def never(*_: object, **__: object) -> object:
        raise AssertionError("read, hashed or loaded again")

    monkeypatch.setattr(Listed, "read", never)
    # What a hashed weight file holds.
    monkeypatch.setattr(
        "precompute.fingerprints.fingerprint.Content", never
    )  # of a hashed weight file
    monkeypatch.setattr(TextEncoders, "__init__", never)
    monkeypatch.setattr(VaeEncoder, "__init__", never)
    precompute(again)
