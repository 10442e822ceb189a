"""What the manifest tells of a cache: counts, shapes, digests."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShardError
from shards.format import manifest
from shards.format.product import captions_digest
from shards.format.records import Record
from shards.format.sidecar import Sidecar
from shards.format.writer import write_shard

# Latents of 8 x 8, 4 x 12 and 12 x 4 in turns; see tests.conftest.bucketed.
NUM_SHARDS, IMAGES_A_SHARD = 7, 5


def test_shards_held_out_have_no_training_records(bucketed: Path) -> None:
    found = replace(manifest.load(bucketed), held_out=[1, 3])
    for _ in range(2):
        assert found.training_records("conditioning") == [5, 0, 5, 0, 5, 5, 5]
    assert found.conditioning["conditioning"].shard_records == [IMAGES_A_SHARD] * NUM_SHARDS


def test_images_are_counted_by_bucket(bucketed: Path) -> None:
    assert manifest.load(bucketed).bucket_records() == [15, 10, 10]


def test_height_comes_before_width(bucketed: Path) -> None:
    found = manifest.load(bucketed)
    assert found.record_specs("latents", 1)["latent"].shape == (16, 4, 12)
    pairs = found.record_specs("validation/conditioning", 1)
    assert pairs["conditioning_latent"].shape == (16, 4, 12)
    factor = found.latent_spec.vae_scale_factor
    assert pairs["conditioning_image"].shape == (3, 4 * factor, 12 * factor)


def test_a_run_depends_on_the_fingerprints_of_all_it_reads(bucketed: Path) -> None:
    found = manifest.load(bucketed)
    product = found.conditioning["conditioning"]
    changes: dict[str, dict[str, Any]] = {
        "text": {"text": replace(found.text, fingerprint="new")},
        "latents": {"latents": replace(found.latents, fingerprint="new")},
        "conditioning": {"conditioning": {"conditioning": replace(product, fingerprint="new")}},
        "captions": {"captions": "new"},
    }
    before = found.fingerprints("conditioning")
    assert before.keys() == changes.keys()
    for name, change in changes.items():
        assert replace(found, **change).fingerprints("conditioning") == before | {name: "new"}


def test_a_manifest_that_was_changed_is_refused(bucketed: Path, tmp_path: Path) -> None:
    text = (bucketed / "manifest.json").read_text()
    changed = text.replace('"num_skipped": 0', '"num_skipped": 1')
    assert changed != text
    (tmp_path / "manifest.json").write_text(changed)
    with pytest.raises(ShardError, match="changed since it was written"):
        manifest.load(tmp_path)


def short_digest(value: object) -> str:
    """D of docs/shard-format.md."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:32]


def test_the_digest_of_captions_is_that_of_keys_and_prompts(tmp_path: Path) -> None:
    key = "000000-00000-0123456789abcdef"

    def latents(prompt: str) -> Sidecar:
        return write_shard(tmp_path, 0, [Record(key, {}, {})], fingerprint="f", prompts=[[prompt]])

    for prompt in (key, key.replace("a", "b")):
        expected = short_digest([short_digest([[key], [[prompt]]])])
        assert captions_digest([latents(prompt)]) == expected


def test_the_first_missing_shards_of_an_incomplete_cache_are_named(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    for shard in (2, 4):
        (tmp_path / "latents" / f"{shard:06d}.json").touch()
    with pytest.raises(ShardError, match=r"latents: 2 finished, missing 000000, 000001, 000003\)"):
        manifest.load(tmp_path)
