"""Controls drawn from photographs at inference: those of the cache, and those of the settings."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from common.errors import ConfigError
from infer.config import GenerateConfig, ScoreConfig
from infer.convention import Convention, find_convention
from infer.drawing import metadata
from infer.drawing.controlnet_set import find_controlnet_sets
from infer.drawing.generate import generate
from infer.drawing.pictures import plan_pictures
from infer.drawing.requests import find_requests, load_control
from infer.photographs import Photograph, Redrawing, draw_controls, find_redrawing
from infer.scoring.charts import worst_sheet
from infer.scoring.measures import MEASURES, Sample, Values, applicable_measures
from infer.scoring.redrawn import measure_redrawn
from infer.scoring.results import WITH, WITHOUT, SampleResult, summarize_variants
from infer.scoring.score import score
from precompute.config import PrecomputeConfig
from precompute.planning.prepare import prepare
from precompute.run import precompute
from sd3.annotators.annotator import Annotator
from sd3.annotators.drawing import Drawing
from sd3.images import fit
from sd3.pretrained import DATA_KEY
from shards.format import manifest
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, Outcome, flags
from tests.depth_model import save_depth_model
from train.sets.data_entry import data_entry

BLUR = {"name": "blur", "arguments": {"radius": 2.0}, "digest": "another"}
SIZE = (RESOLUTION_PX, RESOLUTION_PX)
UNLOADABLE = """
class Unloadable:
    def __init__(self):
        raise OSError("no weights")

    def batch(self, images):
        return images
