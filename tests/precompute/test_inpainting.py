"""Caches for inpainting hold what the stock inpainting pipeline makes of a picture and a mask."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3ControlNetInpaintingPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from common.errors import ConfigError
from infer.pipeline import COMPONENTS
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3 import images
from sd3.annotators.degraded import strokes
from sd3.inpainting import kept_cells, without_masked
from sd3.pixels import to_uint8
from shards import verify
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, SHARD_MB

SIZE = (RESOLUTION_PX, RESOLUTION_PX)


@pytest.fixture
def config(fresh: PrecomputeConfig, circles: Path) -> PrecomputeConfig:
    """Random strokes over the circles' pictures; one pair."""
    return replace(
        fresh,
        num_extra_conditioning_channels=1,
        conditioning_from="strokes",
        validation_prompt=PROMPTS[:1],
        validation_image=(circles / "target" / "0.png",),
    )


def prepared(base: Path, picture: Image.Image, mask: Image.Image) -> Tensor:
    """What the stock pipeline gives an inpainting ControlNet, [1, 17, h, w]."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    parts = dict.fromkeys((*COMPONENTS, "controlnet")) | {"vae": vae}
    pipeline = StableDiffusion3ControlNetInpaintingPipeline(**parts)
    with torch.no_grad():
        return pipeline.prepare_image_with_mask(
            picture, mask, *SIZE, 1, 1, torch.device("cpu"), torch.float32
        )


def cached(cache: Cache, tensors: dict[str, Tensor]) -> Tensor:
    """The same from a record, by the VAE's scale and shift."""
    spec = cache.conditioning_spec
    latent = (tensors["conditioning_latent"] - spec.shift_factor) * spec.scaling_factor
    return torch.cat([latent, tensors["conditioning_mask"].float()])[None]


def fitted(circles: Path, row: int) -> Image.Image:
    return images.fit(Image.open(circles / "target" / f"{row}.png").convert("RGB"), SIZE)


def test_records_are_what_the_stock_pipeline_prepares(
    config: PrecomputeConfig, base: Path, circles: Path
) -> None:
    precompute(config)
    found = Cache(config.cache)
    assert [fault for _, faults in verify.faults(config.cache) for fault in faults] == []
    by_row = {}
    for row in range(10):
        picture = fitted(circles, row)
        by_row[row] = prepared(base, picture, strokes(picture))
    records = [
        cached(found, found.sample(shard, index)[1])
        for shard, count in enumerate(found.conditioning.product.shard_records)
        for index in range(count)
    ]
    assert len(records) == 10
    for record in records:
        differences = [(record - expected).abs().max().item() for expected in by_row.values()]
        # Each is its own picture's alone.
        assert sorted(differences)[0] < 1e-4
        assert sorted(differences)[1] > 0.1
    assert 0 < torch.cat(records)[:, 16].mean() < 1
    # And the pair.
    (location,) = found.validation.locations()
    pair = found.validation.tensors(*location)
    torch.testing.assert_close(cached(found, pair), by_row[0], rtol=0, atol=1e-4)
    kept = without_masked(fitted(circles, 0), strokes(fitted(circles, 0)))
    assert torch.equal(pair["conditioning_image"], to_uint8(kept))


def test_masks_that_come_with_the_data(
    config: PrecomputeConfig, base: Path, circles: Path, tmp_path: Path
) -> None:
    """Conditioning images that are masks, and a pair with a transparent part."""
    source = tmp_path / "source"
    (source / "masks").mkdir(parents=True)
    (source / "target").mkdir()
    lines, masks = [], {}
    for row in range(3):
        mask = Image.new("RGB", (512, 512))
        ImageDraw.Draw(mask).rectangle((64 * row, 100, 64 * row + 200, 300), fill="white")
        mask.save(source / "masks" / f"{row}.png")
        masks[row] = mask
        Image.open(circles / "target" / f"{row}.png").save(source / "target" / f"{row}.png")
        lines.append(
            f'{{"source": "masks/{row}.png", "target": "target/{row}.png", "prompt": "{row}"}}\n'
        )
    (source / "prompt.json").write_text("".join(lines))
    see_through = Image.open(source / "target" / "1.png").convert("RGBA")
    see_through.putalpha(masks[1].convert("L").point(lambda level: 255 - level))
    see_through.save(tmp_path / "pair.png")
    precompute(
        replace(
            config,
            source=str(source),
            conditioning_from=None,
            validation_image=(tmp_path / "pair.png",),
            shard_mb=10 * SHARD_MB,
        )
    )
    found = Cache(config.cache)
    expected = {
        row: prepared(base, fitted(source, row), images.fit(mask, SIZE))
        for row, mask in masks.items()
    }
    for index in range(3):
        _, tensors, prompts = found.sample(0, index)
        row = int(found.text.metadata(*found.text.locate(prompts[0]))["prompt"])
        torch.testing.assert_close(cached(found, tensors), expected[row], rtol=0, atol=1e-4)
    pair = found.validation.tensors(*next(iter(found.validation.locations())))
    torch.testing.assert_close(cached(found, pair), expected[1], rtol=0, atol=1e-4)


def test_a_cell_is_kept_by_its_first_pixel() -> None:
    mask = Image.new("L", (32, 16))
    for x, y, level in ((0, 0, 128), (8, 0, 127), (17, 0, 255), (31, 15, 255), (24, 8, 255)):
        mask.putpixel((x, y), level)
    picture = Image.new("RGB", mask.size, (9, 8, 7))
    kept = without_masked(picture, mask)
    assert kept.getpixel((0, 0)) == kept.getpixel((17, 0)) == (0, 0, 0, 0)
    assert kept.getpixel((8, 0)) == (9, 8, 7, 255)
    assert kept_cells(to_uint8(kept)[None], 8)[0, 0].tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    # As the stock pipeline: binarised at a half, nearest, inverted.
    binary = torch.from_numpy(np.array(mask) / 255 >= 0.5).float()[None, None]
    stock = 1 - torch.nn.functional.interpolate(binary, size=(2, 4))
    assert torch.equal(kept_cells(to_uint8(kept)[None], 8).float(), stock)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_extra_conditioning_channels": 2}, "0, or 1 for the mask of inpainting"),
        ({"conditioning_range": "0_1"}, "leave out --conditioning-range 0_1"),
        ({"conditioning_from": "mask"}, "strokes draws masks"),
    ],
)
def test_what_makes_no_masks_is_refused(
    config: PrecomputeConfig, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(config, **change)


def test_a_validation_image_needs_a_transparent_part(
    config: PrecomputeConfig, circles: Path
) -> None:
    image = circles / "target" / "0.png"
    message = f"--validation-image {image}: no part of it is transparent"
    with pytest.raises(ConfigError, match=re.escape(message)):
        precompute(replace(config, conditioning_from=None))


def test_a_control_for_inpainting_stands_beside_others(
    config: PrecomputeConfig, cache: Path, precompute_config: PrecomputeConfig
) -> None:
    """And differs from the same pictures as a usual control."""
    plain = replace(
        config, num_extra_conditioning_channels=0, validation_prompt=(), validation_image=()
    )
    precompute(replace(plain, conditioning_name="strokes"))
    precompute(replace(config, conditioning_name="holes"))
    both = Cache(config.cache, "holes").manifest
    assert both.conditioning_specs["holes"].inpainting
    assert both.conditioning_specs["strokes"].inpainting is None
    assert both.conditioning["holes"].fingerprint != both.conditioning["strokes"].fingerprint
