"""Stage 1: what is cached is what the stock models compute."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import (
    CLIPTokenizer,
    T5TokenizerFast,
)

from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards import verify
from shards.format import manifest, sidecar
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from tests.conftest import NUM_ROWS, PROMPTS, RESOLUTION_PX, TOKENS
from tests.precompute.edited_source import copy_of, rows
from train.data import TrainingSamples


def test_prompts_are_what_the_stock_pipeline_encodes(cache: Path, base: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    found = Cache(cache)
    seen = []
    for shard, count in enumerate(found.manifest.text.shard_records):
        for index in range(count):
            prompt = found.text.metadata(shard, index)["prompt"]
            seen.append(prompt)
            tensors = found.text.tensors(shard, index)
            with torch.no_grad():
                embeds, _, pooled, _ = pipeline.encode_prompt(
                    prompt, None, None, max_sequence_length=TOKENS
                )
            clip, t5 = embeds[0].split([24, TOKENS])
            # A batch of two and of one differ in the last digit.
            torch.testing.assert_close(tensors["clip_embeds"], clip[:, :80], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tensors["t5_embeds"], t5, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tensors["pooled_embeds"], pooled[0], rtol=1e-5, atol=1e-5)
            assert not clip[:, 80:].any()
    assert seen[0] == ""
    assert len(seen) == len(set(seen))


def stock_posteriors(
    base: Path, files: list[Path], *, normalized: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std [B, 16, h, w] of images from the stock VAE, all at once.

    The cached ones went through it two at a time, which rounds otherwise. Pixels are from -1 to 1
    where they are normalized, and else from 0 to 1.
    """
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=normalized)
    size = (RESOLUTION_PX, RESOLUTION_PX)
    images = [Image.open(f).convert("RGB").resize(size, Image.Resampling.BILINEAR) for f in files]
    with torch.no_grad():
        posterior = vae.encode(processor.preprocess(images)).latent_dist
    return posterior.mean, posterior.std


def test_latents_are_what_the_stock_vae_encodes(cache: Path, base: Path, circles: Path) -> None:
    found = Cache(cache)
    samples = [
        found.sample(shard, index)
        for shard, count in enumerate(found.conditioning.product.shard_records)
        for index in range(count)
    ]
    assert len(samples) == NUM_ROWS
    for name, file in (("latent", "target"), ("conditioning_latent", "source")):
        expected, _ = stock_posteriors(base, [circles / row[file] for row in rows(circles)])
        cached = torch.stack([tensors[name] for _, tensors, _ in samples])
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-4)
    prompts = [found.text.metadata(*found.text.locate(p[0]))["prompt"] for _, _, p in samples]
    assert prompts == [row["prompt"] for row in rows(circles)]


