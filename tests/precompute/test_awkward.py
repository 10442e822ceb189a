"""Awkward rows: each is encoded as anyone would by hand, or left out with a reason."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from common.errors import ShardError
from precompute.config import PrecomputeConfig
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.run import precompute
from shards import verify
from shards.format import manifest, sidecar
from shards.reading.cache import Cache
from tests.conftest import RESOLUTION_PX

BACKGROUND = "#2060a0"
SHARD_LATENTS = 8  # of the settings' shard_mb
TABLE_LINES = 20
ROTATE_RIGHT = Image.Transpose.ROTATE_270
Picture = Image.Image
rng = np.random.default_rng(5)


def grain(width: int = 96, height: int = 96, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), np.uint8)


@dataclass
class Case:
    """A row and what becomes of it.

    Attributes:
        name: of the image file.
        write: makes the image file; None leaves none.
        by_hand: the picture in RGB that should be encoded, or would but for its conditioning
            image; None where no image is to be had.
        reason: pattern of why it is bad.
        prompt: its caption, or captions.
        conditioning: size of the conditioning image.
    """

    name: str
    write: Callable[[Path], Any] | None
    by_hand: Picture | None = None
    reason: str = ""
    prompt: Any = None
    conditioning: tuple[int, int] | None = None


def saved(image: Picture, **settings: Any) -> Callable[[Path], Any]:
    return lambda path: image.save(path, **settings)


def written(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def png(image: Picture) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def over_background(rgba: np.ndarray) -> Picture:
    behind = np.array([0x20, 0x60, 0xA0])
    alpha = rgba[..., 3:].astype(float) / 255
    return Image.fromarray((rgba[..., :3] * alpha + behind * (1 - alpha)).round().astype(np.uint8))


def image_cases() -> list[Case]:
    """Images of every kind."""
    rgb = Image.fromarray(grain())
    tall = Image.fromarray(grain(64, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to see it upright
    palette = rgb.quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = 3
    clear_rgba = np.array(palette.convert("RGBA"))
    clear_rgba[np.array(palette) == 3, 3] = 0
    grey = Image.fromarray(grain(channels=1)[..., 0])
    deep = rng.integers(0, 1 << 16, (96, 96)).astype(np.uint16)
    bits = Image.fromarray((grain(channels=1)[..., 0] > 127).astype(np.uint8) * 255)
    rgba = grain(channels=4)
    grey_alpha = grain(channels=2)
    jpeg = io.BytesIO()
    tall.save(jpeg, "jpeg", quality=95, exif=exif.tobytes())
    cmyk = io.BytesIO()
    rgb.convert("CMYK").save(cmyk, "jpeg", quality=95)
    frames = [rgb.quantize(32), grey.quantize(32)]
    one, other = Image.fromarray(grain()), Image.fromarray(grain())
    sideways = Image.fromarray(grain(128, 64))
    flags = io.BytesIO()
    rgb.save(flags, "dds")
    unknown = flags.getvalue()[:80] + bytes(4) + flags.getvalue()[84:]  # the pixels' format
    huge = bytearray(png(rgb))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, with a wrong checksum
    return [
        Case("plain.png", saved(rgb), rgb),
        Case("turned.jpg", written(jpeg.getvalue()), ImageOps.exif_transpose(Image.open(jpeg))),
        Case("turned.tiff", saved(sideways, exif=exif), sideways.transpose(ROTATE_RIGHT)),
        Case("palette.png", saved(palette), palette.convert("RGB")),
        Case("clear.png", saved(clear, transparency=3), over_background(clear_rgba)),
        Case("grey.png", saved(grey), grey.convert("RGB")),
        Case("deep.png", saved(Image.fromarray(deep)), gray_rgb((deep >> 8).astype(np.uint8))),
        Case("bits.png", saved(bits.convert("1")), bits.convert("RGB")),
        Case("alpha.png", saved(Image.fromarray(rgba)), over_background(rgba)),
        Case(
            "grey-alpha.png",
            saved(Image.fromarray(grey_alpha)),
            over_background(grey_alpha[..., [0, 0, 0, 1]]),
        ),
        Case("cmyk.jpg", written(cmyk.getvalue()), Image.open(cmyk).convert("RGB")),
        Case(
            "moving.gif",
            saved(frames[0], save_all=True, append_images=frames[1:]),
            frames[0].convert("RGB"),
        ),
        Case("lossless.webp", saved(rgb, lossless=True), rgb),
        Case("old.bmp", saved(rgb), rgb),
        Case("scan.tiff", saved(rgb), rgb),
        Case("other-size.png", saved(rgb), rgb, conditioning=(240, 240)),
        Case("nearly.png", saved(rgb), rgb, conditioning=(200, 201)),
        Case("one-percent.png", saved(rgb), rgb, conditioning=(200, 202)),
        Case("wide.png", saved(Image.fromarray(grain(1280, 64))), Image.fromarray(grain(1, 1))),
        Case("dot.png", saved(Image.fromarray(grain(1, 1))), Image.fromarray(grain(1, 1))),
        Case(
            "thread.png",
            saved(Image.new("RGB", (40_000, 1))),
            reason="40000 x 1 pixels, too long and thin for 64 x 64",
            conditioning=(40_000, 1),
        ),
        Case("empty.png", written(b""), reason="the file is empty"),
        Case("half.png", written(png(rgb)[:2000]), reason="not a readable image"),
        Case("half.jpg", written(jpeg.getvalue()[:900]), reason="not a readable image"),
        Case("page.png", written(b"<!DOCTYPE html><html></html>"), reason="not a readable image"),
        Case("huge.png", written(bytes(huge)), reason="not a readable image"),
        Case("unknown.dds", written(unknown), reason="not a readable image"),
        Case(
            "float.tiff", saved(Image.fromarray(deep.astype(np.float32))), reason="floating point"
        ),
        Case("folder.png", Path.mkdir, reason="is a directory"),
        Case("dangling.png", lambda path: path.symlink_to("nowhere.png"), reason="No such file"),
        Case("missing.png", None, reason="No such file"),
        Case("nul\0.png", None, reason="not a file name"),
        Case("half-\ud83d.png", None, reason="not a file name"),
        Case("shape.png", saved(one), one, reason="of another shape", conditioning=(100, 120)),
        Case("over.png", saved(other), other, reason="of another shape", conditioning=(197, 200)),
        Case("plain.png", None, rgb),  # a second time
    ]


def gray_rgb(values: np.ndarray) -> Picture:
    return Image.fromarray(values).convert("RGB")


def name_and_caption_cases() -> list[Case]:
    """Plain pictures under awkward names and with awkward captions."""
    names = [
        "a.b.c.png",
        "with space.png",
        "ünï ☃.png",
        "deep/er/one.png",
        "../outside.png",
        "-x_.png",
    ]
    good = [
        "",
        "x" * 10_000,
        "🎈 emoji 👩‍👩‍👧",
        "line\nbreak\ttab",
        "مرحبا بالعالم",
        'quotes " and \\ and </s> <|endoftext|>',
        ["first", "second", "first"],
    ]
    bad: list[tuple[Any, str]] = [
        (None, "no caption"),
        (7, "the prompt is not text but int"),
        ([], "0 captions, 1 to 256 expected"),
        (["fine", None], "the prompt is not text but NoneType"),
        ({"a": 1}, "the prompt is not text but dict"),
        ("half \ud83d", "half of a surrogate pair"),
    ]
    cases = []
    for name in names:
        picture = Image.fromarray(grain())
        cases.append(Case(name, saved(picture), picture))
    for number, prompt in enumerate(good):
        picture = Image.fromarray(grain())
        cases.append(Case(f"good{number}.png", saved(picture), picture, prompt=prompt))
    for number, (prompt, reason) in enumerate(bad):
        picture = Image.fromarray(grain())
        cases.append(Case(f"bad{number}.png", saved(picture), reason=reason, prompt=prompt))
    return cases


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    found = [*image_cases(), *name_and_caption_cases()]
    for number, case in enumerate(found):
        if case.prompt is None and case.reason != "no caption":
            case.prompt = f"caption {number}"
    by_name = {case.name: case for case in found}
    # What was written, read by Pillow: these need no more than that.
    by_name["wide.png"].by_hand = None
    by_name["dot.png"].by_hand = None
    return found


@pytest.fixture(scope="module")
def source(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awkward") / "source"
    lines = []
    for number, case in enumerate(cases):
        path = folder / "target" / case.name.replace("\0", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        if case.write is not None:
            case.write(path)
        if case.name in ("wide.png", "dot.png"):
            with Image.open(path) as image:
                case.by_hand = image.convert("RGB")
        size = case.conditioning or (case.by_hand.size if case.by_hand else (96, 96))
        control = folder / "source" / f"{number}.png"
        control.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grain(*size)).save(control)
        lines.append(
            {
                "source": f"source/{number}.png",
                "target": f"target/{case.name}",
                "prompt": case.prompt,
            }
        )
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def config(
    precompute_config: PrecomputeConfig, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> PrecomputeConfig:
    return replace(
        precompute_config,
        source=str(source),
        cache=tmp_path_factory.mktemp("awkward-cache") / "cache",
        background=BACKGROUND,
        max_bad_fraction=1.0,
        validation_prompt=(),
        validation_image=(),
    )


@pytest.fixture(scope="module")
def made(config: PrecomputeConfig, cases: list[Case]) -> PrecomputeConfig:
    with said_file(config).open("w") as file, contextlib.redirect_stdout(file):
        precompute(config)
    return config


def said_file(config: PrecomputeConfig) -> Path:
    """Return where the first run's output went."""
    return config.cache.with_name("said.txt")


