"""Odd pictures: counted and named, by a dry run too; or left out before anything is encoded."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import DigestCache
from precompute.planning.inventory import take_inventory
from precompute.planning.oddities import empty_captions
from precompute.run import precompute
from precompute.sources.open_source import open_source
from precompute.sources.source import SourceSettings
from shards.format import manifest
from shards.reading.cache import Cache
from tests.conftest import Outcome, flags
from tests.precompute.test_again import Encoded, encoded, tars  # noqa: F401  (a fixture)
from tests.sd3.icc import P3, p3_in_srgb, profile

NUM_ROWS = 4
rng = np.random.default_rng(7)


def grain(side: int = 96) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four rows of plain pictures, which tests make odd."""
    folder = tmp_path / "source"
    (folder / "c").mkdir(parents=True)
    lines = []
    for number in range(NUM_ROWS):
        grain().save(folder / f"{number}.png")
        grain().save(folder / "c" / f"{number}.png")
        line = {"source": f"c/{number}.png", "target": f"{number}.png", "prompt": f"row {number}"}
        lines.append(json.dumps(line))
    (folder / "prompt.json").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(fresh: PrecomputeConfig, source: Path) -> PrecomputeConfig:
    return replace(fresh, source=str(source), validation_prompt=(), validation_image=())


def said(config: PrecomputeConfig, command: Callable[..., Outcome], *more: object) -> list[str]:
    """Return what a dry run says, and then a run, which both must end well."""
    outputs = []
    for dry in (["--dry-run"], []):
        outcome = command("precompute", *flags(config), *more, *dry)
        assert outcome.exit_code == 0, outcome.output
        outputs.append(outcome.output)
    return outputs


def test_plain_pictures_are_not_spoken_of(
    config: PrecomputeConfig, command: Callable[..., Outcome]
) -> None:
    for output in said(config, command):
        assert "images are" not in output
        assert "images have" not in output
        assert "images use" not in output
        assert "captions are" not in output
        assert "prompts have" not in output


def test_empty_captions_are_counted_whatever_the_layout(tmp_path: Path) -> None:
    texts: list[str | list[str] | None] = ["a", "", ["b", ""], None, "", ["", "c"], "d", ""]
    for number, text in enumerate(texts):
        grain(8).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text if isinstance(text, str) else "e")
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for settings, expected in (({}, [1, 2, 4, 5, 7]), ({"caption_extension": "txt"}, [1, 4, 7])):
        path = str(tmp_path)
        source = open_source(
            SourceSettings(train_data_dir=path, wants_conditioning=False, **settings)
        )
        inventory = take_inventory(
            source,
            range(len(texts)),
            DigestCache(tmp_path / "hashes.npy", keep=False),
            conditioning=False,
            transparency=False,
        )
        assert empty_captions(inventory).tolist() == expected


