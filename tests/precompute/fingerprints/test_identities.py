"""What the identities of text, latents and conditioning hold: each thing that counts, and no more.

A component is a folder of small files here, since only their bytes count.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from precompute.config import PrecomputeConfig
from precompute.fingerprints import fingerprint
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.encoder_spec import (
    EncoderSpecs,
    LatentSettings,
    TextSettings,
    latent_identity,
    read_specs,
    text_identity,
)
from precompute.fingerprints.fingerprint import hash_component
from precompute.planning import identities
from precompute.planning.identities import find_identities
from sd3.annotators.annotator import Annotator

TEXT = TextSettings(77, "bfloat16", "float16", allow_tf32=True)
LATENTS = LatentSettings(512, [(512, 512)], "mean", "bfloat16", "float16", "white", allow_tf32=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of components, each with a configuration, weights and tokenizer files."""
    for name in (*TEXT.components, "vae"):
        folder = tmp_path / "model" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"width": 4, "_name_or_path": "here"}')
        (folder / "model.safetensors").write_bytes(b"weights of " + name.encode())
        (folder / "model.fp16.safetensors").write_bytes(b"half of " + name.encode())
        (folder / "vocabulary.json").write_text('{"a": 0}')
        (folder / "merges.txt").write_text("a b\n")
        (folder / "spiece.model").write_bytes(b"pieces")
    return tmp_path / "model"


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "hashes.npy")


@pytest.mark.parametrize(
    "change",
    [{"max_sequence_length": 78}, {"compute_dtype": "float16"}, {"cache_dtype": "float32"}],
    ids=str,
)
def test_each_setting_of_the_text_encoders_counts(
    model: Path, digests: DigestCache, change: dict[str, Any]
) -> None:
    settings = TextSettings(**vars(TEXT) | change)
    before = text_identity(model, None, TEXT, digests)
    assert text_identity(model, None, settings, digests) == before | change


@pytest.mark.parametrize(
    ("change", "entries"),
    [
        ({"posterior": "mean_std"}, {"posterior": "mean_std"}),
        ({"compute_dtype": "float16"}, {"compute_dtype": "float16"}),
        ({"cache_dtype": "float32"}, {"cache_dtype": "float32"}),
        ({"shapes": [(64, 128)]}, {"buckets": [[64, 128]]}),
        # Its activations fit as long as an image has no more pixels than one of 1024 px.
        ({"resolution_px": 1024}, {"resolution": 1024, "tiled": False}),
        ({"resolution_px": 1088}, {"resolution": 1088, "tiled": True}),
    ],
    ids=str,
)
def test_each_setting_of_the_vae_counts(
    model: Path, digests: DigestCache, change: dict[str, Any], entries: dict[str, Any]
) -> None:
    settings = LatentSettings(**vars(LATENTS) | change)
    before = latent_identity(model, None, LATENTS, digests)
    assert latent_identity(model, None, settings, digests) == before | entries


@pytest.mark.parametrize(
    ("compute_dtype", "allow_tf32", "counts"),
    [("float32", False, True), ("float32", True, False), ("bfloat16", False, False)],
)
def test_products_in_full_count_where_float32_is_computed(
    model: Path, digests: DigestCache, compute_dtype: str, allow_tf32: bool, counts: bool
) -> None:
    changes: dict[str, Any] = {"compute_dtype": compute_dtype, "allow_tf32": allow_tf32}
    for identity in (
        text_identity(model, None, replace(TEXT, **changes), digests),
        latent_identity(model, None, replace(LATENTS, **changes), digests),
    ):
        assert ("allow_tf32" in identity) == counts


@pytest.mark.parametrize("component", [*TEXT.components, "vae"])
def test_each_component_counts(model: Path, digests: DigestCache, component: str) -> None:
    def both() -> dict[str, Any]:
        text = text_identity(model, None, TEXT, digests)
        return text | latent_identity(model, None, LATENTS, digests)

    before = both()
    (model / component / "config.json").write_text('{"width": 5}')
    after = both()
    assert {name for name in before if before[name] != after[name]} == {component}