"""


def with_annotator(controlnet: Path, folder: Path, annotator: dict[str, Any] | None) -> Path:
    """Return a copy of a ControlNet whose configuration names an annotator."""
    shutil.copytree(controlnet, folder)
    config = json.loads((folder / "config.json").read_text())
    config[DATA_KEY]["annotator"] = annotator
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def blurring(controlnet: Path, tmp_path: Path) -> Path:
    return with_annotator(controlnet, tmp_path / "blurring", BLUR)


@pytest.fixture
def config(base: Path, blurring: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    """Two pictures from photographs, by a ControlNet whose controls are blurred pictures."""
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(blurring),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS,
        image=(circles / "target" / "0.png", circles / "target" / "1.png"),
        from_photo=True,
        num_inference_steps=1,
        device="cpu",
    )


def photograph(circles: Path, row: int) -> Image.Image:
    with Image.open(circles / "target" / f"{row}.png") as image:
        return fit(image.convert("RGB"), RESOLUTION_PX)


def convention_of(config: GenerateConfig) -> Convention:
    name = config.controlnet[0]
    base = Path(config.pretrained_model_name_or_path)
    return find_convention(config, base, name, Path(name))


def test_a_controlnet_says_what_draws_its_controls(config: GenerateConfig, circles: Path) -> None:
    redrawing = find_redrawing(config, config.controlnet[0], convention_of(config))
    with Image.open(circles / "target" / "3.png") as image:
        named = [Photograph("3", image.convert("RGB"), SIZE)]
    (found,) = draw_controls(redrawing.open(), named)
    expected = photograph(circles, 3).filter(ImageFilter.GaussianBlur(2))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("annotator", "changes", "message"),
    [
        (None, {}, "its configuration does not say what draws its controls from photographs; give"),
        (
            BLUR | {"name": "gone.py:drawn"},
            {},
            "its controls were drawn by gone.py:drawn, and cannot be here: "
            "--conditioning-from gone.py:drawn: no such file. Of a path its last part is noted",
        ),
        ({"name": 3}, {}, "annotator in its config.json: "),
        (BLUR, {"conditioning_args": ("width=3",)}, "width=3: unknown to blur. Known: radius."),
    ],
)
def test_what_is_missing_is_one_line(
    config: GenerateConfig,
    controlnet: Path,
    tmp_path: Path,
    annotator: dict[str, Any] | None,
    changes: dict[str, Any],
    message: str,
) -> None:
    other = with_annotator(controlnet, tmp_path / "other", annotator)
    wrong = replace(config, controlnet=(str(other),), **changes)
    with pytest.raises(ConfigError) as raised:
        find_redrawing(wrong, wrong.controlnet[0], convention_of(wrong))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_settings_name_another_and_a_line_says_so(
    config: GenerateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = replace(config, conditioning_from="grey")
    redrawing = find_redrawing(grey, "it", convention_of(grey))
    assert redrawing.annotator.name == "grey"
    assert "it: grey does not draw as in its training" in capsys.readouterr().err
    wider = replace(config, conditioning_args=("radius=5",))
    found = find_redrawing(wider, "it", convention_of(wider)).annotator
    assert (found.name, found.arguments) == ("blur", {"radius": 5})


def encode(vae: AutoencoderKL, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent: Tensor = vae.encode(pixels).latent_dist.mean[0]
    return latent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["canny", "mask", "depth"])
def test_a_control_drawn_again_has_the_latent_of_the_cache(
    config: GenerateConfig,
    fresh: PrecomputeConfig,
    controlnet: Path,
    circles: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    arguments: tuple[str, ...] = ()
    if name == "depth":
        save_depth_model(tmp_path / "depth-model")
        monkeypatch.chdir(tmp_path)
        arguments = ("model=depth-model", "invert=true")
    stage1 = replace(
        fresh,
        conditioning_from=name,
        conditioning_args=arguments,
        validation_prompt=(),
        validation_image=(),
    )
    precompute(stage1)
    found = manifest.load(stage1.cache)
    entry = data_entry(found, "conditioning")["annotator"]
    trained = with_annotator(controlnet, tmp_path / "trained", json.loads(json.dumps(entry)))
    trained_config = replace(config, controlnet=(str(trained),))
    capsys.readouterr()
    redrawing = find_redrawing(trained_config, "it", convention_of(trained_config))
    assert "does not draw as in its training" not in capsys.readouterr().err
    drawing = redrawing.open()
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    cache = Cache(stage1.cache)
    rows = [f"{int(a):016x}{int(b):016x}" for a, b in prepare(stage1).inventory.images]
    count = 0
    for shard, records in enumerate(cache.conditioning.product.shard_records):
        for index in range(records):
            row = rows.index(cache.conditioning.metadata(shard, index)["image_hash"])
            with Image.open(circles / "target" / f"{row}.png") as image:
                named = [Photograph(str(row), image.convert("RGB"), SIZE)]
            (control,) = draw_controls(drawing, named)
            _, tensors, _ = cache.sample(shard, index)
            assert (encode(vae, control) - tensors["conditioning_latent"]).abs().max() < 1e-5
            count += 1
    assert count == len(rows)


@pytest.mark.slow
def test_pictures_from_photographs_are_those_of_the_controls(
    config: GenerateConfig, circles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "the images are taken for controls, as drawn by blur; for photographs give --from-photo"
    generate(config)
    assert note not in capsys.readouterr().err
    controls = []
    for row in range(2):
        controls.append(tmp_path / f"control-{row}.png")
        photograph(circles, row).filter(ImageFilter.GaussianBlur(2)).save(controls[row])
    ready = replace(config, from_photo=False, image=tuple(controls), output_dir=tmp_path / "ready")
    generate(ready)
    assert note in capsys.readouterr().err
    for name in ("000.png", "001.png", "contact_sheet.png"):
        ours, theirs = (np.asarray(Image.open(one.output_dir / name)) for one in (config, ready))
        assert (ours == theirs).all()
    picture = config.output_dir / "000.png"
    before = picture.stat().st_mtime_ns
    generate(config)
    assert picture.stat().st_mtime_ns == before
    generate(replace(config, conditioning_args=("radius=3",)))
    assert picture.stat().st_mtime_ns != before
    assert metadata.read(picture)["settings"]["from_photo"] is True
    assert "from_photo" not in metadata.read(ready.output_dir / "000.png")["settings"]


@pytest.mark.slow
def test_each_controlnet_gets_its_own_control(
    config: GenerateConfig, controlnet: Path, circles: Path, tmp_path: Path
) -> None:
    lines = {"name": "canny", "arguments": {}, "digest": ""}
    other = with_annotator(controlnet, tmp_path / "lines", lines)
    both = replace(
        config,
        controlnet=(config.controlnet[0], str(other)),
        combine=True,
        prompt=PROMPTS[:1],
        image=config.image[:1],
    )
    generate(both)
    paths = (tmp_path / "one.png", tmp_path / "two.png")
    photograph(circles, 0).filter(ImageFilter.GaussianBlur(2)).save(paths[0])
    Image.fromarray(cv2.Canny(np.asarray(photograph(circles, 0)), 100, 200)).save(paths[1])
    ready = replace(both, from_photo=False, image=paths, output_dir=tmp_path / "ready")
    generate(ready)
    ours, theirs = (np.asarray(Image.open(one.output_dir / "000.png")) for one in (both, ready))
    assert (ours == theirs).all()


@pytest.mark.slow
def test_score_draws_controls_from_the_rows_images_and_again_from_the_pictures(
    config: GenerateConfig, circles: Path, tmp_path: Path
) -> None:
    measured = ScoreConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=config.controlnet,
        output_dir=tmp_path / "score",
        source=circles,
        from_photo=True,
        measure=("redrawn", "targets"),
        num_samples=2,
        num_inference_steps=1,
        device="cpu",
    )
    score(measured)
    rows = list(csv.DictReader((tmp_path / "score" / "samples.csv").open()))
    for row in range(2):
        control = np.asarray(photograph(circles, row).filter(ImageFilter.GaussianBlur(2)))
        for variant in (WITH, WITHOUT):
            with Image.open(tmp_path / "score" / variant / f"00{row}.png") as picture:
                drawn = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(2)))
            psnr = peak_signal_noise_ratio(control, drawn, data_range=255)
            ssim = structural_similarity(control, drawn, channel_axis=-1, data_range=255)
            assert rows[row][f"{variant}_control_psnr"] == f"{psnr:.4f}"
            assert rows[row][f"{variant}_control_ssim"] == f"{ssim:.4f}"


@pytest.mark.slow
def test_an_annotator_that_cannot_be_loaded_leaves_the_other_figures(
    config: GenerateConfig, circles: Path, tmp_path: Path
) -> None:
    (tmp_path / "unloadable.py").write_text(UNLOADABLE)
    measured = ScoreConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=config.controlnet,
        conditioning_from=f"{tmp_path / 'unloadable.py'}:Unloadable",
        output_dir=tmp_path / "score",
        source=circles,
        measure=("redrawn", "targets"),
        num_samples=1,
        num_inference_steps=1,
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"cannot be loaded \(OSError: no weights\)"):
        score(measured)
    (row,) = csv.DictReader((tmp_path / "score" / "samples.csv").open())
    assert row[f"{WITH}_control_psnr"] == ""
    assert float(row[f"{WITH}_psnr"]) > 0


def test_a_picture_that_nothing_can_be_drawn_from_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(image: Image.Image) -> Image.Image:
        if image.getpixel((0, 0)) == (0, 0, 0):
            raise ValueError("nothing to see")
        return image.point(lambda value: value // 2)

    results = []
    for number, level in enumerate((200, 0, 100)):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 16), (level,) * 3).save(path)
        sample = Sample(number, "a house", Image.new("RGB", (16, 16), (100,) * 3))
        nothing: Values = {"control_psnr": None, "control_ssim": None}
        results.append(SampleResult(sample, {WITH: path}, {WITH: nothing}))
    own = Redrawing(Annotator("half", {}, [], half), "", "cpu")
    measure_redrawn([MEASURES["redrawn"]], results, own)
    found = [result.values[WITH]["control_psnr"] for result in results]
    assert found == [100.0, None, pytest.approx(20 * math.log10(255 / 50))]
    assert capsys.readouterr().err == (
        f"1 of 3 pictures have no control to compare: {tmp_path / '1.png'}: no conditioning image "
        "from it (ValueError: nothing to see)\n"
    )
    figures = summarize_variants([MEASURES["redrawn"]], results)
    assert figures[WITH]["control_psnr"].count == 2
    assert worst_sheet(MEASURES["redrawn"], results).size[0] > 0


def test_photographs_are_drawn_from_once_in_batches_and_kept_as_files(
    config: GenerateConfig, circles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = Drawing.draw

    def counting(self: Drawing, images: Sequence[Image.Image]) -> Any:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Drawing, "draw", counting)
    photographs = tuple(circles / "target" / f"{row}.png" for row in range(10))
    many = replace(config, image=photographs, prompt=PROMPTS[:1], seed=(0, 1))
    _, (controlnet,) = find_controlnet_sets(many, with_text_encoders=True)
    redrawing = find_redrawing(many, "it", controlnet.convention)
    requests = find_requests(many, None)
    plan = partial(plan_pictures, many, controlnet, title_in_name=False, redrawings=[redrawing])
    pictures = plan([*requests, *requests])
    assert sizes == [8, 2]
    assert len(pictures) == 40
    for row, picture in enumerate(pictures[::2]):
        (control,) = picture.controls
        assert control.path == many.output_dir / f"conditioning-{row % 10:03d}.png"
        expected = photograph(circles, row % 10).filter(ImageFilter.GaussianBlur(2))
        (found,) = picture.fit_controls()
        assert found.tobytes() == expected.tobytes()


def test_an_image_that_changes_while_pictures_are_drawn_is_noticed(
    config: GenerateConfig, tmp_path: Path
) -> None:
    path = tmp_path / "changing.png"
    Image.new("RGB", SIZE).save(path)
    control = load_control(path)
    Image.new("RGB", SIZE, "white").save(path)
    with pytest.raises(ConfigError, match=r"--image .*changing.png: it was changed while pict"):
        control.image(convention_of(config))


def test_what_is_measured_by_default() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture = Image.fromarray(noise)
    lines = Image.new("RGB", (64, 64))
    lines.paste("white", (20, 0, 22, 64))
    assert applicable_measures(Sample(0, "a house", picture, picture)) == ("targets",)
    blurred = Sample(0, "a house", picture, picture, "blur")
    assert applicable_measures(blurred) == ("targets", "redrawn")
    for name in ("mask", "shuffle"):
        assert applicable_measures(replace(blurred, annotator=name)) == ("targets",)
    canny = Sample(0, "a house", lines, picture, "canny")
    assert applicable_measures(canny) == ("edges", "targets")


@pytest.mark.parametrize(
    "given", [{"conditioning_from": "canny"}, {"conditioning_args": ("radius=3",)}]
)
def test_what_draws_from_photographs_is_refused_without_any(
    config: GenerateConfig, given: dict[str, Any]
) -> None:
    (name,) = given
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"^{flag}: says how .*; add --from-photo, or leave it"):
        replace(config, from_photo=False, **given)


@pytest.mark.parametrize("layout", ["images", "table"])
def test_photographs_to_measure_on_need_from_photo(
    config: GenerateConfig, circles: Path, tmp_path: Path, layout: str
) -> None:
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    shutil.copy(circles / "target" / "0.png", unseen / "0.png")
    if layout == "images":
        (unseen / "0.txt").write_text(PROMPTS[0])
    else:
        row = {"file_name": "0.png", "text": PROMPTS[0]}
        (unseen / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    measured = ScoreConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=config.controlnet,
        output_dir=tmp_path / "score",
        source=unseen,
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"^--source .*unseen: no cond.*; add --from-photo to"):
        score(measured)


def test_validation_pairs_are_no_photographs(
    config: GenerateConfig, command: Callable[..., Outcome], cache: Path
) -> None:
    with pytest.raises(ConfigError, match="--from-photo: the cache's validation pairs have"):
        replace(config, prompt=(), image=(), cache=str(cache))
    outcome = command("infer", "generate", *flags(replace(config, conditioning_from="nothing")))
    assert outcome.exit_code == 2
    assert "--conditioning-from nothing: none of canny" in outcome.output.splitlines()[-1]
