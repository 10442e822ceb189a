"""What a cache says of its annotator, and that caches made without saying it stay as they are."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from precompute.config import PrecomputeConfig
from precompute.fingerprints.annotator_spec import annotator_spec
from precompute.fingerprints.digest_cache import DigestCache
from precompute.planning.existing_layout import _changes
from precompute.run import precompute
from sd3.annotators.registry import find_annotator
from sd3.images import fit
from shards.format import manifest
from shards.format.expected_cache import read_expected
from shards.reading.cache import Cache
from tests.conftest import RESOLUTION_PX, Outcome, flags, write_manifest
from tests.precompute.test_again import Encoded, again, encoded, tars  # noqa: F401  (a fixture)
from train.sets.data_entry import data_entry

BLUR = {"conditioning_name": "blurred", "conditioning_from": "blur"}


@pytest.fixture
def blurred(again: PrecomputeConfig, circles: Path) -> PrecomputeConfig:  # noqa: F811
    """A second control beside that of the source."""
    return replace(
        again,
        **BLUR,
        conditioning_args=("radius=2",),
        validation_image=(circles / "target" / "0.png", circles / "target" / "1.png"),
    )


def drawn_pair(cache: Path, name: str, number: int) -> bytes:
    reader = Cache(cache, name).validation
    pixels = reader.tensors(*list(reader.locations())[number])["conditioning_image"]
    return pixels.permute(1, 2, 0).numpy().tobytes()


def test_a_cache_without_an_annotator_says_nothing_of_one(cache: Path) -> None:
    assert "annotators" not in json.loads((cache / "manifest.json").read_text())
    found = manifest.load(cache)
    assert found.annotators == {}
    assert "annotator" not in data_entry(found, "conditioning")


@pytest.mark.slow
def test_name_and_arguments_stand_in_the_cache_and_the_controlnets_entry(
    blurred: PrecomputeConfig, command: Callable[..., Outcome], circles: Path
) -> None:
    precompute(blurred)
    found = manifest.load(blurred.cache)
    assert found.annotators.keys() == {"blurred"}
    spec = found.annotators["blurred"]
    assert (spec.name, spec.arguments) == ("blur", {"radius": 2})
    entry = data_entry(found, "blurred")["annotator"]
    assert entry == {"name": "blur", "arguments": {"radius": 2}, "digest": spec.digest}
    assert "annotator" not in data_entry(found, "conditioning")
    said = command("shards", "info", blurred.cache).output
    drawn_by = {
        line.split("'")[1]: line.partition(", drawn by ")[2]
        for line in said.splitlines()
        if line.startswith("conditioning '")
    }
    assert drawn_by == {"blurred": "blur (radius=2)", "conditioning": ""}
    # The photographs of its pairs are drawn from; those of the other control stay as they are.
    for number in range(2):
        with Image.open(circles / "target" / f"{number}.png") as image:
            photograph = fit(image.convert("RGB"), RESOLUTION_PX)
        expected = photograph.filter(ImageFilter.GaussianBlur(2)).tobytes()
        assert drawn_pair(blurred.cache, "blurred", number) == expected
        with Image.open(circles / "source" / f"{number}.png") as image:
            ready = fit(image.convert("RGB"), RESOLUTION_PX).tobytes()
        assert drawn_pair(blurred.cache, "conditioning", number) == ready
    # The first control is made once more: the second one's annotator stays noted.
    first = {"conditioning_name": "conditioning", "conditioning_from": None}
    precompute(replace(blurred, **first, conditioning_args=()))
    assert manifest.load(blurred.cache).annotators.keys() == {"blurred"}


@pytest.mark.slow
def test_a_cache_that_does_not_say_it_yet_is_told_and_nothing_encoded(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
) -> None:
    """As a former version made it: the same records, with nothing said of Canny."""
    config = replace(again, conditioning_from="canny", validation_image_as_is=True)
    precompute(config)
    document = json.loads((config.cache / "manifest.json").read_text())
    del document["annotators"]
    write_manifest(config.cache, document)
    assert manifest.load(config.cache).annotators == {}
    before = tars(config)
    encoded.taken()
    precompute(config)
    assert encoded.taken() == {}
    assert tars(config) == before
    assert manifest.load(config.cache).annotators["conditioning"].name == "canny"
    # What they were known by then: the name, and the two thresholds.
    identity = read_expected(config.cache)[0].products["conditioning/conditioning"].identity
    assert identity["drawn_by"] == ["canny", "100 200"]


def test_no_folder_of_this_machine_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.py").write_text("def drawn(image, weights=''):\n    return image\n")
    (tmp_path / "some.bin").write_bytes(b"weights")
    name = f"{tmp_path / 'lines.py'}:drawn"
    annotator = find_annotator(name, [f"weights={tmp_path / 'some.bin'}"])
    digests = DigestCache.in_memory()
    far = annotator_spec(annotator, digests)
    assert (far.name, far.arguments) == ("lines.py:drawn", {"weights": "some.bin"})
    monkeypatch.chdir(tmp_path.parent)
    near = annotator_spec(annotator, digests)
    assert near.name == f"{tmp_path.name}/lines.py:drawn"
    assert near.arguments == {"weights": f"{tmp_path.name}/some.bin"}
    assert near.digest == far.digest


def test_a_folder_counts_by_its_files_and_not_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.py").write_text("def drawn(image, weights=''):\n    return image\n")
    monkeypatch.chdir(tmp_path)

    def digest_of(weights: str) -> str:
        annotator = find_annotator("lines.py:drawn", [f"weights={weights}"])
        return annotator_spec(annotator, DigestCache.in_memory()).digest

    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "a.bin").write_bytes(b"a")
        (tmp_path / name / "b.bin").write_bytes(b"b")
    first = digest_of("one")
    assert first == digest_of("two")
    for name in ("run.log", ".hidden", "__pycache__/a.pyc"):
        (tmp_path / "two" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "two" / name).write_bytes(b"written")
    assert digest_of("two") == first
    (tmp_path / "two" / "b.bin").rename(tmp_path / "two" / "c.bin")
    renamed = digest_of("two")
    (tmp_path / "two" / "c.bin").write_bytes(b"a")
    (tmp_path / "two" / "deep" / "a.bin").write_bytes(b"b")
    swapped = digest_of("two")
    (tmp_path / "two" / "config.json").write_text("{}")
    assert len({first, renamed, swapped, digest_of("two")}) == 4
    # Of the folder that one works in, and of those around it, the name alone counts.
    assert digest_of(".") != digest_of("..") != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning_args": ("radius=2",)}, "--conditioning-args: is for --conditioning-from"),
        ({"validation_image_as_is": True}, "--validation-image-as-is: is for --conditioning-from"),
        (
            {"conditioning_from": "blur", "conditioning_args": ("width=2",)},
            "--conditioning-args width=2: unknown to blur. Known: radius.",
        ),
        (
            {"conditioning_from": "nothing"},
            "--conditioning-from nothing: none of canny, softedge, lineart",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(
    fresh: PrecomputeConfig,
    command: Callable[..., Outcome],
    change: dict[str, Any],
    message: str,
) -> None:
    arguments = flags(fresh)
    for name, value in change.items():
        option = "--" + name.replace("_", "-")
        arguments += [option] if value is True else [option, value if value is str else str(value)]
    arguments = [text.removeprefix("('").removesuffix("',)") for text in arguments]
    done = command("precompute", *arguments)
    assert done.exit_code == 2
    last = done.output.strip().splitlines()[-1]
    assert message in last


def test_another_annotator_is_said_in_words() -> None:
    canny, own = {"drawn_by": ["canny", "100 200"]}, {"drawn_by": ["drawn", "a" * 64, "b" * 32]}
    assert _changes(canny, own) == ["drawn by drawn, was by canny 100 200"]
    assert _changes({"drawn_by": []}, canny) == ["drawn by canny 100 200, was by nobody"]
    edited = {"drawn_by": ["drawn", "c" * 64, "b" * 32]}
    assert _changes(own, edited) == ["drawn draws otherwise: other code, files or weights"]
