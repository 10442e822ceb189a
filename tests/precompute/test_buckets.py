"""Buckets, mirrors and drawn conditioning images, from source to training."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from xxhash import xxh3_128_hexdigest

from common.errors import ConfigError, ShardError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.buckets import bucket_shapes, nearest_buckets
from shards import verify
from shards.format import manifest, sidecar
from shards.reading.cache import Cache
from tests.conftest import REPOSITORY, flags, run_python
from train.config import TrainConfig
from train.run import train

RESOLUTION = 128
SHAPES = [(64, 256), (128, 128), (256, 64)]
# Width and height of the images, and the bucket nearest each, worked out by hand: the border
# between a quarter and one is a half, since 1/2 : 1/4 = 1 : 1/2.
SIZES = {(130, 130): 1, (100, 310): 0, (300, 90): 2, (128, 250): 1, (128, 260): 0, (512, 129): 2}


def test_bucket_shapes_are_of_about_the_same_area() -> None:
    assert bucket_shapes(RESOLUTION) == SHAPES
    assert bucket_shapes(64) == [(64, 64)]
    for resolution in (256, 512, 768, 1024):
        shapes = bucket_shapes(resolution)
        assert (resolution, resolution) in shapes
        assert {(height, width) for width, height in shapes} == set(shapes)
        for width, height in shapes:
            assert (width % 64, height % 64) == (0, 0)
            assert 1 / 4 <= width / height <= 4
            # No other multiple of 64 beside the shorter side is nearer the square's area.
            short, long = sorted((width, height))
            error = abs(short * long - resolution**2)
            assert error <= min(abs(short * (long + s) - resolution**2) for s in (-64, 64))


def test_the_nearest_bucket_is_nearest_in_proportion() -> None:
    shapes = bucket_shapes(1024)
    sizes = np.random.default_rng(0).integers(1, 4000, (500, 2)).astype(np.int32)
    for (width, height), bucket in zip(sizes.tolist(), nearest_buckets(sizes, shapes), strict=True):
        distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in shapes]
        assert distances[bucket] == pytest.approx(min(distances))
    assert nearest_buckets(np.array([[0, 0]], np.int32), shapes).tolist() == [0]


def write_source(folder: Path, sizes: list[tuple[int, int]], first: int = 0) -> None:
    """Write images of some sizes with conditioning images, numbered from `first` on."""
    lines = []
    for number, size in enumerate(sizes, first):
        rng = np.random.default_rng(number)
        row = {"source": f"{number}c.png", "target": f"{number}.png", "prompt": f"number {number}"}
        for kind in ("source", "target"):
            folder.mkdir(parents=True, exist_ok=True)
            smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
            smooth.resize(size, Image.Resampling.BICUBIC).save(folder / row[kind])
        lines.append(json.dumps(row) + "\n")
    with (folder / "prompt.json").open("a") as file:
        file.writelines(lines)


@pytest.fixture
def config(fresh: PrecomputeConfig, tmp_path: Path) -> PrecomputeConfig:
    write_source(tmp_path / "source", list(SIZES))
    return replace(
        fresh,
        source=str(tmp_path / "source"),
        resolution=RESOLUTION,
        buckets=True,
        validation_prompt=("a", "b"),
        validation_image=(tmp_path / "source" / "0c.png", tmp_path / "source" / "1c.png"),
    )


def by_hand(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Return the middle of an image, as large as possible of this shape, at this size."""
    width, height = image.size
    scale = max(shape[0] / width, shape[1] / height)
    size = (
        max(shape[0], math.floor(width * scale + 1e-9)),
        max(shape[1], math.floor(height * scale + 1e-9)),
    )
    resized = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((have - want) / 2) for have, want in zip(size, shape, strict=True))
    return resized.crop((left, top, left + shape[0], top + shape[1]))


def encoded(base: Path, image: Image.Image) -> torch.Tensor:
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess([image])
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mean[0]


Samples = dict[str, list[dict[str, torch.Tensor]]]


