"""Annotators that draw batches: before the encoders are loaded, each image once, and what stays."""

import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import pipeline

import precompute.run
from common.errors import ConfigError, ShardError
from precompute.config import PrecomputeConfig
from precompute.encoding import control_pass, drawn_controls
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.planning.prepare import prepare
from sd3.annotators.drawing import Drawing
from sd3.image_files import BadImage
from sd3.images import fit
from shards.format import sidecar
from shards.reading.cache import Cache
from tests.conftest import NUM_ROWS, RESOLUTION_PX
from tests.depth_model import save_depth_model
from tests.precompute.test_again import Encoded, encoded, tars  # noqa: F401  (a fixture)

FAILING = """
class Failing:
    def batch(self, images):
        if any(hash(image.tobytes()) == {hash} for image in images):
            raise ValueError("nothing to see")
        return images
"""
SLOW = """
import time


class Slow:
    def batch(self, images):
        time.sleep(0.02 * len(images))
        return images
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_model(tmp_path_factory.mktemp("depth") / "model")


@pytest.fixture
def config(fresh: PrecomputeConfig, model: Path, circles: Path) -> PrecomputeConfig:
    """Depth of the circles, and of two of them to validate on."""
    photographs = (circles / "target" / "0.png", circles / "target" / "1.png")
    return replace(
        fresh,
        conditioning_from="depth",
        conditioning_args=(f"model={model}",),
        validation_image=photographs,
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were drawn, in the main thread alone."""
    sizes: list[int] = []
    original = Drawing.draw

    def counting(self: Drawing, images: Sequence[Image.Image]) -> Any:
        assert threading.current_thread() is threading.main_thread()
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Drawing, "draw", counting)
    return sizes


def depth_by_stock_libraries(model: Path, circles: Path) -> Callable[[int], Image.Image]:
    stock = pipeline("depth-estimation", model=str(model), device="cpu")

    def depth(row: int) -> Image.Image:
        with Image.open(circles / "target" / f"{row}.png") as image:
            found: Image.Image = stock(fit(image.convert("RGB"), RESOLUTION_PX))["depth"]
        return found.convert("RGB")

    return depth