def is_good(case: Case) -> bool:
    return not case.reason


def fitted(image: Picture) -> Picture:
    """Return the picture's shorter side resized to the resolution, and its centre."""
    width, height = image.size
    scale = RESOLUTION_PX / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = ((one - RESOLUTION_PX) / 2 for one in resized.size)
    return resized.crop(
        (round(left), round(top), round(left) + RESOLUTION_PX, round(top) + RESOLUTION_PX)
    )


def test_there_are_enough(cases: list[Case]) -> None:
    assert len(cases) >= 40
    assert sum(not is_good(case) for case in cases) >= 15


def test_good_rows_hold_what_the_stock_vae_gives(
    made: PrecomputeConfig, cases: list[Case], base: Path, source: Path
) -> None:
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    processor = VaeImageProcessor(vae_scale_factor=8)
    found = Cache(made.cache)
    samples = {}
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = found.sample(shard, index)
            captions = [found.text.metadata(*found.text.locate(one))["prompt"] for one in prompts]
            samples[captions[0]] = (tensors, captions)
    good = [(number, case) for number, case in enumerate(cases) if is_good(case)]
    assert len(samples) == len(good)
    for number, case in good:
        expected = case.prompt if isinstance(case.prompt, list) else [case.prompt]
        tensors, captions = samples[expected[0]]
        assert captions == list(dict.fromkeys(expected)), case.name
        assert case.by_hand is not None
        with Image.open(source / "source" / f"{number}.png") as control:
            control_by_hand = control.convert("RGB")
        if case.conditioning:  # of square images, in one step from its own size to the square
            square = (RESOLUTION_PX, RESOLUTION_PX)
            control_by_hand = control_by_hand.resize(square, Image.Resampling.BILINEAR)
        for name, picture in (("latent", case.by_hand), ("conditioning_latent", control_by_hand)):
            with torch.no_grad():
                posterior = vae.encode(processor.preprocess([fitted(picture)])).latent_dist
            torch.testing.assert_close(
                tensors[name], posterior.mean[0], rtol=1e-3, atol=1e-3, msg=f"{case.name}: {name}"
            )


