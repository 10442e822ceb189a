"""The benchmarks of stage 1 in small: what they count is what arithmetic says."""

from pathlib import Path

import pytest
import torch

from benchmarks import planning, precompute, sealing
from benchmarks.random_weights import save_encoders
from benchmarks.synthetic import TINY, write_cache
from precompute.config import PrecomputeConfig
from precompute.planning.prepare import prepare
from shards.format import manifest, sidecar


def test_planning_a_few_thousand_rows(tmp_path: Path) -> None:
    for edition in (0, 1):
        source = planning.InventedRows(3000, edition)
        planning.write_digests(tmp_path / f"hashes{edition}.npy", source)
    found = planning.measure(3000, tmp_path)
    assert found["prompts"] == 2401  # four of five rows, and the empty prompt
    # 128 MB hold 244 latents of 524,288 bytes and 134 prompts of 950,272, less what breaks batches.
    assert found["shards"] == {"text": 19, "latents": 14, "conditioning": 14}
    # The first 30 rows changed: they stand in the first shard of each.
    assert found["again_same_shards"] == {"text": 18, "latents": 13, "conditioning": 13}


def test_sealing_and_verifying_a_few_records(tmp_path: Path) -> None:
    write_cache(tmp_path, TINY, 3, 5)
    before = manifest.load(tmp_path)
    sealing.caption_at_random(tmp_path)
    found = sealing.measure(tmp_path)
    assert (found["records"], found["shards"]) == (3 * 3 * 5 + 1, 3 * 3 + 1)
    # Sealed anew, with the captions that were drawn: some lie in other shards than their images'.
    after = manifest.load(tmp_path)
    assert after.captions != before.captions
    assert after.latents.shard_sha256 == before.latents.shard_sha256
    prompts = sidecar.load_present(tmp_path / "latents", 0).prompts
    assert {key[:6] for (key,) in prompts} > {"000001"}


def test_bytes_a_sample(tmp_path: Path) -> None:
    found = precompute.measure_bytes(tmp_path, 2.0)["512"]
    latent = 16 * 64 * 64 * 2
    text = 2 * (77 * 2048 + 77 * 4096 + 2048)
    for name, size in (("ours: latent", latent), ("ours: text, shared", text / 2)):
        assert size < found[name] < size + 4096  # headers, padding, sidecar
    assert found["one padded float16 embedding a row, text alone"] == 2 * (154 * 4096 + 2048)
    arrow = 4 * (154 * 4096 + 2048)
    assert arrow < found["the reference's Arrow cache, text alone"] < 1.01 * arrow


def test_rows_that_share_a_prompt() -> None:
    captions = {circle.prompt for circle in precompute.random_circles(500, seed=0)}
    assert precompute.measure_sharing(500) == pytest.approx(500 / len(captions))


@pytest.mark.slow
def test_encoders_are_busy(precompute_config: PrecomputeConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    found = precompute.measure_speed(replace(precompute_config, cache=tmp_path / "cache"))
    for one in found.values():
        assert 0 < one["busy"] <= 1
        assert one["seconds"] > 0


@pytest.mark.slow
def test_the_true_size_is_that_of_sd3(tmp_path: Path, circles: Path) -> None:
    save_encoders(tmp_path / "base", dtype=torch.bfloat16, layers=1)
    config = PrecomputeConfig(
        source=str(circles),
        pretrained_model_name_or_path=str(tmp_path / "base"),
        cache=tmp_path / "cache",
        device="cpu",
    )
    context = prepare(config)
    assert vars(context.specs.text) | {"dtype": ""} == {
        "clip_tokens": 77,
        "clip_width": 2048,
        "max_sequence_length": 77,
        "t5_width": 4096,
        "pooled_width": 2048,
        "dtype": "",
        "without_t5": None,
    }
    latents = context.specs.latents
    assert (latents.latent_channels, latents.vae_scale_factor) == (16, 8)