@pytest.mark.parametrize(
    ("name", "content", "counts"),
    [
        ("config.json", '{"width": 5}', True),
        ("config.json", '{"_name_or_path": "there",  "width": 4, "torch_dtype": "float16"}', False),
        ("model.safetensors", "other weights", True),
        ("model.fp16.safetensors", "other weights", False),
        ("vocabulary.json", '{"a": 1}', True),
        ("vocabulary.json", '{ "a":0 }', False),
        ("merges.txt", "b a\n", True),
        ("spiece.model", "others", True),
        ("model.safetensors.index.json", "{}", False),
        ("README.md", "text", False),
    ],
)
def test_what_a_model_computes_with_counts(
    model: Path, digests: DigestCache, name: str, content: str, counts: bool
) -> None:
    before = hash_component(model / "vae", None, digests)
    (model / "vae" / name).write_text(content)
    assert (hash_component(model / "vae", None, digests) != before) == counts


def test_of_two_variants_the_one_that_is_loaded_counts(model: Path, digests: DigestCache) -> None:
    plain, half = (hash_component(model / "vae", name, digests) for name in (None, "fp16"))
    assert plain != half
    (model / "vae" / "model.safetensors").write_text("other weights")
    assert hash_component(model / "vae", "fp16", digests) == half
    (model / "vae" / "model.fp16.safetensors").write_text("other weights")
    assert hash_component(model / "vae", "fp16", digests) != half


def test_all_bytes_of_a_large_file_count(
    model: Path, digests: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 10)
    weights, found = model / "vae" / "model.safetensors", set()
    for last in (b"a", b"b"):
        weights.write_bytes(bytes(35) + last)
        found.add(hash_component(model / "vae", None, digests))
    assert len(found) == 2


def test_the_digest_of_a_file_is_kept_until_the_file_changes(
    model: Path, digests: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.sources.file_versions.SETTLED_NS", 0)
    weights, found = model / "vae" / "model.safetensors", []
    for year, content in enumerate((b"weights", b"weights", b"changed")):
        weights.write_bytes(content)
        os.utime(weights, (1e9, 1e9 + year))
        found.append(hash_component(model / "vae", None, digests))
    assert found[0] == found[1] != found[2]


def test_the_largest_bucket_has_the_most_pixels() -> None:
    # 30,720, 36,864 and 20,480 pixels.
    assert replace(LATENTS, shapes=[(96, 320), (192, 192), (320, 64)]).largest_shape == (192, 192)


def test_the_specs_are_those_that_are_asked_for(
    base: Path, precompute_config: PrecomputeConfig
) -> None:
    config = replace(precompute_config, resolution=128, buckets=True, conditioning_range="0_1")
    specs: EncoderSpecs = read_specs(base, config)
    assert (specs.latents.pixel_range, specs.conditioning.pixel_range) == ("-1_1", "0_1")
    # Of 64 x 256, 128 x 128 and 256 x 64 px: height and width, an eighth of each.
    assert specs.grids == [(32, 8), (16, 16), (8, 32)]


def found_annotator(files: list[Path], former: list[str]) -> Annotator:
    def draw(image: Image.Image) -> Image.Image:
        return image

    return Annotator("draw", {}, ["draw", "source"], draw, files=files, former=former)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The present and the former identity of text, latents and conditioning, as last found."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def note(_: Path, by_folder: dict[str, Any]) -> list[Any]:
        found[:] = by_folder.values()
        return [now for now, _ in found]

    monkeypatch.setattr(identities, "identities_in_use", note)
    return found


def test_the_conditioning_range_and_the_drawing_count(
    base: Path,
    precompute_config: PrecomputeConfig,
    digests: DigestCache,
    tmp_path: Path,
    forms: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    specs = read_specs(base, precompute_config)
    _, latents, control = find_identities(precompute_config, specs, None, digests)
    assert control == latents | {"conditioning_range": "-1_1", "drawn_by": []}
    other = replace(precompute_config, conditioning_range="0_1")
    assert find_identities(other, specs, None, digests)[2]["conditioning_range"] == "0_1"

    # A former version knew of an annotator's name and source, and of no more.
    alone = found_annotator([], ["module:draw", "source"])
    weights = tmp_path / "weights.npy"
    weights.write_bytes(b"1")
    reading = found_annotator([weights], ["module:draw", "source"])
    find_identities(precompute_config, specs, alone, digests)
    assert [one["drawn_by"] for one in forms[2]] == [["draw", "source"], ["module:draw", "source"]]
    drawn_by = []
    for content in (b"1", b"2"):
        weights.write_bytes(content)
        find_identities(precompute_config, specs, reading, digests)
        now, former = forms[2]
        assert former["drawn_by"] == now["drawn_by"] != ["module:draw", "source"]
        drawn_by.append(json.dumps(now["drawn_by"]))
    assert drawn_by[0] != drawn_by[1]