def test_bad_rows_are_named_with_their_reasons(made: PrecomputeConfig, cases: list[Case]) -> None:
    found = manifest.load(made.cache)
    bad = [(number, case) for number, case in enumerate(cases) if not is_good(case)]
    assert found.num_skipped == len(bad)
    said = said_file(made).read_text().splitlines()
    assert f"{len(bad)} rows were left out:" in said
    table = said[said.index(f"{len(bad)} rows were left out:") + 1 :]
    lines = 0
    for number, case in bad:
        name = "target/" + case.name.replace("\ud83d", r"\ud83d")
        name = name if name.isprintable() else repr(name)
        row = f"line {number + 1}, {name}"
        # Each row has a slot, so a shard's rows are those of its eight.
        reasons = {}
        for folder in ("latents", "conditioning/conditioning"):
            card = sidecar.load(made.cache / folder, number // SHARD_LATENTS)
            assert card is not None
            reasons |= {one.row: one.reason for one in card.skipped}
        assert re.search(case.reason, reasons[row]), (row, reasons[row])
        lines += f"  {row}: {reasons[row].removeprefix(f'{name}: ')}" in table  # its name once
    assert lines == TABLE_LINES
    assert f"  … and {len(bad) - TABLE_LINES} more" in table
    assert all(not faults for _, faults in verify.faults(made.cache))
    # A row whose conditioning image is bad has a latent and is no sample.
    only_latents = sum(case.by_hand is not None for _, case in bad)
    num_samples = found.conditioning["conditioning"].num_records
    assert num_samples == len(cases) - len(bad)
    assert found.latents.num_records == num_samples + only_latents


def test_the_bound_and_strict(made: PrecomputeConfig, cases: list[Case], tmp_path: Path) -> None:
    bad, rows = sum(not is_good(case) for case in cases), len(cases)
    precompute(replace(made, max_bad_fraction=bad / rows))
    with pytest.raises(ShardError, match=f"{bad} of {rows} rows cannot be used, more than"):
        precompute(replace(made, max_bad_fraction=(bad - 1) / rows))
    with pytest.raises(ShardError, match=r"rows cannot be used, more than --max-bad-fraction 0\.1"):
        precompute(replace(made, cache=tmp_path / "a", max_bad_fraction=0.1))
    with pytest.raises(ShardError, match=r"--max-bad-fraction 0 \(--strict\)"):
        precompute(replace(made, cache=tmp_path / "b", strict=True))
    for folder in ("a", "b"):
        assert not list((tmp_path / folder).rglob("*.tar"))


def test_taking_bad_rows_out_encodes_nothing(
    made: PrecomputeConfig,
    cases: list[Case],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cleaned = tmp_path / "cleaned"
    shutil.copytree(source, cleaned, symlinks=True)
    lines = (source / "prompt.json").read_text().splitlines()
    kept = [line for line, case in zip(lines, cases, strict=True) if is_good(case)]
    (cleaned / "prompt.json").write_text("\n".join(kept))
    cache = tmp_path / "cache"
    shutil.copytree(made.cache, cache)

    def never(*_: object) -> None:
        raise AssertionError("nothing is new")

    monkeypatch.setattr(VaeEncoder, "encode", never)
    monkeypatch.setattr(TextEncoders, "encode", never)
    precompute(replace(made, source=str(cleaned), cache=cache))
    assert manifest.load(cache).num_skipped == 0
    # Shards behind the last good row are gone. Of the others those change that held a latent
    # without a conditioning latent, and lose no other record.
    last = max(number for number, case in enumerate(cases) if is_good(case))
    gone = [number for number, case in enumerate(cases) if case.by_hand and not is_good(case)]
    changed = {number // SHARD_LATENTS for number in gone}
    num_shards = last // SHARD_LATENTS + 1
    assert changed < set(range(num_shards))
    for folder in ("latents", "conditioning/conditioning"):
        tars = [path.name for path in sorted((cache / folder).glob("*.tar"))]
        assert tars == [f"{shard:06d}.tar" for shard in range(num_shards)]
        for shard in range(num_shards):
            old, new = (
                sidecar.tar_path(one / folder, shard).read_bytes() for one in (made.cache, cache)
            )
            assert (old != new) == (folder == "latents" and shard in changed)
    before, after = (
        {
            key: sums
            for shard in range(num_shards)
            if (card := sidecar.load(one / "latents", shard))
            for key, sums in zip(card.keys, card.checksums, strict=True)
        }
        for one in (made.cache, cache)
    )
    assert after.items() <= before.items()
    assert len(before) - len(after) == len(gone) == 2