def test_repeated_prompts_are_encoded_once(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    def edit(lines: list[dict[str, object]]) -> None:
        for line in lines:
            line["prompt"] = "the same"

    precompute(replace(fresh, source=copy_of(circles, tmp_path / "edited", edit)))
    found = manifest.load(fresh.cache)
    assert found.text.num_records == 2  # and the empty prompt
    assert found.latents.num_records == NUM_ROWS


def test_a_second_control_is_added_beside_the_first(
    cache: Path, fresh: PrecomputeConfig, base: Path, circles: Path
) -> None:
    shutil.copytree(cache, fresh.cache)
    kept = {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*.tar")}
    precompute(replace(fresh, conditioning_name="raw", conditioning_range="0_1"))
    now = {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*.tar")}
    assert kept.items() <= now.items()
    first, second = Cache(fresh.cache), Cache(fresh.cache, "raw")
    assert first.conditioning_spec.pixel_range == "-1_1"
    assert second.conditioning_spec.pixel_range == "0_1"
    assert torch.equal(first.sample(0, 0)[1]["latent"], second.sample(0, 0)[1]["latent"])
    image = circles / rows(circles)[0]["source"]  # of the first row and of the first pair
    for found, normalized in ((first, True), (second, False)):
        mean, _ = stock_posteriors(base, [image], normalized=normalized)
        for record in (found.sample(0, 0)[1], found.validation.tensors(0, 0)):
            close = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(record["conditioning_latent"], mean[0], **close)
    assert all(not faults for _, faults in verify.faults(fresh.cache))


def test_mean_and_standard_deviation_are_kept_on_request(
    fresh: PrecomputeConfig, base: Path, circles: Path
) -> None:
    precompute(replace(fresh, posterior="mean_std"))
    _, tensors, _ = Cache(fresh.cache).sample(0, 0)
    files = [circles / row["target"] for row in rows(circles)[:2]]
    mean, std = stock_posteriors(base, files)
    torch.testing.assert_close(tensors["latent"], mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["latent_std"], std[0], rtol=1e-4, atol=1e-9)
    assert tensors["conditioning_latent_std"].shape == (16, 8, 8)


def test_half_precision_cache_is_the_rounded_one(cache: Path, fresh: PrecomputeConfig) -> None:
    precompute(replace(fresh, cache_dtype="float16"))
    half, full = Cache(fresh.cache), Cache(cache)
    for rounded, exact in (
        (half.sample(0, 0)[1], full.sample(0, 0)[1]),
        (half.text.tensors(0, 1), full.text.tensors(0, 1)),
    ):
        for name, tensor in exact.items():
            assert rounded[name].dtype == torch.float16
            assert torch.equal(rounded[name], tensor.to(torch.float16))


def test_validation_pairs_are_cached(cache: Path, base: Path, circles: Path) -> None:
    found = Cache(cache)
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    for index, prompt in enumerate(PROMPTS):
        tensors = found.validation.tensors(0, index)
        assert found.validation.metadata(0, index) == {"prompt": prompt}
        with torch.no_grad():
            _, _, pooled, _ = pipeline.encode_prompt(prompt, None, None)
        torch.testing.assert_close(tensors["pooled_embeds"], pooled[0], rtol=1e-5, atol=1e-5)
        image = Image.open(circles / "source" / f"{index}.png")
        small = image.resize((RESOLUTION_PX,) * 2, Image.Resampling.BILINEAR)
        pixels = VaeImageProcessor().preprocess(small)
        unit = tensors["conditioning_image"][None] / 255
        assert torch.equal(2 * unit - 1, pixels)
        # The circle is among the data, so its conditioning latent is there as well.
        latent = found.sample(0, index)[1]["conditioning_latent"]
        torch.testing.assert_close(tensors["conditioning_latent"], latent, rtol=1e-4, atol=1e-4)


def test_prompts_that_are_cut_are_counted(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(lines: list[dict[str, object]]) -> None:
        lines[1]["prompt"] = "circle " * 300
        lines[3]["prompt"] = "a circle " * 40
        lines[5]["prompt"] = "circle " * 21

    precompute(replace(fresh, source=copy_of(circles, tmp_path / "long", edit)))
    output = capsys.readouterr().out
    tokenizer = T5TokenizerFast.from_pretrained(
        fresh.pretrained_model_name_or_path, subfolder="tokenizer_3"
    )
    longest = len(tokenizer("circle " * 300).input_ids)
    assert longest > 300
    prompts = {str(row["prompt"]) for row in rows(tmp_path / "long")}
    long = [one for one in prompts if len(tokenizer(one).input_ids) > fresh.max_sequence_length]
    assert len(long) >= 2
    assert (
        f"{len(long)} prompts have more T5 tokens than --max-sequence-length 20 and are cut; "
        f"the longest has {longest}: "
    ) in output
    # The miniature's CLIP takes 24 tokens, start and end included.
    clip = CLIPTokenizer.from_pretrained(fresh.pretrained_model_name_or_path, subfolder="tokenizer")
    lengths = [len(clip(one, verbose=False).input_ids) for one in prompts]
    cut = sum(length > clip.model_max_length for length in lengths)
    assert 2 <= cut < len(long)
    assert (
        f"{cut} prompts have more CLIP tokens than its {clip.model_max_length} and are cut; "
        f"the longest has {max(lengths)}: "
    ) in output


def test_conditioning_images_of_another_size_and_of_another_shape(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    source = copy_of(circles, tmp_path / "sizes", lambda _: None)
    for name, size in (("2", (256, 256)), ("4", (512, 300))):
        path = source / "source" / f"{name}.png"
        Image.open(path).resize(size).save(path)
    precompute(replace(fresh, source=source, max_bad_fraction=0.1))
    found = manifest.load(fresh.cache)
    assert found.latents.num_records == 10
    assert found.conditioning["conditioning"].num_records == 9
    card = sidecar.load(fresh.cache / "conditioning" / "conditioning", 0)
    assert card is not None
    (skipped,) = card.skipped
    assert skipped.row.startswith("line 5, ")
    assert "source/4.png: 512 x 300 pixels, of another shape than its image's 512 x 512" in (
        skipped.reason
    )


def test_every_caption_of_a_list_is_cached_and_training_draws_one(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    first, second = (row["prompt"] for row in rows(circles)[:2])

    def edit(lines: list[dict[str, object]]) -> None:
        lines[0]["prompt"] = [first, second, first, "a third"]
        lines[3]["prompt"] = []
        lines[4]["prompt"] = ["text", 5]

    source = copy_of(circles, tmp_path / "lists", edit)
    precompute(replace(fresh, source=source, max_bad_fraction=0.2))
    found = Cache(fresh.cache)
    _, _, keys = found.sample(0, 0)
    texts = [found.text.metadata(*found.text.locate(key))["prompt"] for key in keys]
    assert texts == [first, second, "a third"]
    assert found.manifest.num_skipped == 2
    order = Order(found.conditioning.product.shard_records, seed=0)
    samples = TrainingSamples([found], unmixed(order), seed=0, proportion_empty_prompts=0.0)
    places = [p for p in range(400) if order.record(p) == (0, 0)]
    expected = [found.embeddings(key)["pooled_embeds"] for key in keys]
    drawn = {
        next(n for n, one in enumerate(expected) if torch.equal(one, sample["pooled_embeds"]))
        for sample in (samples[place] for place in places)
    }
    assert drawn == {0, 1, 2}
