"""Several crops of each picture, as pairs of their own: image and control cut at the same place."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import ConfigError
from demo.circles import Circle, write_circles
from demo.colors import COLORS
from precompute.config import PrecomputeConfig
from precompute.encoding.load_image import SourceImages
from precompute.planning.prepare import prepare
from precompute.run import precompute
from sd3 import images
from shards import verify
from shards.format import manifest
from shards.reading.cache import Cache
from tests.conftest import NUM_ROWS, RESOLUTION_PX, Outcome
from tests.precompute.test_again import Encoded, encoded, tars  # noqa: F401  (a fixture)
from tests.precompute.test_bad_rows import spoil
from tests.precompute.test_buckets import close, write_source
from tests.precompute.test_buckets import encoded as encoded_by_hand

Record = tuple[str, dict[str, Any], dict[str, Any]]


@pytest.fixture
def config(fresh: PrecomputeConfig) -> PrecomputeConfig:
    """Three crops, the random ones as large as the target, so that they are not resized."""
    one_to_one = RESOLUTION_PX / 512
    return replace(
        fresh,
        views=3,
        crop_scale=f"{one_to_one}:{one_to_one}",
        validation_prompt=(),
        validation_image=(),
    )


def records(cache: Path, name: str = "conditioning") -> Iterator[Record]:
    """Yield key, tensors and the latent's JSON of each sample."""
    found = Cache(cache, name)
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            key, tensors, _ = found.sample(shard, index)
            about = found.latents.metadata(*found.latents.locate(key))
            assert found.conditioning.metadata(shard, index).get("crop") == about.get("crop")
            yield key, tensors, about


def contents(cache: Path, name: str = "conditioning") -> set[str]:
    return {key.rpartition("-")[2] for key, _, _ in records(cache, name)}


@pytest.mark.parametrize(
    ("image_px", "settings"),
    [
        (512, {"conditioning_from": None}),
        (300, {}),  # controls of another size than their images
        (512, {"random_flip": True}),
        (512, {"num_extra_conditioning_channels": 1}),  # the disc is the mask
    ],
    ids=["same size", "other size", "mirrored", "inpainting"],
)
def test_a_disc_and_its_outline_have_one_centre_in_all_views(
    fresh: PrecomputeConfig, tmp_path: Path, image_px: int, settings: dict[str, Any]
) -> None:
    # Small ones near the middle, which lie whole in each crop of at least 0.7 of the sides.
    discs = [Circle(236, 270, 60, "black", "white"), Circle(281, 245, 40, "black", "white")]
    assert sum(COLORS["black"]) == 0
    source = tmp_path / "discs"
    write_circles(source, discs)
    for path in (source / "target").iterdir():
        if settings.get("num_extra_conditioning_channels"):
            ImageOps.invert(Image.open(path)).save(source / "source" / path.name)
    for path in (source / "source").iterdir():
        Image.open(path).resize((image_px, image_px), Image.Resampling.BOX).save(path)
    context = prepare(
        replace(
            fresh,
            source=str(source),
            resolution=128,
            views=6,
            crop_scale="0.7:0.9",
            validation_prompt=(),
            validation_image=(),
            **settings,
        )
    )
    pictures, size = SourceImages(context), (128, 128)
    seen = Counter[int]()
    for item in range(len(context.views)):
        row = context.row_of(item)
        left, top, right, bottom = context.crop_of(item) or (0, 0, 512, 512)
        assert right - left == bottom - top
        scale = 128 / (right - left)
        expected = np.array([(discs[row].x - left) * scale, (discs[row].y - top) * scale])
        if context.views.mirrored[item]:
            expected[0] = 128 - expected[0]
        disc = 255 - np.array(pictures.load(item, size, "image").convert("L")).astype(float)
        control = pictures.load(item, size, "conditioning_image")
        drawn = ImageOps.invert(control.getchannel("A")) if control.mode == "RGBA" else control
        outline = np.array(drawn.convert("L")).astype(float)
        assert np.abs(centre(disc) - expected).max() < 0.25
        assert np.abs(centre(outline) - expected).max() < 0.5
        seen[row] += 1
    each = 6 * (2 if settings.get("random_flip") else 1)
    assert seen == {0: each, 1: each}