def encode(vae: AutoencoderKL, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent: Tensor = vae.encode(pixels).latent_dist.mean[0]
    return latent


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of drawn images that were opened for reading."""
    paths: list[Path] = []

    class Counted(zipfile.ZipFile):
        def __init__(self, file: Any, mode: Any = "r", *args: Any) -> None:
            super().__init__(file, mode, *args)
            paths.extend([file] if mode == "r" else [])

    monkeypatch.setattr(drawn_controls.zipfile, "ZipFile", Counted)
    return paths


def test_a_shards_drawings_are_opened_once(tmp_path: Path, opened: list[Path]) -> None:
    product = SimpleNamespace(folder=tmp_path, identity_digest="1234")
    build: Any = SimpleNamespace(
        product=product, plan=SimpleNamespace(shard=3), keys=["a", "b", "c"], metadata=[b""] * 3
    )
    images = [Image.new("RGB", (4, 4), (level, 1, 2)) for level in range(2)]
    results = [images[0], BadImage("nothing to see"), images[1]]
    drawn = map(drawn_controls.encode_drawn, range(3), results)
    drawn_controls.write_drawn(build, drawn)
    shard = drawn_controls.DrawnShard(build)
    for at, image in ((0, images[0]), (2, images[1]), (0, images[0])):
        assert shard.image(at).tobytes() == image.tobytes()
    with pytest.raises(BadImage, match=r"^nothing to see$"):
        shard.image(1)
    assert opened == [tmp_path / "000003.drawn.zip"]
    build.keys[0] = "another"
    with pytest.raises(ShardError, match=r"drawn\.zip: changed while precompute was running"):
        shard.image(0)


@pytest.mark.slow
def test_what_is_encoded_is_the_librarys_depth(
    config: PrecomputeConfig,
    model: Path,
    circles: Path,
    base: Path,
    drawn: list[int],
    opened: list[Path],
) -> None:
    precompute.run.precompute(replace(config, dataloader_num_workers=1, vae_batch_size=2))
    assert len(opened) == len(set(opened)) == 2
    assert sum(drawn) == NUM_ROWS + 2
    assert max(drawn) == 8
    depth = depth_by_stock_libraries(model, circles)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    cache = Cache(config.cache)
    rows = prepare(config)
    digests = [f"{int(a):016x}{int(b):016x}" for a, b in rows.inventory.images]
    seen = 0
    for shard, count in enumerate(cache.conditioning.product.shard_records):
        for index in range(count):
            row = digests.index(cache.conditioning.metadata(shard, index)["image_hash"])
            _, tensors, _ = cache.sample(shard, index)
            expected = encode(vae, depth(row))
            assert (tensors["conditioning_latent"] - expected).abs().max() < 1e-5
            seen += 1
    assert seen == NUM_ROWS
    for at, location in enumerate(cache.validation.locations()):
        pixels = cache.validation.tensors(*location)["conditioning_image"]
        assert (pixels.permute(1, 2, 0).numpy() == np.asarray(depth(at))).all()
    assert not list(config.cache.rglob("*drawn*"))


@pytest.mark.slow
def test_nothing_else_is_on_the_device_while_it_draws(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for kind in (Drawing, TextEncoders, VaeEncoder):
        original = kind.__init__

        def noting(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> None:
            events.append(type(self).__name__)
            original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", noting)
    precompute.run.precompute(config)
    assert events == ["Drawing", "TextEncoders", "VaeEncoder"]
    precompute.run.precompute(config)
    assert len(events) == 3


@pytest.mark.slow
def test_what_was_drawn_before_an_interruption_is_not_drawn_again(
    config: PrecomputeConfig, drawn: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = replace(config, cache=tmp_path / "whole")
    precompute.run.precompute(whole)
    drawn.clear()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(precompute.run, "encode_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute.run.precompute(config)
    assert sum(drawn) == NUM_ROWS + 2
    assert len(list(config.cache.rglob("*.drawn.zip"))) == 2
    drawn.clear()
    precompute.run.precompute(config)
    assert drawn == [2]  # the validation pairs, which are few
    assert tars(config) == tars(whole)
    assert not list(config.cache.rglob("*.drawn.zip"))


@pytest.mark.slow
def test_other_weights_are_drawn_again_even_after_an_interruption(
    config: PrecomputeConfig, drawn: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(precompute.run, "encode_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute.run.precompute(config)
    drawn.clear()
    other = save_depth_model(tmp_path / "other", seed=1)
    precompute.run.precompute(replace(config, conditioning_args=(f"model={other}",)))
    assert sum(drawn) == NUM_ROWS + 2


@pytest.mark.slow
def test_the_same_model_elsewhere_encodes_nothing(
    config: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
    model: Path,
    drawn: list[int],
    tmp_path: Path,
) -> None:
    precompute.run.precompute(config)
    encoded.taken()
    drawn.clear()
    shutil.copytree(model, tmp_path / "moved")
    precompute.run.precompute(replace(config, conditioning_args=(f"model={tmp_path / 'moved'}",)))
    assert encoded.taken() == {}
    assert drawn == []
    inverted = (f"model={model}", "invert=true")
    precompute.run.precompute(replace(config, conditioning_args=inverted))
    assert encoded.taken() == {"conditioning": NUM_ROWS}


@pytest.mark.slow
def test_an_image_that_nothing_can_be_drawn_from_is_one_bad_row(
    config: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    with Image.open(circles / "target" / "4.png") as image:
        pixels = fit(image.convert("RGB"), RESOLUTION_PX).tobytes()
    (tmp_path / "failing.py").write_text(FAILING.format(hash=hash(pixels)))
    own = replace(
        config,
        conditioning_from=f"{tmp_path / 'failing.py'}:Failing",
        conditioning_args=(),
        max_bad_fraction=0.1,
        random_flip=True,
    )
    precompute.run.precompute(own)
    skipped = [
        one
        for shard in range(len(prepare(own).products.conditioning.fingerprints))
        if (card := sidecar.load(own.cache / "conditioning/conditioning", shard))
        for one in card.skipped
    ]
    assert [one.row for one in skipped] == ["line 5, target/4.png"]
    assert "no conditioning image from it (ValueError: nothing to see)" in skipped[0].reason
    assert Cache(own.cache).conditioning.product.num_records == 2 * NUM_ROWS - 1
    failing = replace(own, validation_image=(circles / "target" / "4.png",))
    with pytest.raises(ConfigError, match=r"--validation-image .*4.png: no conditioning image"):
        precompute.run.precompute(failing)


@pytest.mark.slow
def test_a_drawing_that_vanishes_ends_the_run(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = control_pass.write_drawn

    def vanishing(build: Any, drawn: Any) -> None:
        original(build, drawn)
        for path in config.cache.rglob("*.drawn.zip"):
            path.unlink()

    monkeypatch.setattr(control_pass, "write_drawn", vanishing)
    with pytest.raises(ShardError, match=r"drawn\.zip: changed while precompute was running"):
        precompute.run.precompute(config)


@pytest.mark.slow
def test_validation_images_may_be_ready_ones(
    config: PrecomputeConfig, circles: Path, drawn: list[int]
) -> None:
    ready = replace(config, validation_image_as_is=True)
    precompute.run.precompute(ready)
    assert sum(drawn) == NUM_ROWS
    cache = Cache(ready.cache)
    for at, location in enumerate(cache.validation.locations()):
        with Image.open(circles / "target" / f"{at}.png") as image:
            expected = np.asarray(fit(image.convert("RGB"), RESOLUTION_PX))
        pixels = cache.validation.tensors(*location)["conditioning_image"]
        assert (pixels.permute(1, 2, 0).numpy() == expected).all()


def test_a_dry_run_times_what_is_drawn(
    config: PrecomputeConfig,
    tmp_path: Path,
    drawn: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    own = {"conditioning_from": f"{tmp_path / 'slow.py'}:Slow", "conditioning_args": ()}
    precompute.run.precompute(replace(config, **own, dry_run=True))
    (speed,) = re.findall(
        rf"^  drawing: {NUM_ROWS} images at ([\d.]+)/s, \d+ s; [\d.]+ GB of memory",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert 1 < float(speed) <= 50  # 20 ms each, and what else the machine does
    assert set(drawn) == {8}


def test_the_room_for_drawings_is_counted(config: PrecomputeConfig) -> None:
    context = prepare(config)
    plain = prepare(replace(config, conditioning_from="canny", conditioning_args=()))
    assert context.bytes_needed() - plain.bytes_needed() == NUM_ROWS * RESOLUTION_PX**2
