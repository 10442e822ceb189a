"""Sealing: what is compared and kept, two at once, and after one that was killed."""

import json
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShardError
from shards import verify
from shards.format import manifest, seal
from shards.format.expected_cache import ExpectedCache, read_expected, write_expected


def another_control(cache: Path, name: str) -> ExpectedCache:
    """Add a copy of the control to a cache, as if just made; return what its maker expects."""
    for kind in ("conditioning", "validation"):
        shutil.copytree(cache / kind / "conditioning", cache / kind / name)
    expected, _ = read_expected(cache)
    products = {
        folder.replace("/conditioning", f"/{name}"): product
        for folder, product in expected.products.items()
    }
    return replace(expected, products=products, conditioning_name=name)


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_two_controls_that_are_sealed_at_once_are_both_there(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = [another_control(copy, name) for name in ("canny", "depth")]
    write = manifest.write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)  # both have read what is there before either writes
        write(*arguments)

    monkeypatch.setattr(manifest, "write", slowly)
    threads = [threading.Thread(target=seal.seal, args=(copy, maker)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(manifest.load(copy).conditioning) == ["canny", "conditioning", "depth"]
    assert sorted(manifest.load(copy).validation) == ["canny", "conditioning", "depth"]
    assert all(not faults for _, faults in verify.faults(copy))
    assert not list(copy.glob("*.tmp-*"))


def test_one_that_was_killed_keeps_nobody_from_sealing(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "ABANDONED_AFTER_S", 0.1)
    (copy / seal.CLAIM).touch()
    seal.seal(copy, another_control(copy, "canny"))
    assert sorted(manifest.load(copy).conditioning) == ["canny", "conditioning"]
    assert not (copy / seal.CLAIM).exists()


def test_a_sealed_cache_is_left_alone(copy: Path) -> None:
    expected, _ = read_expected(copy)
    before = copy.stat().st_mtime_ns  # changes when a file is made, renamed or removed in it
    assert seal.seal(copy, expected) == manifest.load(copy)
    assert copy.stat().st_mtime_ns == before


def test_each_sidecar_is_parsed_once(copy: Path, parsed: Counter[str]) -> None:
    expected, _ = read_expected(copy)
    seal.seal(copy, expected)
    assert len(parsed) == sum(len(each.fingerprints) for each in expected.products.values())
    assert {*parsed.values()} == {1}


def test_shards_with_other_captions_or_fingerprints_count_as_missing(copy: Path) -> None:
    expected, _ = read_expected(copy)
    assert expected.missing(copy) == {}
    latents, text = expected.products["latents"], expected.products["text"]
    other = replace(
        expected,
        products=expected.products
        | {
            "latents": replace(latents, captions=[latents.captions[0], "0" * 32]),
            "text": replace(text, fingerprints=["0" * 32, *text.fingerprints[1:]]),
        },
    )
    assert other.missing(copy) == {"latents": [1], "text": [0]}
    with pytest.raises(ShardError, match=r"not complete; .*latents lacks 1 of 2 shards \(000001\)"):
        seal.seal(copy, other)


def change_first(folder: Path, **edit: object) -> None:
    path = folder / "000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))


def test_other_controls_go_when_the_latents_change(copy: Path) -> None:
    expected, _ = read_expected(copy)
    seal.seal(copy, another_control(copy, "canny"))
    assert sorted(seal.seal(copy, expected).conditioning) == ["canny", "conditioning"]
    change_first(copy / "latents", fingerprint="0" * 32)
    latents = expected.products["latents"]
    changed = replace(latents, fingerprints=["0" * 32, *latents.fingerprints[1:]])
    now = seal.seal(copy, replace(expected, products=expected.products | {"latents": changed}))
    assert list(now.conditioning) == list(now.validation) == ["conditioning"]
    assert list(now.conditioning_specs) == ["conditioning"]


def test_other_controls_lose_their_validation_pairs_when_prompts_are_encoded_otherwise(
    copy: Path,
) -> None:
    expected, _ = read_expected(copy)
    seal.seal(copy, another_control(copy, "canny"))
    text = replace(expected.products["text"], identity={"encoders": "others"})
    now = seal.seal(copy, replace(expected, products=expected.products | {"text": text}))
    assert sorted(now.conditioning) == ["canny", "conditioning"]
    assert {name: pairs.num_records for name, pairs in now.validation.items()} == {
        "canny": 0,
        "conditioning": 2,
    }


def test_a_cache_is_incomplete_from_withdrawing_to_sealing(copy: Path) -> None:
    expected, _ = read_expected(copy)
    before = manifest.load(copy)
    seal.withdraw(copy)
    assert not (copy / "manifest.json").exists()
    assert seal.previous_manifest(copy) == before
    with pytest.raises(ShardError, match="incomplete, manifest"):
        manifest.load(copy)
    seal.withdraw(copy)  # by another worker
    assert seal.seal(copy, expected) == manifest.load(copy) == before
    assert not (copy / "manifest.previous.json").exists()


def test_rows_that_lack_a_picture_count_as_left_out(copy: Path) -> None:
    # Four rows of three pictures each, of which ten have records: a row lacks two, or two lack one.
    expected, _ = read_expected(copy)
    expected = replace(expected, num_rows=4, num_images=12, images_per_row=3, max_bad_fraction=0.25)
    assert seal.seal(copy, expected).num_skipped == 1
    assert seal.seal(copy, replace(expected, images_per_row=0)).num_skipped == 1  # a former plan
    assert seal.seal(copy, replace(expected, max_bad_fraction=0.2)).num_skipped == 1  # a single one
    with pytest.raises(ShardError, match=r"1 of 4 rows cannot be used, more than .* 0 "):
        seal.seal(copy, replace(expected, max_bad_fraction=0.0))


def test_held_out_rows_may_have_fewer_pictures(copy: Path) -> None:
    # One row of four pictures; of those held out 4 have one each, or two have two, or one has six.
    expected, _ = read_expected(copy)
    records = manifest.load(copy).conditioning["conditioning"].shard_records
    assert sum(records) == 10
    held_out = list(range(1, len(records)))
    expected = replace(expected, held_out=held_out, max_bad_fraction=1.0)
    there, rest = records[0], sum(records[1:])
    for num_rows, num_held_out, each, planned, lacking in (
        (1 + rest, rest, there, there + rest, 0),
        (2 + rest, rest, there, 2 * there + rest, 1),
        (2 + rest, rest + 1, there, there + rest + 1, 1),
        (2 + rest + 2, rest + 2, there, 2 * there + rest + 2, 3),
        (1 + rest, rest, there + 1, there + 1 + rest, 1),
    ):
        wanted = replace(
            expected,
            num_rows=num_rows,
            num_held_out=num_held_out,
            images_per_row=each,
            num_images=planned,
        )
        assert seal.seal(copy, wanted).num_skipped == lacking


def test_a_plan_is_replaced_unless_it_is_the_same(copy: Path) -> None:
    expected, arrays = read_expected(copy)
    path = copy / "plan.safetensors"
    before = path.stat().st_ino
    write_expected(copy, expected, arrays)
    assert path.stat().st_ino == before  # a file that is replaced is another file
    for maker in ("one", "two"):  # plans of equal length
        write_expected(copy, replace(expected, made_by={"by": maker}), arrays)
        assert read_expected(copy)[0].made_by == {"by": maker}