def centre(light: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return where the centre of mass lies, in pixels from the left and upper border."""
    down, across = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    return np.array([(light * across).sum(), (light * down).sum()]) / light.sum()


def test_records_are_what_the_vae_makes_of_the_crops(
    config: PrecomputeConfig, base: Path, circles: Path
) -> None:
    precompute(config)
    assert [fault for _, faults in verify.faults(config.cache) for fault in faults] == []
    found = Cache(config.cache)
    number_of = {
        (found.text.metadata(shard, index)["prompt"]): None
        for shard, count in enumerate(found.manifest.text.shard_records)
        for index in range(count)
    }
    assert len(number_of) == NUM_ROWS + 1
    rows = [json.loads(line) for line in (circles / "prompt.json").read_text().splitlines()]
    by_caption = {row["prompt"]: row for row in rows}
    views: dict[str, list[Any]] = {}
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = found.sample(shard, index)
            caption = str(found.text.metadata(*found.text.locate(prompts[0]))["prompt"])
            crop = found.latents.metadata(shard, index).get("crop")
            views.setdefault(caption, []).append(crop)
            if crop is not None and index % 2:  # some of them
                for name, file in (("latent", "target"), ("conditioning_latent", "source")):
                    image = Image.open(circles / by_caption[caption][file]).convert("RGB")
                    assert (crop[2] - crop[0], crop[3] - crop[1]) == (64, 64)
                    close(tensors[name], encoded_by_hand(base, image.crop(crop)))
    assert views.keys() == by_caption.keys()
    for crops in views.values():
        assert crops.count(None) == 1
        assert len(set(map(str, crops))) == 3


def test_more_crops_keep_what_is_there_and_a_second_control_has_the_same(
    config: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    precompute(replace(config, views=1, crop_scale="0.5:1"))
    first = {key: tensors["latent"] for key, tensors, _ in records(config.cache)}
    encoded.taken()
    precompute(replace(config, overwrite=False))
    assert encoded.taken()["latents"] == 2 * NUM_ROWS
    now = {key: (tensors["latent"], about) for key, tensors, about in records(config.cache)}
    assert len(now) == 3 * NUM_ROWS
    assert all((now[key][0] == latent).all() for key, latent in first.items())
    before = tars(config)
    precompute(replace(config, conditioning_name="canny", conditioning_from="canny"))
    assert all(tars(config)[name] == before[name] for name in before)
    second = {key: about for key, _, about in records(config.cache, "canny")}
    assert second == {key: about for key, (_, about) in now.items()}
    # Fewer crops drop records, and must be told to.
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"latents: 10 of 30 records.*10 gone") as raised:
        precompute(replace(config, views=2, overwrite=False))
    made_with = f"--views 3 --crop-scale {config.crop_scale} --seed 0"
    assert f"it was made with {made_with}: give the same to add a control" in str(raised.value)
    assert Cache(config.cache).manifest.made_by["views"] == made_with  # shards info says it


@pytest.mark.parametrize("change", [{"seed": 1}, {"crop_scale": "0.125:0.2"}])
def test_other_settings_draw_other_crops_and_keep_the_centre_crops(
    config: PrecomputeConfig, change: dict[str, Any]
) -> None:
    plans = [prepare(replace(config, **each)) for each in ({}, change)]
    ids = [set(plan.products.latents.ids.tolist()) for plan in plans]
    firsts = set(plans[0].products.latents.ids[plans[0].views.is_first].tolist())
    assert ids[0] & ids[1] == firsts
    assert len(firsts) == NUM_ROWS


def test_crops_do_not_depend_on_the_order_of_rows(
    config: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(circles, source)
    lines = (source / "prompt.json").read_text().splitlines(keepends=True)
    (source / "prompt.json").write_text("".join(lines[::-1][:6]))
    plans = [prepare(each) for each in (config, replace(config, source=str(source)))]
    crops = [
        {
            int(plan.products.latents.ids[item]): plan.crop_of(item)
            for item in range(len(plan.views))
        }
        for plan in plans
    ]
    assert len(crops[1]) == 6 * 3
    assert crops[1].items() <= crops[0].items()


def test_crops_have_the_shape_of_their_bucket(fresh: PrecomputeConfig, tmp_path: Path) -> None:
    write_source(tmp_path / "source", [(500, 1900), (800, 600), (1600, 500)])
    shapes = [(64, 256), (128, 128), (256, 64)]
    context = prepare(
        replace(
            fresh,
            source=str(tmp_path / "source"),
            resolution=128,
            buckets=True,
            views=4,
            validation_prompt=(),
            validation_image=(),
        )
    )
    latents, pictures = context.products.latents, SourceImages(context)
    counts = Counter[int]()
    for plan in map(latents.shard, range(latents.num_shards)):
        width, height = shapes[plan.bucket]
        for item in plan.items.tolist():
            assert plan.bucket == context.row_of(item)
            assert pictures.load(item, (width, height), "image").size == (width, height)
            if crop := context.crop_of(item):
                # To half a pixel of either side.
                wide, high = crop[2] - crop[0], crop[3] - crop[1]
                assert abs(wide * height - high * width) <= (width + height) / 2
                counts[plan.bucket] += 1
    assert counts == dict.fromkeys(range(3), 3)


def test_a_held_out_picture_has_its_centre_crop_alone(config: PrecomputeConfig) -> None:
    precompute(replace(config, validation_rows=3))
    held_out, trained = [], []
    for _, _, about in records(config.cache):
        (held_out if about.get("held_out") else trained).append(about)
    assert [about.get("crop") for about in held_out] == [None] * 3
    assert len(trained) == 3 * (NUM_ROWS - 3)
    hashes = [{about["image_hash"] for about in some} for some in (held_out, trained)]
    assert (len(hashes[0]), len(hashes[1])) == (3, NUM_ROWS - 3)
    assert not hashes[0] & hashes[1]
    found = manifest.load(config.cache)
    assert sum(found.training_records("conditioning")) == len(trained)
    assert found.num_skipped == 0


@pytest.mark.slow
def test_a_bad_row_counts_once_and_has_no_views(
    config: PrecomputeConfig, circles: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(circles, source)
    spoil(source / "target" / "1.png")
    spoil(source / "source" / "4.png")
    precompute(replace(config, source=str(source), validation_rows=2, max_bad_fraction=0.3))
    found = manifest.load(config.cache)
    assert found.num_skipped == 2
    assert "rows skipped: 2" in command("shards", "info", config.cache).output


def test_a_picture_is_decoded_once_for_its_views(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch, which one thread loads, is a row's views.
    context = prepare(replace(config, vae_batch_size=6, random_flip=True, max_train_samples=4))
    decoded = Counter[str]()
    for name in ("decode", "conditioning_numbers"):
        monkeypatch.setattr(images, name, counting(getattr(images, name), name, decoded))
    pictures = SourceImages(context)
    for item in range(len(context.views)):
        for kind in ("image", "conditioning_image"):
            pictures.load(item, (64, 64), kind)
    assert decoded == {"decode": 4, "conditioning_numbers": 4}
    # Bytes are let go after the last view, decoded or not.
    assert not context.source._kept


def counting(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def counted(*values: Any) -> Any:
        calls[name] += 1
        return function(*values)

    return counted


def test_a_dry_run_counts_views(
    config: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(replace(config, dry_run=True, validation_rows=1))
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  ")}
    assert counts["latents"] == counts["conditioning/conditioning"] == "28"
    # 0.125 of 512 px, to be 64 px: not enlarged. The circles themselves are not, either.
    assert not any("enlarged" in line for line in lines)
    precompute(replace(config, dry_run=True, crop_scale="0.05:1"))
    assert (
        "10 images, or crops of them, are enlarged more than twofold; --min-image-px N leaves "
        "smaller ones out, --crop-scale with a larger LOW cuts larger ones"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": 0}, "--views 0: must be at least 1"),
        ({"crop_scale": "0.3:1", "views": 1}, "is for random crops.*give --views 2 or more"),
        ({"crop_scale": "1:1"}, "would be the same; give a smaller LOW"),
        ({"crop_scale": "0:1"}, "expected LOW:HIGH, above 0 and up to 1"),
        ({"crop_scale": "0.5:1.1"}, "expected LOW:HIGH"),
        ({"crop_scale": "0.9:0.5"}, "expected LOW:HIGH"),
        ({"crop_scale": "0.5"}, "expected LOW:HIGH"),
        ({"crop_scale": "nan:1"}, "expected LOW:HIGH"),
        ({"crop_scale": "half"}, "expected LOW:HIGH"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: PrecomputeConfig, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(config, **change)