def samples(config: PrecomputeConfig) -> Samples:
    """Return the samples of a cache by caption; of each first the plain one, then the mirror."""
    found = Cache(config.cache, config.conditioning_name)
    result: dict[str, list[tuple[bool, dict[str, torch.Tensor]]]] = {}
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = found.sample(shard, index)
            caption = found.text.metadata(*found.text.locate(prompts[0]))["prompt"]
            mirrored = bool(found.latents.metadata(shard, index).get("mirrored"))
            result.setdefault(caption, []).append((mirrored, tensors))
    return {
        caption: [tensors for _, tensors in sorted(both, key=lambda one: one[0])]
        for caption, both in result.items()
    }


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_every_image_is_in_its_bucket(config: PrecomputeConfig, base: Path, tmp_path: Path) -> None:
    precompute(config)
    found = manifest.load(config.cache)
    assert found.buckets == [(height // 8, width // 8) for width, height in SHAPES]
    card_buckets = {}
    for shard, bucket in enumerate(found.latents.shard_buckets):
        card = sidecar.load(config.cache / "latents", shard)
        assert card is not None
        card_buckets |= dict.fromkeys(card.keys, bucket)
    assert sorted(card_buckets.values()) == sorted(SIZES.values())
    cached = samples(config)
    for number, bucket in enumerate(SIZES.values()):
        (tensors,) = cached[f"number {number}"]
        for name, file in (("latent", f"{number}.png"), ("conditioning_latent", f"{number}c.png")):
            image = Image.open(tmp_path / "source" / file).convert("RGB")
            close(tensors[name], encoded(base, by_hand(image, SHAPES[bucket])))
    assert found.validation["conditioning"].shard_buckets == [1, 0]  # of pictures 0 and 1
    assert all(not faults for _, faults in verify.faults(config.cache))


def test_a_row_of_another_shape_adds_a_shard_and_touches_no_other(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    # Ten rows of one bucket do not fit its last shard.
    precompute(config)
    before = {path: path.read_bytes() for path in config.cache.rglob("latents/*.tar")}
    per_shard = int(config.shard_mb * 1e6 / (16 * 8 * 32 * 4))
    write_source(tmp_path / "source", [(100, 310)] * (per_shard + 1), first=len(SIZES))
    precompute(config)
    found = manifest.load(config.cache)
    assert sorted(found.latents.shard_buckets)[:2] == [0, 0]
    for path, data in before.items():
        if found.latents.shard_buckets[int(path.stem)] != 0:
            assert path.read_bytes() == data


def test_the_first_row_of_a_shape_adds_a_shard_and_touches_no_other(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    source = tmp_path / "no tall ones"
    write_source(source, [size for size, bucket in SIZES.items() if bucket != 0])
    wide = replace(config, source=str(source))
    precompute(wide)

    def tars() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for product in ("latents", "conditioning")
            for path in config.cache.rglob(f"{product}/**/*.tar")
        }

    before, buckets = tars(), manifest.load(config.cache).latents.shard_buckets
    assert set(buckets) == {1, 2}
    write_source(source, [(100, 310)], first=len(SIZES))
    precompute(wide)
    after, found = tars(), manifest.load(config.cache)
    assert found.latents.shard_buckets == [*buckets, 0]
    assert found.conditioning["conditioning"].shard_buckets == [*buckets, 0]
    assert before.items() <= after.items()
    assert len(after) - len(before) == 2
    cached = Cache(config.cache)
    for shard, bucket in enumerate(found.latents.shard_buckets):
        width, height = SHAPES[bucket]
        for index in range(found.latents.shard_records[shard]):
            for tensor in cached.sample(shard, index)[1].values():
                assert tensor.shape == (16, height // 8, width // 8)


def test_training_on_buckets(
    config: PrecomputeConfig, train_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(config)
    train(replace(train_config, cache=(str(config.cache),), max_train_steps=3))
    assert (train_config.output_dir / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_mirrors_are_rows_of_their_own(
    config: PrecomputeConfig, base: Path, tmp_path: Path
) -> None:
    precompute(replace(config, random_flip=True))
    cached = samples(config)
    for number, bucket in enumerate(SIZES.values()):
        plain, mirror = cached[f"number {number}"]
        for name, file in (("latent", f"{number}.png"), ("conditioning_latent", f"{number}c.png")):
            image = Image.open(tmp_path / "source" / file).convert("RGB")
            picture = by_hand(image, SHAPES[bucket])
            close(plain[name], encoded(base, picture))
            close(mirror[name], encoded(base, ImageOps.mirror(picture)))
    # Of each image two records, with keys of their own, that tell which image and which of both.
    found = Cache(config.cache)
    keys, halves = set(), []
    for shard, count in enumerate(found.manifest.latents.shard_records):
        for index in range(count):
            keys.add(found.sample(shard, index)[0].rpartition("-")[2])
            about = found.latents.metadata(shard, index)
            halves.append((about["image_hash"], about.get("mirrored", False)))
    hashes = {
        xxh3_128_hexdigest((tmp_path / "source" / f"{number}.png").read_bytes())
        for number in range(len(SIZES))
    }
    assert len(keys) == 2 * len(SIZES)
    assert sorted(halves) == sorted((one, flip) for one in hashes for flip in (False, True))


def test_canny_is_opencvs(config: PrecomputeConfig, base: Path, tmp_path: Path) -> None:
    canny = replace(config, conditioning_from="canny", random_flip=True)
    precompute(canny)
    cached = samples(canny)
    for number, bucket in enumerate(SIZES.values()):
        image = Image.open(tmp_path / "source" / f"{number}.png").convert("RGB")
        for tensors, picture in zip(
            cached[f"number {number}"],
            (by_hand(image, SHAPES[bucket]), ImageOps.mirror(by_hand(image, SHAPES[bucket]))),
            strict=True,
        ):
            edges = Image.fromarray(cv2.Canny(np.array(picture), 100, 200)).convert("RGB")
            close(tensors["conditioning_latent"], encoded(base, edges))
            close(tensors["latent"], encoded(base, picture))


@pytest.mark.slow
def test_anyones_annotator(
    config: PrecomputeConfig,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What draws, what returns another mode and size, and what fails on one picture.
    source = (
        "from PIL import Image, ImageOps\n"
        "def negative(image):\n"
        "    if image.getpixel((0, 0)) == FAILS:\n"
        "        raise ValueError('too dark')\n"
        "    return ImageOps.invert(image)\n"
        "def small(image):\n"
        "    return image.convert('L').resize((image.width // 2, image.height // 2))\n"
        "def nothing(image):\n"
        "    return 'a string'\n"
    )
    first = Image.open(tmp_path / "source" / "0.png").convert("RGB")
    pixel = by_hand(first, SHAPES[1]).getpixel((0, 0))
    folder = tmp_path / "modules" / "annotating"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text(f"FAILS = {pixel}\n{source}")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    mine = replace(
        config,
        conditioning_from="annotating.mine:negative",
        max_bad_fraction=1.0,
        conditioning_name="negative",
    )
    precompute(mine)
    said = capsys.readouterr().out
    assert "line 1, 0.png: no conditioning image from it (ValueError: too dark)" in said
    cached = samples(mine)
    assert len(cached) == len(SIZES) - 1
    for number, bucket in list(enumerate(SIZES.values()))[1:]:
        image = Image.open(tmp_path / "source" / f"{number}.png").convert("RGB")
        picture = ImageOps.invert(by_hand(image, SHAPES[bucket]))
        close(cached[f"number {number}"][0]["conditioning_latent"], encoded(base, picture))
    small = replace(mine, conditioning_from="annotating.mine:small", conditioning_name="small")
    precompute(small)
    assert len(samples(small)) == len(SIZES)
    nothing = replace(mine, conditioning_from="annotating.mine:nothing", conditioning_name="none")
    with pytest.raises(ConfigError, match=r"--validation-image .*0c\.png: the .* is str, no image"):
        precompute(nothing)
    nothing = replace(nothing, validation_prompt=(), validation_image=())
    with pytest.raises(
        ShardError, match=r"none of the 6 rows .*\n.*drawn from it is str, no image"
    ):
        precompute(nothing)


def test_a_changed_annotator_draws_again(
    config: PrecomputeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = tmp_path / "modules" / "drawing.py"
    module.parent.mkdir()
    module.write_text("def same(image):\n    return image\n")
    monkeypatch.syspath_prepend(module.parent)
    drawn = replace(config, conditioning_from="drawing:same")
    precompute(drawn)
    latents = {path: path.stat().st_mtime_ns for path in config.cache.rglob("latents/*.tar")}
    capsys.readouterr()
    precompute(drawn)
    assert "already complete" in capsys.readouterr().out
    module.write_text("def same(image):\n    return image.rotate(180)\n")
    precompute(drawn)
    said = capsys.readouterr().out
    assert "6 records in 3 shards, 0 kept, 3 to make (same draws otherwise:" in said
    assert {path: path.stat().st_mtime_ns for path in latents} == latents


@pytest.mark.slow
def test_a_changed_annotator_leaves_other_controls_alone(
    config: PrecomputeConfig, base: Path, tmp_path: Path
) -> None:
    module = tmp_path / "turning.py"
    module.write_text("def turned(image):\n    return image\n")
    precompute(config)
    turned = replace(config, conditioning_from="turning:turned", conditioning_name="turned")

    def run() -> None:  # in a process of its own, which imports what the module is now
        path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
        outcome = run_python("-m", "precompute", *flags(turned), PYTHONPATH=path)
        assert outcome.returncode == 0, outcome.stderr

    def others() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in config.cache.rglob("*.tar")
            if "turned" not in path.parts
        }

    run()
    before = others()
    module.write_text("def turned(image):\n    return image.rotate(180)\n")
    run()
    assert others() == before
    cached = samples(turned)
    for number, bucket in enumerate(SIZES.values()):
        image = Image.open(tmp_path / "source" / f"{number}.png").convert("RGB")
        picture = by_hand(image, SHAPES[bucket]).transpose(Image.Transpose.ROTATE_180)
        close(cached[f"number {number}"][0]["conditioning_latent"], encoded(base, picture))
    assert all(not faults for _, faults in verify.faults(config.cache))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "edges",
            "none of canny, softedge, lineart, blur, grey, superres, jpeg, mask, strokes, depth",
        ),
        ("no_such_module:function", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("json:no_such_function", "json has no such function"),
        ("itertools:chain", "the source of itertools cannot be read"),
    ],
)
def test_annotators_that_are_none(config: PrecomputeConfig, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        precompute(replace(config, conditioning_from=name))
    assert message in str(caught.value)
    assert not config.cache.exists()


def test_buckets_need_multiples_of_64(config: PrecomputeConfig) -> None:
    with pytest.raises(ConfigError, match="--resolution 144: with --buckets it must be a multiple"):
        replace(config, resolution=144)