def test_an_empty_caption_is_named_unless_it_is_for_all(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    text = (source / "prompt.json").read_text()
    (source / "prompt.json").write_text(text.replace("row 2", ""))
    line = "  1 captions are empty, and train the ControlNet without a prompt: 2.png\n"
    outcome = command("precompute", *flags(config), "--dry-run")
    assert line in outcome.output
    outcome = command("precompute", *flags(config), "--dry-run", "--caption", "")
    assert "captions are empty" not in outcome.output


def test_enlarged_images_are_named_and_may_be_left_out(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    for number, side in ((0, 20), (1, 31), (2, 32)):  # to 64, which is twice 32
        grain(side).save(source / f"{number}.png")
    line = (
        "  2 images are enlarged more than twofold; --min-image-px N leaves smaller ones out: "
        "0.png (20 x 20 px), 1.png (31 x 31 px)\n"
    )
    for output in said(config, command):
        assert line in output
    assert manifest.load(config.cache).num_skipped == 0
    for output in said(config, command, "--min-image-px", 31, "--strict", "--overwrite"):
        assert (
            "  1 images are smaller than --min-image-px 31, and their rows are left out: 0.png\n"
        ) in output
        assert "  1 images are enlarged more than twofold" in output
        assert "cannot be used" not in output
    found = manifest.load(config.cache)
    assert (found.num_skipped, found.latents.num_records) == (0, 3)
    outcome = command("precompute", *flags(config), "--min-image-px", 97)
    assert outcome.exit_code == 2
    assert "--min-image-px 97: the images of all 4 rows are smaller; give less" in outcome.output


def test_a_display_p3_photograph_is_encoded_in_srgb(
    config: PrecomputeConfig,
    source: Path,
    command: Callable[..., Outcome],
    encoded: Encoded,  # noqa: F811
) -> None:
    precompute(config)
    encoded.taken()
    before = latents(config)
    stored = np.asarray(Image.open(source / "2.png"))
    Image.fromarray(stored).save(source / "2.png", icc_profile=profile(P3))
    Image.open(source / "c" / "3.png").save(source / "c" / "3.png", icc_profile=profile(P3))
    for output in said(config, command, "--overwrite"):
        line = "1 images have a colour profile other than sRGB, and are converted to sRGB: 2.png\n"
        assert line in output
    # The control is data: its file has changed, so it is read again, and comes out as it was.
    assert encoded.taken() == {"latents": 1, "conditioning": 2}
    after = latents(config)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["row 2"]
    by_hand = Image.fromarray(p3_in_srgb(stored).round().astype(np.uint8))
    by_hand.save(source / "2.png")
    again = replace(config, cache=config.cache.with_name("by-hand"))
    precompute(again)
    distance = np.abs(latents(again)["row 2"] - after["row 2"]).max()
    assert distance < 0.05 * np.abs(after["row 2"] - before["row 2"]).max()


def latents(config: PrecomputeConfig) -> dict[str, np.ndarray]:
    """Return the latents of a cache by their prompts."""
    found = Cache(config.cache)
    samples = {}
    for shard, count in enumerate(found.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = found.sample(shard, index)
            text = found.text.metadata(*found.text.locate(prompts[0]))["prompt"]
            samples[text] = tensors["latent"].numpy()
    return samples


def test_rounded_controls_are_named(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    Image.effect_noise((1000, 700), 50).convert("RGB").save(source / "1.png")
    Image.effect_noise((704, 512), 50).convert("RGB").save(source / "c" / "1.png")
    Image.effect_noise((512, 384), 50).convert("RGB").save(source / "c" / "2.png")
    for output in said(config, command, "--max-bad-fraction", 0.5):
        assert "  1 conditioning images have rounded sides, and are stretched back" in output
        assert "images' shape: c/1.png\n" in output
        assert "c/2.png: 512 x 384 pixels, of another shape than its image's 96 x 96" in output


def test_blank_controls_are_named(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    for number in range(NUM_ROWS):
        drawing = Image.new("RGBA", (96, 96), (255, 255, 255, 0))
        drawing.paste((255, 255, 255, 255), (10, 10, 20 + number, 50))
        drawing.save(source / "c" / f"{number}.png")
    line = "  4 conditioning images are of one colour: c/0.png, c/1.png, c/2.png, …; transparent"
    for output in said(config, command):
        assert line in output
    other = replace(config, cache=config.cache.with_name("black"), background="black")
    for output in said(other, command):
        assert "of one colour" not in output


@pytest.mark.slow
def test_maps_that_use_a_sliver_of_their_range_are_named(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    for number in range(NUM_ROWS):
        depth = np.linspace(0, 5000 - number, 96 * 96).reshape(96, 96).astype(np.uint16)
        Image.fromarray(depth).save(source / "c" / f"{number}.png")
    line = (
        "  4 conditioning images use little of their range, 0 to 5000 of 65535, which become 0 to "
        "19 of 255: c/0.png, c/1.png, c/2.png, …; --conditioning-scale 0:5000 makes these black to "
        "white, and auto each image's own\n"
    )
    for output in said(config, command):
        assert line in output
    for scale in ("0:5000", "auto"):
        other = replace(config, cache=config.cache.with_name(scale[-1]), conditioning_scale=scale)
        for output in said(other, command):
            assert "little of their range" not in output
        assert manifest.load(other.cache).conditioning_specs["conditioning"].scale == scale
    dark = replace(config, cache=config.cache.with_name("dark"), conditioning_scale="0:60000")
    assert "use little of their range, 0 to 21 of 255: c/0.png" in said(dark, command)[0]


def test_the_scale_encodes_conditioning_images_again_and_nothing_else(
    config: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
) -> None:
    precompute(config)
    before = tars(config)
    encoded.taken()
    precompute(replace(config, conditioning_scale="auto", overwrite=True))
    assert encoded.taken() == {"conditioning": NUM_ROWS}
    precompute(replace(config, overwrite=True))
    assert tars(config) == before


def unreadable() -> dict[str, bytes]:
    """Return files that are no pictures that can be used, and a word of what is said of each."""
    file, array = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.eye(96, dtype=np.float32)).save(file, "TIFF")
    np.save(array, np.zeros((4, 4)))
    whole = io.BytesIO()
    grain().save(whole, "PNG")
    return {
        "floating point": file.getvalue(),
        "NumPy array": array.getvalue(),
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "pip install pillow-heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "the file is empty": b"",
        "truncated": whole.getvalue()[:900],
    }


@pytest.mark.parametrize("folder", [".", "c"])
def test_what_cannot_be_read_is_refused_before_prompts_are_encoded(
    folder: str,
    config: PrecomputeConfig,
    source: Path,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("precompute.run.encode_text", never)
    for reason, data in unreadable().items():
        (source / folder / "1.png").write_bytes(data)
        for dry in (["--dry-run"], []):
            outcome = command("precompute", *flags(config), "--strict", *dry)
            assert outcome.exit_code == 2
            assert "1 of 4 rows cannot be used" in outcome.output
            assert reason in outcome.output
            assert "  line 2, 1.png: " in outcome.output


@pytest.mark.slow
def test_controls_of_another_shape_are_refused_stretched_or_cropped(
    config: PrecomputeConfig,
    source: Path,
    command: Callable[..., Outcome],
    encoded: Encoded,  # noqa: F811
) -> None:
    grain(96).resize((96, 64)).save(source / "c" / "1.png")
    allowed = replace(config, max_bad_fraction=0.5)
    for output in said(allowed, command):
        assert (
            "line 2, 1.png: c/1.png: 96 x 64 pixels, of another shape than its image's 96 x 96; "
            "--conditioning-fit stretch or crop takes it\n"
        ) in output
    encoded.taken()
    for way in ("stretch", "crop", "stretch"):
        for output in said(config, command, "--conditioning-fit", way, "--overwrite"):
            assert (
                "  1 conditioning images have another shape than their images; --conditioning-fit "
                f"{way} is done to them: c/1.png\n"
            ) in output
        assert encoded.taken() == {"conditioning": 1}
        assert manifest.load(config.cache).num_skipped == 0


def test_pairs_are_what_counts(
    config: PrecomputeConfig, source: Path, command: Callable[..., Outcome]
) -> None:
    (source / "c" / "1.png").unlink()
    (source / "c" / "2.png").write_bytes(b"")
    dry, run = said(config, command, "--max-bad-fraction", 0.5)
    assert "4 rows, 4 captions" in dry
    assert "2 rows would be left out, 2 pairs kept:\n" in dry
    assert f"{config.cache}: complete, 2 pairs, 2 rows left out, 5 prompts, " in run
    outcome = command("shards", "info", config.cache)
    assert "conditioning 'conditioning': 2 pairs, pixels encoded in -1_1\n" in outcome.output
    assert "rows skipped: 2\n" in outcome.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conditioning-scale", "16bit"], "expected as-is, which takes 8 bit as they are and of"),
        (["--conditioning-scale", "9:3"], "or LOW:HIGH with the lower number first, such as 0:5"),
        (
            ["--conditioning-scale", "auto", "--conditioning-from", "canny"],
            "--conditioning-from draws them; leave one out",
        ),
        (
            ["--conditioning-fit", "crop", "--conditioning-from", "canny"],
            "--conditioning-fit crop: is for conditioning images of the data set",
        ),
        (["--min-image-px", "0"], "--min-image-px 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant(
    options: list[str], message: str, config: PrecomputeConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("precompute", *flags(config), *options)
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_what_drawing_makes_blank_is_named(
    config: PrecomputeConfig, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (96, 96), (90, 80, 70)).save(source / "3.png")
    precompute(replace(config, conditioning_from="canny"))
    assert "  1 conditioning images are of one colour: 3.png\n" in capsys.readouterr().out
